"""Plots of a run: the confusion matrix, losses and scores by epoch, reliability, and accuracy by coverage."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.figure import Figure  # pyplot would set a backend for the whole process
from sklearn.metrics import ConfusionMatrixDisplay

CONFUSION_MATRIX_FILE = "confusion_matrix.png"
CURVES_FILE = "training_curves.png"
RELIABILITY_FILE = "reliability.png"
COVERAGE_FILE = "coverage.png"
PLOTS = (CONFUSION_MATRIX_FILE, CURVES_FILE, RELIABILITY_FILE, COVERAGE_FILE)

# Panels of the curves: the title, and the entries of the Trainer's log with their names in the legend.
PANELS = {
    "Loss": {"loss": "training", "eval_loss": "validation"},
    "Validation score": {"eval_accuracy": "accuracy", "eval_f1": "weighted F1", "eval_f1_micro": "micro F1"},
    "Validation error": {"eval_mse": "mean squared error", "eval_mae": "mean absolute error"},
}


def plot_confusion_matrix(
    matrix: Sequence[Sequence[int]], label_names: Sequence[str], path: str | Path, title: str = "Confusion matrix"
) -> None:
    """Plot a confusion matrix. Each cell shows its count and its share of the true label, which is also its color.

    Args:
        matrix: (labels, labels) counts; rows are true labels, columns predicted labels.
        label_names: Names of the labels in index order.
        path: PNG file to write.
        title: Title of the plot.

    Source: coloring by share is our choice. With counts the largest class would hide the others.
    """
    counts = np.asarray(matrix)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    many = len(counts) > 8
    # matplotlib reads text between two dollar signs as a formula unless they are escaped.
    names = [fill(name.replace("$", r"\$"), 16) for name in label_names]
    side = min(max(4.0, 1.1 * len(names)), 16.0)
    figure = Figure(figsize=(side + 1, side), dpi=150, layout="constrained")
    display = ConfusionMatrixDisplay(shares, display_labels=names)
    style = {"cmap": "Blues", "im_kw": {"vmin": 0, "vmax": 1}, "text_kw": {"fontsize": 6 if many else 10}}
    display.plot(ax=figure.subplots(), xticks_rotation="vertical" if many else "horizontal", **style)
    for cell, text in np.ndenumerate(display.text_):
        # scikit-learn would choose the text color by the highest share, but the color scale ends at 1.
        text.set(text=f"{counts[cell]}\n{shares[cell]:.0%}", color="white" if shares[cell] > 0.5 else "black")
    display.ax_.set(xlabel="Predicted label", ylabel="True label", title=title)
    display.im_.colorbar.set_label("Share of the true label's posts")
    figure.savefig(path, format="png", bbox_inches="tight")  # without it the title of a square plot is cut off


def plot_curves(
    log_history: Sequence[Mapping[str, float]], path: str | Path, chosen_epoch: float | None = None
) -> None:
    """Plot losses by epoch and, beside them, validation scores or, for a regression, validation errors.

    A panel needs a curve of at least two points. Without a panel no file is written, and one of an earlier run is
    deleted.

    Args:
        log_history: `trainer.state.log_history`.
        path: PNG file to write.
        chosen_epoch: Epoch whose weights were kept; it is marked.
    """
    # The entry with the run time ends training. A later evaluation, of the best checkpoint, is not part of the curves.
    history = list(takewhile(lambda entry: "train_runtime" not in entry, log_history))
    panels = {}
    for title, names in PANELS.items():
        curves = {name: [(e["epoch"], e[key]) for e in history if key in e] for key, name in names.items()}
        if any(len(points) > 1 for points in curves.values()):
            panels[title] = {name: points for name, points in curves.items() if points}
    Path(path).unlink(missing_ok=True)
    if not panels:
        return
    figure = Figure(figsize=(5 * len(panels), 4), dpi=150, layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        # Accuracy and F1 often coincide. The second curve is thin and dashed, so that both are visible.
        for (linestyle, width), (name, points) in zip((("-", 3), ("--", 1.5)), curves.items(), strict=False):
            axes.plot(*zip(*points, strict=True), linestyle, linewidth=width, marker="o", markersize=3, label=name)
        if chosen_epoch is not None:
            axes.axvline(chosen_epoch, color="gray", linestyle=":", label="weights kept")
        axes.set(xlabel="Epoch", ylabel=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, format="png")


def plot_reliability(results: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Plot accuracy by confidence, before and after the temperature, above the numbers of answers.

    Without calibration scores no file is written, and one of an earlier run is deleted.

    Args:
        results: Split to its scores, see `all_scores`; the plot shows the last split.
        path: PNG file to write.

    Source: the bins are those of the expected calibration error.
    """
    Path(path).unlink(missing_ok=True)
    split, scores = list(results.items())[-1]
    if "calibration" not in scores:
        return
    found = scores["calibration"]
    panels = {"temperature 1": found["before"]}
    if found["temperature"] != 1:
        panels[f"temperature {found['temperature']:.3g}"] = found["after"]
    figure = Figure(figsize=(4.2 * len(panels) + 0.3, 4.8), dpi=150, layout="constrained")
    grid = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row", height_ratios=(3, 1))
    for (above, below), (title, errors) in zip(grid.T, panels.items(), strict=True):
        confidence, accuracy, count = zip(
            *((one["confidence"], one["accuracy"], one["count"]) for one in errors["bins"]), strict=True
        )
        above.plot([0, 1], [0, 1], "--", color="gray", label="calibrated")
        above.plot(confidence, accuracy, "o-", label="measured")
        above.set(title=f"{split}, {title}, ECE {errors['ece']:.3f}", xlim=(0, 1), ylim=(0, 1))
        below.bar(confidence, count, width=0.03)
        below.set(xlabel="Confidence")
        above.grid(alpha=0.3)
    grid[0, 0].set(ylabel="Accuracy")
    grid[0, 0].legend()
    grid[1, 0].set(ylabel="Answers")
    figure.savefig(path, format="png")


def plot_coverage(results: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Plot the accuracy of the surest answers against the share of posts answered, one curve per split.

    Without these scores no file is written, and one of an earlier run is deleted.

    Args:
        results: Split to its scores, see `all_scores`.
        path: PNG file to write.
    """
    Path(path).unlink(missing_ok=True)
    curves = {
        split: scores["accuracy_by_coverage"] for split, scores in results.items() if "accuracy_by_coverage" in scores
    }
    if not curves:
        return
    figure = Figure(figsize=(5, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for number, (split, curve) in enumerate(curves.items()):
        (line,) = axes.plot(curve["coverage"], curve["accuracy"], marker="o", markersize=3, label=split)
        selective = results[split].get("selective", {})
        if selective.get("accuracy") is not None:
            style = {"color": line.get_color(), "marker": "*", "markersize": 14, "linestyle": ""}
            label = f"{split}, min_confidence {selective['min_confidence']:.3g}"
            axes.plot(selective["answered"], selective["accuracy"], label=label, **style)
            if number == 0:
                axes.axhline(selective["wanted_accuracy"], color="gray", linestyle=":", label="wanted accuracy")
    axes.set(xlabel="Share of posts answered, the surest first", ylabel="Accuracy of the answers", xlim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")
