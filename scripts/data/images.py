"""Values of an undecoded image column, `{"path": ..., "bytes": ...}`, as other modules need them."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize
from urllib.request import url2pathname

from clipcacg.scripts.data.errors import InputError


def locate_image(name: str, folders: Sequence[Path | str]) -> str:
    """Return the path of an image that a table names, in the first of the folders that has it; a URL stays a URL.

    If none has it, the folders are searched for what the name would be if the table or the images came from another
    system: with slashes in place of backslashes, and with accents as characters of their own or not.
    """
    if name.startswith("file://"):
        name = url2pathname(name.removeprefix("file://"))
    if "://" in name:
        return name
    slashed = name.replace("\\", "/")
    names = dict.fromkeys([name, slashed, normalize("NFC", slashed), normalize("NFD", slashed)])
    paths = [str(Path(folder) / name) for name in names for folder in folders]
    return next(filter(os.path.isfile, paths), paths[0])


def image_source(value: Any) -> Any:
    """Return what the processor opens: the path, or a file object with the bytes that Parquet holds.

    Raises:
        InputError: the post has no image.
    """
    if value is None:
        raise InputError("it has no image")
    if not isinstance(value, dict):
        return value
    if value["bytes"] is None:
        return value["path"]
    file = io.BytesIO(value["bytes"])
    file.name = value["path"] or "image"
    return file


def image_bytes(value: dict[str, Any]) -> bytes:
    """Return the encoded bytes of an image, by which equal images are recognised.

    Raises:
        InputError: the file cannot be read, or the image is a URL, which may show another image tomorrow.
    """
    if value["bytes"] is not None:
        return value["bytes"]
    if "://" in value["path"]:
        raise InputError(f"{value['path']} is a URL; --cache_features and --group_duplicates need local images")
    try:
        return Path(value["path"]).read_bytes()
    except OSError as error:
        raise InputError(f"the image {value['path']} cannot be read: {error.strerror}") from error
