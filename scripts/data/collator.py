"""Turn rows of posts into the padded batches that the model reads."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.faults import Faults
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
        replace_bad (`bool`): put good posts of the batch in place of those that cannot be read, for training alone;
            the batch then has bad_posts, their IDs with the reasons.
    """

    processor: ClipCaCgProcessor
    config: ClipCaCgConfig
    features: dict[str, FeatureStore] = field(default_factory=dict)
    replace_bad: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows with text, image and, for training, label, text_label and image_label.

        Returns:
            `dict[str, torch.Tensor]`: the arguments of `ClipCaCgModel.forward`; the first axis is the batch.

        Raises:
            InputError: a text or image cannot be read; the message names the post.
        """
        try:
            return self._batch(rows)
        except InputError:
            bad = self.faults(rows) if self.replace_bad else {}
            good = [row for index, row in enumerate(rows) if index not in bad]
            if not (bad and good):
                raise
            batch = self._batch((good * len(rows))[: len(rows)])
            return batch | {"bad_posts": [(str(rows[index].get("id")), reason) for index, reason in bad.items()]}

    def faults(self, rows: Sequence[dict[str, Any]]) -> dict[int, str]:
        """Return what is wrong with those rows that cannot be read, by their index."""
        reasons: dict[int, str] = {}
        try:
            self._batch(rows)
        except InputError:  # reading them one by one is slower
            for index, row in enumerate(rows):
                try:
                    self._batch([row])
                except InputError as error:
                    reasons[index] = str(error).removeprefix(f"post {row.get('id', '')}: ")
        return reasons

    def _batch(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        columns = [column for column in ("text", "image") if self.reads(column)]
        may_lack = self.config.modality_dropout > 0
        batch = read_posts(self.processor, rows, columns, may_lack) | cached_inputs(rows, self.features)
        if may_lack:  # a stored output does not tell whether there was an image
            batch["has_image"] = torch.tensor([int(row["image"] is not None) for row in rows])
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


def leave_out_unreadable(
    dataset: datasets.Dataset, collator: PostCollator, faults: Faults, name: str, num_workers: int = 0
) -> datasets.Dataset:
    """Read every post once and leave out those that cannot be read; nothing is read unless `--on_error skip` asks.

    Args:
        dataset: Posts to evaluate or to store features of, which must all be readable.
        collator: Reads them.
        faults: Counts those that are left out.
        name: Split, for messages.
        num_workers: Processes that read.

    Raises:
        InputError: If more than a tenth of all posts are bad.
    """
    if faults.on_error == "raise" or not any(collator.reads(column) for column in ("text", "image")):
        return dataset
    batches: DataLoader[Any] = DataLoader(
        dataset,  # type: ignore[arg-type]  # torch's type is its own class
        batch_size=32,
        num_workers=num_workers,
        collate_fn=collator.faults,
    )
    bad = {32 * turn + index: reason for turn, found in enumerate(batches) for index, reason in found.items()}
    dataset = faults.leave_out(dataset, bad, name)
    faults.check_share()
    return dataset
