"""Training posts that are read row by row, without a copy on this machine."""

import random
from collections.abc import Iterator
from typing import Any

import datasets
from torch.utils.data import IterableDataset

BUFFER = 1000  # rows


class PostStream(IterableDataset):
    """Rows of a stream with the labels that were read before, in an order that follows from the seed and the epoch.

    A run that resumes within an epoch therefore finds the same posts behind those that it skips.

    Args:
        rows: Posts with the column row, in the order of their source.
        labels: The columns row and label, and perhaps text_label and image_label, of the rows to use.
        seed: Seed of the order.
        buffer: Number of rows among which the next post is drawn; 0 keeps the order of the source.
    """

    def __init__(
        self, rows: datasets.IterableDataset, labels: datasets.Dataset, seed: int, buffer: int = BUFFER
    ) -> None:
        self.rows, self.seed, self.buffer, self.epoch = rows, seed, buffer, 0
        self.names = [name for name in labels.column_names if name.endswith("label")]
        values = zip(*(labels[name][:] for name in self.names), strict=True)
        self.labels = dict(zip(labels["row"][:], values, strict=True))

    def __len__(self) -> int:
        return len(self.labels)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; the data loader calls this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        draw, buffer = random.Random(self.seed + self.epoch), list[dict[str, Any]]()
        for post in self.rows.take(max(self.labels, default=0)):
            labels = self.labels.get(post["row"])
            if labels is None:  # a row that was left out
                continue
            buffer.append(post | dict(zip(self.names, labels, strict=True)))
            if len(buffer) > self.buffer:
                position = draw.randrange(len(buffer))
                buffer[position], buffer[-1] = buffer[-1], buffer[position]
                yield buffer.pop()
        draw.shuffle(buffer)
        yield from buffer
