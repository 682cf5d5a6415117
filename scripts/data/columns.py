"""Give the columns of a source the names and forms that the other modules read: row, id, text, image and labels."""

import base64
import binascii
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import datasets
from pyarrow.compute import struct_field

from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.images import locate_image
from clipcacg.scripts.data.sources import FOLDER, REASON

logger = logging.getLogger(__name__)

BASE64 = re.compile(r"[A-Za-z0-9+/\s]{100,}={0,2}\s*")  # a path has a dot, or is shorter
STRINGS, BYTES = ("string", "large_string", "string_view"), ("binary", "large_binary", "binary_view")
IMAGE = datasets.Image(decode=False)


@dataclass(frozen=True)
class Columns:
    """Which columns of a source hold what.

    Args:
        text: Columns whose texts are joined; none if the model reads no texts.
        image: Column of the images; None if the model reads no images.
        labels: Column to "label", "text_label" or "image_label".
    """

    text: Sequence[str] = ()
    image: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """All of them, each once."""
        return list(dict.fromkeys([*self.labels, *self.text, *([self.image] if self.image else [])]))


def as_posts(
    dataset: datasets.Dataset, columns: Columns, folder: Path | str, prefix: str, name: str
) -> datasets.Dataset:
    """Give a split the columns row (its number, from 1), id, text, image and the labels.

    Args:
        dataset: A split as the source has it.
        columns: Its columns.
        folder: Folder that paths of images start from, unless an image lies at that path of the table's own folder.
        prefix: Start of the ID of a row that has none of its own.
        name: The source, for messages.

    Raises:
        InputError: If a column holds no texts or no images.
    """
    rows = list(range(1, len(dataset) + 1))
    kept = dict(columns.labels)
    if columns.image and (is_image(dataset.features[columns.image]) or _has_all_bytes(dataset, columns.image)):
        kept[columns.image] = "image"  # such a column stays on disk
    if kept:
        posts = dataset.select_columns(list(kept)).rename_columns(kept).add_column("row", rows)
    else:
        posts = datasets.Dataset.from_dict({"row": rows}, split=dataset.split)
    ids = dataset["id"][:] if "id" in dataset.column_names else [None] * len(dataset)
    ids = [f"{prefix}{row}" if own is None else str(own) for row, own in zip(rows, ids, strict=True)]
    posts = posts.add_column("id", ids, feature=datasets.Value("string"))
    if columns.text:
        parts = [check_texts(dataset, column, name)[column][:] for column in columns.text]
        texts = [join_texts(part) for part in zip(*parts, strict=True)]
        if lossy := sum("\ufffd" in (text or "") for text in texts):
            logger.warning("%d texts of %s have characters that are not in UTF-8: save it in UTF-8", lossy, name)
        posts = posts.add_column("text", texts, feature=datasets.Value("string"))
    if columns.image and "image" not in kept.values():
        values = check_images(dataset, columns.image, name)[columns.image][:]
        own = dataset[FOLDER][:] if FOLDER in dataset.column_names else [None] * len(dataset)
        images = [as_image(value, _folders(first, folder)) for value, first in zip(values, own, strict=True)]
        posts = posts.add_column("image", images, feature=IMAGE)
        if several := sum(isinstance(value, list) and len(value) > 1 for value in values):
            logger.warning("%d rows of %s hold several images: the first of each counts", several, name)
    return posts.cast_column("image", IMAGE) if columns.image else posts


def stream_posts(
    dataset: datasets.IterableDataset, columns: Columns, present: Sequence[str], folder: Path | str, prefix: str
) -> datasets.IterableDataset:
    """Give a stream of rows the columns row, id, text, image and error; no row is kept.

    Args:
        dataset: A split as the source has it.
        columns: Its columns.
        present: Names of all columns of the source.
        folder, prefix: As in `as_posts`.
    """
    if columns.image and dataset.features and is_image(dataset.features[columns.image]):
        dataset = dataset.cast_column(columns.image, IMAGE)
    as_post = partial(_as_post, columns=columns, folder=folder, prefix=prefix)
    own = [name for name in (FOLDER, REASON) if not dataset.features or name in dataset.features]
    return dataset.map(as_post, with_indices=True, remove_columns=[*present, *own])


def in_memory(dataset: datasets.IterableDataset, columns: Columns) -> tuple[datasets.Dataset, dict[int, str]]:
    """Read the columns of a stream to its end, without decoding its images.

    Returns:
        The rows; and what is wrong with a row that could not be parsed, by its index.
    """
    names = [*columns.names, "id", FOLDER, REASON]
    if dataset.features:
        dataset = dataset.select_columns([name for name in names if name in dataset.features])
        if columns.image and is_image(dataset.features[columns.image]):
            dataset = dataset.cast_column(columns.image, IMAGE)
        return datasets.Dataset.from_list(list(dataset), features=dataset.features, split=dataset.split), {}
    rows = [{name: row.get(name) for name in names} for row in dataset]
    bad = {index: row[REASON] for index, row in enumerate(rows) if row[REASON]}
    columns_of = {name: [row[name] for row in rows] for name in names}
    return datasets.Dataset.from_dict(columns_of, split=dataset.split, on_mixed_types="use_json"), bad


def _as_post(row: Mapping[str, Any], index: int, columns: Columns, folder: Path | str, prefix: str) -> dict[str, Any]:
    own = row.get("id")
    post: dict[str, Any] = {"row": index + 1, "id": f"{prefix}{index + 1}" if own is None else str(own)}
    if columns.text:
        post["text"] = join_texts(row.get(column) for column in columns.text)
    if columns.image:
        post["image"] = as_image(row.get(columns.image), _folders(row.get(FOLDER), folder))
    return post | {"error": row.get(REASON)}


def _folders(own: str | None, folder: Path | str) -> list[Path | str]:
    return [folder] if own is None or own == str(folder) else [own, folder]


def is_image(feature: Any) -> bool:
    """Whether a column can be cast to `datasets.Image` as it is."""
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in BYTES


def _has_all_bytes(dataset: datasets.Dataset, column: str) -> bool:
    """Whether a column holds {"bytes", "path"}, and so no path that starts from the folder of its table."""
    feature = dataset.features[column]
    if not isinstance(feature, dict) or feature.keys() != {"bytes", "path"} or not is_image(feature["bytes"]):
        return False
    chunks = dataset.data.column(column).chunks
    return all(struct_field(chunk, "bytes").null_count == chunk.null_count for chunk in chunks)


def check_texts(dataset: datasets.Dataset, column: str, name: str) -> datasets.Dataset:
    """Return the column alone.

    Raises:
        InputError: If it holds lists, images or other things that are no texts.
    """
    feature = dataset.features[column]
    if not isinstance(feature, (datasets.Value, datasets.Json)) or getattr(feature, "dtype", "") in BYTES:
        raise InputError(f"The column {column} of {name} holds no texts, but {feature}: name another --text_column.")
    return dataset.select_columns([column])


def check_images(dataset: datasets.Dataset, column: str, name: str) -> datasets.Dataset:
    """Return the column alone, not decoded.

    Raises:
        InputError: If it holds neither strings nor lists.
    """
    feature = dataset.features[column]
    is_list = isinstance(feature, (datasets.List, datasets.LargeList))
    inner = feature.feature if is_list else feature
    has_parts = isinstance(inner, dict) and bool({"bytes", "path"} & set(inner))
    is_text = isinstance(inner, datasets.Json) or getattr(inner, "dtype", "") in (*STRINGS, "null")
    if not (is_image(inner) or has_parts or is_text):
        raise InputError(f"The column {column} of {name} holds no images, but {feature}: name another --image_column.")
    dataset = dataset.select_columns([column])
    return dataset.cast_column(column, type(feature)(IMAGE)) if is_list and is_image(inner) else dataset


def join_texts(values: Iterable[Any]) -> str | None:
    """Join texts, without empty ones, by a space; None if there are none. Numbers become texts, NaN and lists not."""
    texts = [str(value) for value in values if value == value and not isinstance(value, (bytes, dict, list, NoneType))]
    return " ".join(text for text in texts if text) if texts else None


def as_image(value: Any, folders: Sequence[Path | str]) -> dict[str, Any] | None:
    """Return an image as `{"path", "bytes"}`, without opening it; None if there is none.

    Args:
        value: A path, absolute or relative to one of `folders`, a URL, base64, bytes, `{"path", "bytes"}`, or a list
            of these, of which the first counts.
        folders: What a relative path may start from; the first that has such a file counts.
    """
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, dict):
        content = value.get("bytes")
        found = as_image(value.get("path") if content is None else content, folders)
        return found and found | {"path": found["path"] or value.get("path")}
    if isinstance(value, bytes):
        return {"path": None, "bytes": value}
    if not isinstance(value, str) or not value.strip():
        return None
    if value.startswith("data:") or BASE64.fullmatch(value):
        try:
            return {"path": None, "bytes": base64.b64decode(value.partition(",")[2] or value)}
        except binascii.Error:
            return {"path": value, "bytes": None}  # whoever opens it reports it
    return {"path": locate_image(value.strip(), folders), "bytes": None}
