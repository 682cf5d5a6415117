"""Read a table, a folder or a Hub data set with the readers of the datasets library."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
from datasets.packaged_modules.csv.csv import CsvConfig

from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.mending import mend

logger = logging.getLogger(__name__)

READERS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
FAULTS = (datasets.exceptions.DatasetGenerationError, OSError, StopIteration, ValueError, pyarrow.ArrowException)
METADATA = "metadata.csv"  # of an imagefolder, with the column file_name
SPLITS = ("train", "validation", "test")
# Names of files and of splits, to ours.
SPLIT_NAMES = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
# What pandas takes for an empty cell, though in a text column such words are texts.
EMPTY_CELLS = ["", "NA", "N/A", "n/a", "<NA>", "NaN", "nan", "NULL", "null", "None"]


def read_source(
    name: str,
    *,
    config: str | None = None,
    splits: Mapping[str, str] | None = None,
    texts: Sequence[str] = (),
    labels: Sequence[str] = (),
    on_error: str = "raise",
    streaming: bool = False,
) -> tuple[Any, dict[str, dict[int, str]]]:
    """Read the splits train, validation and test of any source, those of them that it has.

    Args:
        name: A table, a folder of tables or images, a folder of `save_to_disk`, or a Hub data set.
        config: Config of a data set that has several.
        splits: Ours to the source's own name, where it is not one of `SPLIT_NAMES`.
        texts: Columns of a table on the Hub whose cells stay as they are written. In a local one all cells do, apart
            from labels.
        labels: Columns in which words such as NaN are empty cells.
        on_error: With "skip", a row of a .csv or .jsonl file that cannot be parsed is an empty row.
        streaming: Read rows when they are asked for, without a copy on this machine.

    Returns:
        A `DatasetDict` or `IterableDatasetDict` of the splits, with their columns as they are; a source that is not
        split has the one split "train". And by split, what is wrong with a row that could not be parsed, by its index.

    Raises:
        InputError: If the source cannot be read, or a config or a split is not there.
    """
    path, splits = Path(name).expanduser(), splits or {}
    cells = {"converters": dict.fromkeys(texts, str), "keep_default_na": False}
    cells["na_values"] = dict.fromkeys(labels, EMPTY_CELLS)
    with reading(name):
        if files := _tables(path, splits, streaming):
            if config:
                raise InputError(f"--dataset_config {config}: {name} has no configs.")
            first = next(iter(files.values()))[0]
            builder = READERS[table_suffix(first)]
            options: dict[str, Any] = {}
            if builder in ("csv", "json"):
                options = {"encoding": "utf-8-sig", "encoding_errors": "replace"}
            if builder == "csv":
                options["sep"] = "\t" if table_suffix(first) == ".tsv" else ","
                options |= cells | {"converters": _as_written(files, options, labels)}

            def load(files: Mapping[str, list[Path]]) -> Any:
                # Together the splits would get the types and the class names of the first.
                found = {
                    split: datasets.load_dataset(
                        builder, data_files={split: list(map(str, part))}, split=split, streaming=streaming, **options
                    )
                    for split, part in files.items()
                }
                return datasets.IterableDatasetDict(found) if streaming else datasets.DatasetDict(found)

            if first.name == METADATA:
                return _imagefolder(files, load), {}
            try:
                return load(files), {}
            except FAULTS:
                if builder not in ("csv", "json"):
                    raise
                files, bad = mend(files, options.get("sep", ""))
                lines = [line for rows in bad.values() for line in rows.values()]
                if not lines:
                    raise
                if on_error == "raise":
                    raise InputError(
                        f"{name} cannot be read: {lines[0]}. --on_error skip leaves out bad rows."
                    ) from None
            return load(files), bad
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            if config:
                raise InputError(f"--dataset_config {config}: {name} has no configs.")
            found = datasets.load_from_disk(str(path))
            found = found if isinstance(found, datasets.DatasetDict) else datasets.DatasetDict(train=found)
            return _ours(found, name, splits), {}
        name = str(path) if path.exists() else name
        try:
            is_csv = isinstance(datasets.load_dataset_builder(name, config).config, CsvConfig)
        except ValueError:
            _check_config(name, config)
            raise
        found = datasets.load_dataset(name, config, streaming=streaming, **(cells if is_csv else {}))
        return _ours(found, name, splits), {}


def column_names(dataset: datasets.Dataset | datasets.IterableDataset, name: str) -> list[str]:
    """Return the names of the columns; a stream of text has them in its first row."""
    if dataset.column_names is None:
        with reading(name):
            return list(next(iter(dataset)))
    return list(dataset.column_names)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what the readers raise into an InputError that names the source."""
    try:
        yield
    except InputError:
        raise
    except FAULTS as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0] or "it is empty"
        raise InputError(f"{name} cannot be read as a data set: {reason}") from error


def table_suffix(path: Path) -> str:
    """The suffix that tells a table's format, in small letters and without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSED), "")


def _tables(path: Path, splits: Mapping[str, str], streaming: bool) -> dict[str, list[Path]]:
    """The tables to read, by split; none for a folder or Hub data set that datasets understands by itself.

    Raises:
        InputError: If there is no such file, or it is no table.
    """
    if path.is_dir():
        files = _tables_of_folder(path, splits)
        is_imagefolder = any(file.name == METADATA for part in files.values() for file in part)
        return {} if is_imagefolder and streaming else files
    if path.exists() and table_suffix(path) not in READERS:
        raise InputError(f"{path} is not a table that can be read. Allowed: {', '.join(READERS)}.")
    if table_suffix(path) in READERS:
        if not path.is_file():
            raise InputError(f"There is no file {path}.")
        for ours, own in splits.items():
            raise InputError(f"--{ours}_split {own}: {path} is one file without splits.")
        return {"train": [path]}
    return {}


def _tables_of_folder(folder: Path, splits: Mapping[str, str]) -> dict[str, list[Path]]:
    """The tables of a folder by the split that their names or folders tell, those of the commonest format."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    metadata = {path.name for path in files if path.stem == "metadata"}
    own_rules = {"README.md", "dataset_dict.json", "state.json"}  # of the Hub, and of save_to_disk
    if any(path.name in own_rules for path in files) or metadata - {METADATA}:
        return {}
    tables = [path for path in files if path.name == METADATA or (not metadata and table_suffix(path) in READERS)]
    formats = Counter(table_suffix(path) for path in tables)
    others = [path for path in tables if table_suffix(path) != max(formats, key=formats.__getitem__)]
    if any(_split_of(path.relative_to(folder), splits) for path in others):
        raise InputError(
            f"{folder} has tables of several formats ({', '.join(formats)}): give all of them one format."
        )
    tables = [path for path in tables if path not in others]
    for path in others:
        logger.warning("%s has another format than the other tables, and is not used", path)
    found: dict[str | None, list[Path]] = {}
    for path in tables:
        found.setdefault(_split_of(path.relative_to(folder), splits), []).append(path)
    for ours, own in splits.items():
        if ours not in found:
            raise InputError(f"--{ours}_split {own}: no table of {folder} has this name.")
    without = found.pop(None, [])
    if found and without:
        logger.warning("%s belongs to no split and is not used", ", ".join(str(path) for path in without))
    if without and not found:
        return {"train": without}
    return {split: found[split] for split in SPLITS if split in found}


def _as_written(files: Mapping[str, list[Path]], options: Mapping[str, Any], labels: Sequence[str]) -> dict[str, type]:
    """Converters that keep every cell as it is written, apart from labels.

    pandas would judge the type of a column anew for every 10,000 rows, and fail where the judgments differ.
    """
    heads = [pandas.read_csv(path, nrows=0, **options).columns for part in files.values() for path in part]
    return dict.fromkeys((column for head in heads for column in head if column not in labels), str)


def _imagefolder(files: Mapping[str, list[Path]], load: Callable[..., Any]) -> datasets.DatasetDict:
    """Read the metadata.csv of an imagefolder; the reader of `datasets` would take the text NA for an empty cell."""
    posts = datasets.DatasetDict()
    for split, part in files.items():
        pieces = []
        for path in part:
            rows = load({split: [path]})[split]
            images = [str(path.parent / name) for name in rows["file_name"]]
            pieces.append(rows.remove_columns("file_name").add_column("image", images))
        posts[split] = datasets.concatenate_datasets(pieces)
    return posts


def _split_of(path: Path, splits: Mapping[str, str]) -> str | None:
    """The split that the name of a file, or else of a folder around it, has as a word."""
    names = {own.lower(): ours for ours, own in splits.items()}
    names |= {own: ours for own, ours in SPLIT_NAMES.items() if ours not in splits and own not in names}
    for part in reversed(path.parts):
        for own, ours in names.items():
            if re.search(rf"(?<![a-z0-9]){re.escape(own)}(?![a-z])", part.lower()):
                return ours
    return None


def _check_config(name: str, config: str | None) -> None:
    """Raise an InputError that lists the configs, if a data set has several or has not the one asked for."""
    configs = datasets.get_dataset_config_names(name)
    if (config or "default") in configs or (config is None and len(configs) < 2):
        return
    fault = f"{name} has several configs" if config is None else f"{name} has no config {config}"
    raise InputError(f"{fault}: name one with --dataset_config. Choices: {', '.join(configs)}.")


def _ours(found: Any, name: str, splits: Mapping[str, str]) -> Any:
    """Give the splits of a data set our names, and leave out the others.

    Raises:
        InputError: If a split that a flag names is not there, or none has a name that we know.
    """
    for ours, own in splits.items():
        if own not in found:
            raise InputError(f"--{ours}_split {own}: {name} has the splits {', '.join(found)}.")
    names = {own: ours for own, ours in SPLIT_NAMES.items() if ours not in splits}
    names |= {own: ours for ours, own in splits.items()}
    if len(found) == 1:
        names = dict.fromkeys(found, names.get(next(iter(found)), "train"))
    kept: dict[str, Any] = {}
    for own, dataset in found.items():
        if kept.setdefault(names.get(own, ""), dataset) is not dataset or own not in names:
            logger.warning("the split %s of %s is not used", own, name)
    kept.pop("", None)
    if not kept:
        raise InputError(
            f"{name} has the splits {', '.join(found)}: name those to use with --train_split, --validation_split and "
            "--test_split."
        )
    return type(found)({split: kept[split] for split in SPLITS if split in kept})
