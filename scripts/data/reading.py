"""Turn the texts and images of posts into model inputs, and name the post that cannot be read."""

from collections.abc import Collection, Sequence
from typing import Any

import torch

from clipcacg.processing_clipcacg import ClipCaCgProcessor, is_blank
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.images import image_source


def read_posts(
    processor: ClipCaCgProcessor, rows: Sequence[dict[str, Any]], columns: Collection[str], may_lack: bool = False
) -> dict[str, torch.Tensor]:
    """Process the columns "text" and "image", those of them that are in `columns`.

    Args:
        processor: Makes the inputs.
        rows: Posts.
        columns: Columns to read.
        may_lack: Take posts without an image, whose column is None, and without a text, whose column is blank.

    Raises:
        InputError: a text or image cannot be read; the message names the post.
    """
    inputs: dict[str, Any] = {}
    try:
        if "text" in columns:
            if not may_lack and any(row["text"] is None for row in rows):
                raise InputError("it has no text")
            inputs["text"] = [None if may_lack and is_blank(row["text"]) else row["text"] for row in rows]
        if "image" in columns:
            inputs["images"] = [
                None if may_lack and row["image"] is None else image_source(row["image"]) for row in rows
            ]
        return dict(processor(**inputs, return_tensors="pt")) if inputs else {}
    except (OSError, TypeError, ValueError) as error:
        if len(rows) == 1:
            raise InputError(f"post {rows[0].get('id', '')}: {error}") from error
        for row in rows:  # one of them fails alone too, and is named
            read_posts(processor, [row], columns, may_lack)
        raise
