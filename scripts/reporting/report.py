"""What a run leaves behind to look at: a table of its scores, a picture of its errors and one of its curves."""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.figure import Figure  # the class itself: pyplot would set a backend for the whole process
from sklearn.metrics import ConfusionMatrixDisplay

CONFUSION_MATRIX_FILE = "confusion_matrix.png"
CURVES_FILE = "training_curves.png"

# Overall scores of our metric and how tables call them.
SCORES = {
    "accuracy": "Accuracy",
    "f1": "Weighted F1",
    "f1_macro": "Macro F1",
    "mse": "Mean squared error",
    "mae": "Mean absolute error",
    "pearsonr": "Pearson's r",
}
# Panels of the curves: title, and which entries of the Trainer's log they show under which name.
LOSSES = ("Loss", {"loss": "training", "eval_loss": "validation"})
ACCURACIES = ("Validation score", {"eval_accuracy": "accuracy", "eval_f1": "weighted F1"})
ERRORS = ("Validation error", {"eval_mse": "mean squared error", "eval_mae": "mean absolute error"})


def results_table(metrics: Mapping[str, Any], label_names: Sequence[str] | None = None) -> str:
    """Scores as Markdown tables that also line up in a terminal.

    Args:
        metrics: what our metric returned; scores that it lacks or that are None are left out.
        label_names: names of the classes in index order; None takes those in `metrics`.

    Returns:
        One table of overall scores and, if there are classes, one of precision, recall, F1 and support per class.

    Raises:
        ValueError: as many names as classes are needed.
    """
    scores = {title: metrics[name] for name, title in SCORES.items() if metrics.get(name) is not None}
    tables = [markdown_table([list(scores), [f"{value:.4f}" for value in scores.values()]])]
    if per_class := metrics.get("per_class"):
        rows = [["Label", "Precision", "Recall", "F1", "Support"]]
        for name, row in zip(label_names or per_class, per_class.values(), strict=True):
            rows.append([name, *(f"{row[key]:.4f}" for key in ("precision", "recall", "f1")), row["support"]])
        tables.append(markdown_table(rows))
    return "\n\n".join(tables)


def markdown_table(rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table whose columns are padded, so that it reads well unrendered; the first row is its head."""
    cells = [[escape_markdown(cell) for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def escape_markdown(value: Any) -> str:
    """Text on one line, with a backslash before all that Markdown would take for markup; a_b stays as it is."""
    return re.sub(r"([\\`*\[\]<>|~$]|(?<!\w)_|_(?!\w)|&(?=#?\w+;))", r"\\\1", " ".join(str(value).split()))


def wrap_markdown(text: str, width: int = 119) -> str:
    """Fill the paragraphs, quotes and list items of a Markdown text; tables, headings and code stay as they are."""
    blocks = re.split(r"(```.*?```)|\n{2,}", text, flags=re.DOTALL)
    return "\n\n".join(_wrap_block(block.strip("\n"), width) for block in blocks if block and block.strip())


def _wrap_block(block: str, width: int) -> str:
    if block.startswith(("```", "|", "#", "![")):
        return block
    mark = "> " if block.startswith("> ") else ""
    items = re.split(r"\n(?=- )", block.replace("\n> ", " "))
    return "\n".join(_fill(item, width, mark or ("  " if item.startswith("- ") else "")) for item in items)


def _fill(text: str, width: int, indent: str) -> str:
    """Fill one paragraph so that no line begins with what would be markup there, such as a dash of a name."""
    glued = re.sub(r" (?=([-+*=#>]+|\d+[.)])( |$))", "\0", " ".join(text.split()))
    filled = fill(glued, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return filled.replace("\0", " ")


def plot_confusion_matrix(
    matrix: Sequence[Sequence[int]], label_names: Sequence[str], path: str | Path, title: str = "Confusion matrix"
) -> None:
    """Draw a confusion matrix: a cell shows its posts and their share of the true class, which is also its colour.

    Args:
        matrix: (labels, labels) counts; rows are true classes, columns predicted ones.
        label_names: names of the classes in index order.
        path: PNG file to write.
        title: what to write above it.

    Source: colours by share, not count, are our choice: the largest class would outshine the others.
    """
    counts = np.asarray(matrix)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    many = len(counts) > 8
    # matplotlib reads a formula between two dollar signs, unless they are escaped.
    names = [fill(name.replace("$", r"\$"), 16) for name in label_names]
    side = min(max(4.0, 1.1 * len(names)), 16.0)
    figure = Figure(figsize=(side + 1, side), dpi=150, layout="constrained")
    display = ConfusionMatrixDisplay(shares, display_labels=names)
    style = {"cmap": "Blues", "im_kw": {"vmin": 0, "vmax": 1}, "text_kw": {"fontsize": 6 if many else 10}}
    display.plot(ax=figure.subplots(), xticks_rotation="vertical" if many else "horizontal", **style)
    for cell, text in np.ndenumerate(display.text_):
        # Coloured here: scikit-learn takes the highest share for the darkest colour, and that is 1 in this picture.
        text.set(text=f"{counts[cell]}\n{shares[cell]:.0%}", color="white" if shares[cell] > 0.5 else "black")
    display.ax_.set(xlabel="Predicted label", ylabel="True label", title=title)
    display.im_.colorbar.set_label("Share of the true label's posts")
    figure.savefig(path, format="png", bbox_inches="tight")  # the square axes would push their title out of the page


def plot_curves(
    log_history: Sequence[Mapping[str, float]], path: str | Path, chosen_epoch: float | None = None
) -> None:
    """Draw by epoch the training and validation loss, and beside it validation scores, or errors for regression.

    Args:
        log_history: `trainer.state.log_history`.
        path: PNG file to write. If no curve has two points no file is left there, not even one of an earlier run.
        chosen_epoch: the epoch whose weights were kept, to be marked.
    """
    # The entry with the run time ends training. The best checkpoint may be evaluated after it: no point of a curve.
    history = list(takewhile(lambda entry: "train_runtime" not in entry, log_history))
    panels = []
    for title, names in (LOSSES, ACCURACIES, ERRORS):
        curves = {name: [(e["epoch"], e[key]) for e in history if key in e] for key, name in names.items()}
        if any(len(points) > 1 for points in curves.values()):
            panels.append((title, {name: points for name, points in curves.items() if points}))
    Path(path).unlink(missing_ok=True)
    if panels:
        _draw_panels(panels, chosen_epoch).savefig(path, format="png")


def _draw_panels(
    panels: Sequence[tuple[str, Mapping[str, Sequence[tuple[float, float]]]]], chosen_epoch: float | None
) -> Figure:
    """Draw each (title, {name: [(epoch, value), ...]}) in axes of its own, side by side."""
    figure = Figure(figsize=(5 * len(panels), 4), dpi=150, layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        # The second curve is thin and dashed: accuracy and F1 often lie on each other, and both shall be seen.
        for style, (name, points) in zip((("-", 3), ("--", 1.5)), curves.items(), strict=False):
            epochs, values = zip(*points, strict=True)
            axes.plot(epochs, values, linestyle=style[0], linewidth=style[1], marker="o", markersize=3, label=name)
        if chosen_epoch is not None:
            axes.axvline(chosen_epoch, color="gray", linestyle=":", label="weights kept")
        axes.set(xlabel="Epoch", ylabel=title)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
