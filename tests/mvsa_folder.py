"""Small folders in the layout of MVSA, for tests that read or damage them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

HEADER = "ID\ttext,image\n"
PIXELS = np.random.default_rng(0).integers(60, 196, (40, 70, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)


def encoded(image: Image.Image, image_format: str, **keywords: object) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, image_format, **keywords)
    return file.getvalue()


JPEG, PNG = encoded(RGB, "JPEG"), encoded(RGB, "PNG")


def write_labels(folder: Path, ids: list[str]) -> None:
    """A label file in which every post is positive."""
    rows = [f"{post_id}\tpositive,neutral\n" for post_id in ids]
    (folder / "labelResultAll.txt").write_text(HEADER + "".join(rows), encoding="utf-8")


def make_folder(folder: Path, labels: str, ids: list[str]) -> Path:
    """Write a label file, and for each ID a text and an image of its own."""
    (folder / "data").mkdir(parents=True)
    (folder / "labelResultAll.txt").write_text(labels, encoding="utf-8")
    for number, post_id in enumerate(ids):
        (folder / f"data/{post_id}.txt").write_text(f"post {post_id}\n")
        noise = np.random.default_rng(number).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"data/{post_id}.jpg")
    return folder
