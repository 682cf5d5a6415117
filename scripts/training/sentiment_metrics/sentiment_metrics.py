"""Scores of a sentiment model as one `evaluate` metric that needs no network.

    metric = evaluate.load("scripts/training/sentiment_metrics", keep_in_memory=True)
    metric.compute(predictions=[2, 0], references=[2, 1], label_names=["negative", "neutral", "positive"])

`evaluate.load` copies this file into a cache and finds its dependencies with a regular expression: an import line
may name one library only, and nothing of this project.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    mean_absolute_error,
    mean_squared_error,
    precision_recall_fscore_support,
)

DESCRIPTION = """
Accuracy, F1 and confusion matrix of a classifier; F1 of a classifier with several labels per post (configuration
"multilabel"); squared error, absolute error and correlation of a regressor (configuration "regression").
"""

INPUTS = """
Args:
    predictions: one class index per post; for several labels per post a list with 1 for each label that applies, else
        0; one float per post for regression.
    references: the true class indices, lists or values.
    label_names: names of all classes in the order of their indices. Without them a class is named by its index, and
        the highest index seen sets the number of classes. Regression ignores them.
Returns:
    accuracy, f1 (mean over classes weighted by support: the F1 that papers on MVSA report), f1_macro (plain mean over
    all classes; one that never occurs counts 0), per_class (name to precision, recall, f1, support) and
    confusion_matrix (rows are true classes, columns predicted ones).
    Several labels per post: f1_micro (over all decisions), f1_macro and per_class.
    Regression: mse, mae and pearsonr, which is None where it is undefined (one post, or all values the same).
"""

CITATION = """
The weighted F1 is our reading of Lu, Ni and Ding, "Cross-Modal Sentiment Analysis Based on CLIP Image-Text Attention
Interaction" (2024), which does not say how it averages over classes.
"""


class SentimentMetrics(evaluate.Metric):
    """Scores of classes (default configuration), of several labels ("multilabel") or of values ("regression")."""

    def _info(self) -> evaluate.MetricInfo:
        """Describe the metric to `evaluate`.

        Raises:
            ValueError: an unknown configuration.
        """
        if self.config_name not in ("default", "multilabel", "regression"):
            raise ValueError(
                f"Unknown configuration {self.config_name!r}: use 'multilabel', 'regression', or leave it out."
            )
        # Floats for classes too: as int64, `datasets` would silently turn a probability of 0.9 into class 0.
        value = datasets.Value("float64")
        value = datasets.List(value) if self.config_name == "multilabel" else value
        features = {name: value for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _compute(
        self, predictions: list[Any], references: list[Any], label_names: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Score all posts at once; `evaluate` calls this from `compute`.

        Args:
            predictions: class indices, lists of 0 and 1, or values, one per post.
            references: the true ones.
            label_names: all class names in index order, or None.

        Returns:
            A dict of plain Python numbers and lists, ready for `json.dump`.

        Raises:
            ValueError: no posts, or a value that is not the index of a class.
        """
        if len(references) == 0:
            raise ValueError("No posts to score: predictions and references are empty.")
        # Lists, not format="numpy" in the description above: that would hand out float32 and lose half the digits.
        predicted, true = np.asarray(predictions), np.asarray(references)
        if self.config_name == "regression":
            return regression_scores(predicted, true)
        if self.config_name == "multilabel":
            return multilabel_scores(predicted, true, label_names)
        return class_scores(predicted, true, label_names)


def class_scores(
    predictions: np.ndarray, references: np.ndarray, label_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Accuracy, both F1 means, scores per class and the confusion matrix.

    Args:
        predictions: (posts,) predicted class indices.
        references: (posts,) true class indices.
        label_names: all class names in index order, or None to name classes by their index.

    Returns:
        The dict that the metric's description lists. A precision, recall or F1 of 0/0 is 0.

    Raises:
        ValueError: a value is not the index of a class.

    Source: the definitions are scikit-learn's. Our choice: a class without posts counts in every score, so that the
    tables of any two runs have the same rows.
    """
    names = list(label_names) if label_names is not None else _names_from_indices(predictions, references)
    classes = list(range(len(names)))
    true, predicted = _class_indices(references, len(names)), _class_indices(predictions, len(names))
    per_class = precision_recall_fscore_support(true, predicted, labels=classes, zero_division=0)
    return {
        "accuracy": float(accuracy_score(true, predicted)),
        "f1": float(f1_score(true, predicted, labels=classes, average="weighted", zero_division=0)),
        "f1_macro": float(f1_score(true, predicted, labels=classes, average="macro", zero_division=0)),
        "per_class": _by_name(names, per_class),
        "confusion_matrix": confusion_matrix(true, predicted, labels=classes).tolist(),
    }


def multilabel_scores(
    predictions: np.ndarray, references: np.ndarray, label_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Both F1 means, and scores per label.

    Args:
        predictions: (posts, labels), 1 for each predicted label, else 0.
        references: (posts, labels), 1 for each true label, else 0.
        label_names: all names in index order, or None to name labels by their index.

    Returns:
        The dict that the metric's description lists. A precision, recall or F1 of 0/0 is 0.

    Raises:
        ValueError: a value is neither 0 nor 1.

    Source: the definitions are scikit-learn's.
    """
    true, predicted = _class_indices(references, 2), _class_indices(predictions, 2)
    names = list(label_names) if label_names is not None else [str(index) for index in range(true.shape[1])]
    return {
        "f1_micro": float(f1_score(true, predicted, average="micro", zero_division=0)),
        "f1_macro": float(f1_score(true, predicted, average="macro", zero_division=0)),
        "per_class": _by_name(names, precision_recall_fscore_support(true, predicted, zero_division=0)),
    }


def regression_scores(predictions: np.ndarray, references: np.ndarray) -> dict[str, float | None]:
    """Mean squared error, mean absolute error and Pearson's correlation.

    Args:
        predictions: (posts,) predicted values.
        references: (posts,) true values.

    Returns:
        mse, mae, pearsonr; the last is None where it is undefined: for one post, or where one side is constant.
    """
    # Models compute in float32: values that differ by its rounding errors alone count as constant.
    undefined = any(np.ptp(values) <= 1e-6 * np.abs(values).max() for values in (predictions, references))
    return {
        "mse": float(mean_squared_error(references, predictions)),
        "mae": float(mean_absolute_error(references, predictions)),
        "pearsonr": None if undefined else float(pearsonr(references, predictions).statistic),
    }


def _by_name(names: Sequence[str], scores: Sequence[np.ndarray]) -> dict[str, dict[str, float]]:
    """Name scikit-learn's arrays of precision, recall, F1 and support."""
    return {
        name: {"precision": float(p), "recall": float(r), "f1": float(f1), "support": int(support)}
        for name, p, r, f1, support in zip(names, *scores, strict=True)
    }


def _names_from_indices(predictions: np.ndarray, references: np.ndarray) -> list[str]:
    """Name classes "0", "1", ... up to the highest index seen; there are at least two."""
    highest = max(1, int(np.nanmax([predictions, references])))
    return [str(index) for index in range(highest + 1)]


def _class_indices(values: np.ndarray, num_classes: int) -> np.ndarray:
    """Turn whole floats into class indices.

    Raises:
        ValueError: a value is not a whole number from 0 to num_classes - 1.
    """
    wrong = values[~np.isin(values, np.arange(num_classes))]
    if wrong.size:
        raise ValueError(f"Expected class indices from 0 to {num_classes - 1}, got {wrong[0]:g}.")
    return values.astype(int)
