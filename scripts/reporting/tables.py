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
# Scores of probabilities and their titles.
CALIBRATION = {
    "ece": "ECE",
    "ece_adaptive": "Adaptive ECE",
    "brier": "Brier score",
    "nll": "Negative log-likelihood",
}
COVERAGE = (1.0, 0.9, 0.8, 0.7, 0.5, 0.3)  # shares of posts answered that the table shows


def results_table(metrics: Mapping[str, Any], label_names: Sequence[str] | None = None) -> str:
    """Format scores as Markdown tables.

    Args:
        metrics: Output of our metric. Scores that are missing or None get no column.
        label_names: Names of the classes in index order; None takes those in `metrics`.

    Returns:
        One table of overall scores; if there are classes, one of precision, recall, F1 and support per class; and if
        posts lack a side, one of the scores of each kind of posts.

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
    if by_kind := metrics.get("by_kind"):
        rows = [["Kind", "Posts", *scores]]
        for kind, found in by_kind.items():
            numbers = (found.get(name) for name, title in SCORES.items() if title in scores)
            rows.append([kind, found["posts"], *("–" if value is None else f"{value:.4f}" for value in numbers)])
        tables.append(markdown_table(rows))
    return "\n\n".join(tables)


def calibration_tables(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Format how far the probabilities can be trusted as Markdown tables.

    Args:
        results: Split to its scores, see `all_scores`.

    Returns:
        One table of calibration before and after the temperature, one of accuracy by share of posts answered, and a
        sentence per split on the accuracy that was wanted; of these what was measured.
    """
    calibration, coverage, sentences = [], [], []
    for split, scores in results.items():
        if found := scores.get("calibration"):
            measured = {1.0: found["before"], found["temperature"]: found["after"]}
            for temperature, errors in measured.items():
                numbers = (f"{errors[name]:.4f}" for name in CALIBRATION)
                calibration.append([split, f"{temperature:.4g}", *numbers])
        if found := scores.get("accuracy_by_coverage"):
            by_share = dict(zip(found["coverage"], found["accuracy"], strict=True))
            coverage.append([split, *(f"{by_share[share]:.4f}" for share in COVERAGE), f"{found['aurc']:.4f}"])
        if found := scores.get("selective"):
            sentences.append(selective_sentence(split, found))
    tables = []
    if calibration:
        tables.append(markdown_table([["Split", "Temperature", *CALIBRATION.values()], *calibration]))
    if coverage:
        shares = [f"{share:.0%} answered" for share in COVERAGE]
        tables.append(markdown_table([["Accuracy", *shares, "AURC"], *coverage]))
    return "\n\n".join(tables + sentences)


def selective_sentence(split: str, found: Mapping[str, Any]) -> str:
    """Say how many posts of a split are answered with the `min_confidence` chosen for an accuracy, and how well."""
    wanted, chosen_on = found["wanted_accuracy"], f"{found['validation_posts']} validation posts"
    if found["min_confidence"] is None:
        return f"No min_confidence gives the answers to the {chosen_on} an accuracy of {wanted:g}."
    accuracy = "" if found["accuracy"] is None else f" with an accuracy of {found['accuracy']:.4f}"
    return (
        f"min_confidence {found['min_confidence']:.4f}, chosen on {chosen_on} for an accuracy of {wanted:g}, answers "
        f"{found['answered']:.1%} of {found['posts']} {split} posts{accuracy}."
    )


def markdown_table(rows: Sequence[Sequence[Any]]) -> str:
    """Format rows as a Markdown table. The first row is the header; every cell is escaped."""
    header, *body = [[escape_markdown(cell) for cell in row] for row in rows]
    return tabulate(body, header, tablefmt="github", disable_numparse=True)  # a label "1e5" is not a number


def escape_markdown(value: Any) -> str:
    """Put a value on one line and escape everything that Markdown would read as markup; a_b stays as it is."""
    return re.sub(r"([\\`*\[\]<>|~$]|(?<!\w)_|_(?!\w)|&(?=#?\w+;))", r"\\\1", " ".join(str(value).split()))
