"""Write MVSA as a Parquet data set that `datasets.load_dataset` reads without our code, and upload it."""

import logging
import math
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow.parquet as pq
from datasets.info import DatasetInfosDict
from datasets.table import embed_table_storage
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import httpx
from tabulate import tabulate

from clipcacg.scripts.data.errors import InputError, as_input_error
from clipcacg.scripts.data.mvsa import LABELS, load_mvsa
from clipcacg.scripts.data.splitting import split_mvsa

logger = logging.getLogger(__name__)

SHARD_BYTES = 500_000_000  # of images in one Parquet file
BATCH_ROWS = 100  # rows in memory at a time, and in a row group
UNFINISHED = ".unfinished"
CARD_TAG = "prepared-mvsa"  # marks an earlier output, which may be replaced

CARD = """---
{metadata}
---

# MVSA-{variant}

Twitter posts with a text, an image and their sentiment (Niu et al., 2016), written as Parquet by `prepare_mvsa.py` of
CLIP-CA-CG.

{counts}

`label` combines `text_label` and `image_label`. Neutral and another label give the other label; a positive with a
negative label drops the post. In MVSA-Multiple each of the two labels is the majority of three annotators.
Split: {splits}, duplicates {duplicates}.

```python
from datasets import load_dataset

posts = load_dataset("PATH OR NAME OF THIS DATA SET")
```

The texts and images belong to their authors, and MVSA is distributed for research: keep copies private.

T. Niu, S. Zhu, L. Pang, A. El Saddik: Sentiment Analysis on Multi-View Social Data. MultiMedia Modeling (MMM), 2016.
"""


@dataclass
class PrepareArguments:
    """How to read, split and share the posts."""

    variant: Literal["single", "multiple"] | None = field(
        default=None, metadata={"help": "default: inferred from the label file"}
    )
    splits: str = field(default="random", metadata={"help": "random, clmlf, cheema:K or a JSON file of IDs"})
    seed: int = field(default=42, metadata={"help": "seed of the random split"})
    group_duplicates: bool = field(default=False, metadata={"help": "keep posts that share text or image together"})
    on_error: Literal["raise", "skip"] = field(default="raise", metadata={"help": "skip leaves faulty posts out"})
    max_samples: int | None = field(default=None, metadata={"help": "keep this many posts of each split"})
    push_to_hub: str | None = field(default=None, metadata={"help": "upload to this data set, USER/NAME"})
    public: bool = field(default=False, metadata={"help": "allow the uploaded data set to be public"})


def prepare(data_dir: str, folder: Path, arguments: PrepareArguments) -> None:
    """Read an MVSA folder, split it, write it to `folder` and, if asked to, upload it.

    Raises:
        InputError: the posts or splits are faulty, or `folder` holds something that this function did not write.
    """
    limit = arguments.max_samples
    if limit is not None and limit < 1:
        raise InputError(f"--max_samples must be at least 1, got {limit}")
    dataset = load_mvsa(data_dir, arguments.variant, arguments.on_error)
    posts = split_mvsa(dataset, arguments.splits, arguments.seed, arguments.group_duplicates)
    if limit is not None:
        posts = datasets.DatasetDict({split: part.take(min(len(part), limit)) for split, part in posts.items()})
    with as_input_error(f"{folder} cannot be written", OSError):
        unfinished = _claim_folder(folder)
        sizes = [_write_split(split, part, unfinished) for split, part in posts.items()]
        _make_card(posts, sizes, arguments).save(unfinished / "README.md")
        _finish(folder)
    logger.info("wrote %s posts to %s", {split: len(part) for split, part in posts.items()}, folder)
    if arguments.push_to_hub:
        _push(folder, arguments.push_to_hub, arguments.public)


def _claim_folder(folder: Path) -> Path:
    """Make the empty `folder/.unfinished` in a folder that is new, empty or an earlier output.

    An earlier output stays whole until the new one is complete.
    """
    present = {path.name for path in folder.iterdir()} - {UNFINISHED} if folder.exists() else set()
    card = folder / "README.md"
    ours = card.is_file() and CARD_TAG in card.read_text(encoding="utf-8", errors="replace")
    ours = ours and present <= {"README.md", "data"} and all(p.suffix == ".parquet" for p in folder.glob("data/*"))
    if present and not ours:
        raise InputError(f"{folder} is neither empty nor an earlier output of prepare_mvsa.py: nothing written")
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    (folder / UNFINISHED / "data").mkdir(parents=True)
    return folder / UNFINISHED


def _write_split(split: str, dataset: datasets.Dataset, folder: Path) -> dict[str, Any]:
    """Write a split as Parquet files of about SHARD_BYTES each, and return its size for the card."""
    images = dataset.cast_column("image", datasets.Image(decode=False))["image"][:]
    total = sum(Path(image["path"]).stat().st_size for image in images)
    shards = min(math.ceil(total / SHARD_BYTES), len(dataset))
    size = 0
    for index in range(shards):
        shard = dataset.shard(shards, index)
        path = folder / "data" / f"{split}-{index:05d}-of-{shards:05d}.parquet"
        with pq.ParquetWriter(path, dataset.features.arrow_schema) as writer:
            for table in shard.with_format("arrow").iter(BATCH_ROWS):
                table = embed_table_storage(table)
                writer.write_table(table)
                size += table.nbytes
    return {"name": split, "num_bytes": size, "num_examples": len(dataset)}


def _make_card(posts: datasets.DatasetDict, sizes: list[dict[str, Any]], arguments: PrepareArguments) -> DatasetCard:
    """Describe the data set: files, features and sizes for `load_dataset`, the rest for people."""
    source = next(iter(posts.values())).info
    variant = source.config_name.title()
    files = [{"split": split, "path": f"data/{split}-*"} for split in posts]
    tags = ["sentiment-analysis", "multimodal", CARD_TAG]
    metadata = DatasetCardData(pretty_name=f"MVSA-{variant}", language="en", license="other", tags=tags)
    metadata["configs"] = [{"config_name": "default", "data_files": files}]
    info = datasets.DatasetInfo(features=source.features, splits=sizes)
    DatasetInfosDict({"default": info}).to_dataset_card_data(metadata)
    labels = {split: Counter(part["label"][:]) for split, part in posts.items()}
    counts = [
        {"split": split, **{name: found[index] for index, name in enumerate(LABELS)}, "posts": found.total()}
        for split, found in labels.items()
    ]
    content = CARD.format(
        metadata=metadata.to_yaml(),
        variant=variant,
        counts=tabulate(counts, headers="keys", tablefmt="github"),
        splits=f"random, seed {arguments.seed}" if arguments.splits == "random" else Path(arguments.splits).name,
        duplicates="kept in one split" if arguments.group_duplicates else "not looked for",
    )
    return DatasetCard(content)


def _finish(folder: Path) -> None:
    """Move a complete output to its place. The card goes first: it marks an interrupted move as our output."""
    (folder / UNFINISHED / "README.md").replace(folder / "README.md")
    shutil.rmtree(folder / "data", ignore_errors=True)
    (folder / UNFINISHED / "data").rename(folder / "data")
    (folder / UNFINISHED).rmdir()


def _push(folder: Path, name: str, public: bool) -> None:
    """Upload a finished output to the data set `name` on the Hub, which is made private unless `public`.

    Raises:
        InputError: the Hub cannot be reached or refuses; or the data set exists and is public, which needs `public`:
            `create_repo` does not change it.
    """
    api = HfApi()
    hub_errors = (httpx.HTTPError, HFValidationError, OSError)
    with as_input_error(f"{folder} is complete, but the upload to {name} failed", *hub_errors):
        name = api.create_repo(name, repo_type="dataset", private=not public, exist_ok=True).repo_id
        if not public and not api.repo_info(name, repo_type="dataset").private:
            raise InputError(f"{name} is public, so nothing is uploaded: make it private, or pass --public")
        files = ["README.md", "data/*.parquet"]
        # An earlier upload may have had more files, which would be read as part of this one.
        api.upload_folder(
            repo_id=name, repo_type="dataset", folder_path=folder, allow_patterns=files, delete_patterns=files
        )
    logger.info("uploaded to %s", name)
