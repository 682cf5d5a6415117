"""Pipeline of CLIP-CA-CG: `pipeline("image-text-sentiment", model=..., trust_remote_code=True)`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from transformers import BatchFeature, Pipeline
from transformers.utils import ModelOutput

from .processing_clipcacg import label_scores


class ImageTextSentimentPipeline(Pipeline):
    """Predict the labels of posts and their scores.

    A post is `{"image": ..., "text": ...}`; its image is a PIL image, a path, a URL or a base64 string. A model of one
    modality needs only that part.

    Example:
        ```python
        sentiment = pipeline("image-text-sentiment", model="outputs/sample", trust_remote_code=True)
        sentiment({"image": "post.jpg", "text": "What a lovely morning!"})
        # [{'label': 'positive', 'score': 0.99}, {'label': 'neutral', 'score': 0.01}, ...]
        ```

    Source:
        transformers' custom pipelines; the output has the form of its "text-classification" with `top_k=None`.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False

    def __call__(self, inputs: Any, **kwargs: Any) -> list[Any] | Iterator[list[dict[str, Any]]]:
        """Predict one post, a list of posts, or a `datasets.Dataset` with the columns image and text.

        Args:
            inputs: See above. A dataset or a generator is read lazily and gives an iterator.
            top_k: Return only the k most likely labels; at least 1.
            batch_size: Posts per forward pass.

        Returns:
            For one post a list of `{"label": str, "score": float}`, highest score first; for several posts one such
            list per post. Scores are probabilities, which add up to 1 unless the model predicts several labels per
            post. A regression has one entry, whose score is the predicted value.

        Raises:
            TypeError: If the image or the text of a post has an unsupported type.
            ValueError: If a post lacks a part that the model reads, its image is broken, or `top_k` is below 1.
        """
        if hasattr(inputs, "column_names"):
            inputs = (row for row in inputs)
        elif isinstance(inputs, (list, tuple)):
            inputs = list(inputs)
            if not inputs:
                return []
        return super().__call__(inputs, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save model, code and processor as training does; transformers would leave out the processor.

        Args:
            save_directory: Folder to write to; created if it does not exist.
            **kwargs: As in `PreTrainedModel.save_pretrained`.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(self, top_k: int | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}.")
        return kwargs, {}, {} if top_k is None else {"top_k": top_k}

    def preprocess(self, inputs: dict[str, Any], **kwargs: Any) -> BatchFeature:
        """Turn a post into model inputs of batch size 1; keywords go to the processor."""
        needed = self.model.config.modalities
        post = inputs if isinstance(inputs, dict) else {}
        if missing := [name for name in needed if post.get(name) is None]:
            raise ValueError(
                f"The model reads the {' and the '.join(needed)} of a post, but this one has no "
                f"{' and no '.join(missing)}. Give " + '{"image": ..., "text": ...}.'
            )
        # In lists of one: the processor would read a list as several posts.
        parts = {{"image": "images"}.get(name, name): [post[name]] for name in needed}
        return self.processor(**parts, return_tensors="pt", **kwargs)

    def _forward(self, model_inputs: BatchFeature) -> ModelOutput:
        return ModelOutput(logits=self.model(**model_inputs).logits)

    def postprocess(self, model_outputs: ModelOutput, top_k: int | None = None) -> list[dict[str, Any]]:
        """Turn logits (1, labels) into labels with their scores, highest first."""
        config = self.model.config
        scores = label_scores(model_outputs["logits"][0], config)
        order = scores.argsort(descending=True)[:top_k].tolist()
        return [{"label": config.id2label[index], "score": scores[index].item()} for index in order]


__all__ = ["ImageTextSentimentPipeline"]
