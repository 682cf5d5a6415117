"""Load posts from any source in one form."""

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
from huggingface_hub.constants import HF_HOME

from clipcacg.scripts.data.mvsa import load_mvsa, split_mvsa
from clipcacg.scripts.data.sample import make_sample

logger = logging.getLogger(__name__)

SAMPLE_FOLDER = Path(HF_HOME) / "clipcacg" / "sample"  # beside what the Hub's libraries cache
SPLIT_NAMES = {"dev": "validation", "val": "validation", "valid": "validation"}  # as data sets also call them


@contextmanager
def one_sentence() -> Iterator[None]:
    """End a script whose input is at fault with what is wrong, and not with a traceback."""
    try:
        yield
    except (FloatingPointError, OSError, ValueError) as error:
        message = str(error)
        if message.startswith("Caught ") and "DataLoader worker" in message:
            # A worker process sends its traceback, of which the last line is "ValueError: what is wrong".
            message = message.rstrip().rpartition("\n")[2].partition(": ")[2]
        logger.debug("where it happened", exc_info=True)
        sys.exit(f"{Path(sys.argv[0]).name}: {message}")


@dataclass
class DataArguments:
    """Where the posts come from. Without `--data_dir` and `--dataset_name` they are the drawn sample."""

    data_dir: str | None = field(default=None, metadata={"help": "Folder of MVSA-Single or MVSA-Multiple."})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Or: a Hub data set, a folder that datasets.load_dataset reads, a .csv or .jsonl file."},
    )
    image_column: str = field(default="image", metadata={"help": "Column of the pictures, or of their paths."})
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels; floats mean a regression."})
    splits: str | None = field(
        default="random",
        metadata={"help": "For --data_dir: random (8:1:1), clmlf, cheema:1 to cheema:10, or a JSON file of IDs."},
    )
    split_seed: int = field(default=42, metadata={"help": "Seed of a random split."})
    group_duplicates: bool = field(default=False, metadata={"help": "Keep duplicate posts in one split."})
    on_error: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "raise, or skip to leave faulty posts out."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on that many posts only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Validate and test on that many posts only."})

    def __post_init__(self) -> None:
        if self.data_dir and self.dataset_name:
            raise ValueError("--data_dir and --dataset_name both name the data: give one of them.")

    @property
    def is_sample(self) -> bool:
        return self.data_dir is None and self.dataset_name is None


def load_posts(arguments: DataArguments, modality: str = "both") -> datasets.DatasetDict:
    """Load posts in the form that everything here expects.

    Args:
        arguments: Where from. `splits=None` takes what comes in one piece as the test split, whole.
        modality: "both", "image" or "text": which columns are needed.

    Returns:
        Some of the splits train, validation and test, with the columns id, text, image (not decoded) and label: a
        ClassLabel, or floats for a regression.

    Raises:
        ValueError: If a column is missing, or the data cannot be read; see `mvsa.load_mvsa` for MVSA.
    """
    if arguments.dataset_name is None:
        folder = arguments.data_dir or make_sample(SAMPLE_FOLDER / "posts")
        dataset = load_mvsa(folder, on_error=arguments.on_error)
        if arguments.splits is None:
            posts = datasets.DatasetDict(test=dataset)
        else:
            posts = split_mvsa(dataset, arguments.splits, arguments.split_seed, arguments.group_duplicates)
    else:
        posts = complete_splits(load_any(arguments, modality), arguments)
    if "image" in next(iter(posts.values())).features:
        posts = posts.cast_column("image", datasets.Image(decode=False))
    return cap(posts, arguments)


def load_any(arguments: DataArguments, modality: str) -> datasets.DatasetDict:
    """Load `--dataset_name` and bring its columns to the names and types we use."""
    path = Path(arguments.dataset_name).expanduser()
    builder = {".csv": "csv", ".json": "json", ".jsonl": "json"}.get(path.suffix)
    try:
        if builder:
            posts = datasets.load_dataset(builder, data_files=str(path))
        else:
            posts = datasets.load_dataset(arguments.dataset_name)
    except (datasets.exceptions.DatasetGenerationError, StopIteration, ValueError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0] or "it is empty"
        raise ValueError(f"{arguments.dataset_name} cannot be read as a table: {reason}") from error
    posts = datasets.DatasetDict({SPLIT_NAMES.get(name, name): dataset for name, dataset in posts.items()})
    for split in posts.keys() - {"train", "validation", "test"}:
        logger.warning("the split %s of %s is not used", split, arguments.dataset_name)
        del posts[split]
    if not posts:
        raise ValueError(f"{arguments.dataset_name} has none of the splits train, validation and test.")
    wanted = {arguments.label_column: "label"}
    wanted |= {arguments.text_column: "text"} if modality != "image" else {}
    wanted |= {arguments.image_column: "image"} if modality != "text" else {}
    first = next(iter(posts.values()))
    missing = [name for name in wanted if name not in first.column_names]
    if missing:
        raise ValueError(
            f"{arguments.dataset_name} has no column {', '.join(missing)}; it has {', '.join(first.column_names)}. "
            "Name the right ones with --image_column, --text_column and --label_column."
        )
    posts = posts.select_columns([*wanted, *(["id"] if "id" in first.column_names else [])]).rename_columns(wanted)
    for split in posts:
        if "id" in posts[split].column_names:
            posts[split] = posts[split].cast_column("id", datasets.Value("string"))
        else:
            posts[split] = posts[split].add_column("id", [f"{split}-{row}" for row in range(len(posts[split]))])
        if isinstance(posts[split].features.get("image"), datasets.Value):
            posts[split] = with_pictures(posts[split], path if path.is_dir() else path.parent)
    return with_labels(posts)


def with_pictures(dataset: datasets.Dataset, folder: Path) -> datasets.Dataset:
    """Turn a column of paths, relative to the file that names them, into pictures."""
    paths = [locate_picture(path, folder) for path in dataset["image"]]
    if None in paths:
        raise ValueError(f"Row {paths.index(None) + 1} names no picture.")
    dataset = dataset.remove_columns("image").add_column("image", paths)
    return dataset.cast_column("image", datasets.Image(decode=False))


def locate_picture(name: Any, folder: Path) -> str | None:
    """The path of a picture that a file in `folder` names; a URL stays as it is, and what is no text is None."""
    if not isinstance(name, str):
        return None
    return name if "://" in name else str(folder / name)


def with_labels(posts: datasets.DatasetDict) -> datasets.DatasetDict:
    """Give labels that are words or bare integers the same ClassLabel in every split; floats stay."""
    label = next(iter(posts.values())).features["label"]
    if isinstance(label, datasets.ClassLabel):
        return without_hidden_labels(posts)
    if label.dtype.startswith("float"):
        return posts
    values = {value for dataset in posts.values() for value in dataset.unique("label")}
    if None in values:
        raise ValueError("There are posts without a label: leave them out, or give them one.")
    values = sorted(values)
    if isinstance(values[0], bool):
        posts = posts.cast_column("label", datasets.Value("int8"))
        values = [int(value) for value in values]
    classes = datasets.ClassLabel(names=[str(value) for value in values])
    return datasets.DatasetDict(
        {
            split: dataset.cast_column("label", datasets.Value("string")).cast_column("label", classes)
            for split, dataset in posts.items()
        }
    )


def without_hidden_labels(posts: datasets.DatasetDict) -> datasets.DatasetDict:
    """Leave out a test split whose labels are kept back, which benchmarks on the Hub mark by -1.

    Raises:
        ValueError: If posts of another split, or all posts, have no label.
    """
    hidden = [split for split, dataset in posts.items() if {None, -1} & set(dataset.unique("label"))]
    if not hidden:
        return posts
    if hidden != ["test"] or len(posts) == 1:
        raise ValueError(f"The split {hidden[0]} has posts without a label: leave them out, or give them one.")
    logger.warning("the labels of the split test are kept back, and it is left out")
    return datasets.DatasetDict({split: dataset for split, dataset in posts.items() if split != "test"})


def complete_splits(posts: datasets.DatasetDict, arguments: DataArguments) -> datasets.DatasetDict:
    """Split 8:1:1 what came in one piece, and take a ninth of training for a missing validation split."""
    label = next(iter(posts.values())).features["label"]
    stratify = "label" if isinstance(label, datasets.ClassLabel) else None
    settings = {"seed": arguments.split_seed, "stratify_by_column": stratify}
    if len(posts) == 1 and (arguments.splits is None or "test" in posts):
        return datasets.DatasetDict(test=next(iter(posts.values())))
    if len(posts) == 1:
        pieces = next(iter(posts.values())).train_test_split(test_size=0.1, **settings)
        posts = datasets.DatasetDict(train=pieces["train"], test=pieces["test"])
    if "validation" not in posts and "train" in posts:
        pieces = posts["train"].train_test_split(test_size=1 / 9, **settings)
        posts = datasets.DatasetDict(posts, train=pieces["train"], validation=pieces["test"])
    return posts


def cap(posts: datasets.DatasetDict, arguments: DataArguments) -> datasets.DatasetDict:
    """Keep a random part of each split where a cap is set."""
    for split, dataset in posts.items():
        limit = arguments.max_train_samples if split == "train" else arguments.max_eval_samples
        if limit is not None and limit < 1:
            raise ValueError(f"A cap of {limit} leaves no posts: it must be at least 1.")
        if limit is not None and limit < len(dataset):
            posts[split] = dataset.shuffle(seed=arguments.split_seed).select(range(limit))
    return posts


def label_names(posts: datasets.DatasetDict) -> list[str] | None:
    """Names of the classes in index order, or None for a regression."""
    label = next(iter(posts.values())).features["label"]
    return label.names if isinstance(label, datasets.ClassLabel) else None


def picture(value: Any) -> Any:
    """A picture column's value as the processor takes it: a path, or a file of the bytes that Parquet holds.

    Raises:
        ValueError: If a post has none.
    """
    if value is None:
        raise ValueError("There is a post without a picture: leave it out, or give it one.")
    if not isinstance(value, dict):
        return value
    if value["bytes"] is None:
        return value["path"]
    file = io.BytesIO(value["bytes"])
    file.name = value["path"] or "A picture"
    return file
