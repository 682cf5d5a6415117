"""Our metric, and what it says of logits."""

from pathlib import Path
from typing import Any

import evaluate
import numpy as np

METRIC = str(Path(__file__).parent / "sentiment_metrics")


def load_metric(regression: bool) -> evaluate.Metric:
    """Our metric, from the folder beside this file."""
    return evaluate.load(METRIC, *(["regression"] if regression else []), keep_in_memory=True)


def score(logits: np.ndarray, labels: np.ndarray, metric: evaluate.Metric, names: list[str] | None) -> dict[str, Any]:
    """All that the metric says of logits (posts, labels) against the true labels (posts,)."""
    values = logits.reshape(-1) if names is None else logits.argmax(axis=-1)
    labels_named = {} if names is None else {"label_names": names}
    return metric.compute(predictions=values, references=labels.reshape(-1), **labels_named)
