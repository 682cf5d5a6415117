"""Turn rows of posts into the padded batches that the model reads."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data.features import FEATURES, FeatureStore, cached_inputs
from clipcacg.scripts.data.reading import read_posts


@dataclass
class PostCollator:
    """Turn rows of posts into a padded batch, decoding the images.

    Args:
        processor (`ClipCaCgProcessor`): makes the inputs.
        config (`ClipCaCgConfig`): its `modalities` are the columns that are read; with its `use_modality_heads` also
            text_label and image_label.
        features (`dict[str, FeatureStore]`): stored outputs of frozen encoders, which replace those encoders' inputs.
    """

    processor: ClipCaCgProcessor
    config: ClipCaCgConfig
    features: dict[str, FeatureStore] = field(default_factory=dict)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows with text, image and, for training, label, text_label and image_label.

        Returns:
            `dict[str, torch.Tensor]`: the arguments of `ClipCaCgModel.forward`; the first axis is the batch.

        Raises:
            InputError: a text or image cannot be read; the message names the post.
        """
        columns = [column for column in ("text", "image") if self.reads(column)]
        batch = read_posts(self.processor, rows, columns) | cached_inputs(rows, self.features)
        for encoder in [*self.features, *self.config.shared]:
            batch.pop(FEATURES[encoder].input, None)
        labels = {"label": "labels"}
        if self.config.use_modality_heads:
            labels |= {"text_label": "text_labels", "image_label": "image_labels"}
        for column, name in labels.items():
            if column in rows[0]:
                batch[name] = self.as_tensor([row[column] for row in rows])
        return batch

    def as_tensor(self, labels: list[Any]) -> torch.Tensor:
        """Return indices or values (batch,); for several labels per post 1.0 where one applies (batch, labels)."""
        if self.config.task != "multi_label_classification":
            return torch.tensor(labels)
        applies = torch.zeros(len(labels), len(self.config.label_names))
        for row, indices in enumerate(labels):
            applies[row, indices] = 1.0
        return applies

    def reads(self, column: str) -> bool:
        """Whether the model reads an input of this column, which the processor makes, and not its stored output."""
        without = [*self.features, *self.config.shared]
        inputs = [f.input for name, f in FEATURES.items() if f.column == column and name not in without]
        return column in self.config.modalities and any(name in self.processor.model_input_names for name in inputs)
