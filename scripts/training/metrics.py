"""The project's metric, and the scores it gives to logits."""

from pathlib import Path
from typing import Any

import evaluate
import numpy as np

from clipcacg.scripts.data.errors import InputError

METRIC = str(Path(__file__).parent / "sentiment_metrics")


def load_metric(regression: bool) -> evaluate.Metric:
    """Load the metric from the folder beside this file."""
    return evaluate.load(METRIC, *(["regression"] if regression else []), keep_in_memory=True)


def score(logits: np.ndarray, labels: np.ndarray, metric: evaluate.Metric, names: list[str] | None) -> dict[str, Any]:
    """All scores of logits (posts, labels) against the true labels (posts,); `names` is None for a regression."""
    values = logits.reshape(-1) if names is None else logits.argmax(axis=-1)
    named = {} if names is None else {"label_names": names}
    return metric.compute(predictions=values, references=labels.reshape(-1), **named)


def names_to_choose_by(regression: bool) -> list[str]:
    """The names that `--metric_for_best_model` takes for classes or for a regression."""
    logits, names = (np.eye(2)[:, :1], None) if regression else (np.eye(2), ["0", "1"])
    scores = score(logits, np.arange(2), load_metric(regression), names)
    return ["loss", *(name for name, value in scores.items() if isinstance(value, float))]


def check_metric_name(name: str, regression: bool | None = None) -> None:
    """Check the value of `--metric_for_best_model`; None as long as the kind of labels is unknown.

    Raises:
        InputError: If no evaluation gives such a score.
    """
    kinds = {kind: names_to_choose_by(kind) for kind in ([False, True] if regression is None else [regression])}
    if name.removeprefix("eval_") not in sum(kinds.values(), []):
        told = [f"{', '.join(names)} for {'numbers' if kind else 'classes'}" for kind, names in kinds.items()]
        raise InputError(f"--metric_for_best_model {name} is no score of an evaluation: use {'; '.join(told)}.")
