"""Load posts from any source in one form."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import datasets
from huggingface_hub.constants import HF_HOME

from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.faults import Faults
from clipcacg.scripts.data.images import locate_image
from clipcacg.scripts.data.labels import with_labels, with_modality_labels
from clipcacg.scripts.data.mvsa import load_mvsa
from clipcacg.scripts.data.splitting import complete_splits, split_mvsa

logger = logging.getLogger(__name__)

SAMPLE_FOLDER = Path(HF_HOME) / "clipcacg" / "sample"
SPLIT_NAMES = {"dev": "validation", "val": "validation", "valid": "validation"}  # other names that data sets use


@dataclass
class DataArguments:
    """Where the posts come from. Without `--data_dir` and `--dataset_name` they are the drawn sample."""

    data_dir: str | None = field(default=None, metadata={"help": "Folder of MVSA-Single or MVSA-Multiple."})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Or: a Hub data set, a folder that datasets.load_dataset reads, a .csv or .jsonl file."},
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images, or of their paths."})
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    label_column: str = field(
        default="label", metadata={"help": "Column of the labels: words, numbers, or lists for several per post."}
    )
    task: Literal["auto", "classification", "regression"] = field(
        default="auto",
        metadata={"help": "What numbers in the label column are. auto: a few whole numbers are classes."},
    )
    text_label_column: str | None = field(
        default=None,
        metadata={"help": "For --dataset_name: column of the texts' own labels, for --use_modality_heads."},
    )
    image_label_column: str | None = field(
        default=None, metadata={"help": "For --dataset_name: column of the images' own labels."}
    )
    use_conflicting_posts: bool = field(
        default=False,
        metadata={"help": "Train the modality heads also on MVSA's posts of a positive and a negative label."},
    )
    splits: str | None = field(
        default="random",
        metadata={"help": "For --data_dir: random (8:1:1), clmlf, cheema:1 to cheema:10, or a JSON file of IDs."},
    )
    split_seed: int = field(default=42, metadata={"help": "Seed of the random split."})
    group_duplicates: bool = field(default=False, metadata={"help": "Keep duplicate posts in one split."})
    on_error: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "For --data_dir: stop at faulty posts, or skip them."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only this many training posts."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use only this many validation posts and this many test posts."}
    )

    def __post_init__(self) -> None:
        if self.data_dir and self.dataset_name:
            raise InputError("--data_dir and --dataset_name both name the data: give one of them.")
        if self.dataset_name and self.splits not in (None, "random"):
            raise InputError(
                f"--splits {self.splits} is for --data_dir alone; {self.dataset_name} keeps its own splits, or is "
                "split at random: leave out --splits."
            )
        if self.dataset_name and self.use_conflicting_posts:
            raise InputError("--use_conflicting_posts is for --data_dir alone: other data keeps the posts it has.")
        if self.dataset_name is None and self.task == "regression":
            raise InputError("--task regression is for --dataset_name alone: the labels of MVSA are classes.")
        if self.dataset_name is None and (self.text_label_column or self.image_label_column):
            raise InputError(
                "--text_label_column and --image_label_column are for --dataset_name alone: MVSA has both labels."
            )

    @property
    def is_sample(self) -> bool:
        return self.data_dir is None and self.dataset_name is None


def load_posts(arguments: DataArguments, modality: str = "both") -> datasets.DatasetDict:
    """Load the posts of any source in one form, and split them if they are not split yet.

    Args:
        arguments (`DataArguments`): the source. With `splits=None` an unsplit data set becomes the test split.
        modality (`str`): "both", "image" or "text": which columns are required.

    Returns:
        `datasets.DatasetDict`: some of the splits train, validation and test, with the columns id, text, image (not
        decoded) and label. The label is a ClassLabel, a list of them, or a float for a regression. Of MVSA, and of a
        data set that names them, also text_label and image_label, with the classes of label; -100 where a post has
        none. Only conflicting posts, which only the training split may hold, have the label -100.

    Raises:
        InputError: a column is missing or the data cannot be read; see `load_mvsa` and `split_mvsa`.
    """
    if arguments.dataset_name is None:
        folder: str | Path | None = arguments.data_dir
        if folder is None:
            from clipcacg.scripts.data.sample import make_sample  # needs tokenizers and models, which posts do not

            folder = make_sample(SAMPLE_FOLDER / "posts")
        keep_conflicting = arguments.use_conflicting_posts and arguments.splits is not None
        dataset = load_mvsa(folder, on_error=arguments.on_error, keep_conflicting=keep_conflicting)
        if arguments.splits is None:
            posts = datasets.DatasetDict(test=dataset)
        else:
            posts = split_mvsa(dataset, arguments.splits, arguments.split_seed, arguments.group_duplicates)
    else:
        posts = _load_any(arguments, arguments.dataset_name, modality)
        if len(posts) == 1 and (arguments.splits is None or "test" in posts):
            posts = datasets.DatasetDict(test=next(iter(posts.values())))
        else:
            posts = complete_splits(posts, arguments.split_seed, arguments.group_duplicates)
    if "image" in next(iter(posts.values())).features:
        posts = posts.cast_column("image", datasets.Image(decode=False))
    return _cap(posts, arguments)


def _load_any(arguments: DataArguments, name: str, modality: str) -> datasets.DatasetDict:
    """Load a data set, and bring its splits and columns to the names and types that `load_posts` returns."""
    posts = _read(name)
    columns = {arguments.label_column: "label"}
    columns |= {arguments.text_column: "text"} if modality != "image" else {}
    columns |= {arguments.image_column: "image"} if modality != "text" else {}
    own_labels = {arguments.text_label_column: "text_label", arguments.image_label_column: "image_label"}
    columns |= {column: label for column, label in own_labels.items() if column}
    first = next(iter(posts.values()))
    missing = [column for column in columns if column not in first.column_names]
    if missing:
        raise InputError(
            f"{name} has no column {', '.join(missing)}; it has {', '.join(first.column_names)}. "
            "Name the right ones with --image_column, --text_column, --label_column, --text_label_column and "
            "--image_label_column."
        )
    posts = posts.select_columns([*columns, *({"id"} & set(first.column_names))]).rename_columns(columns)
    for split, dataset in posts.items():
        if "id" in dataset.column_names:
            dataset = dataset.cast_column("id", datasets.Value("string"))
        else:
            dataset = dataset.add_column("id", [f"{split}-{row}" for row in range(len(dataset))])
        if isinstance(dataset.features.get("image"), datasets.Value):
            dataset = _with_images(dataset, Path(name).expanduser())
        posts[split] = dataset.add_column("row", list(range(1, len(dataset) + 1)))
    faults = Faults(arguments.on_error)
    posts = with_labels(posts, name, arguments.task, faults)
    for column in {"text_label", "image_label"} & set(columns.values()):
        posts = with_modality_labels(posts, column, name, faults)
    return posts.remove_columns("row")


def _read(name: str) -> datasets.DatasetDict:
    """Read a table, a folder or a Hub data set, and keep its splits train, validation and test."""
    path = Path(name).expanduser()
    builder = {".csv": "csv", ".json": "json", ".jsonl": "json"}.get(path.suffix)
    try:
        if builder:
            posts = datasets.load_dataset(builder, data_files=str(path))
        else:
            posts = datasets.load_dataset(name)
    except (datasets.exceptions.DatasetGenerationError, OSError, StopIteration, ValueError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0] or "it is empty"
        raise InputError(f"{name} cannot be read as a data set: {reason}") from error
    posts = datasets.DatasetDict({SPLIT_NAMES.get(split, split): dataset for split, dataset in posts.items()})
    for split in posts.keys() - {"train", "validation", "test"}:
        logger.warning("the split %s of %s is not used", split, name)
        del posts[split]
    if not posts:
        raise InputError(f"{name} has none of the splits train, validation and test.")
    return posts


def _with_images(dataset: datasets.Dataset, source: Path) -> datasets.Dataset:
    """Turn a column of paths, relative to the folder or the table that names them, into images."""
    folder = source if source.is_dir() else source.parent
    paths = [locate_image(path, folder) for path in dataset["image"][:]]
    if None in paths:
        raise InputError(f"row {paths.index(None) + 1} of {source} names no image.")
    dataset = dataset.remove_columns("image").add_column("image", paths)
    return dataset.cast_column("image", datasets.Image(decode=False))


def _cap(posts: datasets.DatasetDict, arguments: DataArguments) -> datasets.DatasetDict:
    """Keep a random part of each split if its size is limited."""
    for split, dataset in posts.items():
        flag = "max_train_samples" if split == "train" else "max_eval_samples"
        limit = getattr(arguments, flag)
        if limit is not None and limit < 1:
            raise InputError(f"--{flag} must be at least 1, got {limit}.")
        if limit is not None and limit < len(dataset):
            posts[split] = dataset.shuffle(seed=arguments.split_seed).select(range(limit))
    return posts
