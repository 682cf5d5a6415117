"""One-line use of CLIP-CA-CG: `pipeline("image-text-sentiment", model=..., trust_remote_code=True)`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from transformers import BatchFeature, Pipeline
from transformers.utils import ModelOutput

from .processing_clipcacg import label_scores

NEEDED = {"both": ("image", "text"), "image": ("image",), "text": ("text",)}


class ImageTextSentimentPipeline(Pipeline):
    """From posts to labels and probabilities.

    A post is `{"image": ..., "text": ...}`; its picture is a PIL image, a path, a URL or a base64 string. For a model
    of one modality `{"image": ...}` or `{"text": ...}` will do.

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
        """Predict one post, a list of them, or a `datasets.Dataset` with the columns image and text.

        Args:
            inputs: See above. A data set, or a generator, gives an iterator, so that memory does not grow with it.
            top_k: Return only the k likeliest labels; 1 or more.
            batch_size: Posts that go through the model at once.

        Returns:
            For one post a list of `{"label", "score"}`, the likeliest first; for several one such list a post. A
            regression has one entry, whose score is the predicted value.

        Raises:
            TypeError: If a post's text is no string, or its picture nothing that can be read: a list, for instance.
            ValueError: If a post lacks what the model reads, its picture is broken, or `top_k` is less than 1.
        """
        if hasattr(inputs, "column_names"):
            inputs = (row for row in inputs)
        elif isinstance(inputs, (list, tuple)):
            inputs = list(inputs)
            if not inputs:
                return []
        return super().__call__(inputs, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save model, code and processor as training does; transformers would leave the processor out.

        Args:
            save_directory: Folder to write to; made if it does not exist.
            **kwargs: As in `PreTrainedModel.save_pretrained`.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(self, top_k: int | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}.")
        return kwargs, {}, {} if top_k is None else {"top_k": top_k}

    def preprocess(self, inputs: dict[str, Any], **kwargs: Any) -> BatchFeature:
        """A post to model inputs of batch size 1; keywords go to the processor."""
        needed = NEEDED[self.model.config.modality]
        post = inputs if isinstance(inputs, dict) else {}
        missing = [name for name in needed if post.get(name) is None]
        if missing:
            raise ValueError(
                f"This model reads {' and '.join(needed)} of a post, but {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing: give "
                '{"image": ..., "text": ...}.'
            )
        columns = {"image": "images", "text": "text"}
        # In lists of one, or the processor would take a list of texts or pictures for so many posts.
        parts = {columns[name]: [post[name]] for name in needed}
        return self.processor(**parts, return_tensors="pt", **kwargs)

    def _forward(self, model_inputs: BatchFeature) -> ModelOutput:
        return ModelOutput(logits=self.model(**model_inputs).logits)

    def postprocess(self, model_outputs: ModelOutput, top_k: int | None = None) -> list[dict[str, Any]]:
        """Logits (1, labels) to labels with their probabilities, the likeliest first."""
        config = self.model.config
        scores = label_scores(model_outputs["logits"][0], config)
        order = scores.argsort(descending=True)[:top_k].tolist()
        return [{"label": config.id2label[index], "score": scores[index].item()} for index in order]


__all__ = ["ImageTextSentimentPipeline"]
