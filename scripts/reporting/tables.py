"""Scores as Markdown tables that are also easy to read in a terminal."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

# Overall scores of our metric and their titles in tables.
SCORES = {
    "accuracy": "Accuracy",
    "f1": "Weighted F1",
    "f1_micro": "Micro F1",
    "f1_macro": "Macro F1",
    "mse": "Mean squared error",
    "mae": "Mean absolute error",
    "pearsonr": "Pearson's r",
}


def results_table(metrics: Mapping[str, Any], label_names: Sequence[str] | None = None) -> str:
    """Format scores as Markdown tables.

    Args:
        metrics: Output of our metric. Scores that are missing or None get no column.
        label_names: Names of the classes in index order; None takes those in `metrics`.

    Returns:
        One table of overall scores and, if there are classes, one of precision, recall, F1 and support per class.

    Raises:
        ValueError: If the numbers of names and classes differ.
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
    """Format rows as a Markdown table. The first row is the header; every cell is escaped."""
    header, *body = [[escape_markdown(cell) for cell in row] for row in rows]
    return tabulate(body, header, tablefmt="github", disable_numparse=True)  # a label "1e5" is not a number


def escape_markdown(value: Any) -> str:
    """Put a value on one line and escape everything that Markdown would read as markup; a_b stays as it is."""
    return re.sub(r"([\\`*\[\]<>|~$]|(?<!\w)_|_(?!\w)|&(?=#?\w+;))", r"\\\1", " ".join(str(value).split()))
