"""Turn an MVSA folder into a Parquet data set that `datasets.load_dataset` reads without our code.

    python scripts/prepare_mvsa.py DATA_DIR OUTPUT_FOLDER [--splits clmlf] [--push_to_hub USER/NAME]

Writes OUTPUT_FOLDER/data/*.parquet, images included, and a data set card with splits and features. An upload is
private unless `--public` is given: the tweets belong to their authors.
"""

from pathlib import Path

from transformers import HfArgumentParser

from clipcacg.scripts.data.errors import add_debug_flag, one_sentence, parse_flags, set_up_logging
from clipcacg.scripts.data.parquet import PrepareArguments, prepare


def main(argv: list[str] | None = None) -> None:
    set_up_logging()
    with one_sentence(argv):
        parser = HfArgumentParser(PrepareArguments, description=__doc__.split("\n")[0])
        parser.add_argument("data_dir", metavar="DATA_DIR", help="MVSA folder: labelResultAll.txt and data/")
        parser.add_argument(
            "output_folder", metavar="OUTPUT_FOLDER", type=Path, help="new, empty or an earlier output"
        )
        add_debug_flag(parser)
        arguments, rest = parse_flags(parser, argv)
        prepare(rest.data_dir, rest.output_folder, arguments)


if __name__ == "__main__":
    main()
