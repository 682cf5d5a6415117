"""How far the probabilities of a classifier can be trusted: temperature, calibration errors, accuracy and coverage.

The calibration errors are a few lines of numpy because no library is worth a dependency for them: scikit-learn has
neither, torchmetrics has no bins of equal mass, and netcal brings Pyro and GPyTorch. A test compares the error of bins
of equal width with the value of torchmetrics, and the Brier score with that of scikit-learn.
"""

import copy
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.processing_clipcacg import label_scores
from clipcacg.scripts.data.errors import InputError

BINS = 15
TEMPERATURES = (0.05, 20.0)  # where `fit_temperature` looks
SHARES = np.linspace(0.05, 1, 20)  # of the posts, at which the accuracy of the answers is given


def fit_temperature(logits: np.ndarray, labels: np.ndarray, config: ClipCaCgConfig) -> float:
    """Return the temperature with the least negative log-likelihood.

    Args:
        logits: (posts, labels).
        labels: (posts,) class indices; (posts, labels) of 0 and 1 for several labels per post.
        config: Config of the model.

    Returns:
        1 if the minimum is outside `TEMPERATURES`: where every answer is right, the likelihood always gains from a
        lower temperature.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    bounds = np.log(TEMPERATURES)
    found = minimize_scalar(
        lambda log: negative_log_likelihood(logits, labels, with_temperature(config, np.exp(log))),
        bounds=tuple(bounds),
        method="bounded",
    ).x
    return 1.0 if np.abs(bounds - found).min() < 0.01 else float(np.exp(found))


def with_temperature(config: ClipCaCgConfig, temperature: float) -> ClipCaCgConfig:
    """Return a copy of the config with another temperature."""
    config = copy.copy(config)
    config.temperature = float(temperature)
    return config


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray, config: ClipCaCgConfig) -> float:
    """Return the mean over posts, or over all decisions for several labels per post; arguments as above."""
    scaled, true = torch.from_numpy(logits).double() / config.temperature, torch.from_numpy(labels)
    if config.task == "multi_label_classification":
        return functional.binary_cross_entropy_with_logits(scaled, true.double()).item()
    return functional.cross_entropy(scaled, true.long()).item()


def confidences(logits: np.ndarray, labels: np.ndarray, config: ClipCaCgConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return what the model is sure of, and whether it is so; arguments as above.

    Returns:
        (posts,) probability of the predicted label, and whether that label is true. For several labels per post
        (posts * labels,) probability of each label, and whether it applies.
    """
    probabilities = label_scores(torch.from_numpy(logits), config).double().numpy()
    if config.task == "multi_label_classification":
        return probabilities.ravel(), labels.ravel().astype(bool)
    return probabilities.max(axis=-1), probabilities.argmax(axis=-1) == labels


def calibration(logits: np.ndarray, labels: np.ndarray, config: ClipCaCgConfig) -> dict[str, Any]:
    """Return the `temperature`, and `calibration_scores` without it (`before`) and with it (`after`)."""
    before, after = (calibration_scores(logits, labels, one) for one in (with_temperature(config, 1.0), config))
    return {"temperature": config.temperature, "before": before, "after": after}


def calibration_scores(logits: np.ndarray, labels: np.ndarray, config: ClipCaCgConfig) -> dict[str, Any]:
    """Return the calibration errors, the Brier score and the negative log-likelihood; arguments as above.

    Returns:
        `ece` of 15 bins of equal width and `ece_adaptive` of 15 bins of equal mass: the mean difference between
        confidence and accuracy, weighted by the bins' sizes; `brier`: the squared error of all probabilities of a
        post, from 0 to 2, or of one label for several labels per post, from 0 to 1; `nll`, see
        `negative_log_likelihood`; and `bins`, those of equal width that are not empty.
    """
    confidence, correct = confidences(logits, labels, config)
    of_width = np.digitize(confidence, np.linspace(0, 1, BINS + 1)[1:-1])
    of_mass = confidence.argsort(kind="stable").argsort() * BINS // len(confidence)
    errors, bins = [], [[]]
    for index in (of_mass, of_width):
        members = [index == number for number in np.unique(index)]
        bins = [
            {"confidence": confidence[one].mean(), "accuracy": correct[one].mean(), "count": int(one.sum())}
            for one in members
        ]
        errors.append(sum(one["count"] * abs(one["confidence"] - one["accuracy"]) for one in bins) / len(confidence))
    probabilities = label_scores(torch.from_numpy(logits), config).double().numpy()
    several = config.task == "multi_label_classification"
    squares = (probabilities - (labels if several else np.eye(logits.shape[-1])[labels])) ** 2
    return {
        "ece": float(errors[1]),
        "ece_adaptive": float(errors[0]),
        "brier": float(squares.mean() if several else squares.sum(axis=-1).mean()),
        "nll": negative_log_likelihood(logits, labels, config),
        "bins": bins,
    }


def accuracy_by_coverage(confidence: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """Return the accuracy of the surest answers for each share of posts answered.

    Args:
        confidence: (posts,) probability of the predicted label.
        correct: (posts,) whether it is true.

    Returns:
        `coverage`: shares of the posts; `accuracy`: that of the surest answers of each share; `aurc`: the area under
        the risk-coverage curve, the mean error rate over all shares.

    Source: Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017.
    """
    accuracy = running_accuracy(correct[(-confidence).argsort(kind="stable")])
    counts = np.ceil(SHARES * len(accuracy)).astype(int)
    return {
        "coverage": SHARES.round(2).tolist(),
        "accuracy": accuracy[counts - 1].tolist(),
        "aurc": float(1 - accuracy.mean()),
    }


def running_accuracy(correct: np.ndarray) -> np.ndarray:
    """Return the accuracy of the first answer, of the first two, and so on."""
    return correct.cumsum() / np.arange(1, len(correct) + 1)


def check_wanted_accuracy(accuracy: float | None, task: str = "single_label_classification") -> None:
    """Check the value of `--wanted_accuracy`; None is no value.

    Raises:
        InputError: If it is no share, or the task is not one class per post.
    """
    if accuracy is not None and not 0 < accuracy <= 1:
        raise InputError(f"--wanted_accuracy must be above 0 and at most 1, got {accuracy}.")
    if accuracy is not None and task != "single_label_classification":
        raise InputError("--wanted_accuracy is for one class per post, and these labels are numbers or lists.")


def choose_min_confidence(
    logits: np.ndarray, labels: np.ndarray, config: ClipCaCgConfig, wanted_accuracy: float
) -> dict[str, Any]:
    """Choose the least `min_confidence` whose answers have a wanted accuracy.

    Args:
        logits: (posts, labels), of the validation split.
        labels: (posts,) class indices.
        config: Config of the model.
        wanted_accuracy: The accuracy.

    Returns:
        `wanted_accuracy`, `validation_posts`, their number, and `min_confidence`: the middle between two neighboring
        confidences; 0 if all posts can be answered, None if no answers are so good.
    """
    confidence, correct = confidences(logits, labels, config)
    order = (-confidence).argsort(kind="stable")
    surest, accuracy = confidence[order], running_accuracy(correct[order])
    following = np.append(surest[1:], -surest[-1])  # equal confidences cannot be parted; the last middle is 0
    good = np.flatnonzero((accuracy >= wanted_accuracy) & (surest > following))
    middle = float(surest[good[-1]] + following[good[-1]]) / 2 if len(good) else None
    return {"wanted_accuracy": wanted_accuracy, "validation_posts": len(labels), "min_confidence": middle}


def answers(logits: np.ndarray, labels: np.ndarray, config: ClipCaCgConfig, chosen: dict[str, Any]) -> dict[str, Any]:
    """Measure what `choose_min_confidence` chose on any split.

    Returns:
        What was chosen; `posts`, their number; the share of them that is `answered`; and the answers' `accuracy`, None
        if there is no answer.
    """
    confidence, correct = confidences(logits, labels, config)
    least = chosen["min_confidence"]
    sure = confidence >= (np.inf if least is None else least)
    accuracy = float(correct[sure].mean()) if sure.any() else None
    return {**chosen, "posts": len(labels), "answered": float(sure.mean()), "accuracy": accuracy}
