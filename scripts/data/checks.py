"""Cheap checks of images before training: each file exists, its header is that of an image, and it is complete."""

import os
import warnings
from pathlib import Path
from typing import BinaryIO

import datasets
from PIL import Image

from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.images import image_source

END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}


def bad_posts(dataset: datasets.Dataset, may_lack: bool = False, decode: bool = False) -> dict[int, str]:
    """Return what is wrong with the texts and images of posts, by the index of the post.

    An image behind a URL is checked when it is read.

    Args:
        dataset: Posts with the column text, image or both.
        may_lack: Accept posts that lack one of the two.
        decode: Decode every image, which finds all faults and is slow.
    """
    reasons = {}
    texts: list[str | None] = dataset["text"][:] if "text" in dataset.column_names else []
    if not may_lack:
        reasons = {index: "it has no text" for index, text in enumerate(texts) if text is None}
    if "image" not in dataset.column_names:
        return reasons
    for index, value in enumerate(dataset["image"]):
        if value is None and may_lack and (texts[index] or "").strip():
            continue
        try:
            source = image_source(value)
            if not isinstance(source, str):
                check_image(source, source.name, decode)
            elif "://" not in source:
                if not os.path.isfile(source):
                    raise InputError(f"missing image: {source}")
                with Path(source).open("rb") as file:
                    check_image(file, source, decode)
        except (InputError, OSError) as error:
            reasons[index] = str(error)
    return reasons


def check_image(file: BinaryIO, name: str, decode: bool = False) -> None:
    """Open an image. One without an end marker is decoded to find out whether it is complete.

    Args:
        file: The encoded image.
        name: Its name, for the message.
        decode: Decode it even if it has an end marker.

    Raises:
        InputError: If the image cannot be opened or decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                if decode or not has_end_marker(file, image.format):
                    image.load()
    except Exception as error:  # Pillow raises nearly any exception for a broken file
        raise InputError(f"broken image: {name}: {type(error).__name__}: {error}") from error


def has_end_marker(file: BinaryIO, image_format: str | None) -> bool:
    """Whether a JPEG, PNG or GIF file ends with the end marker of its format, apart from padding."""
    marker = END_MARKERS.get(image_format or "")
    position = file.tell()
    file.seek(max(file.seek(0, os.SEEK_END) - 64, 0))
    end = file.read().rstrip(b"\0\r\n ")
    file.seek(position)
    return marker is not None and end.endswith(marker)
