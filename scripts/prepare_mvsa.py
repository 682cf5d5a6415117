"""Turn an MVSA folder into a Parquet data set that `datasets.load_dataset` reads with no code of ours.

    python scripts/prepare_mvsa.py DATA_DIR OUTPUT_FOLDER [--splits clmlf] [--push_to_hub USER/NAME]

Writes OUTPUT_FOLDER/data/*.parquet, pictures included, and a data set card that holds splits and features. Pushing
makes a private data set unless `--public` is given: tweets belong to their authors, and are not ours to republish.
"""

import logging
import math
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import datasets
import pyarrow.parquet as pq
from datasets.info import DatasetInfosDict
from datasets.table import embed_table_storage
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from transformers import HfArgumentParser

from clipcacg.scripts.data.mvsa import LABELS, MvsaDataError, load_mvsa, split_mvsa

logger = logging.getLogger(__name__)

SHARD_BYTES = 500_000_000  # of pictures in one Parquet file
BATCH_ROWS = 100  # rows in memory at a time, and in a row group
UNFINISHED = ".unfinished"
CARD_TAG = "prepared-mvsa"  # tells an earlier output, which may be replaced, from any other folder

CARD = """---
{metadata}
---

# MVSA-{variant}

Posts from Twitter with a text and a picture, and their sentiment (Niu et al., 2016), written as Parquet by
`prepare_mvsa.py` of CLIP-CA-CG.

{counts}

`label` combines `text_label` and `image_label`: equal labels stand, a neutral one gives way to the other, and posts
with positive against negative are left out. In MVSA-Multiple each of the two is the majority of three annotators.
Split: {splits}, duplicates {duplicates}.

```python
from datasets import load_dataset

posts = load_dataset("PATH OR NAME OF THIS DATA SET")
```

The texts and pictures belong to their authors, and MVSA is handed out for research: keep copies private.

T. Niu, S. Zhu, L. Pang, A. El Saddik: Sentiment Analysis on Multi-View Social Data. MultiMedia Modeling (MMM), 2016.
"""


@dataclass
class PrepareArguments:
    """How to read, split and share the posts."""

    variant: str | None = field(default=None, metadata={"help": "single or multiple; default: told from the labels"})
    splits: str = field(default="random", metadata={"help": "random, clmlf, cheema:K or a JSON file of IDs"})
    seed: int = field(default=42, metadata={"help": "seed of the random split"})
    group_duplicates: bool = field(default=False, metadata={"help": "keep posts that share text or picture together"})
    on_error: Literal["raise", "skip"] = field(default="raise", metadata={"help": "skip leaves faulty posts out"})
    max_samples: int | None = field(default=None, metadata={"help": "keep this many posts of each split"})
    push_to_hub: str | None = field(default=None, metadata={"help": "upload to this data set, USER/NAME"})
    public: bool = field(default=False, metadata={"help": "allow the uploaded data set to be public"})


def claim_folder(folder: Path) -> Path:
    """Make a place to write in, inside a folder that is new, empty or an earlier output.

    Args:
        folder: where the data set is to end up.

    Returns:
        `folder/.unfinished`, empty; an earlier output stays whole until the new one is complete.

    Raises:
        FileExistsError: the folder holds something that this script has not written.
    """
    present = {path.name for path in folder.iterdir()} - {UNFINISHED} if folder.exists() else set()
    card = folder / "README.md"
    ours = card.is_file() and CARD_TAG in card.read_text(encoding="utf-8", errors="replace")
    ours = ours and present <= {"README.md", "data"} and all(p.suffix == ".parquet" for p in folder.glob("data/*"))
    if present and not ours:
        raise FileExistsError(f"{folder} is neither empty nor an earlier output of prepare_mvsa.py: nothing written")
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    (folder / UNFINISHED / "data").mkdir(parents=True)
    return folder / UNFINISHED


def write_split(split: str, dataset: datasets.Dataset, folder: Path) -> dict[str, str | int]:
    """Write a split as Parquet files of about SHARD_BYTES each, and return what the card says of its size."""
    pictures = dataset.cast_column("image", datasets.Image(decode=False))["image"]
    total = sum(Path(picture["path"]).stat().st_size for picture in pictures)
    shards = min(math.ceil(total / SHARD_BYTES), len(dataset))
    size = 0
    for index in range(shards):
        path = folder / "data" / f"{split}-{index:05d}-of-{shards:05d}.parquet"
        size += write_shard(dataset.shard(shards, index), path)
    return {"name": split, "num_bytes": size, "num_examples": len(dataset)}


def write_shard(dataset: datasets.Dataset, path: Path) -> int:
    """Write one Parquet file, with the pictures of a few rows in memory at a time; returns the bytes written to it."""
    size = 0
    with pq.ParquetWriter(path, dataset.features.arrow_schema) as writer:
        for table in dataset.with_format("arrow").iter(BATCH_ROWS):
            table = embed_table_storage(table)
            writer.write_table(table)
            size += table.nbytes
    return size


def make_card(posts: datasets.DatasetDict, sizes: list[dict], arguments: PrepareArguments) -> DatasetCard:
    """Describe the data set: files, features and sizes for `load_dataset`, the rest for people."""
    source = next(iter(posts.values())).info
    variant = source.config_name.title()
    files = [{"split": split, "path": f"data/{split}-*"} for split in posts]
    tags = ["sentiment-analysis", "multimodal", CARD_TAG]
    metadata = DatasetCardData(pretty_name=f"MVSA-{variant}", language="en", license="other", tags=tags)
    metadata["configs"] = [{"config_name": "default", "data_files": files}]
    info = datasets.DatasetInfo(features=source.features, splits=sizes)
    DatasetInfosDict({"default": info}).to_dataset_card_data(metadata)
    content = CARD.format(
        metadata=metadata.to_yaml(),
        variant=variant,
        counts=table_of_counts(posts),
        splits=f"random, seed {arguments.seed}" if arguments.splits == "random" else Path(arguments.splits).name,
        duplicates="kept in one split" if arguments.group_duplicates else "not looked for",
    )
    return DatasetCard(content)


def table_of_counts(posts: datasets.DatasetDict) -> str:
    """Count the posts of each label and split, as a Markdown table."""
    rows = [["split", *LABELS, "posts"], ["---"] * (len(LABELS) + 2)]
    for split, dataset in posts.items():
        counts = Counter(dataset["label"])
        rows.append([split, *(str(counts[label]) for label in range(len(LABELS))), str(len(dataset))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def finish(folder: Path) -> None:
    """Move a complete output to its place; the card goes first, so that a broken-off move is recognised as ours."""
    (folder / UNFINISHED / "README.md").replace(folder / "README.md")
    shutil.rmtree(folder / "data", ignore_errors=True)
    (folder / UNFINISHED / "data").rename(folder / "data")
    (folder / UNFINISHED).rmdir()


def push(folder: Path, name: str, public: bool) -> None:
    """Upload the folder to the Hub.

    Args:
        folder: a finished output.
        name: USER/NAME; made if it does not exist.
        public: allow the data set to be public.

    Raises:
        MvsaDataError: the data set exists, is public, and `public` is not given. Asking for a private one does not
            change one that exists.
    """
    api = HfApi()
    name = api.create_repo(name, repo_type="dataset", private=not public, exist_ok=True).repo_id
    if not public and not api.repo_info(name, repo_type="dataset").private:
        raise MvsaDataError(f"{name} is public, so nothing is uploaded: make it private, or pass --public")
    files = ["README.md", "data/*.parquet"]
    # An earlier upload may have had more files, which would be read as part of this one.
    api.upload_folder(
        repo_id=name, repo_type="dataset", folder_path=folder, allow_patterns=files, delete_patterns=files
    )
    logger.info("uploaded to %s", name)


def prepare(data_dir: str, folder: Path, arguments: PrepareArguments) -> None:
    """Read, split, write and, if asked to, upload."""
    if arguments.max_samples is not None and arguments.max_samples < 1:
        raise MvsaDataError(f"--max_samples must be at least 1, not {arguments.max_samples}")
    posts = load_mvsa(data_dir, arguments.variant, arguments.on_error)
    posts = split_mvsa(posts, arguments.splits, arguments.seed, arguments.group_duplicates)
    if (limit := arguments.max_samples) is not None:
        posts = datasets.DatasetDict({k: d.select(range(min(len(d), limit))) for k, d in posts.items()})
    unfinished = claim_folder(folder)
    sizes = [write_split(split, dataset, unfinished) for split, dataset in posts.items()]
    make_card(posts, sizes, arguments).save(unfinished / "README.md")
    finish(folder)
    logger.info("wrote %s posts to %s", {split: len(dataset) for split, dataset in posts.items()}, folder)
    if arguments.push_to_hub:
        push(folder, arguments.push_to_hub, arguments.public)


def main() -> None:
    """Read the command line; what is wrong with the folders is said in a sentence, without a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    parser = HfArgumentParser(PrepareArguments, description=__doc__.split("\n")[0])
    parser.add_argument("data_dir", metavar="DATA_DIR", help="MVSA folder: labelResultAll.txt and data/")
    parser.add_argument("output_folder", metavar="OUTPUT_FOLDER", type=Path, help="new, empty or an earlier output")
    arguments, folders = parser.parse_args_into_dataclasses()
    try:
        prepare(folders.data_dir, folders.output_folder, arguments)
    except (MvsaDataError, OSError) as error:
        sys.exit(f"prepare_mvsa.py: {error}")


if __name__ == "__main__":
    main()
