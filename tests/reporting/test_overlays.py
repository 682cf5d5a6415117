"""Overlays: the right part of the image, at the image's own resolution, and smooth."""

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from transformers import BitImageProcessor, CLIPImageProcessor, ConvNextImageProcessor, SiglipImageProcessor

from clipcacg.processing_clipcacg import ClipCaCgProcessor, rgb_array
from clipcacg.scripts.reporting.overlays import GOLD, LONGEST_EDGE, HeatMap, gild, seen_parts, tint, upsample

CROPPED = {"size": {"shortest_edge": 72}, "crop_size": {"height": 56, "width": 56}}


def smooth_image(width: int, height: int) -> Image.Image:
    """Random spots, a third as large as the shorter edge, which resizing hardly changes."""
    spots = [3 * edge // min(width, height) for edge in (height, width)]
    values = np.random.default_rng(0).integers(0, 256, (*spots, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def processor(backbones: Path) -> ClipCaCgProcessor:
    return ClipCaCgProcessor.from_backbones(backbones / "text", backbones / "vision", backbones / "clip")


@pytest.mark.parametrize("size", [(300, 200), (150, 400), (97, 96), (40, 30), (2100, 900), (60, 900)])
@pytest.mark.parametrize(
    "views",
    [
        (ConvNextImageProcessor(size={"shortest_edge": 64}), CLIPImageProcessor(**CROPPED)),
        (BitImageProcessor(**CROPPED), SiglipImageProcessor(size={"height": 64, "width": 64})),
    ],
    ids=["convnext and clip", "bit and siglip"],
)
def test_a_part_is_what_the_encoder_sees(
    processor: ClipCaCgProcessor, size: tuple[int, int], views: tuple[object, object]
) -> None:
    """Resized to the encoder's size it is the encoder's input, whatever the processor does to get there."""
    processor.image_processor, processor.clip_image_processor = views
    array = rgb_array(smooth_image(*size), None, None)
    parts = seen_parts(processor, array)
    inputs = processor(images=array, do_normalize=False, return_tensors="np")
    assert parts.keys() == {"pixel_values", "clip_pixel_values"}
    for name, part in parts.items():
        expected = inputs[name][0].transpose(1, 2, 0)
        drawn = Image.fromarray((part * 255).astype(np.uint8))
        resized = np.asarray(drawn.resize(expected.shape[1::-1], Image.Resampling.BICUBIC)) / 255
        shifted = np.roll(expected, len(expected) // 16, axis=0)
        assert np.abs(resized - expected).mean() < 0.03
        assert np.abs(resized - shifted).mean() > 0.04  # the bound would see a shift


def test_a_part_keeps_the_pixels_of_the_image(processor: ClipCaCgProcessor) -> None:
    array = rgb_array(smooth_image(600, 400), None, None)
    parts = seen_parts(processor, array)
    assert np.array_equal(parts["clip_pixel_values"], array.transpose(1, 2, 0)[:, 100:500] / np.float32(255))
    assert parts["pixel_values"].shape == (351, 352, 3)  # ConvNext's processor shows 64 of 73 rows
    large = seen_parts(processor, rgb_array(smooth_image(3000, 1500), None, None))
    assert large["clip_pixel_values"].shape == (LONGEST_EDGE // 2, LONGEST_EDGE // 2, 3)


def test_orientation_and_transparency(processor: ClipCaCgProcessor, tmp_path: Path) -> None:
    """A photo is drawn upright, and a transparent image with the colors that the model reads."""
    upright = smooth_image(90, 120)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turn by 90 degrees to the right
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    transparent = upright.copy()
    transparent.putalpha(Image.new("L", upright.size, 20))
    expected = seen_parts(processor, rgb_array(upright, None, None))["pixel_values"]
    for image in (tmp_path / "turned.png", transparent):
        assert np.array_equal(seen_parts(processor, rgb_array(image, None, None))["pixel_values"], expected)


def test_upsampling_is_smooth() -> None:
    """No step between neighbors as in a mosaic: a region becomes a hill around its center."""
    weights = np.zeros((7, 7))
    weights[2, 4] = 1
    found = upsample(HeatMap(np.zeros((350, 350, 3)), weights))[..., 0]
    assert np.unravel_index(found.argmax(), found.shape) == pytest.approx((125, 225), abs=1)
    assert np.abs(np.diff(found, axis=0)).max() < 0.04 and found.max() == pytest.approx(1, abs=0.01)


def test_colours() -> None:
    view = np.full((40, 40, 3), 0.5)
    corner, even = np.zeros((4, 4)), np.full((4, 4), 0.25)
    corner[0, 3] = 1
    gilded = gild(HeatMap(view, corner))
    assert gilded[0, 39] == pytest.approx(0.125 + 0.75 * np.array(GOLD)) and gilded[39, 0].tolist() == [0.5] * 3
    uniform = 0.5 * 0.625 + 0.375 * np.array(GOLD)
    assert gild(HeatMap(view, even)) == pytest.approx(np.broadcast_to(uniform, (40, 40, 3)))
    for weights, channel in ((corner, 0), (-corner, 2)):
        tinted = tint(HeatMap(view, weights), limit=1)
        assert tinted[0, 39].argmax() == channel and tinted[39, 0].tolist() == [0.5] * 3
    assert tint(HeatMap(view, corner * 0), limit=0).tolist() == view.tolist()
