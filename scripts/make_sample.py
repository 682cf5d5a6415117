"""Make the sample, a small data set with tiny encoders to train on, from a seed.

    python scripts/make_sample.py FOLDER

Writes FOLDER/posts, drawn images and templated tweets in the layout of MVSA-Single, and FOLDER/backbones, tiny random
encoders as ordinary Hugging Face folders.
"""

import argparse
from pathlib import Path

from clipcacg.scripts.data.errors import add_debug_flag, one_sentence
from clipcacg.scripts.data.sample import make_sample, make_tiny_backbones


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="gets posts/ and backbones/")
    parser.add_argument("--num_posts", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    add_debug_flag(parser)
    arguments = parser.parse_args(argv)
    with one_sentence(argv):
        print(make_sample(arguments.folder / "posts", arguments.num_posts, arguments.seed))
        print(make_tiny_backbones(arguments.folder / "backbones", arguments.seed))


if __name__ == "__main__":
    main()
