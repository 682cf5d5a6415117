"""The project's metric, and the scores it gives to logits."""

from pathlib import Path
from typing import Any

import evaluate
import numpy as np

METRIC = str(Path(__file__).parent / "sentiment_metrics")


def load_metric(regression: bool) -> evaluate.Metric:
    """Load the metric from the folder beside this file."""
    return evaluate.load(METRIC, *(["regression"] if regression else []), keep_in_memory=True)


def score(logits: np.ndarray, labels: np.ndarray, metric: evaluate.Metric, names: list[str] | None) -> dict[str, Any]:
    """All scores of logits (posts, labels) against the true labels (posts,); `names` is None for a regression."""
    values = logits.reshape(-1) if names is None else logits.argmax(axis=-1)
    named = {} if names is None else {"label_names": names}
    return metric.compute(predictions=values, references=labels.reshape(-1), **named)
