"""Posts: read MVSA or any other data set, split it, and turn rows into batches."""

from clipcacg.scripts.data.loading import load_posts
from clipcacg.scripts.data.mvsa import load_mvsa
from clipcacg.scripts.data.splitting import split_mvsa

__all__ = ["load_mvsa", "load_posts", "split_mvsa"]
