"""Load posts from any source in one form."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
from huggingface_hub.constants import HF_HOME

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.scripts.data.checks import bad_posts
from clipcacg.scripts.data.columns import Columns, as_posts, in_memory, stream_posts
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.faults import Faults
from clipcacg.scripts.data.labels import with_labels, with_modality_labels
from clipcacg.scripts.data.lines import short_hash
from clipcacg.scripts.data.mending import Reasons
from clipcacg.scripts.data.mvsa import load_mvsa, read_folder
from clipcacg.scripts.data.sources import column_names, numbered, read_source, reading, shard_names, state_of
from clipcacg.scripts.data.splitting import complete_splits, split_mvsa
from clipcacg.scripts.data.streaming import BUFFER, PostStream

logger = logging.getLogger(__name__)

SAMPLE_FOLDER = Path(HF_HOME) / "clipcacg" / "sample"
SHARD_POSTS = 1000  # in one shard of a folder of images and texts
# Flags that say how to read a data set; MVSA has one form.
OF_DATA_SETS = (
    "image_column", "text_column", "dataset_config", "train_split", "validation_split", "test_split", "streaming",
)  # fmt: skip


@dataclass
class ColumnArguments:
    """How to read a data set, a folder or a table: which of its parts to use, and what to do with bad rows."""

    image_column: str | None = field(
        default=None,
        metadata={"help": "Column of the images: paths, URLs, bytes or base64; default: the checkpoint's, or image."},
    )
    text_column: list[str] | None = field(
        default=None,
        metadata={"help": "Column of the texts, or several to join; default: the checkpoint's, or text."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Config of a data set that has several."})
    train_split: str | None = field(default=None, metadata={"help": "Name of the training split in the data set."})
    validation_split: str | None = field(default=None, metadata={"help": "Name of its validation split."})
    test_split: str | None = field(default=None, metadata={"help": "Name of its test split."})
    streaming: bool = field(
        default=False, metadata={"help": "Read rows one after the other, without a copy on this disk."}
    )
    on_error: Literal["raise", "skip"] = field(
        default="raise",
        metadata={"help": "Stop at rows that cannot be read, or leave them out, up to a tenth of all rows."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.text_column, str):
            self.text_column = [self.text_column]

    def own_splits(self) -> dict[str, str]:
        """Our name of each split for which a flag gives the data set's own."""
        names = {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}
        return {ours: own for ours, own in names.items() if own}


@dataclass
class DataArguments(ColumnArguments):
    """Where the posts come from. Without `--data_dir` and `--dataset_name` they are the drawn sample."""

    data_dir: str | None = field(default=None, metadata={"help": "Folder of MVSA-Single or MVSA-Multiple."})
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Or: a table (.csv, .tsv, .json, .jsonl, .parquet, .arrow), a folder of such tables or of images, "
            "or a Hub data set."
        },
    )
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
        metadata={"help": "Also train the modality heads on posts with opposite labels (positive, negative)."},
    )
    splits: str | None = field(
        default="random",
        metadata={"help": "For --data_dir: random (8:1:1), clmlf, cheema:1 to cheema:10, or a JSON file of IDs."},
    )
    split_seed: int = field(default=42, metadata={"help": "Seed of the random split."})
    group_duplicates: bool = field(default=False, metadata={"help": "Keep duplicate posts in one split."})
    shuffle_buffer: int | None = field(
        default=None,
        metadata={"help": f"With --streaming: draw the next training post among this many rows; default: {BUFFER}."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only this many training posts."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use only this many validation posts and this many test posts."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag in OF_DATA_SETS:
            if getattr(self, flag) and not self.dataset_name:
                raise InputError(f"--{flag} is for --dataset_name alone: leave it out, or name a data set.")
        if self.shuffle_buffer is not None and not self.streaming:
            raise InputError("--shuffle_buffer is for --streaming alone: other posts are all shuffled.")
        if self.shuffle_buffer is not None and self.shuffle_buffer < 0:
            raise InputError(f"--shuffle_buffer must be at least 0, got {self.shuffle_buffer}.")
        if self.streaming and self.group_duplicates:
            raise InputError("--group_duplicates compares all posts, which --streaming does not keep: choose one.")
        for flag in ("max_train_samples", "max_eval_samples"):
            limit = getattr(self, flag)
            if limit is not None and limit < 1:
                raise InputError(f"--{flag} must be at least 1, got {limit}.")
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


def load_posts(
    arguments: DataArguments,
    modality: str = "both",
    remembered: ClipCaCgConfig | None = None,
    faults: Faults | None = None,
    may_lack: bool = False,
) -> datasets.DatasetDict:
    """Load the posts of any source in one form, and split them if they are not split yet.

    Args:
        arguments (`DataArguments`): the source. With `splits=None` an unsplit data set becomes the test split. Its
            `text_column` and `image_column` are set to those that were read.
        modality (`str`): "both", "image" or "text": which columns are required.
        remembered (`ClipCaCgConfig`, *optional*): config of a checkpoint, whose columns are read if no flag says
            otherwise.
        faults (`Faults`, *optional*): takes the rows that `on_error="skip"` leaves out.
        may_lack (`bool`): accept posts that have a text and no image, for a model with `modality_dropout`.

    Returns:
        `datasets.DatasetDict`: some of the splits train, validation and test, with the columns id, text, image (not
        decoded) and label. The label is a ClassLabel, a list of them, or a float for a regression. Of MVSA, and of a
        data set that names them, also text_label and image_label, with the classes of label; -100 where a post has
        none. Only conflicting posts, which only the training split may hold, have the label -100.

        With `streaming`, the training split has no text and no image (see `training_stream`), the others lie in
        memory, and an unsplit source has no other split.

    Raises:
        InputError: a column is missing, the data cannot be read or a row is bad; see `load_mvsa` and `split_mvsa`.
    """
    faults = Faults(arguments.on_error) if faults is None else faults
    if arguments.dataset_name is None:
        folder: str | Path | None = arguments.data_dir
        if folder is None:
            from clipcacg.scripts.data.sample import make_sample  # needs tokenizers and models, which posts do not

            folder = make_sample(SAMPLE_FOLDER / "posts")
        keep_conflicting = arguments.use_conflicting_posts and arguments.splits is not None
        dataset = load_mvsa(folder, None, arguments.on_error, keep_conflicting, faults)
        if arguments.splits is None:
            posts = datasets.DatasetDict(test=dataset)
        else:
            posts = split_mvsa(dataset, arguments.splits, arguments.split_seed, arguments.group_duplicates)
        posts = posts.cast_column("image", datasets.Image(decode=False))
    else:
        posts = _load_any(arguments, arguments.dataset_name, modality, remembered, faults, may_lack)
        if arguments.streaming:
            faults.check_share()
            return posts
        if len(posts) == 1 and (arguments.splits is None or "test" in posts):
            posts = datasets.DatasetDict(test=next(iter(posts.values())))
        else:
            posts = complete_splits(posts, arguments.split_seed, arguments.group_duplicates)
    faults.check_share()
    return _cap(posts, arguments)


def _load_any(
    arguments: DataArguments,
    name: str,
    modality: str,
    remembered: ClipCaCgConfig | None,
    faults: Faults,
    may_lack: bool,
) -> datasets.DatasetDict:
    """Load a data set, and bring its splits and columns to the names and types that `load_posts` returns."""
    own_labels = {arguments.text_label_column: "text_label", arguments.image_label_column: "image_label"}
    labels = {arguments.label_column: "label"} | {column: label for column, label in own_labels.items() if column}
    if len(labels) < 1 + sum(map(bool, (arguments.text_label_column, arguments.image_label_column))):
        raise InputError("--label_column, --text_label_column and --image_label_column must name different columns.")
    posts, malformed = read_rows(arguments, name, modality, remembered, labels)
    for split, dataset in posts.items():
        faults.num_rows += len(dataset)
        posts[split] = faults.leave_out(dataset, malformed.get(split, {}), _source(name, split, posts))
    posts = with_labels(posts, name, arguments.task, faults)
    for column in {"text_label", "image_label"} & set(labels.values()):
        posts = with_modality_labels(posts, column, name, faults)
    for split, dataset in posts.items():
        posts[split] = faults.leave_out(dataset, bad_posts(dataset, may_lack), _source(name, split, posts))
    return posts if arguments.streaming else posts.remove_columns("row")


def _source(name: str, split: str, posts: datasets.DatasetDict) -> str:
    """What messages call a split."""
    return name if len(posts) == 1 else f"the split {split} of {name}"


def read_rows(
    arguments: ColumnArguments,
    name: str,
    modality: str,
    remembered: ClipCaCgConfig | None,
    labels: Mapping[str, str],
) -> tuple[datasets.DatasetDict, Reasons]:
    """Read a data set, and give its splits the columns of `as_posts`.

    Args:
        arguments: Says which columns and splits. `text_column` and `image_column` are set to those that were read.
        name: The data set.
        modality: "both", "image" or "text".
        remembered: Config of a checkpoint.
        labels: Column of labels to its new name.

    Returns:
        The splits, and by split what is wrong with a row that could not be parsed, by its index.

    Raises:
        InputError: If a column is missing.
    """
    posts, malformed, columns, names, folder = _open(arguments, name, modality, remembered, labels)
    for split, dataset in posts.items():
        prefix, used = f"{split}-" if len(posts) > 1 else "", columns
        if split == "test" and len(posts) > 1:  # which benchmarks publish without labels
            used = replace(used, labels={column: labels[column] for column in labels if column in names[split]})
        _check_columns(used, names[split], _source(name, split, posts))
        if arguments.streaming and labels and isinstance(arguments, DataArguments):
            limit = arguments.max_train_samples if split == "train" else arguments.max_eval_samples
            dataset = dataset if limit is None else dataset.take(limit)
            used = Columns(labels=labels) if split == "train" else used
            with reading(name):
                dataset, malformed[split] = in_memory(dataset, used)
        elif arguments.streaming:
            posts[split] = stream_posts(dataset, columns, names[split], folder, prefix)
            continue
        dataset = as_posts(dataset, used, folder, prefix, name)
        for label in sorted(set(labels.values()) - set(dataset.column_names)):
            dataset = dataset.add_column(label, [None] * len(dataset))
        posts[split] = dataset
    return posts, malformed


class _Source(NamedTuple):
    """The splits of a source as they are, with the faults of `read_source`, and how to read them."""

    posts: Any
    malformed: Reasons
    columns: Columns
    names: Mapping[str, Sequence[str]]  # of all columns of each split
    folder: Path  # that paths of images start from


def _open(
    arguments: ColumnArguments,
    name: str,
    modality: str,
    remembered: ClipCaCgConfig | None,
    labels: Mapping[str, str],
) -> _Source:
    """Open a source and choose its columns; see `read_rows`."""
    texts = [arguments.text_column, getattr(remembered, "text_columns", None), ["text"]]
    images = [arguments.image_column, getattr(remembered, "image_column", None), "image"]
    posts, malformed = read_source(
        name,
        config=arguments.dataset_config,
        splits=arguments.own_splits(),
        as_written=["id", *(column for choice in texts for column in choice or ()), *filter(None, images), *labels],
        on_error=arguments.on_error,
        streaming=arguments.streaming,
    )
    names = {split: column_names(dataset, name) for split, dataset in posts.items()}
    present = next(iter(names.values()))
    if modality != "image":
        arguments.text_column = next(c for c in texts if c and (c in texts[::2] or set(c) <= set(present)))
    if modality != "text":
        arguments.image_column = next(c for c in images if c and (c in images[::2] or c in present))
    columns = Columns(
        arguments.text_column or () if modality != "image" else (),
        arguments.image_column if modality != "text" else None,
        labels,
    )
    path = Path(name).expanduser()
    return _Source(posts, malformed, columns, names, path if path.is_dir() else path.parent)


def _check_columns(columns: Columns, present: Sequence[str], name: str) -> None:
    """Raise an InputError that lists the columns of a source, if one of those to read is missing; warn of doubles."""
    if missing := [column for column in columns.names if column not in present]:
        kinds = ["image", "text", *(["label", "text_label", "image_label"] if columns.labels else [])]
        flags = [f"--{kind}_column" for kind in kinds]
        raise InputError(
            f"{name} has no column {', '.join(missing)}; it has {', '.join(present)}. Name the right ones with "
            f"{', '.join(flags[:-1])} and {flags[-1]}."
        )
    if twice := [column for column in columns.names if f"{column}.1" in present]:
        logger.warning("%s has several columns %s: the first counts", name, ", ".join(twice))


def training_stream(
    arguments: DataArguments, modality: str, posts: datasets.DatasetDict, remembered: ClipCaCgConfig | None, seed: int
) -> PostStream:
    """Open the training posts of `--streaming`, of which `load_posts` returns the labels alone.

    Args:
        arguments: The source.
        modality: "both", "image" or "text".
        posts: What `load_posts` returned for it.
        remembered: Config of a checkpoint.
        seed: Seed of the order of the posts.
    """
    streams, _ = read_rows(arguments, str(arguments.dataset_name), modality, remembered, {})
    buffer = BUFFER if arguments.shuffle_buffer is None else arguments.shuffle_buffer
    return PostStream(streams["train"], posts["train"], seed, buffer)


def load_to_predict(arguments: ColumnArguments, name: str, split: str, config: ClipCaCgConfig) -> datasets.Dataset:
    """Load posts without labels.

    Args:
        arguments: Says which columns and splits, and with `streaming` that no row is kept.
        name: A source as `read_source` takes it, or a folder with <ID>.jpg and <ID>.txt in itself or in `data`, which
            are read in the order of their IDs.
        split: Which split, of a source that has several.
        config: Config of the model: its `modality`, and the columns that it was trained on.

    Returns:
        Rows with id, text and image, those that the model reads, and error: why a row could not be parsed, or None.

    Raises:
        InputError: If the source or the split is not there.
    """
    if (whole := _posts_of_folder(name, config)) is not None:
        return whole
    posts, malformed = read_rows(arguments, name, config.modality, config, {})
    split = _choose_split(posts, split, name)
    if arguments.streaming:
        return posts[split]
    errors = [malformed.get(split, {}).get(index) for index in range(len(posts[split]))]
    return posts[split].remove_columns("row").add_column("error", errors, feature=datasets.Value("string"))


def load_shards(
    arguments: ColumnArguments, name: str, split: str, config: ClipCaCgConfig
) -> tuple[dict[str, datasets.IterableDataset], str | None]:
    """Load posts without labels as streams of some posts each: one for each table of a folder or file of a data set.

    Args:
        arguments, name, split, config: As in `load_to_predict`; every source is read with `streaming`.

    Returns:
        The name of each shard, and its rows as in `load_to_predict`. A post without an ID is called after its shard.
        The shards do not depend on the number of processes that read them. And what tells the posts from others, of a
        source whose shards are numbered; see `state_of`.

    Raises:
        InputError: If the source or the split is not there.
    """
    if (posts := _posts_of_folder(name, config)) is not None:
        names = numbered(-(-len(posts) // SHARD_POSTS))
        stream = posts.to_iterable_dataset(num_shards=len(names))
        shards = {shard: stream.shard(len(names), index) for index, shard in enumerate(names)}
        return shards, short_hash(posts["id"][:])
    arguments.streaming = True
    content: str | None = state_of(name, arguments.dataset_config)
    source = _open(arguments, name, config.modality, config, {})
    split = _choose_split(source.posts, split, name)
    stream, present = source.posts[split], source.names[split]
    _check_columns(source.columns, present, _source(name, split, source.posts))
    if isinstance(stream, datasets.Dataset):  # of save_to_disk
        if not len(stream):
            raise InputError(f"{name} has no posts.")
        stream = stream.to_iterable_dataset(num_shards=-(-len(stream) // SHARD_POSTS))
    names = shard_names(name, arguments.own_splits(), split, stream.num_shards)
    if names != numbered(len(names)):
        content = None  # a folder of tables may get more of them
    elif content != state_of(name, arguments.dataset_config):
        raise InputError(f"{name} changed while it was opened: call the command again.")
    shards = {
        shard: stream_posts(stream.shard(len(names), index), source.columns, present, source.folder, f"{shard}-")
        for index, shard in enumerate(names)
    }
    return shards, content


def _posts_of_folder(name: str, config: ClipCaCgConfig) -> datasets.Dataset | None:
    """The posts of a folder with <ID>.jpg and <ID>.txt; None of another source."""
    if not (rows := read_folder(Path(name).expanduser(), config.modalities)):
        return None
    string = datasets.Value("string")
    features = {"id": string, "text": string, "image": datasets.Image(decode=False), "error": string}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def _choose_split(posts: Mapping[str, Any], split: str, name: str) -> str:
    """The one split that there is, or else the one asked for.

    Raises:
        InputError: If that is not there.
    """
    split = next(iter(posts)) if len(posts) == 1 else split
    if split not in posts:
        raise InputError(f"{name} has no split {split}: name one with --split. Choices: {', '.join(posts)}.")
    return split


def _cap(posts: datasets.DatasetDict, arguments: DataArguments) -> datasets.DatasetDict:
    """Keep a random part of each split if its size is limited."""
    for split, dataset in posts.items():
        flag = "max_train_samples" if split == "train" else "max_eval_samples"
        limit = getattr(arguments, flag)
        if limit is not None and limit < len(dataset):
            posts[split] = dataset.shuffle(seed=arguments.split_seed).select(range(limit))
    return posts
