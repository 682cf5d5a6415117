"""The processor: every kind of image and text, keywords, limits, errors, answers, and saving."""

import base64
import copy
import io
import json
import logging
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from sklearn.datasets import load_sample_images
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from clipcacg import processing_clipcacg
from clipcacg.processing_clipcacg import ClipCaCgProcessor, label_scores

pytestmark = pytest.mark.filterwarnings("error")  # nothing that is tested here may warn
LONG = "good day " * 200
NAMES = ["input_ids", "attention_mask", "pixel_values"]
CLIP_NAMES = [f"clip_{name}" for name in NAMES]
PIXELS = np.random.default_rng(0).integers(60, 196, (40, 70, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)
GRAY = RGB.convert("L")
GRAYS = np.asarray(GRAY)


def stored(image: Image.Image, form: str = "PNG", **keywords: Any) -> Image.Image:
    """An image as it comes back from a file."""
    file = io.BytesIO()
    image.save(file, form, **keywords)
    return Image.open(file)


def sixteen_bits(mode: str, dtype: str) -> Image.Image:
    return Image.frombytes(mode, GRAY.size, (GRAYS.astype(int) * 256 + 77).astype(dtype).tobytes())


PALETTE, RED, BLUE = RGB.quantize(16), *(Image.new("RGB", (70, 40), colour) for colour in ("red", "blue"))
JPEG = stored(RGB, "JPEG").fp.getvalue()
# What is given, and the image it shows.
IMAGES: dict[str, tuple[Any, Image.Image]] = {
    **{mode: (RGB.convert(mode), RGB.convert(mode)) for mode in ("1", "L", "P", "PA", "RGBA", "CMYK", "YCbCr")},
    **{mode: (GRAY.convert(mode), GRAY) for mode in ("LA", "F", "I")},
    "one transparent colour": (stored(PALETTE, transparency=3), PALETTE),
    "a transparency for every colour": (stored(PALETTE, transparency=bytes([0, 128] + [255] * 14)), PALETTE),
    "I;16": (sixteen_bits("I;16", "<u2"), GRAY),
    "I;16B": (sixteen_bits("I;16B", ">u2"), GRAY),
    "sixteen bits in I": (sixteen_bits("I", "<i4"), GRAY),
    "below zero in I": (Image.fromarray(np.full((9, 9), -5, np.int32)), Image.new("L", (9, 9))),
    "first frame of a GIF": (stored(RED, "GIF", save_all=True, append_images=[BLUE]), RED),
    "height, width": (GRAYS, GRAY),
    "height, width, 1": (GRAYS[..., None], GRAY),
    "1, height, width": (GRAYS[None], GRAY),
    "height, width, 3": (PIXELS, RGB),
    "3, height, width": (PIXELS.transpose(2, 0, 1), RGB),
    "height, width, 4": (np.asarray(RGB.convert("RGBA")), RGB),
    "four rows": (PIXELS[:4], Image.fromarray(PIXELS[:4])),
    "four columns": (PIXELS[:, :4].transpose(2, 0, 1), Image.fromarray(PIXELS[:, :4])),
    "mirrored": (PIXELS[:, ::-1], RGB.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "sixteen bits": (PIXELS.astype(np.uint16) << 8, RGB),
    "tensor": (torch.tensor(PIXELS).permute(2, 0, 1), RGB),
    "gray tensor": (torch.tensor(GRAYS), GRAY),
    "tensor with a gradient": (torch.tensor(PIXELS, dtype=torch.float32, requires_grad=True), RGB),
    "float": (PIXELS.astype(np.float32), RGB),
    "float64": (PIXELS.astype(np.float64), RGB),
}
BROKEN = {
    "empty.jpg": b"",
    "page.jpg": b"<html>not found</html>",
    "cut.jpg": JPEG[: len(JPEG) // 2],
    "cut.png": stored(RGB).fp.getvalue()[:2000],
    "header.ppm": b"P6 40 40 255\n",
    "bomb.ppm": b"P6 40000 40000 255\n",
}


@pytest.fixture
def processor(backbones: Path) -> ClipCaCgProcessor:
    return ClipCaCgProcessor.from_backbones(backbones / "text", backbones / "vision", backbones / "clip")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Serves `tmp_path`; a function from a file's name to its URL, with the paths asked for as `.requests`."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            url.requests.append(self.path)

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path)) as http:

        def url(name: str) -> str:
            return f"http://127.0.0.1:{http.server_port}/{name}"

        url.requests = []
        threading.Thread(target=http.serve_forever, args=[0.01], daemon=True).start()
        yield url
        http.shutdown()


def check(processor: ClipCaCgProcessor, given: Any, *shown: Image.Image, atol: float = 1e-6, **keywords: Any) -> None:
    """Both views of what is given are those that the stock image processors make of the images shown."""
    data = processor(images=given, return_tensors="pt", **keywords)
    assert sorted(data) == ["clip_pixel_values", "pixel_values"]
    for name in data:
        stock = processor.clip_image_processor if name.startswith("clip") else processor.image_processor
        pixels = stock([image.convert("RGB") for image in shown], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(data[name], pixels, atol=atol, rtol=0)


@pytest.mark.parametrize("kind", IMAGES)
def test_images_of_every_kind(processor: ClipCaCgProcessor, kind: str):
    given, shown = IMAGES[kind]
    # A float image is not rounded to bytes between resizing and normalising.
    check(processor, given, shown, atol=0.02 if "float" in str(getattr(given, "dtype", "")) else 1e-6)


def test_exif_orientation_is_applied(processor: ClipCaCgProcessor, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    RGB.save(tmp_path / "turned.jpg", exif=exif)
    upright = Image.open(io.BytesIO(JPEG)).transpose(Image.Transpose.ROTATE_270)
    check(processor, tmp_path / "turned.jpg", upright)
    with Image.open(tmp_path / "turned.jpg") as image:
        check(processor, image, upright)


def test_batches_and_keywords_of_arrays(processor: ClipCaCgProcessor):
    batch = np.stack([PIXELS, PIXELS[::-1]])
    shown = [RGB, RGB.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    for given in (batch, batch.transpose(0, 3, 1, 2), torch.tensor(batch), torch.tensor(batch).permute(0, 3, 1, 2)):
        check(processor, given, *shown)
    check(processor, PIXELS / np.float32(255), RGB, atol=0.02, do_rescale=False)
    three_rows = PIXELS[:3]  # could be read either way
    check(processor, three_rows, Image.fromarray(three_rows), input_data_format="channels_last")


@pytest.mark.parametrize("kind", ["height, width, 3", "I;16"])
def test_paths_urls_and_base64(processor: ClipCaCgProcessor, tmp_path: Path, server: Callable, kind: str):
    given, shown = IMAGES[kind]
    image = given if kind == "I;16" else shown
    image.save(tmp_path / "a b.png")
    content = (tmp_path / "a b.png").read_bytes()
    text = base64.b64encode(content).decode()
    sources = [image, given, tmp_path / "a b.png", str(tmp_path / "a b.png"), server("a b.png")]
    sources += [text, base64.encodebytes(content).decode(), f"data:image/png;base64,{text}"]
    for source in sources:
        check(processor, source, shown)
    check(processor, sources, *[shown] * len(sources))


def test_an_image_is_read_once_for_both_views(processor: ClipCaCgProcessor, tmp_path: Path, server: Callable):
    class CountingPng(PngImageFile):
        read = 0

        def getexif(self) -> Image.Exif:
            self.read += 1
            return super().getexif()

    RGB.save(tmp_path / "a.png")
    with CountingPng(tmp_path / "a.png") as image:
        check(processor, image, RGB)
    check(processor, server("a.png"), RGB)
    assert image.read == 1 and server.requests == ["/a.png"]


@pytest.mark.parametrize("name", [*BROKEN, "missing.jpg", "."])
@pytest.mark.parametrize("kind", ["path", "string", "url"])
def test_a_broken_image_is_named(processor: ClipCaCgProcessor, tmp_path: Path, server: Callable, name: str, kind: str):
    (tmp_path / name).is_dir() or name == "missing.jpg" or (tmp_path / name).write_bytes(BROKEN[name])
    source = {"path": tmp_path / name, "string": str(tmp_path / name), "url": server(name)}[kind]
    missing = kind != "url" and name not in BROKEN
    with pytest.raises(FileNotFoundError if missing else ValueError) as caught:
        processor(images=[RGB, source])
    message = str(caught.value)
    assert repr(str(source)) in message and "\n" not in message
    assert ("404 " in message) == (kind == "url" and name == "missing.jpg")


def test_other_broken_sources_are_named(processor: ClipCaCgProcessor, tmp_path: Path):
    cut = base64.b64encode(JPEG[:1000]).decode()
    for source in (cut, f"data:image/jpeg;base64,{cut}", "http://127.0.0.1:9/a.png"):
        with pytest.raises(ValueError, match="cannot be read as an image") as caught:
            processor(images=source)
        assert source[:30] in str(caught.value) and len(str(caught.value)) < 300
    for name in ("cut.jpg", "cut.png", "header.ppm"):
        (tmp_path / name).write_bytes(BROKEN[name])
        with Image.open(tmp_path / name) as image, pytest.raises(ValueError, match=f"{name}' cannot be read as an im"):
            processor(images=image)


def test_a_post_or_many(processor: ClipCaCgProcessor):
    assert processor.model_input_names == NAMES + CLIP_NAMES
    both = processor(images=[RGB, GRAY], text=["good", ""], return_tensors="pt")
    assert list(both) == processor.model_input_names
    images = processor(images=(RGB, GRAY), return_tensors="pt")
    texts = processor(text=("good", ""), return_tensors="pt")
    assert {**texts, **images}.keys() == both.keys() and not texts.keys() & images.keys()
    assert all(torch.equal(value, both[name]) for name, value in {**texts, **images}.items())
    one = processor(images=RGB, text="good", return_tensors="pt")
    assert all(torch.equal(one[name][0], both[name][0]) for name in both)
    assert both["attention_mask"].sum(1).tolist()[1] == both["clip_attention_mask"].sum(1).tolist()[1] == 2  # ""


def test_missing_images_and_texts(processor: ClipCaCgProcessor):
    """A missing text is all padding, and only `has_image` tells that an image is missing."""
    whole = processor(images=[RGB, GRAY], text=["good", "bad"], return_tensors="pt")
    lacking = processor(images=[RGB, None], text=["good", None], return_tensors="pt")
    assert list(lacking) == [*whole, "has_image"] and lacking["has_image"].tolist() == [1, 0]
    for name in ("attention_mask", "clip_attention_mask"):
        assert lacking[name].sum(1).tolist() == [whole[name][0].sum(), 0]
    assert all(torch.equal(lacking[name][0], whole[name][0]) for name in whole)
    alone = processor(images=[None], return_tensors="np")
    assert alone["pixel_values"].shape == (1, *whole["pixel_values"].shape[1:]) and alone["has_image"].tolist() == [0]
    assert processor(images=[None, RGB], text=["good", "bad"])["has_image"] == [0, 1]


@pytest.mark.parametrize("kind, expected", [("pt", torch.Tensor), ("np", np.ndarray), (None, list)])
def test_return_tensors_and_padding(processor: ClipCaCgProcessor, kind: str | None, expected: type):
    posts = {"images": [RGB, GRAY], "text": ["good", "a bad day"], "return_tensors": kind}
    data = processor(**posts, padding="max_length")
    assert {type(value) for value in data.values()} == {expected}
    assert [len(data[name][0]) for name in ("input_ids", "clip_input_ids")] == [128, 77]
    if kind is None:
        data = processor(**posts, padding=False)
        assert len({len(row) for row in data["input_ids"]}) == len({len(row) for row in data["clip_input_ids"]}) == 2


@pytest.mark.parametrize(
    "keywords, length, clip_length",
    [
        ({}, 128, 77),
        ({"max_length": 10}, 10, 10),
        ({"max_length": 1000}, 128, 77),
        ({"max_length": 100, "padding": "max_length"}, 100, 77),
        ({"truncation": False}, 603, 77),
        ({"pad_to_multiple_of": 8}, 128, 72),
        ({"pad_to_multiple_of": 32, "max_length": 96}, 96, 64),
        ({"add_special_tokens": False}, 128, 77),
        ({"padding_side": "left"}, 128, 77),
    ],
)
def test_text_keywords(
    processor: ClipCaCgProcessor,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    keywords: dict[str, Any],
    length: int,
    clip_length: int,
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # for caplog to read its warnings
    data = processor(text=[LONG, "bad"], return_tensors="np", **keywords)
    assert data["input_ids"].shape == data["attention_mask"].shape == (2, length)
    assert data["clip_input_ids"].shape == data["clip_attention_mask"].shape == (2, clip_length)
    start, end = processor.clip_tokenizer.bos_token_id, processor.clip_tokenizer.eos_token_id
    assert (data["clip_input_ids"][:, 0] == start).all() and data["clip_input_ids"][0, -1] == end
    assert (np.diff(data["clip_attention_mask"][1]) <= 0).all()  # padded on the right
    special = keywords.get("add_special_tokens", True)
    assert (data["input_ids"][0, -1] == processor.tokenizer.eos_token_id) == special
    assert (data["attention_mask"][1, 0] == 0) == (keywords.get("padding_side") == "left")
    assert bool(caplog.records) == (keywords.get("truncation") is False)


def test_image_keywords(processor: ClipCaCgProcessor):
    def shapes(**keywords: Any) -> list[tuple[int, ...]]:
        return [value.shape[2:] for value in processor(images=RGB, return_tensors="np", **keywords).values()]

    assert shapes() == [(64, 64), (64, 64)]
    assert shapes(do_resize=False) == [(40, 70), (64, 64)]
    assert shapes(size={"shortest_edge": 32}, do_center_crop=False) == [(32, 32), (32, 56)]
    assert shapes(crop_size=20, crop_pct=0.5) == [(64, 64), (20, 20)]  # each known to one of them alone
    plain = processor(images=RGB, do_normalize=False, do_rescale=False, return_tensors="np")
    assert all(value.max() > 100 for value in plain.values())


def test_nested_keywords_are_those_of_transformers(processor: ClipCaCgProcessor):
    def outputs(**keywords: Any) -> dict[str, Any]:
        return dict(processor(images=RGB, text=[LONG], **keywords))

    flat = outputs(max_length=9, crop_size=20, return_tensors="np")
    for nested in (
        {"text_kwargs": {"max_length": 9}, "images_kwargs": {"crop_size": 20}, "return_tensors": "np"},
        {"text_kwargs": {"max_length": 9, "return_tensors": "np"}, "crop_size": 20},
        {
            "common_kwargs": {"return_tensors": "np", "max_length": 30},
            "max_length": 9,
            "images_kwargs": {"crop_size": 20},
        },
    ):
        before = copy.deepcopy(nested)
        np.testing.assert_equal(outputs(**nested), flat)
        assert nested == before


@pytest.mark.parametrize(
    "images, text, keywords, error, message",
    [
        (None, None, {}, ValueError, "images, text, or both"),
        ([], None, {}, ValueError, "images is an empty list"),
        (None, [], {}, ValueError, "text is an empty list"),
        ([], [], {}, ValueError, "empty list"),
        ([RGB, "missing.jpg"], "one", {}, ValueError, "2 images, 1 text"),
        (PIXELS, ["one", "two"], {}, ValueError, "1 images, 2 texts"),
        ([[RGB]], None, {}, TypeError, r"images\[0\] .* not list"),
        (None, [["one"]], {}, TypeError, r"text\[0\] .* not list"),
        (
            RGB,
            "one",
            {"text_kwargs": {"padding": False}, "padding": True},
            ValueError,
            "padding .* in text_kwargs and flat",
        ),
        (RGB, "one", {"images_kwargs": {"size": 9}, "size": 9}, ValueError, "size was given twice"),
        (RGB, "one", {"images_kwargs": {"padding": True}}, TypeError, "Unknown keyword padding. Allowed: "),
        (RGB, "one", {"do_resizee": False}, TypeError, "Unknown keyword do_resizee. Allowed: "),
        (None, "one", {"videos": None, "truncatoin": 1}, TypeError, "Unknown keyword truncatoin, videos. Allowed: "),
        (np.zeros((9, 9, 2)), None, {}, ValueError, r"\(9, 9, 2\) is not an image"),
        (np.zeros(3), None, {}, ValueError, r"\(3,\) is not an image"),
        (np.zeros((1, 1, 9, 9, 3)), None, {}, ValueError, r"\(1, 9, 9, 3\) is not an image"),
        (np.zeros((0, 9, 3)), None, {}, ValueError, r"\(0, 9, 3\) is not an image"),
        (Image.new("RGB", (0, 9)), None, {}, ValueError, "An image .*no pixels"),
    ],
)
def test_clear_errors(
    processor: ClipCaCgProcessor, images: Any, text: Any, keywords: dict, error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        processor(images=images, text=text, **keywords)


def test_bert_and_a_shared_tokenizer(processor: ClipCaCgProcessor, tmp_path: Path):
    bert = hf.BertTokenizer(vocab={token: i for i, token in enumerate("[PAD] [UNK] [CLS] [SEP] [MASK] good".split())})
    assert "token_type_ids" in bert("good")
    shared = ClipCaCgProcessor(processor.image_processor, bert, processor.clip_image_processor, bert)
    shared.save_pretrained(tmp_path)
    for each in (shared, ClipCaCgProcessor.from_pretrained(tmp_path)):
        data = each(images=RGB, text="good", return_tensors="pt")
        assert list(data) == each.model_input_names
        assert data["input_ids"].tolist() == data["clip_input_ids"].tolist() == [[2, 5, 3]]


@pytest.mark.parametrize("clip", [True, False])
def test_round_trips(processor: ClipCaCgProcessor, tmp_path: Path, clip: bool):
    if not clip:
        processor = ClipCaCgProcessor(processor.image_processor, processor.tokenizer)
    expected = processor(images=RGB, text=LONG, return_tensors="pt")
    assert list(expected) == processor.model_input_names == [n for n in NAMES + CLIP_NAMES if clip or n in NAMES]
    processor.save_pretrained(tmp_path / "first")
    reloaded = ClipCaCgProcessor.from_pretrained(tmp_path / "first")
    for _ in range(2):  # saved twice, the second time over itself
        reloaded.save_pretrained(tmp_path / "second")
    saved = json.loads((tmp_path / "second" / "processor_config.json").read_text())
    parts = {"image_processor": "ConvNextImageProcessor"} | (
        {"clip_image_processor": "CLIPImageProcessor"} if clip else {}
    )
    assert {k: v["image_processor_type"] for k, v in saved.items() if k.endswith("image_processor")} == parts
    assert (tmp_path / "second" / "clip_tokenizer" / "tokenizer.json").exists() == clip
    again = ClipCaCgProcessor.from_pretrained(tmp_path / "second")
    for each in (reloaded, again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        data = each(images=RGB, text=LONG, return_tensors="pt")
        assert list(data) == list(expected)
        assert all(torch.equal(data[name], expected[name]) for name in expected)


def test_it_is_json_and_auto_processor_reads_it(processor: ClipCaCgProcessor, tmp_path: Path):
    processor.save_pretrained(tmp_path / "saved")
    again = hf.AutoProcessor.from_pretrained(tmp_path / "saved")
    assert type(again) is ClipCaCgProcessor
    written = json.loads(ClipCaCgProcessor.from_pretrained(tmp_path / "saved").to_json_string())
    again.to_json_file(tmp_path / "processor.json")
    assert json.loads((tmp_path / "processor.json").read_text()) == written
    assert "- tokenizer: " in repr(processor) and "clip_image_processor" in repr(processor)


def test_defaults_of_the_parts_apply_unless_a_keyword_replaces_them(processor: ClipCaCgProcessor):
    image = torch.full((3, 50, 50), 200, dtype=torch.uint8)
    posts = {"images": [image] * 2, "text": ["a", "a b c d"], "return_tensors": "pt"}
    processor.tokenizer.padding_side = "left"
    processor.image_processor.do_rescale, processor.image_processor.do_normalize = True, False
    data = processor(**posts)
    assert data["attention_mask"][0, 0] == 0 and data["pixel_values"].max() <= 1
    data = processor(**posts, padding_side="right", do_rescale=False)
    assert data["attention_mask"][0, 0] == 1 and data["pixel_values"].max() > 100
    again = processor(**posts)  # the keywords of the last call have no effect
    assert again["attention_mask"][0, 0] == 0 and again["pixel_values"].max() <= 1


def test_a_missing_clip_tokenizer_is_an_error(processor: ClipCaCgProcessor, tmp_path: Path):
    processor.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "clip_tokenizer")
    with pytest.raises(OSError, match="no CLIP tokenizer in its clip_tokenizer"):
        ClipCaCgProcessor.from_pretrained(tmp_path)


def test_from_backbones(backbones: Path, tmp_path: Path):
    for pair in ({"clip_tokenizer": "any"}, {"clip_image_processor": "any"}):
        with pytest.raises(ValueError, match="give both or neither"):
            ClipCaCgProcessor("any", "any", **pair)
    with pytest.raises(ValueError, match="clip_mode"):
        ClipCaCgProcessor.from_backbones(backbones / "text", backbones / "vision", clip_mode="encodr")
    shutil.copytree(backbones, tmp_path / "copy")
    for name in ("text", "clip"):  # a tokenizer without a limit gets the encoder's
        file = tmp_path / "copy" / name / "tokenizer_config.json"
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "model_max_length"}))
        assert hf.AutoTokenizer.from_pretrained(file.parent).model_max_length > 10**9
    processor = ClipCaCgProcessor.from_backbones(*(tmp_path / "copy" / name for name in ("text", "vision", "clip")))
    assert (processor.tokenizer.model_max_length, processor.clip_tokenizer.model_max_length) == (128, 77)


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_a_timm_encoder(backbones: Path, tmp_path: Path, crop_mode: str):
    pytest.importorskip("timm")
    scale = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    transform = {"input_size": [3, 96, 96], "crop_pct": 0.9, "interpolation": "bicubic", "crop_mode": crop_mode}
    transform |= scale
    hf.TimmWrapperConfig(architecture="test_resnet", pretrained_cfg=transform).save_pretrained(tmp_path / "timm")
    stock = hf.AutoImageProcessor.from_pretrained(tmp_path / "timm")(RGB, return_tensors="pt")["pixel_values"]
    ClipCaCgProcessor.from_backbones(backbones / "text", tmp_path / "timm").save_pretrained(tmp_path / "processor")
    processor = ClipCaCgProcessor.from_pretrained(tmp_path / "processor")
    assert isinstance(processor.image_processor, hf.BitImageProcessor)
    pixels = processor(images=RGB, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, stock, atol=0.02, rtol=0)  # a byte, which two resizing codes round apart


def test_a_tokenizer_without_special_tokens_masks_and_limit(backbones: Path, tmp_path: Path):
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "day": 2}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", model_input_names=["input_ids"])
    tokenizer.save_pretrained(tmp_path)
    hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=6, vocab_size=8).save_pretrained(tmp_path)
    processor = ClipCaCgProcessor.from_backbones(tmp_path, backbones / "vision")
    for texts in ([""], ["", "a day"], ["", "a day " * 9]):
        for form in ({"return_tensors": "pt"}, {"padding": False}):
            inputs = processor(text=texts, **form)
            lengths = [len(ids) for ids in inputs["input_ids"]]
            assert 1 <= min(lengths) and max(lengths) <= 6
            assert sum(inputs["attention_mask"][0]) == 0 and inputs["input_ids"][0][0] == 0


def photograph(width: int, height: int) -> Image.Image:
    """A real photograph, repeated until it is large enough."""
    tile = load_sample_images().images[0]
    return Image.fromarray(np.tile(tile, (height // 427 + 1, width // 640 + 1, 1))[:height, :width])


SIZES = [(640, 400, 2), (1280, 768, 4), (641, 400, 1), (250, 240, 1)]


@pytest.mark.parametrize(("width", "height", "decoded"), SIZES)
def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(
    processor: ClipCaCgProcessor,
    width: int,
    height: int,
    decoded: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photograph(width, height).save(tmp_path / "photo.jpg", quality=90)
    sizes, original = [], processing_clipcacg._pil_to_rgb
    monkeypatch.setattr(processing_clipcacg, "_pil_to_rgb", lambda image: sizes.append(image.size) or original(image))
    keywords = {"size": {"shortest_edge": 80}, "do_normalize": False, "return_tensors": "pt"}
    reduced = processor(images=tmp_path / "photo.jpg", **keywords)
    assert sizes == [(width // decoded, height // decoded)]
    with Image.open(tmp_path / "photo.jpg") as image:
        image.load()
        whole = processor(images=image, **keywords)
    for view in ("pixel_values", "clip_pixel_values"):
        assert (reduced[view] - whole[view]).abs().mean() <= 1 / 255


def test_a_jpeg_that_is_not_resized_is_decoded_whole(processor: ClipCaCgProcessor, tmp_path: Path) -> None:
    photograph(640, 480).save(tmp_path / "photo.jpg")
    keywords = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
    assert processor(images=tmp_path / "photo.jpg", **keywords)["pixel_values"].shape[-2:] == (480, 640)
    few, many = ({"size": {"shortest_edge": 64}, "crop_pct": share} for share in (0.5, 0.05))
    assert processor.needed_edge(few) == 128 and processor.needed_edge(many) == 1280


@pytest.mark.parametrize("size", [(48, 40), [48, 40]])
def test_a_size_may_be_a_pair_as_in_the_parts(processor: ClipCaCgProcessor, size: Any) -> None:
    processor = copy.copy(processor)
    processor.image_processor = processor.clip_image_processor  # ConvNext's own takes no pair
    pixels = processor(images=RGB, size=size, do_center_crop=False, return_tensors="pt")["clip_pixel_values"]
    assert pixels.shape[-2:] == (48, 40)


@pytest.mark.parametrize(
    ("fields", "scores", "answer"),
    [
        ({}, [0.6225, 0.3775], {"label": "a"}),
        ({"problem_type": "multi_label_classification"}, [0.8808, 0.8176], {"labels": ["a", "b"]}),
        ({"num_labels": 1, "id2label": None}, [2.0], {"value": 2.0}),
    ],
)
def test_one_rule_turns_logits_into_answers(
    tiny_config: Callable, fields: dict[str, Any], scores: list[float], answer: dict[str, Any]
) -> None:
    config = tiny_config(**{"id2label": {0: "a", 1: "b"}, **fields})
    logits = torch.tensor([[2.0, 1.5][: config.num_labels], [-3.0, -2.0][: config.num_labels]])
    assert label_scores(logits, config)[0].tolist() == pytest.approx(scores, abs=1e-4)
    assert label_scores(logits.bfloat16(), config).dtype == torch.float32
    first, second = ClipCaCgProcessor.post_process(logits, config)
    if "value" not in answer:
        assert first.pop("scores") == pytest.approx(dict(zip("ab", scores, strict=True)), abs=1e-4)
        assert second.get("label", second.get("labels")) == ("b" if "label" in answer else [])
    assert first == answer


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", "regression"])
def test_the_temperature_scales_probabilities_and_nothing_else(tiny_config: Callable, problem_type: str) -> None:
    count = 1 if problem_type == "regression" else 3
    config = tiny_config(problem_type=problem_type, num_labels=count, id2label=None, temperature=2.0)
    logits = torch.tensor([[2.0, 1.0, -3.0][:count]])
    expected = {
        "single_label_classification": (logits / 2).softmax(-1),
        "multi_label_classification": (logits / 2).sigmoid(),
        "regression": logits,
    }
    torch.testing.assert_close(label_scores(logits, config), expected[problem_type])


def test_an_answer_below_min_confidence_is_uncertain(tiny_config: Callable) -> None:
    config = tiny_config(id2label={0: "a", 1: "b"})
    logits = torch.tensor([[2.0, 1.5], [-3.0, -2.0]])  # 0.62 and 0.73 for the likelier one
    without, found = (ClipCaCgProcessor.post_process(logits, config, least) for least in (None, 0.7))
    assert [answer["label"] for answer in without] == ["a", "b"]
    assert [answer["label"] for answer in found] == ["uncertain", "b"]
    assert [answer["scores"] for answer in found] == [answer["scores"] for answer in without]
    with pytest.raises(ValueError, match="min_confidence must be from 0 to 1, not 70"):
        ClipCaCgProcessor.post_process(logits, config, 70)
    several = tiny_config(id2label={0: "a", 1: "b"}, problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="min_confidence is for one label per example, .* multi_label_classification"):
        ClipCaCgProcessor.post_process(logits, several, 0.7)


def test_the_collator_makes_batches_of_rows_and_can_be_pickled(checkpoint: Path, posts_folder: Path) -> None:
    processor = ClipCaCgProcessor.from_pretrained(checkpoint)
    images, text = [str(posts_folder / f"data/{number}.jpg") for number in (1, 2)], ["one", "a longer text"]
    rows = [{"image": image, "text": words, "label": 2} for image, words in zip(images, text, strict=True)]
    batch = pickle.loads(pickle.dumps(processor.collate))(rows)
    expected = processor(images=images, text=text, return_tensors="pt")
    assert batch.pop("labels").tolist() == [2, 2] and batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert "pixel_values" not in processor.collate([{"tweet": None}], text="tweet")
    with pytest.raises(ValueError, match="no column image or text, only label. With the Trainer set remove_unused"):
        processor.collate([{"label": 1}])
