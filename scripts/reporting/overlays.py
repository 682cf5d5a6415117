"""Weights of image regions, drawn on the image itself: on the part of it that an encoder sees."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

LONGEST_EDGE = 1024  # pixels of a drawing
RED, BLUE, GOLD = (0.84, 0.15, 0.16), (0.12, 0.35, 0.75), (0.88, 0.63, 0.0)


@dataclass
class HeatMap:
    """Weights of the regions of an image.

    Args:
        view: (height, width, 3), values in 0 to 1: the part of the image that the encoder sees, in its own pixels.
        weights: (rows, columns), from the top left.
    """

    view: np.ndarray
    weights: np.ndarray


def seen_parts(processor: Any, image: np.ndarray) -> dict[str, np.ndarray]:
    """Cut out of an image what each encoder sees of it, in the image's own pixels and proportions.

    Every image processor resizes and crops by rules of its own. So it also processes an image of coordinates, and what
    comes out tells the place of each pixel.

    Args:
        processor: A `ClipCaCgProcessor`.
        image: (3, height, width), bytes. A large image is made smaller first.

    Returns:
        By the name of the input, "pixel_values" and perhaps "clip_pixel_values": (height, width, 3), values in 0 to 1.
    """
    whole = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)).astype(np.uint8))
    whole.thumbnail((LONGEST_EDGE, LONGEST_EDGE))
    x, y = ((np.arange(edge, dtype=np.float32) + 0.5) / edge for edge in whole.size)
    coordinates = np.stack(np.broadcast_arrays(x, y[:, None], np.float32(0)))
    views = processor(images=coordinates, do_rescale=False, do_normalize=False, return_tensors="np")
    parts = {}
    for name in views.keys() & {"pixel_values", "clip_pixel_values"}:
        columns, rows, _ = views[name][0]
        (left, right), (top, bottom) = ends(columns.mean(axis=0), whole.width), ends(rows.mean(axis=1), whole.height)
        parts[name] = np.asarray(whole.crop((left, top, right, bottom)), np.float32) / 255
    return parts


def ends(coordinates: np.ndarray, edge: int) -> tuple[int, int]:
    """Where a view begins and ends on one axis of the image, in pixels.

    Args:
        coordinates: (size,), for each row or column of the view its place in the image, from 0 to 1.
        edge: Pixels of the image on this axis.
    """
    size = len(coordinates)
    middle = np.arange(size // 4, size - size // 4)  # resizing bends the coordinates close to the border
    slope, start = np.polyfit(middle, coordinates[middle], 1)
    first, last = np.rint(np.clip([start - slope / 2, start + slope * (size - 0.5)], 0, 1) * edge).astype(int)
    return int(first), int(max(last, first + 1))


def upsample(heat_map: HeatMap) -> np.ndarray:
    """Resize the weights (rows, columns) smoothly to (height, width, 1) of the image."""
    height, width = heat_map.view.shape[:2]
    weights = Image.fromarray(heat_map.weights.astype(np.float32))
    return np.asarray(weights.resize((width, height), Image.Resampling.BICUBIC))[..., None]


def gild(heat_map: HeatMap) -> np.ndarray:
    """The image (height, width, 3) in grey, golden where the weights are high.

    The strongest weight or twice the average, whichever is more, gets full color: uniform attention gives a uniform
    image.
    """
    weights = heat_map.weights
    full = max(weights.max(), 2 * weights.mean())
    return blend(heat_map, upsample(heat_map).clip(0) / full, np.array(GOLD))


def tint(heat_map: HeatMap, limit: float) -> np.ndarray:
    """The image (height, width, 3) in grey, tinted red for positive weights and blue for negative ones.

    Args:
        heat_map: What to show.
        limit: The weight that gets full color.
    """
    weights = upsample(heat_map) / (limit or 1)
    return blend(heat_map, np.abs(weights), np.where(weights > 0, RED, BLUE))


def blend(heat_map: HeatMap, strength: np.ndarray, color: np.ndarray) -> np.ndarray:
    """The image in grey (height, width, 3), with so much of the color; full strength, 1, leaves the image visible."""
    share = 0.75 * strength.clip(0, 1)
    return heat_map.view.mean(axis=-1, keepdims=True) * (1 - share) + color * share
