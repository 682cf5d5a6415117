"""Tables are compared as text."""

import pytest

from clipcacg.scripts.reporting.tables import markdown_table, results_table

METRICS = {
    "accuracy": 0.75,
    "f1": 2 / 3,
    "f1_macro": None,
    "per_class": {
        "neg|ative": {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 1},
        "positive": {"precision": 1.0, "recall": 2 / 3, "f1": 0.8, "support": 3},
    },
}


def test_results_table_leaves_out_what_was_not_measured() -> None:
    assert results_table(METRICS).splitlines() == [
        "| Accuracy   | Weighted F1   |",
        "|------------|---------------|",
        "| 0.7500     | 0.6667        |",
        "",
        "| Label      | Precision   | Recall   | F1     | Support   |",
        "|------------|-------------|----------|--------|-----------|",
        r"| neg\|ative | 0.5000      | 1.0000   | 0.6667 | 1         |",
        "| positive   | 1.0000      | 0.6667   | 0.8000 | 3         |",
    ]


def test_label_names_replace_those_of_the_metric_and_are_escaped() -> None:
    table = results_table(METRICS, ["*sad*", "so_so"])
    assert r"| \*sad\* " in table and "| so_so " in table
    with pytest.raises(ValueError):
        results_table(METRICS, ["only one"])


def test_cells_that_look_like_numbers_stay_as_they_are() -> None:
    assert markdown_table([["Label", "Value"], ["1e5", "0.50"], ["007", ""]]).splitlines()[2:] == [
        "| 1e5     | 0.50    |",
        "| 007     |         |",
    ]
