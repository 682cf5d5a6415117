"""Plots of a run: the confusion matrix, and losses and scores by epoch."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure  # pyplot would set a backend for the whole process
from sklearn.metrics import ConfusionMatrixDisplay

CONFUSION_MATRIX_FILE = "confusion_matrix.png"
CURVES_FILE = "training_curves.png"

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
