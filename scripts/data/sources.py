"""Read a table, a folder or a Hub data set with the readers of the datasets library."""

import glob
import logging
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet as pq
from datasets.packaged_modules.csv.csv import CsvConfig
from huggingface_hub import hf_hub_download

from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.lines import is_output, short_hash
from clipcacg.scripts.data.mending import Reasons, form_of, head_of, mend, parse, table_suffix

logger = logging.getLogger(__name__)

READERS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet",
    ".arrow": "arrow", ".tar": "webdataset",
}  # fmt: skip
FAULTS = (
    datasets.exceptions.DatasetGenerationError, EOFError, OSError, StopIteration, ValueError, pyarrow.ArrowException,
    tarfile.TarError, zlib.error,
)  # fmt: skip
METADATA = ("metadata.csv", "metadata.jsonl")  # of an imagefolder, with the column file_name
SPLITS = ("train", "validation", "test")
# Names of files and of splits, to ours.
SPLIT_NAMES = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
HUB_FILE = re.compile(r"hf://datasets/([^@]+)@([^/]+)/(.+)")  # repository, revision and path
EMPTY = "it is empty"
SEEN = 100  # rows of a stream that tell its columns
TEXT = ("csv", "json")  # readers of lines
INDEX = "__index_level_0__"  # what pandas calls the cells of a row beyond the header
# Columns of our own: the folder of a row's table, and why a row of a stream could not be parsed.
FOLDER, REASON = "folder of the table", "reason of the fault"


def read_source(
    name: str,
    *,
    config: str | None = None,
    splits: Mapping[str, str] | None = None,
    as_written: Sequence[str] = (),
    on_error: str = "raise",
    streaming: bool = False,
) -> tuple[Any, Reasons]:
    """Read the splits train, validation and test of any source, those of them that it has.

    Args:
        name: A table, a folder of tables or images, a folder of `save_to_disk`, or a Hub data set.
        config: Config of a data set that has several.
        splits: Ours to the source's own name, where it is not one of `SPLIT_NAMES`.
        as_written: Columns of a CSV file on the Hub whose cells stay as they are written; in a local one all do.
        on_error: With "skip", a row of a local table of text that cannot be parsed is an empty row.
        streaming: Read rows when they are asked for, without a copy on this machine.

    Returns:
        A `DatasetDict` or `IterableDatasetDict` of the splits, with their columns as they are; a source that is not
        split has the one split "train". And by split, what is wrong with a row that could not be parsed, by its index;
        a stream has that in the column `REASON`. Tables that lie in several folders have the column `FOLDER`.

    Raises:
        InputError: If the source cannot be read, or a config or a split is not there.
    """
    path, splits = Path(name).expanduser(), splits or {}
    with reading(name):
        files = _tables(path, splits, streaming)
        is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
        if config and (files or is_saved):
            raise InputError(f"--dataset_config {config}: {name} has no configs.")
        if files:
            folder = path if path.is_dir() else path.parent
            if streaming:
                return _stream_tables(name, files, on_error), {}
            return _read_tables(name, files, folder, on_error)
        if is_saved:
            found = datasets.load_from_disk(str(path))
            found = found if isinstance(found, datasets.DatasetDict) else datasets.DatasetDict(train=found)
        else:
            return _from_hub(str(path) if path.exists() else name, config, splits, as_written, on_error, streaming)
        return _ours(found, name, splits), {}


def column_names(dataset: datasets.Dataset | datasets.IterableDataset, name: str) -> list[str]:
    """Return the names of the columns; a stream of text has them in its first rows."""
    names = dataset.column_names
    if names is None:
        with reading(name):
            first = list(dataset.take(SEEN))
        if not first:
            raise InputError(f"{name} cannot be read as a data set: {EMPTY}")
        if all(row.get(REASON) for row in first):
            raise unparsable(name, first[0][REASON])
        names = (column for row in first for column in row)
    return [column for column in dict.fromkeys(names) if column not in (FOLDER, REASON)]


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what the readers raise into an InputError that names the source."""
    try:
        yield
    except InputError:
        raise
    except FAULTS as error:
        reason = str(error.__cause__ or error).strip()
        # A worker process sends its whole traceback as the message; its end is the original message.
        reason = reason.rpartition("\n")[2] if reason.startswith("Caught ") else reason.partition("\n")[0] or EMPTY
        if isinstance(error, pandas.errors.ParserError):  # of a stream from the Hub; other files are read by line
            reason += ". Without --streaming the row is named, and --on_error skip leaves it out"
        raise InputError(f"{name} cannot be read as a data set: {reason}") from error


def is_table(path: Path) -> bool:
    """Whether a file is a table that can be read, and not one of predictions that `predict.py` wrote."""
    return table_suffix(path) in READERS and not is_output(path)


def shard_names(name: str, splits: Mapping[str, str], split: str, count: int) -> list[str]:
    """Name the shards of one split, in their order: as its local tables without their suffixes, or else by numbers.

    Args:
        name, splits: As in `read_source`.
        split: Our name of the split.
        count: Number of its shards.
    """
    path = Path(name).expanduser()
    tables = _tables(path, splits, streaming=True).get(split, [])
    inside = [table.relative_to(path) if table != path else Path(table.name) for table in tables]
    ends = [table.name.lower().rindex(table_suffix(table)) for table in inside]
    names = ["-".join([*table.parts[:-1], table.name[:end]]) for table, end in zip(inside, ends, strict=True)]
    return names if len(set(names)) == count else numbered(count)


def numbered(count: int) -> list[str]:
    """Names of shards that have none of their own."""
    return [f"{index:05d}-of-{count:05d}" for index in range(count)]


def _tables(path: Path, splits: Mapping[str, str], streaming: bool) -> dict[str, list[Path]]:
    """The tables to read, by split; none for a folder or Hub data set that datasets understands by itself.

    Raises:
        InputError: If there is no such file, or it is no table.
    """
    if path.is_dir():
        files = _tables_of_folder(path, splits)
        is_imagefolder = any(file.name in METADATA for part in files.values() for file in part)
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
    files = _files_below(folder)
    metadata = {path.name for path in files if path.stem == "metadata"}
    own_rules = {"README.md", "dataset_dict.json", "state.json"}  # of the Hub, and of save_to_disk
    if any(path.name in own_rules for path in files) or metadata - set(METADATA):
        return {}
    tables = [path for path in files if path.name in METADATA or (not metadata and is_table(path))]
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


def _files_below(folder: Path) -> list[Path]:
    """The files of a folder and of those in it, links to folders among them, without what other programs leave."""
    seen, found = {folder.resolve()}, list[Path]()
    for root, inside, names in os.walk(folder, followlinks=True):
        visible = {Path(root, name): Path(root, name).resolve() for name in inside if not _is_left_over(name)}
        inside[:] = [path.name for path, real in visible.items() if real not in seen]
        seen |= set(visible.values())
        found += [Path(root, name) for name in names if not _is_left_over(name)]
    return sorted(path for path in found if path.is_file())


def _is_left_over(name: str) -> bool:
    return name.startswith((".", "~$", "__MACOSX"))


def _read_tables(
    name: str, files: Mapping[str, list[Path]], folder: Path, on_error: str
) -> tuple[datasets.DatasetDict, Reasons]:
    """Read local tables. Where that fails, look for rows that cannot be parsed, and read the rest."""
    # Together the splits would get the types and the class names of the first.
    try:
        return datasets.DatasetDict({split: _load(split, part, folder) for split, part in files.items()}), {}
    except InputError:
        raise
    except FAULTS:
        if READERS[table_suffix(next(iter(files.values()))[0])] not in TEXT:
            raise
    copies, bad = dict[Path, Path](), Reasons()
    for split, part in files.items():
        mended, bad[split], count = mend(part)
        copies |= mended
        if not count:
            raise ValueError(f"{EMPTY} ({', '.join(path.name for path in part)})")
        if bad[split] and (on_error == "raise" or len(bad[split]) == count):
            raise unparsable(name, next(iter(bad[split].values())))
    reasons = any(bad.values())
    # Types are those of the first part of a file, unless a later part differs: then the file is read in one part.
    found = {split: _load(split, part, folder, copies, in_one=not reasons) for split, part in files.items()}
    return datasets.DatasetDict(found), bad


def _stream_tables(name: str, files: Mapping[str, list[Path]], on_error: str) -> datasets.IterableDatasetDict:
    """Open local tables as streams."""
    streams = {}
    for split, part in files.items():
        named = datasets.NamedSplit(split)
        if READERS[table_suffix(part[0])] in TEXT:
            # The items of a list are the shards of the stream.
            given = {"name": name, "split": split, "paths": list(part), "on_error": on_error}
            streams[split] = datasets.IterableDataset.from_generator(_rows, gen_kwargs=given, split=named)
        else:
            pieces = [_with_folder(rows, own) for own, rows in _pieces(split, part, {}, streaming=True)]
            if not pieces:
                raise ValueError(EMPTY)
            streams[split] = datasets.concatenate_datasets(pieces, split=named)
    return datasets.IterableDatasetDict(streams)


def _with_folder(rows: datasets.IterableDataset, folder: Path) -> datasets.IterableDataset:
    """Add the column `FOLDER` to rows that may hold paths of images, in place of images."""
    if "Image(" in str(rows.features):  # which adding would decode
        return rows
    features = datasets.Features(rows.features | {FOLDER: datasets.Value("string")})
    return rows.map(_add, fn_kwargs={"new": {FOLDER: str(folder)}}, features=features)


def _add(row: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return row | new


def _rows(name: str, split: str, paths: Sequence[Path], on_error: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of tables of text. Where their reader fails, go on line by line."""
    done, last = 0, dict[str, Any]()
    try:
        for own, rows in _pieces(split, paths, {}, streaming=True):
            for row in chain.from_iterable(batches_of_rows(rows, 100)):
                if INDEX in row:
                    raise ValueError("a row has more cells than the header")
                yield row | {REASON: None, FOLDER: str(own)}
                done, last = done + 1, row
        return
    except InputError:
        raise
    except (*FAULTS, TypeError) as error:  # a TypeError is about a list whose items are not all rows
        logger.debug("%s is read line by line: %s", name, error)
    with reading(name):
        parsed = ((path, *found) for path in paths for found in parse(path))
        for _, row, _ in islice(parsed, max(done - 1, 0), done):
            # A quoted cell of several lines, with text behind its closing quote, is several rows here and one there.
            if READERS[table_suffix(paths[0])] == "csv" and any(
                last.get(name) not in (row[name], None) for name in row
            ):
                raise InputError(f"{name} has bad lines behind a cell with a broken quote: mend it.")
        for path, row, reason in parsed:
            if reason and on_error == "raise":
                raise unparsable(name, reason)
            yield row | {REASON: reason, FOLDER: str(path.parent)}


def batches_of_rows(stream: datasets.IterableDataset, size: int) -> Iterator[list[dict[str, Any]]]:
    """All rows of a stream, some at a time, in every process of a `DataLoader`.

    Iteration over its rows would give each of the processes a share.
    """
    for columns in stream.iter(size):
        yield [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def unparsable(name: str, reason: str) -> InputError:
    """The error about a row that cannot be parsed."""
    return InputError(f"{name} cannot be read: {reason}. --on_error skip leaves out bad rows.")


def _load(
    split: str,
    paths: Sequence[Path],
    folder: Path,
    copies: Mapping[Path, Path] | None = None,
    in_one: bool = False,
) -> datasets.Dataset:
    """Read the tables of one split; see `_pieces`."""
    pieces = []
    for own, rows in _pieces(split, paths, copies or {}, in_one):
        if own != folder:
            rows = rows.add_column(FOLDER, [str(own)] * len(rows))
        pieces.append(rows)
    if not pieces:
        raise ValueError(EMPTY)
    return datasets.concatenate_datasets(pieces, split=datasets.NamedSplit(split))


def _columns_of(path: Path, in_one: bool) -> Any:
    """What tables that are read together have in common besides their folder; None for a table without rows."""
    builder = READERS[table_suffix(path)]
    if builder == "csv":
        return form_of(path)
    if builder == "json":
        head_of(path)
        return path if in_one else ""
    if builder == "parquet":
        metadata = pq.read_metadata(path)
        return sorted(metadata.schema.to_arrow_schema().names) if metadata.num_rows else None
    return ""


def _pieces(
    split: str, paths: Sequence[Path], copies: Mapping[Path, Path], in_one: bool = False, streaming: bool = False
) -> Iterator[tuple[Path, Any]]:
    """Read the tables of one split that lie in one folder and have the same columns.

    Args:
        split: Name of the split.
        paths: The tables, of one format.
        copies: What to read in place of a table.
        in_one: Read each JSON file as a whole, and by itself.
        streaming: Read rows when they are asked for.

    Yields:
        A folder, and the rows of its tables.

    Raises:
        ValueError: If the first row has more cells than the header: pandas would take the first of them for an index.
    """
    builder = READERS[table_suffix(paths[0])]
    for (own, form), group in groupby(paths, key=lambda path: (path.parent, _columns_of(path, in_one))):
        if form is None:
            continue
        tables = [copies.get(path, path) for path in group]
        options: dict[str, Any] = {}
        names: dict[str, str] = {"file_name": "image"} if paths[0].name in METADATA else {}
        if builder in TEXT:
            options = {"encoding": "utf-8-sig", "encoding_errors": "replace"}
        if in_one and builder == "json":
            options["chunksize"] = max(path.stat().st_size for path in tables) + 1
        if builder == "csv":
            options |= {"keep_default_na": False}
            if not copies:
                options |= {"sep": form.delimiter, "skipinitialspace": form.has_spaces, "skiprows": form.skipped}
            head = pandas.read_csv(tables[0], nrows=0, **options).columns
            # pandas would judge the type of a column anew for every 10,000 rows, and fail where the judgments differ.
            options["converters"] = dict.fromkeys(head, str)
            names |= {old: new for old, new in zip(head, form.header, strict=False) if old != new}
        data_files = {split: [glob.escape(str(path)) for path in tables]}
        try:
            rows = datasets.load_dataset(builder, data_files=data_files, split=split, streaming=streaming, **options)
        except StopIteration as error:  # which may not leave a generator
            raise ValueError(EMPTY) from error
        if builder == "csv" and INDEX in (rows.column_names or ()):
            raise ValueError("a row has more cells than the header")
        yield own, _named(rows.rename_columns(names) if names else rows)


def _named(rows: Any) -> Any:
    """Call the first image of each entry of a WebDataset image, its text text and its key id."""
    present = rows.column_names or []
    if "__key__" not in present:
        return rows
    images = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    names = {"__key__": "id", "txt": "text"} | dict.fromkeys(images[:1], "image")
    for column in images:  # or renaming a column of a stream would decode them and encode them anew
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows.rename_columns({own: ours for own, ours in names.items() if own in present and ours not in present})


def _split_of(path: Path, splits: Mapping[str, str]) -> str | None:
    """The split that the name of a file, or else of a folder around it, has as a word."""
    names = {own.lower(): ours for ours, own in splits.items()}
    names |= {own: ours for own, ours in SPLIT_NAMES.items() if ours not in splits and own not in names}
    for part in reversed(path.parts):
        for own, ours in names.items():
            if re.search(rf"(?<![a-z0-9]){re.escape(own)}(?![a-z])", part.lower()):
                return ours
    return None


def _from_hub(
    name: str,
    config: str | None,
    splits: Mapping[str, str],
    as_written: Sequence[str],
    on_error: str,
    streaming: bool,
) -> tuple[Any, Reasons]:
    """Read what the `datasets` library knows how to read by itself: a Hub data set, or a folder with such a layout.

    Tables of text in which that fails are read like local ones.
    """
    try:
        builder = datasets.load_dataset_builder(name, config).config
    except ValueError:
        _check_config(name, config)
        raise
    is_csv = isinstance(builder, CsvConfig)
    cells = {"converters": dict.fromkeys(as_written, str), "keep_default_na": False} if is_csv else {}
    try:
        found = _ours(datasets.load_dataset(name, config, streaming=streaming, **cells), name, splits)
        return type(found)({split: _named(rows) for split, rows in found.items()}), {}
    except InputError:
        raise
    except FAULTS:
        tables = [Path(url) for urls in builder.data_files.values() for url in urls]
        if not all(READERS.get(table_suffix(path)) in TEXT and is_table(path) for path in tables):
            raise
    files = {split: [_on_disk(url) for url in urls] for split, urls in builder.data_files.items()}
    return _read_tables(name, _ours(files, name, splits), Path(name), on_error)


def state_of(name: str, config: str | None) -> str:
    """What changes with a source: the revision of a data set on the Hub, or a digest of the files that are here.

    Raises:
        InputError: If the Hub does not tell it.
    """
    path = Path(name).expanduser()
    if not path.exists():
        with reading(name):
            return str(datasets.load_dataset_builder(name, config).hash)
    files = [file for file in _files_below(path) if not is_output(file)] if path.is_dir() else [path]
    states = [(file, file.stat()) for file in files]
    return short_hash([[str(file.relative_to(path)), stat.st_size, stat.st_mtime_ns] for file, stat in states])


def _on_disk(url: str) -> Path:
    """A file, or the local copy of one of the Hub."""
    file = HUB_FILE.fullmatch(url)
    return Path(hf_hub_download(file[1], file[3], repo_type="dataset", revision=file[2]) if file else url)


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
