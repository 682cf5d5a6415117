"""Processor of CLIP-CA-CG: pictures and texts to the inputs of the model."""

from __future__ import annotations

import base64
import copy
import io
import math
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, BatchFeature, BitImageProcessor
from transformers.processing_utils import ProcessorMixin

from .configuration_clipcacg import ClipCaCgConfig

# A tokenizer without a limit of its own says so with a very large number.
NO_LIMIT = 10**9
SOURCES = (str, os.PathLike, Image.Image)  # of a picture, beside arrays, tensors and files
MAX_RATIO = 100  # of a picture's edges, beyond which only its middle is looked at; our choice
TIMEOUT = 60  # seconds that a server of pictures has to answer
TEXT_KEYWORDS = {"add_special_tokens", "max_length", "pad_to_multiple_of", "padding", "padding_side", "truncation"}
# Tokenizers keep how to pad and cut from call to call, so threads that ask for different things must take turns. One
# lock a process: a fork of one that holds it would wait for ever.
LOCKS: dict[int, threading.Lock] = {}


class ClipCaCgProcessor(ProcessorMixin):
    """Makes `input_ids`, `attention_mask`, `pixel_values` and, with the CLIP pair, their `clip_*` counterparts.

    Args:
        image_processor: Image processor of the vision encoder.
        tokenizer: Tokenizer of the text encoder.
        clip_image_processor: CLIP's image processor, or None for a model that reads no CLIP inputs.
        clip_tokenizer: CLIP's tokenizer; given exactly when `clip_image_processor` is.

    Raises:
        ValueError: If only one of the CLIP pair is given.

    Source:
        transformers' `ProcessorMixin`. Saved beside the model: both image processors in `processor_config.json`,
        CLIP's tokenizer in the folder `clip_tokenizer`.
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self, image_processor: Any, tokenizer: Any, clip_image_processor: Any = None, clip_tokenizer: Any = None
    ) -> None:
        if (clip_image_processor is None) != (clip_tokenizer is None):
            raise ValueError("clip_image_processor and clip_tokenizer go together: give both or neither.")
        super().__init__(image_processor, tokenizer)
        self.clip_image_processor = clip_image_processor
        self.clip_tokenizer = clip_tokenizer

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that transformers loads and saves. It refuses None as a part, so the CLIP pair is ours to do."""
        return ["image_processor", "tokenizer"]

    @classmethod
    def from_backbones(
        cls, text_model: str | Path, vision_model: str | Path, clip_model: str | Path | None = None, **config: Any
    ) -> ClipCaCgProcessor:
        """Build the processor that fits `from_backbones` of the model; the same call works on both.

        Args:
            text_model: Hub name or folder of the text encoder.
            vision_model: Hub name or folder of the vision encoder.
            clip_model: Hub name or folder of the CLIP model, or None.
            **config: Fields of `ClipCaCgConfig`; the processor does not depend on them.
        """
        ClipCaCgConfig(**{"clip_mode": "none", **config})  # a misspelt value is told here as well
        clip = () if clip_model is None else (AutoImageProcessor.from_pretrained(clip_model), _tokenizer(clip_model))
        return cls(_image_processor(vision_model), _tokenizer(text_model), *clip)

    @property
    def model_input_names(self) -> list[str]:
        names = ["input_ids", "attention_mask", "pixel_values"]
        return names if self.clip_tokenizer is None else names + [f"clip_{name}" for name in names]

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **kwargs: Any) -> BatchFeature:
        """Prepare one post or many; a picture alone or a text alone will do.

        Args:
            images: One picture or a list of them: PIL images of any mode, arrays or tensors (height, width),
                (channels, height, width) or (height, width, channels), paths, files open for reading bytes, URLs or
                base64 strings. A 4-D array is a batch.
            text: One text or a list of them, as many as there are pictures. Longer than the encoder takes: truncated.
            **kwargs: Keywords of the tokenizer (`padding`, True unless told otherwise; `truncation`, likewise;
                `max_length`, `pad_to_multiple_of`, `padding_side`, `add_special_tokens`), of the image processors
                (`do_resize`, `size`, `do_center_crop`, ...) and `return_tensors` ("pt", "np" or None for lists).
                CLIP's texts are cut at its own limit, keep their special tokens and are padded on the right whatever
                these say, as CLIP needs.

        Returns:
            A `BatchFeature` with the names of `model_input_names` that apply; the first axis is the post.

        Raises:
            TypeError: For a keyword that no part knows, or a picture or text of a type that cannot be read.
            ValueError: If there is nothing to do, the counts differ, or a picture is broken.
            FileNotFoundError: If there is no picture at a path.
        """
        return_tensors = kwargs.pop("return_tensors", None)
        text_kwargs = {name: kwargs.pop(name) for name in TEXT_KEYWORDS & kwargs.keys()}
        self._check_image_keywords(kwargs)
        if images is None and text is None:
            raise ValueError("The processor needs images, text, or both.")
        texts = None if text is None else _as_texts(text)
        pictures = None if images is None else _as_pictures(images)
        if texts and pictures and len(texts) != len(pictures):
            raise ValueError(
                f"Every post is one picture and one text: got {len(pictures)} images, {len(texts)} texts."
            )
        data: dict[str, Any] = {}
        if texts:
            data |= self._tokenize(texts, return_tensors, text_kwargs)
        if pictures:
            # Decoded and converted once, for both views.
            needed = self._needed_edge(kwargs)
            arrays = [_rgb_array(picture, kwargs.get("input_data_format"), needed) for picture in pictures]
            arrays = arrays if needed is None else [_middle(array) for array in arrays]
            data |= self._process_pictures(arrays, {**kwargs, "return_tensors": return_tensors})
        return BatchFeature({name: data[name] for name in self.model_input_names if name in data})

    @staticmethod
    def post_process(logits: torch.Tensor, config: ClipCaCgConfig) -> list[dict[str, Any]]:
        """Turn logits into answers, one per example.

        Args:
            logits: (batch, labels), as the model returns them.
            config: Config of the model: its `task` chooses the rule, its `id2label` names the labels.

        Returns:
            For one label per example `{"label": str, "scores": {label: probability}}`, for several
            `{"labels": [every label with a probability of 0.5 or more], "scores": {label: probability}}`, for a
            regression `{"value": float}`.
        """
        answers: list[dict[str, Any]] = []
        for row in label_scores(logits, config):
            if config.task == "regression":
                answers.append({"value": row.item()})
                continue
            scores = {config.id2label[index]: score for index, score in enumerate(row.tolist())}
            if config.task == "multi_label_classification":
                chosen = [label for label, score in scores.items() if score >= 0.5]
                answers.append({"labels": chosen, "scores": scores})
            else:
                answers.append({"label": config.id2label[int(row.argmax())], "scores": scores})
        return answers

    def _check_image_keywords(self, kwargs: dict[str, Any]) -> None:
        parts = [part for part in (self.image_processor, self.clip_image_processor) if part is not None]
        known = set().union(*(part.valid_kwargs.__annotations__ for part in parts))
        unknown = sorted(kwargs.keys() - known)
        if unknown:
            names = ", ".join(sorted(TEXT_KEYWORDS | known | {"return_tensors"}))
            raise TypeError(f"{', '.join(unknown)}: no such keyword; the processor takes {names}.")

    def _needed_edge(self, kwargs: dict[str, Any]) -> int | None:
        """The longest edge that either view is resized to, or None if one is not resized at all."""
        edges = []
        for part in (self.image_processor, self.clip_image_processor):
            if part is None:
                continue
            if not kwargs.get("do_resize", part.do_resize):
                return None
            size = kwargs.get("size", part.size)
            size = [size] if isinstance(size, int) else size
            values = size if isinstance(size, (list, tuple)) else dict(size).values()
            # ConvNextImageProcessor resizes to more than its size, and crops.
            share = kwargs.get("crop_pct") or getattr(part, "crop_pct", None) or 1
            edges += [value / share for value in values if value is not None]
        return math.ceil(max(edges))

    def _tokenize(self, texts: list[str], return_tensors: str | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs = {"padding": True, "truncation": True, **kwargs, "return_tensors": return_tensors}
        with LOCKS.setdefault(os.getpid(), threading.Lock()):
            data = dict(self.tokenizer(texts, **_within_limit(self.tokenizer, kwargs)))
            if self.clip_tokenizer is not None:
                # CLIP has no positions beyond its limit, and its sentence is the state of the closing token.
                kwargs |= {"truncation": True, "padding_side": "right", "add_special_tokens": True}
                clip = self.clip_tokenizer(texts, **_within_limit(self.clip_tokenizer, kwargs))
                data |= {f"clip_{name}": value for name, value in clip.items()}
        return data

    def _process_pictures(self, arrays: list[np.ndarray], kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs["input_data_format"] = "channels_first"
        data = {"pixel_values": self._view(self.image_processor, arrays, kwargs)}
        if self.clip_image_processor is not None:
            data["clip_pixel_values"] = self._view(self.clip_image_processor, arrays, kwargs)
        return data

    @staticmethod
    def _view(image_processor: Any, arrays: list[np.ndarray], kwargs: dict[str, Any]) -> Any:
        known = image_processor.valid_kwargs.__annotations__
        return image_processor(arrays, **{name: value for name, value in kwargs.items() if name in known})[
            "pixel_values"
        ]

    def to_dict(self) -> dict[str, Any]:
        """What goes into `processor_config.json`: tokenizers have files of their own."""
        parts = copy.copy(self)
        del parts.clip_tokenizer
        if parts.clip_image_processor is None:
            del parts.clip_image_processor
        return super(ClipCaCgProcessor, parts).to_dict()

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save every part, and the code that `trust_remote_code=True` runs; arguments as in `ProcessorMixin`."""
        if self.clip_tokenizer is not None:
            self.clip_tokenizer.save_pretrained(Path(save_directory) / "clip_tokenizer")
        files = super().save_pretrained(save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files

    @classmethod
    def _get_arguments_from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        processor_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        args = super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
        clip = (processor_dict or {}).pop("clip_image_processor", None)
        if clip is None:
            return args
        subfolder = os.path.join(kwargs.pop("subfolder", ""), "clip_tokenizer")
        try:
            clip_tokenizer = AutoTokenizer.from_pretrained(
                pretrained_model_name_or_path, subfolder=subfolder, **kwargs
            )
        except (OSError, ValueError) as error:
            raise OSError(f"{pretrained_model_name_or_path} has no CLIP tokenizer in its {subfolder}.") from error
        clip_image_processor = cls.get_possibly_dynamic_module(clip["image_processor_type"])(**clip)
        return [*args, clip_image_processor, clip_tokenizer]


def label_scores(logits: torch.Tensor, config: ClipCaCgConfig) -> torch.Tensor:
    """Turn logits into one score per label.

    Args:
        logits: (..., labels).
        config: Config of the model; its `task` chooses the rule.

    Returns:
        (..., labels) in float32: probabilities that add up to 1 for one label per example, independent probabilities
        for several labels, the predicted values themselves for a regression.
    """
    logits = logits.float()
    if config.task == "regression":
        return logits
    return logits.sigmoid() if config.task == "multi_label_classification" else logits.softmax(dim=-1)


def _within_limit(tokenizer: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords with a `max_length` that the encoder can read, also after padding to a multiple."""
    asked, multiple = kwargs.get("max_length"), kwargs.get("pad_to_multiple_of") or 1
    limit = tokenizer.model_max_length // multiple * multiple
    if not kwargs["truncation"] or limit > NO_LIMIT or (asked is None and multiple == 1):
        return kwargs
    return {**kwargs, "max_length": limit if asked is None else min(asked, limit)}


def _as_texts(text: Any) -> list[str]:
    texts = [text] if isinstance(text, str) else list(text)
    for index, item in enumerate(texts):
        if not isinstance(item, str):
            raise TypeError(f"text[{index}] must be a string, not {type(item).__name__}.")
        try:
            item.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text[{index}] is not Unicode: {error}") from None
    if not texts:
        raise ValueError("text is an empty list: there is nothing to process.")
    return texts


def _as_pictures(images: Any) -> list[Any]:
    one = isinstance(images, SOURCES) or hasattr(images, "read") or getattr(images, "ndim", 4) < 4
    pictures = [images] if one else list(images)
    for index, item in enumerate(pictures):
        if not (isinstance(item, SOURCES) or hasattr(item, "read") or hasattr(item, "ndim")):
            raise TypeError(
                f"images[{index}] must be a PIL image, an array, a tensor, a path, a file, a URL or a base64 string, "
                f"not {type(item).__name__}."
            )
    if not pictures:
        raise ValueError("images is an empty list: there is nothing to process.")
    return pictures


def _rgb_array(picture: Any, data_format: str | None, needed_edge: int | None) -> np.ndarray:
    """Any picture as (3, height, width): bytes for a PIL image, a path or a URL; an array keeps its own range.

    Channels come first in memory too: both image processors would otherwise turn the picture, and slowly.
    """
    if isinstance(picture, SOURCES) or hasattr(picture, "read"):
        return _decode(picture, needed_edge)
    array = np.asarray(picture.detach().cpu() if hasattr(picture, "detach") else picture)
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3 and (data_format or _guess_format(array)) == "channels_first":
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or array.size == 0:
        raise ValueError(
            f"An array of shape {tuple(picture.shape)} is not a picture: it needs a height, a width and 1, 3 or 4 "
            "channels."
        )
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    array = np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array[..., :3]
    # torch refuses arrays turned by a step of -1, or read-only ones.
    return np.require(array.transpose(2, 0, 1), requirements="CW")


def _middle(array: np.ndarray) -> np.ndarray:
    """A picture, or the middle of a sliver: 30,000 x 2 pixels, resized by the short edge, would fill gigabytes."""
    height, width = array.shape[1:]
    longest = MAX_RATIO * min(height, width)
    if max(height, width) <= longest:
        return array
    top, left = (max(edge - longest, 0) // 2 for edge in (height, width))
    return np.ascontiguousarray(array[:, top : top + longest, left : left + longest])


def _guess_format(array: np.ndarray) -> str:
    first, last = array.shape[0], array.shape[-1]
    return "channels_first" if first in (1, 3) or last not in (1, 3, 4) else "channels_last"


def _decode(picture: str | os.PathLike | Image.Image, needed_edge: int | None) -> np.ndarray:
    """A PIL image, or what a path, a URL or a base64 string leads to, as RGB bytes (3, height, width)."""
    try:
        if isinstance(picture, Image.Image):
            return _pil_to_rgb(picture)
        with _open(picture) as image:
            _decode_reduced(image, needed_edge)
            return _pil_to_rgb(image)
    except FileNotFoundError:
        raise
    except Exception as error:  # what a broken file makes Pillow raise, or a server httpx, has no common type
        if isinstance(picture, (str, os.PathLike)):
            name = os.fspath(picture)
        else:
            name = getattr(picture, "filename", "") or getattr(picture, "name", "")
        shown, reason = _short(name) if name else "An image", str(error).partition("\n")[0]
        raise ValueError(f"{shown} cannot be read as a picture: {reason}") from error


def _decode_reduced(image: Image.Image, needed_edge: int | None) -> None:
    """Have a large JPEG decoded at a half, a quarter or an eighth of its size, which takes a fraction of the time.

    Only where that leaves twice what the views need, and divides both edges: libjpeg rounds up, and the picture would
    shift. The views of photographs then change by 0.2 to 0.7 of 255 levels on average.
    """
    if needed_edge is None or image.format != "JPEG":
        return
    width, height = image.size
    for scale in (8, 4, 2):
        if width % scale == 0 and height % scale == 0 and min(width, height) >= 2 * needed_edge * scale:
            image.draft(None, (width // scale, height // scale))
            return


def _open(source: Any) -> Image.Image:
    """Open what `transformers.image_utils.load_image` opens, or a file, without its conversion to RGB."""
    if hasattr(source, "read"):
        return Image.open(source)
    if os.path.isfile(source):
        return Image.open(source)
    if not isinstance(source, str):
        raise FileNotFoundError(f"There is no picture {os.fspath(source)!r}.")
    if source.startswith(("http://", "https://")):
        response = httpx.get(source, follow_redirects=True, timeout=TIMEOUT).raise_for_status()
        return Image.open(io.BytesIO(response.content))
    if source.startswith("data:image/"):
        return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    try:
        return Image.open(io.BytesIO(base64.b64decode(source)))
    except (ValueError, UnidentifiedImageError):
        raise FileNotFoundError(f"There is no picture {_short(source)}.") from None


def _short(name: str) -> str:
    """A path, a URL or a base64 string for a message."""
    return repr(name if len(name) <= 300 else f"{name[:60]}...")


def _pil_to_rgb(image: Image.Image) -> np.ndarray:
    """A PIL image of any mode, turned upright by its EXIF orientation, as RGB bytes (3, height, width)."""
    if 0 in image.size:
        raise ValueError("it has no pixels")
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # without the question it would copy every picture
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # Sixteen bits, of which `convert` would cut everything above 255 off to white. Mode I may also hold bytes.
        values = np.asarray(image).clip(0, 2**16 - 1)
        wide = image.mode != "I" or values.max() > 255
        image = Image.fromarray((values // 256 if wide else values).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # a palette whose transparency is not one colour, but one value a colour
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))  # `convert` would copy it all
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _image_processor(vision_model: str | Path) -> Any:
    """The encoder's image processor, in a form that can be saved and loaded inside a processor.

    Source: timm's own evaluation transform for a timm encoder, whose wrapper does not survive a reload there.
    """
    processor = AutoImageProcessor.from_pretrained(vision_model)
    if type(processor).__name__ != "TimmWrapperImageProcessor":
        return processor
    data = processor.data_config
    height, width = data["input_size"][-2:]
    return BitImageProcessor(
        size={"shortest_edge": int(min(height, width) / data["crop_pct"])},
        crop_size={"height": height, "width": width},
        resample=Image.Resampling[data["interpolation"].upper()],
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
    )


def _tokenizer(model: str | Path) -> Any:
    """The encoder's tokenizer. One that knows no limit of its own gets the encoder's."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.model_max_length > NO_LIMIT:
        config = AutoConfig.from_pretrained(model)
        positions = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
        if positions is not None:
            # RoBERTa and its kin, whose padding ID is 1, number the positions from 2 on.
            tokenizer.model_max_length = positions - 2 * (getattr(config, "pad_token_id", None) == 1)
    return tokenizer


__all__ = ["ClipCaCgProcessor", "label_scores"]
