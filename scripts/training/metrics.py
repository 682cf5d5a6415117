"""The project's metric, and the scores it gives to logits."""

from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from sklearn.metrics import precision_recall_curve

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.processing_clipcacg import label_scores, labels_that_apply
from clipcacg.scripts.data.errors import InputError

METRIC = str(Path(__file__).parent / "sentiment_metrics")
CONFIGURATIONS = {"regression": ["regression"], "multi_label_classification": ["multilabel"]}
TASKS = {
    "single_label_classification": "classes",
    "multi_label_classification": "several labels per post",
    "regression": "numbers",
}


def load_metric(task: str = "single_label_classification") -> evaluate.Metric:
    """Load the metric from the folder beside this file.

    Args:
        task: `ClipCaCgConfig.task` of the model.
    """
    return evaluate.load(METRIC, *CONFIGURATIONS.get(task, []), keep_in_memory=True)


def score(
    logits: np.ndarray,
    labels: np.ndarray,
    metric: evaluate.Metric,
    names: list[str] | None,
    config: ClipCaCgConfig | None = None,
) -> dict[str, Any]:
    """All scores of logits (posts, labels) against the true labels.

    Args:
        logits: (posts, labels).
        labels: (posts,) class indices or values; (posts, labels) of 0 and 1 for several labels per post.
        metric: From `load_metric`.
        names: Names of the classes, None for a regression.
        config: Config of the model, for several labels per post; None: a label applies from a logit of 0.
    """
    if metric.config_name == "multilabel":
        applies = torch.from_numpy(logits >= 0)
        if config is not None:
            applies = labels_that_apply(label_scores(torch.from_numpy(logits), config), config.label_thresholds)
        return metric.compute(predictions=applies.int().numpy(), references=labels.astype(int), label_names=names)
    values = logits.reshape(-1) if names is None else logits.argmax(axis=-1)
    named = {} if names is None else {"label_names": names}
    return metric.compute(predictions=values, references=labels.reshape(-1), **named)


def best_threshold(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the threshold with the best F1; 0.5 if none is better.

    Args:
        labels: (posts,) 1 where the label applies, else 0.
        probabilities: (posts,) of the label.

    Returns:
        0.5, or the middle between two neighboring probabilities.
    """
    if not labels.any():
        return 0.5
    precision, recall, found = precision_recall_curve(labels, probabilities)  # predicted from `found` on
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(f1[:-1].argmax())
    at_half = int(np.searchsorted(found, 0.5))  # the last entry of f1 is that of predicting nothing
    if f1[at_half] >= f1[best]:
        return 0.5
    below = found[best - 1] if best else 0.0
    return float(below + found[best]) / 2


def names_to_choose_by(task: str) -> list[str]:
    """The names that `--metric_for_best_model` takes for a task."""
    logits, names = (np.eye(2)[:, :1], None) if task == "regression" else (np.eye(2), ["0", "1"])
    labels = np.eye(2) if task == "multi_label_classification" else np.arange(2)
    scores = score(logits, labels, load_metric(task), names)
    return ["loss", *(name for name, value in scores.items() if isinstance(value, float))]


def check_metric_name(name: str, task: str | None = None) -> None:
    """Check the value of `--metric_for_best_model`; `task` is None as long as it is unknown.

    Raises:
        InputError: If no evaluation gives such a score.
    """
    choices = {task: names_to_choose_by(task) for task in ([task] if task else TASKS)}
    if name.removeprefix("eval_") not in sum(choices.values(), []):
        told = [f"{', '.join(names)} for {TASKS[task]}" for task, names in choices.items()]
        raise InputError(f"--metric_for_best_model {name} is no score of an evaluation: use {'; '.join(told)}.")
