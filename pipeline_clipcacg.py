"""Pipeline of CLIP-CA-CG: `pipeline("image-text-sentiment", model=..., trust_remote_code=True)`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Pipeline
from transformers.utils import ModelOutput

from .processing_clipcacg import (
    UNCERTAIN,
    check_min_confidence,
    is_blank,
    label_scores,
    missing_parts,
    modality_scores,
)


class ImageTextSentimentPipeline(Pipeline):
    """Predict the labels of posts and their scores.

    A post is `{"image": ..., "text": ...}`; its image is a PIL image, a path, a URL or a base64 string. A model of one
    modality needs only that part. A model of both that was trained with `modality_dropout` also answers posts of one
    part.

    Example:
        ```python
        sentiment = pipeline("image-text-sentiment", model="outputs/sample", trust_remote_code=True)
        sentiment({"image": "post.jpg", "text": "What a lovely morning!"})
        # [{'label': 'positive', 'score': 0.99}, {'label': 'neutral', 'score': 0.01}, ...]

        # A model with modality heads:
        sentiment({"image": "storm.jpg", "text": "What a lovely morning!"}, return_modalities=True)
        # {'post': [{'label': ..., 'score': ...}, ...], 'text': [...], 'image': [...], 'conflict': ...}
        ```

    Source:
        transformers' custom pipelines; the output has the form of its "text-classification" with `top_k=None`.
    """

    # transformers declares these four as None, and knows the types of a pipeline's model and processor only vaguely.
    _load_processor = True  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    model: Any
    processor: Any

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> list[Any] | dict[str, Any] | Iterator[Any]:
        """Predict one post, a list of posts, or a `datasets.Dataset` with the columns image and text.

        Args:
            inputs: See above. A dataset or a generator is read lazily and gives an iterator.
            top_k: Return only the k most likely labels; at least 1.
            min_confidence: For a model of one label per post, the probability in [0, 1] below which the answer is
                "uncertain".
            return_modalities: Also return the sentiment of the text and of the image alone, and their conflict. The
                model needs `use_modality_heads`.
            batch_size: Posts per forward pass.

        Returns:
            For one post a list of `{"label": str, "score": float}`, highest score first; for several posts one such
            list per post. Scores are probabilities, which add up to 1 unless the model predicts several labels per
            post. A regression has one entry, whose score is the predicted value. The list of an uncertain answer
            starts with one more entry, `{"label": "uncertain", "score": highest probability}`.
            With `return_modalities` a dict in place of each list: such a list under "post", "text" and "image", and
            under "conflict" the probability that text and image are opposite, one positive and the other negative. A
            side that the post lacks is None. "conflict" is None if a side is, or if negative and positive are not
            among the labels.

        Raises:
            TypeError: If the image or the text of a post has an unsupported type.
            ValueError: If a post lacks a part that the model needs, its image is broken, `top_k` is below 1,
                `min_confidence` cannot be used, or the model lacks the heads for `return_modalities`.
        """
        if hasattr(inputs, "column_names"):
            inputs = (row for row in inputs)
        elif isinstance(inputs, (list, tuple)):
            inputs = list(inputs)
            if not inputs:
                return []
        return super().__call__(inputs, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save model, code and processor as training does; transformers would leave out the processor.

        Args:
            save_directory: Folder to write to; created if it does not exist.
            **kwargs: As in `PreTrainedModel.save_pretrained`.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        min_confidence: float | None = None,
        return_modalities: bool | None = None,
        **kwargs: Any,
    ) -> tuple[dict, dict, dict]:
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}.")
        if min_confidence is not None:
            check_min_confidence(min_confidence, self.model.config)
        asked = {"top_k": top_k, "min_confidence": min_confidence, "return_modalities": return_modalities}
        return kwargs, {}, {name: value for name, value in asked.items() if value is not None}

    def preprocess(self, input_: Any, **kwargs: Any) -> Any:
        """Turn a post into model inputs of batch size 1; keywords go to the processor."""
        config, given = self.model.config, input_ if isinstance(input_, dict) else {}
        # pandas has NaN for an empty cell, and tables have "" for no image.
        post = {name: value for name, value in given.items() if value is not None and not _is_nan(value)}
        if isinstance(post.get("image"), str) and is_blank(post["image"]):
            del post["image"]
        if missing := missing_parts(post, config):
            keys = (
                f"the keys {', '.join(map(repr, given))}" if isinstance(input_, dict) else f"a {type(input_).__name__}"
            )
            raise ValueError(
                f"The model reads the {' and the '.join(config.modalities)} of a post, but this one has no "
                f"{' and no '.join(missing)}: got {keys}. Give "
                + '{"image": ..., "text": ...}'
                + (", or train with modality_dropout." if len(missing) < len(config.modalities) else ".")
            )
        # In lists of one: the processor would read a list as several posts.
        parts = {name: [post.get(name)] for name in config.modalities}
        if config.modality_dropout and is_blank(post.get("text")):
            parts["text"] = [None]
        inputs = self.processor(images=parts.get("image"), text=parts.get("text"), return_tensors="pt", **kwargs)
        if config.modality_dropout:  # the posts of a batch must have the same inputs
            inputs.setdefault("has_image", torch.ones(1, dtype=torch.long))
        return inputs

    def _forward(self, input_tensors: Any, **kwargs: Any) -> ModelOutput:
        outputs = self.model(**input_tensors, **kwargs)
        names = ("logits", "text_logits", "image_logits", "has_text", "has_image")
        return ModelOutput({name: outputs[name] for name in names if outputs.get(name) is not None})

    def postprocess(  # type: ignore[override]
        self,
        model_outputs: ModelOutput,
        top_k: int | None = None,
        min_confidence: float | None = None,
        return_modalities: bool = False,
    ) -> list[dict[str, Any]] | dict[str, Any]:
        """Turn the outputs for one post into labels with their scores, highest first; see `__call__`."""
        config = self.model.config

        def ranked(scores: dict[str, float]) -> list[dict[str, Any]]:
            order = sorted(scores, key=scores.__getitem__, reverse=True)[:top_k]
            return [{"label": label, "score": scores[label]} for label in order]

        scores = label_scores(model_outputs["logits"][0], config).tolist()
        post = ranked(dict(zip(config.label_names, scores, strict=True)))
        if min_confidence is not None and post[0]["score"] < min_confidence:
            post.insert(0, {"label": UNCERTAIN, "score": post[0]["score"]})
        if not return_modalities:
            return post
        (found,) = modality_scores(model_outputs, config)
        sides = {side: None if found[side] is None else ranked(found[side]) for side in ("text", "image")}
        return {"post": post, **sides, "conflict": found["conflict"]}


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and value != value


__all__ = ["ImageTextSentimentPipeline"]
