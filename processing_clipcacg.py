"""Processor of CLIP-CA-CG: turns images and texts into the model's inputs, and its logits into answers."""

from __future__ import annotations

import base64
import copy
import io
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature, BitImageProcessor
from transformers.processing_utils import ProcessorMixin

from .configuration_clipcacg import (
    LOADING_KEYWORDS,
    PADDED_DUAL_ENCODERS,
    ClipCaCgConfig,
    check_keywords,
    check_sources,
    split_keywords,
)
from .modeling_clipcacg import encoder_facts, load_config

# Tokenizers that know no limit set `model_max_length` to a very large number.
NO_LIMIT = 10**9
SOURCES = (str, os.PathLike, Image.Image)  # of an image, beside arrays, tensors and files
UNCERTAIN = "uncertain"  # the label of an answer below `min_confidence`
MAX_RATIO = 100  # longest to shortest edge of an image; our choice
TIMEOUT = 60  # seconds that an image server has to answer
TEXT_KEYWORDS = {
    "add_special_tokens", "max_length", "pad_to_multiple_of", "padding", "padding_side", "return_tensors", "truncation"
}  # fmt: skip
# Tokenizers keep padding and truncation as state between calls, so threads with different settings must take turns.
# One lock per process: a forked child would wait forever for a lock that its parent held.
LOCKS: dict[int, threading.Lock] = {}


class ClipCaCgProcessor(ProcessorMixin):
    """Makes `input_ids`, `attention_mask`, `pixel_values` and, with the CLIP pair, their `clip_*` counterparts.

    Args:
        image_processor: Image processor of the vision encoder.
        tokenizer: Tokenizer of the text encoder.
        clip_image_processor: CLIP's image processor, or None for a model without CLIP inputs.
        clip_tokenizer: CLIP's tokenizer. Give both parts of the CLIP pair or neither.
        clip_padding: "longest" pads CLIP's texts to the longest one, "max_length" to the tokenizer's limit, which is
            what SigLIP was trained on.

    Raises:
        ValueError: If only one of the CLIP pair is given.

    Source:
        transformers' `ProcessorMixin`. Saved beside the model: both image processors in `processor_config.json`,
        CLIP's tokenizer in the folder `clip_tokenizer`.
    """

    _auto_class = "AutoProcessor"  # type: ignore[assignment]  # transformers declares it as None

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        clip_image_processor: Any = None,
        clip_tokenizer: Any = None,
        clip_padding: str = "longest",
    ) -> None:
        if (clip_image_processor is None) != (clip_tokenizer is None):
            raise ValueError("clip_image_processor and clip_tokenizer go together: give both or neither.")
        super().__init__(image_processor, tokenizer)
        self.clip_image_processor = clip_image_processor
        self.clip_tokenizer = clip_tokenizer
        self.clip_padding = clip_padding

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that transformers loads and saves; it refuses None, so the CLIP pair is saved by hand."""
        return ["image_processor", "tokenizer"]

    @classmethod
    def from_backbones(
        cls, text_model: str | Path, vision_model: str | Path, clip_model: str | Path | None = None, **keywords: Any
    ) -> ClipCaCgProcessor:
        """Build the processor of a model on these backbones.

        It takes the arguments of the model's `from_backbones`, but always needs the first two: a saved processor has a
        tokenizer and an image processor, also for a model of one modality.

        Args:
            text_model: Hub name or folder of the text encoder.
            vision_model: Hub name or folder of the vision encoder.
            clip_model: Hub name or folder of the CLIP model, or None.
            **keywords: Loading options, and fields of `ClipCaCgConfig`. The fields are checked, but the processor does
                not depend on them.

        Raises:
            TypeError: For an unknown keyword.
            ValueError: For encoders that the model does not take either.
        """
        options, fields = split_keywords(keywords)
        check_keywords("from_backbones", fields, ClipCaCgConfig.known_fields() | LOADING_KEYWORDS)
        check_sources({"text": text_model, "vision": vision_model, "clip": clip_model}, options, fields)
        clip_config = None if clip_model is None else load_config(clip_model, options["clip"])
        mode = "none" if clip_config is None else "encoder"
        ClipCaCgConfig(**{"clip_mode": mode, "clip_config": clip_config, **fields})
        parts = {
            "image_processor": _image_processor(vision_model, options["vision"]),
            "tokenizer": _tokenizer(text_model, "text", options["text"]),
        }
        if clip_model is not None and clip_config is not None:
            parts["clip_image_processor"] = AutoImageProcessor.from_pretrained(clip_model, **options["clip"])
            parts["clip_tokenizer"] = _tokenizer(clip_model, "clip.text", options["clip"])
            if clip_config.model_type in PADDED_DUAL_ENCODERS:
                parts["clip_padding"] = "max_length"
        return cls(**parts)

    @property
    def model_input_names(self) -> list[str]:
        names = ["input_ids", "attention_mask", "pixel_values"]
        return names if self.clip_tokenizer is None else names + [f"clip_{name}" for name in names]

    def __call__(
        self, images: Any = None, text: str | Sequence[str | None] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Prepare one example or a batch; images alone or texts alone are allowed.

        Args:
            images: One image or a list of images: PIL images of any mode, arrays or tensors (height, width),
                (channels, height, width) or (height, width, channels), paths, binary files, URLs or base64 strings.
                A 4-D array is a batch. In a list, None is a missing image.
            text: One text or a list with one text per image. Texts beyond the encoder's limit are truncated. In a
                list, None is a missing text: its `attention_mask` is 0 throughout.
            **kwargs: Keywords of the tokenizer (`padding` and `truncation`, both True by default, `max_length`,
                `pad_to_multiple_of`, `padding_side`, `add_special_tokens`), keywords of the image processors
                (`do_resize`, `size`, `do_center_crop`, ...) and `return_tensors` ("pt", "np", or None for lists);
                flat, or nested in `text_kwargs` and `images_kwargs`, or in `common_kwargs` for both. CLIP's texts
                always keep their special tokens, are truncated at CLIP's limit and padded on the right.

        Returns:
            A `BatchFeature` with those names of `model_input_names` that apply; the first axis is the batch. Where an
            image is missing, also `has_image` (batch,), 1 or 0; the pixels of a missing image stand for nothing.

        Raises:
            TypeError: For an unknown keyword, or an image or text of an unsupported type.
            ValueError: If both inputs are missing, the counts differ, an image is broken, or a keyword is given both
                flat and nested.
            FileNotFoundError: If a path leads to no image.
        """
        text_kwargs, images_kwargs = self._sort_keywords(kwargs)
        return_tensors = text_kwargs.pop("return_tensors", images_kwargs.pop("return_tensors", None))
        if images is None and text is None:
            raise ValueError("The processor needs images, text, or both.")
        texts = None if text is None else _as_texts(text)
        image_list = None if images is None else _as_images(images)
        if texts and image_list and len(texts) != len(image_list):
            raise ValueError(f"Give one text per image: got {len(image_list)} images, {len(texts)} texts.")
        data: dict[str, Any] = {}
        if texts:
            data |= self._tokenize(texts, {**text_kwargs, "return_tensors": return_tensors})
        if image_list:
            # Decoding and conversion happen once for both views.
            needed = self.needed_edge(images_kwargs)
            data_format = images_kwargs.get("input_data_format")
            read = {
                i: rgb_array(image, data_format, needed) for i, image in enumerate(image_list) if image is not None
            }
            read = read if needed is None else {index: _middle(array) for index, array in read.items()}
            black = np.zeros_like(next(iter(read.values()), np.zeros((3, needed or 224, needed or 224), np.uint8)))
            arrays = [read.get(index, black) for index in range(len(image_list))]
            if len(read) < len(image_list):
                data["has_image"] = [int(index in read) for index in range(len(image_list))]
            images_kwargs |= {"return_tensors": return_tensors, "input_data_format": "channels_first"}
            data["pixel_values"] = _view(self.image_processor, arrays, images_kwargs)
            if self.clip_image_processor is not None:
                equal = self.clip_image_processor.to_dict() == self.image_processor.to_dict()
                own = data["pixel_values"] if equal else _view(self.clip_image_processor, arrays, images_kwargs)
                data["clip_pixel_values"] = own
        names = [*self.model_input_names, "has_image"]
        return BatchFeature({name: data[name] for name in names if name in data}, tensor_type=return_tensors)

    def collate(
        self, rows: Sequence[dict[str, Any]], image: str = "image", text: str = "text", label: str = "label"
    ) -> dict[str, torch.Tensor]:
        """Turn rows of a data set into a padded batch: the `data_collator` of a `Trainer` or a `DataLoader`.

        The Trainer needs `remove_unused_columns=False`. For other column names use `functools.partial`.

        Args:
            rows: One dict for each example.
            image, text, label: Names of the columns; those that the rows lack are left out.

        Returns:
            What `__call__` returns, and `labels` (batch,).

        Raises:
            ValueError: If the rows have neither an image nor a text, and as in `__call__`.
        """
        columns = rows[0].keys()
        if not {image, text} & columns:
            raise ValueError(
                f"The rows have no column {image} or {text}, only {', '.join(columns)}. With the Trainer set "
                "remove_unused_columns=False; for other names use functools.partial(processor.collate, text=NAME)."
            )
        images = [row[image] for row in rows] if image in columns else None
        texts = [row[text] for row in rows] if text in columns else None
        batch = dict(self(images=images, text=texts, return_tensors="pt"))
        return batch | ({"labels": torch.tensor([row[label] for row in rows])} if label in columns else {})

    @staticmethod
    def post_process(
        logits: torch.Tensor, config: ClipCaCgConfig, min_confidence: float | None = None
    ) -> list[dict[str, Any]]:
        """Turn logits into answers, one per example.

        Args:
            logits: (batch, labels), as the model returns them.
            config: Config of the model: its `task` chooses the rule, its `id2label` names the labels, and its
                `temperature` scales the logits.
            min_confidence: For one label per example, the probability in [0, 1] below which the label is "uncertain";
                None for no limit.

        Returns:
            For one label per example `{"label": str, "scores": {label: probability}}`, for several
            `{"labels": [every label that applies], "scores": {label: probability}}`, for a regression
            `{"value": float}`. An "uncertain" answer has the same scores as any other.

        Raises:
            ValueError: If `min_confidence` is no probability, or the model does not give each example one label.
        """
        if min_confidence is not None:
            check_min_confidence(min_confidence, config)
        names: dict[int, str] = config.id2label  # type: ignore[assignment]  # transformers makes its keys integers
        answers: list[dict[str, Any]] = []
        for row in label_scores(logits, config):
            if config.task == "regression":
                answers.append({"value": row.item()})
                continue
            scores = {names[index]: score for index, score in enumerate(row.tolist())}
            if config.task == "multi_label_classification":
                applies = labels_that_apply(row, config.label_thresholds).tolist()
                chosen = [label for label, is_chosen in zip(scores, applies, strict=True) if is_chosen]
                answers.append({"labels": chosen, "scores": scores})
            else:
                is_uncertain = min_confidence is not None and row.max().item() < min_confidence
                answers.append({"label": UNCERTAIN if is_uncertain else names[int(row.argmax())], "scores": scores})
        return answers

    def _image_processors(self) -> list[Any]:
        parts = [self.image_processor, self.clip_image_processor]
        return [part for part in parts if part is not None]

    def _sort_keywords(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Sort flat and nested keywords into those for texts and those for images.

        transformers' own `_merge_kwargs` would not serve: it is private, only warns of an unknown keyword, and knows
        one image processor.
        """
        image_keywords = set().union(*(part.valid_kwargs.__annotations__ for part in self._image_processors()))
        known = {"text_kwargs": TEXT_KEYWORDS, "images_kwargs": image_keywords}
        flat = {name: value for name, value in kwargs.items() if name not in (*known, "common_kwargs")}
        common = kwargs.get("common_kwargs") or {}
        unknown = (flat.keys() | common.keys()) - set().union(*known.values())
        merged = []
        for group, names in known.items():
            nested = kwargs.get(group) or {}
            unknown |= nested.keys() - names
            if twice := sorted(nested.keys() & flat.keys()):
                raise ValueError(f"Keyword {', '.join(twice)} was given twice: in {group} and flat. Give it once.")
            merged.append({name: value for name, value in {**common, **nested, **flat}.items() if name in names})
        if unknown:
            allowed = ", ".join(sorted(set().union(known, *known.values())))
            raise TypeError(f"Unknown keyword {', '.join(sorted(unknown))}. Allowed: {allowed}.")
        return merged[0], merged[1]

    def needed_edge(self, kwargs: dict[str, Any]) -> int | None:
        """The longest edge that a view is resized to, or None if a view is not resized."""
        edges = []
        for part in self._image_processors():
            if not kwargs.get("do_resize", part.do_resize):
                return None
            size = kwargs.get("size", part.size)
            size = [size] if isinstance(size, int) else size
            values = size if isinstance(size, (list, tuple)) else dict(size).values()
            # ConvNextImageProcessor resizes to more than its size and then crops.
            share = kwargs.get("crop_pct") or getattr(part, "crop_pct", None) or 1
            edges += [value / share for value in values if value is not None]
        return math.ceil(max(edges))

    def _tokenize(self, texts: list[str | None], kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs = {"padding": True, "truncation": True, **kwargs}
        with LOCKS.setdefault(os.getpid(), threading.Lock()):
            data = _encode(self.tokenizer, texts, _within_limit(self.tokenizer, kwargs))
            if self.clip_tokenizer is not None:
                # CLIP has no positions beyond its limit, and pools at the closing token.
                kwargs |= {"truncation": True, "padding_side": "right", "add_special_tokens": True}
                if self.clip_padding == "max_length":
                    kwargs |= {"padding": "max_length", "max_length": self.clip_tokenizer.model_max_length}
                    kwargs.pop("pad_to_multiple_of", None)
                clip = _encode(self.clip_tokenizer, texts, _within_limit(self.clip_tokenizer, kwargs))
                data |= {f"clip_{name}": value for name, value in clip.items()}
        return data

    def to_dict(self) -> dict[str, Any]:
        """Content of `processor_config.json`; the tokenizers have their own files."""
        parts = copy.copy(self)
        del parts.clip_tokenizer
        if parts.clip_image_processor is None:
            del parts.clip_image_processor
        return super(ClipCaCgProcessor, parts).to_dict()

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save all parts and the code that `trust_remote_code=True` runs; arguments as in `ProcessorMixin`."""
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


def missing_parts(post: dict[str, Any], config: ClipCaCgConfig) -> list[str]:
    """Return which parts the model needs and the post lacks: some of "image" and "text".

    A model trained with `modality_dropout` needs one of the two alone.

    Args:
        post: "image" and "text"; a part that is missing may be None.
        config: Config of the model.
    """
    if config.modality_dropout:
        return ["image", "text"] if post.get("image") is None and is_blank(post.get("text")) else []
    return [name for name in config.modalities if post.get(name) is None]


def is_blank(text: Any) -> bool:
    """Whether a text is None or has no words; to a model with `modality_dropout` such a text is missing."""
    return text is None or (isinstance(text, str) and not text.strip())


def label_scores(logits: torch.Tensor, config: ClipCaCgConfig) -> torch.Tensor:
    """Turn logits into one score per label.

    Args:
        logits: (..., labels).
        config: Config of the model; its `task` chooses the rule, and its `temperature` scales the logits.

    Returns:
        (..., labels) in float32: probabilities that add up to 1 for one label per example, independent probabilities
        for several labels, the predicted values themselves for a regression.
    """
    logits = logits.float()
    if config.task == "regression":
        return logits
    logits = logits / config.temperature
    return logits.sigmoid() if config.task == "multi_label_classification" else logits.softmax(dim=-1)


def modality_scores(outputs: Any, config: ClipCaCgConfig) -> list[dict[str, Any]]:
    """Turn the logits of the modality heads into each side's probabilities and their conflict, one dict per example.

    Args:
        outputs: Of a model with `use_modality_heads`.
        config: Config of the model.

    Returns:
        `{"text": {label: probability}, "image": {label: probability}, "conflict": float}`. A side that the example
        lacks is None. `conflict` is None if a side is, or if negative and positive are not among the labels. The
        config's `temperature` does not scale these probabilities: it is fitted to `logits` alone.

    Raises:
        ValueError: If the model has no modality heads.
    """
    if outputs.get("text_logits") is None:
        raise ValueError(
            "The model has no modality heads, which give the sentiment of the text and of the image alone: train one "
            "with use_modality_heads."
        )
    sides = []
    for side in ("text", "image"):
        probabilities = outputs[f"{side}_logits"].float().softmax(dim=-1).tolist()
        read = outputs.get(f"has_{side}")
        given = [True] * len(probabilities) if read is None else read.tolist()
        scores = [dict(zip(config.label_names, row, strict=True)) for row in probabilities]
        sides.append([of_side if is_given else None for of_side, is_given in zip(scores, given, strict=True)])
    has_conflict = {"negative", "positive"} <= set(config.label_names)
    return [
        {"text": text, "image": image, "conflict": conflict(text, image) if has_conflict and text and image else None}
        for text, image in zip(*sides, strict=True)
    ]


def conflict(text: dict[str, float], image: dict[str, float]) -> float:
    """Return the probability that text and image are of opposite sentiment.

    Args:
        text, image: Probability of each label, negative and positive among them.

    Source: our choice. The paper drops such examples. As in `combine_probabilities`, the two labels count as
        independent.
    """
    return text["positive"] * image["negative"] + text["negative"] * image["positive"]


def check_min_confidence(min_confidence: float, config: ClipCaCgConfig) -> None:
    """Check the probability below which a model's answer is "uncertain".

    Raises:
        ValueError: If it is no probability, or the model does not give each example one label.
    """
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence must be from 0 to 1, not {min_confidence}.")
    if config.task != "single_label_classification":
        raise ValueError(f"min_confidence is for one label per example, and this model's task is {config.task}.")


def labels_that_apply(probabilities: torch.Tensor, thresholds: list[float] | None = None) -> torch.Tensor:
    """Choose among several labels per example.

    Args:
        probabilities: (..., labels).
        thresholds: `label_thresholds` of the config: the probability from which each label applies; None: 0.5.

    Returns:
        (..., labels) of True and False.
    """
    return probabilities >= torch.tensor(thresholds or 0.5, device=probabilities.device)


def _view(image_processor: Any, arrays: list[np.ndarray], kwargs: dict[str, Any]) -> Any:
    """The `pixel_values` that one image processor makes; it gets the keywords that it knows."""
    known = image_processor.valid_kwargs.__annotations__
    return image_processor(arrays, **{name: kwargs[name] for name in known & kwargs.keys()})["pixel_values"]


def _encode(tokenizer: Any, texts: list[str | None], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what the tokenizer makes of the texts, with a mask also where it would make none by default."""
    given = [text or "" for text in texts]
    data = tokenizer(given, return_attention_mask=True, **kwargs)
    lengths = [len(ids) for ids in data["input_ids"]]
    if 0 in lengths:  # an empty text and a tokenizer without special tokens: the encoders need one token at least
        longest = {**kwargs, "padding": "max_length", "max_length": max(1, *lengths), "pad_to_multiple_of": None}
        data = tokenizer(given, return_attention_mask=True, **longest)
    for mask, text in zip(data["attention_mask"], texts, strict=True):
        if text is None:
            mask[:] = [0] * len(mask) if isinstance(mask, list) else 0
    return dict(data)


def _within_limit(tokenizer: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords, with `max_length` capped so that the text fits the encoder even after padding to a multiple."""
    asked, multiple = kwargs.get("max_length"), kwargs.get("pad_to_multiple_of") or 1
    limit = tokenizer.model_max_length // multiple * multiple
    if not kwargs["truncation"] or limit > NO_LIMIT or (asked is None and multiple == 1):
        return kwargs
    return {**kwargs, "max_length": limit if asked is None else min(asked, limit)}


def _as_texts(text: Any) -> list[str | None]:
    texts = [text] if isinstance(text, str) else list(text)
    for index, item in enumerate(texts):
        if item is None:
            continue
        if not isinstance(item, str):
            raise TypeError(f"text[{index}] must be a string, not {type(item).__name__}.")
        try:
            item.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text[{index}] is not Unicode: {error}") from None
    if not texts:
        raise ValueError("text is an empty list: there is nothing to process.")
    return texts


def _as_images(images: Any) -> list[Any]:
    one = isinstance(images, SOURCES) or hasattr(images, "read") or getattr(images, "ndim", 4) < 4
    image_list = [images] if one else list(images)
    for index, item in enumerate(image_list):
        if not (item is None or isinstance(item, SOURCES) or hasattr(item, "read") or hasattr(item, "ndim")):
            raise TypeError(
                f"images[{index}] must be a PIL image, an array, a tensor, a path, a file, a URL or a base64 string, "
                f"not {type(item).__name__}."
            )
    if not image_list:
        raise ValueError("images is an empty list: there is nothing to process.")
    return image_list


def rgb_array(image: Any, data_format: str | None, needed_edge: int | None) -> np.ndarray:
    """Convert any image to (3, height, width): bytes, except that an array keeps its dtype and range.

    The channels also come first in memory; both image processors would otherwise transpose it, and slowly.
    """
    if isinstance(image, SOURCES) or hasattr(image, "read"):
        return _decode(image, needed_edge)
    array = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3 and (data_format or _guess_format(array)) == "channels_first":
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or array.size == 0:
        raise ValueError(
            f"An array of shape {tuple(image.shape)} is not an image: it needs a height, a width and 1, 3 or 4 "
            "channels."
        )
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    array = np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array[..., :3]
    # torch accepts neither negative strides nor read-only arrays.
    return np.require(array.transpose(2, 0, 1), requirements=["C", "W"])


def _middle(array: np.ndarray) -> np.ndarray:
    """Crop a very long image to its middle: 30,000 x 2 pixels, resized by the short edge, would fill gigabytes."""
    height, width = array.shape[1:]
    longest = MAX_RATIO * min(height, width)
    if max(height, width) <= longest:
        return array
    top, left = (max(edge - longest, 0) // 2 for edge in (height, width))
    return np.ascontiguousarray(array[:, top : top + longest, left : left + longest])


def _guess_format(array: np.ndarray) -> str:
    first, last = array.shape[0], array.shape[-1]
    return "channels_first" if first in (1, 3) or last not in (1, 3, 4) else "channels_last"


def _decode(source: Any, needed_edge: int | None) -> np.ndarray:
    """Decode a PIL image, a path, a URL, a base64 string or a file to RGB bytes (3, height, width)."""
    try:
        if isinstance(source, Image.Image):
            return _pil_to_rgb(source)
        with _open(source) as image:
            _decode_reduced(image, needed_edge)
            return _pil_to_rgb(image)
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's errors for a broken file and httpx' have no common base class
        if isinstance(source, (str, os.PathLike)):
            name = os.fspath(source)
        else:
            name = getattr(source, "filename", "") or getattr(source, "name", "")
        shown, reason = _short(name) if name else "An image", str(error).partition("\n")[0]
        raise ValueError(f"{shown} cannot be read as an image: {reason}") from error


def _decode_reduced(image: Image.Image, needed_edge: int | None) -> None:
    """Let a large JPEG be decoded at a half, a quarter or an eighth of its size, which is several times faster.

    Only where the result still has twice the size that the views need, and the scale divides both edges: libjpeg
    rounds up, which would shift the image. Views of photos then change by 0.2 to 0.7 of 255 levels on average.
    """
    if needed_edge is None or image.format != "JPEG":
        return
    width, height = image.size
    for scale in (8, 4, 2):
        if width % scale == 0 and height % scale == 0 and min(width, height) >= 2 * needed_edge * scale:
            image.draft(None, (width // scale, height // scale))
            return


def _open(source: Any) -> Image.Image:
    """Open a file, or what `transformers.image_utils.load_image` opens, without converting it to RGB."""
    if hasattr(source, "read") or os.path.isfile(source):
        return Image.open(source)
    if not isinstance(source, str):
        raise FileNotFoundError(f"There is no image {os.fspath(source)!r}.")
    if source.startswith(("http://", "https://")):
        response = httpx.get(source, follow_redirects=True, timeout=TIMEOUT).raise_for_status()
        return Image.open(io.BytesIO(response.content))
    if source.startswith("data:image/"):
        return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    try:
        return Image.open(io.BytesIO(base64.b64decode(source)))
    except (ValueError, UnidentifiedImageError):
        raise FileNotFoundError(f"There is no image {_short(source)}.") from None


def _short(name: str) -> str:
    """A path, a URL or a base64 string, quoted and cut for a message."""
    return repr(name if len(name) <= 300 else f"{name[:60]}...")


def _pil_to_rgb(image: Image.Image) -> np.ndarray:
    """Convert a PIL image of any mode, after applying its EXIF orientation, to RGB bytes (3, height, width)."""
    if 0 in image.size:
        raise ValueError("it has no pixels")
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # exif_transpose would copy upright images too
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # `convert` clips 16-bit values at 255. Mode I may hold 8-bit values too.
        values = np.asarray(image).clip(0, 2**16 - 1)
        wide = image.mode != "I" or values.max() > 255
        image = Image.fromarray((values // 256 if wide else values).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # a palette may have one transparency per colour, which only RGBA keeps
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))  # `convert` copies even RGB
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _image_processor(vision_model: str | Path, options: dict[str, Any]) -> Any:
    """The encoder's image processor, in a form that can be reloaded inside a `ProcessorMixin`.

    A timm encoder's wrapper cannot; an equal `BitImageProcessor` with timm's evaluation transform replaces it.
    """
    processor = AutoImageProcessor.from_pretrained(vision_model, **options)
    if type(processor).__name__ != "TimmWrapperImageProcessor":
        return processor
    data = processor.data_config
    height, width = data["input_size"][-2:]
    resized = {"height": int(height / data["crop_pct"]), "width": int(width / data["crop_pct"])}
    if data.get("crop_mode") == "border":
        raise ValueError(
            f"vision_model: {vision_model} pads images with a border (crop_mode), which is not supported."
        )
    return BitImageProcessor(
        size=resized if data.get("crop_mode") == "squash" else {"shortest_edge": min(resized.values())},
        crop_size={"height": height, "width": width},
        resample=Image.Resampling[data["interpolation"].upper()],
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
    )


def _tokenizer(model: str | Path, part: str, options: dict[str, Any]) -> Any:
    """The encoder's tokenizer, which makes no more tokens than the encoder has positions, and pads on the right.

    Args:
        model: Hub name or folder.
        part: "text" or "clip.text".
        options: Loading options of `from_backbones`.
    """
    tokenizer = AutoTokenizer.from_pretrained(model, **options)
    limit = encoder_facts(load_config(model, options), part).max_tokens
    if limit is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    tokenizer.padding_side = "right"  # decoders count positions from the first token, padding or not
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise ValueError(f"The tokenizer of {model} has no token to pad texts with: set its pad_token.")
    return tokenizer


__all__ = [
    "UNCERTAIN",
    "ClipCaCgProcessor",
    "check_min_confidence",
    "is_blank",
    "label_scores",
    "labels_that_apply",
    "missing_parts",
    "modality_scores",
]
