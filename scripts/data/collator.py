"""Rows of posts to the padded batches that a model reads."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data.features import FEATURES, FeatureStore, cached_inputs
from clipcacg.scripts.data.loading import picture


@dataclass
class PostCollator:
    """Rows of posts to a padded batch, decoding the pictures on the way.

    Args:
        processor: Makes the inputs.
        config: Its `modality` says which columns to read.
        features: Where the outputs of frozen backbones are kept, by backbone: they take the place of its inputs.
    """

    processor: ClipCaCgProcessor
    config: ClipCaCgConfig
    features: dict[str, FeatureStore] = field(default_factory=dict)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows with text, image and, if there is one, label, to tensors; see `ClipCaCgModel.forward`.

        Raises:
            ValueError: If a picture is broken; the message names it.
        """
        columns: dict[str, Any] = {}
        if self._reads("text"):
            columns["text"] = [row["text"] or "" for row in rows]  # an empty cell of a table is None
        if self._reads("image"):
            columns["images"] = [picture(row["image"]) for row in rows]
        batch = dict(self.processor(**columns, return_tensors="pt")) if columns else {}
        batch |= cached_inputs(rows, self.features)
        for backbone in self.features:
            batch.pop(FEATURES[backbone].input, None)
        if "label" in rows[0]:
            batch["labels"] = torch.tensor([row["label"] for row in rows])
        return batch

    def _reads(self, column: str) -> bool:
        """Whether some backbone needs the texts, or the pictures, themselves."""
        if self.config.modality not in ("both", column):
            return False
        clip = [] if self.processor.clip_tokenizer is None else ["clip.text", "clip.vision"]
        backbones = [name for name in ("text", "vision", *clip) if FEATURES[name].column == column]
        return not all(name in self.features for name in backbones)
