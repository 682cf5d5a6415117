"""Make a small sample to train on, posts and backbones, from nothing but a seed."""

from clipcacg.scripts.data.sample import main

if __name__ == "__main__":
    main()
