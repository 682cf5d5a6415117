"""Tables compared as text, pictures by what was drawn into them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image

from clipcacg.scripts.reporting.report import plot_confusion_matrix, plot_curves, results_table, wrap_markdown

METRICS = {
    "accuracy": 0.75,
    "f1": 2 / 3,
    "f1_macro": 0.5,
    "per_class": {
        "neg|ative": {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 1},
        "positive": {"precision": 1.0, "recall": 2 / 3, "f1": 0.8, "support": 3},
    },
    "confusion_matrix": [[1, 0], [1, 2]],
}
HISTORY = [
    {"loss": 1.1, "epoch": 0.5, "step": 1},
    {"loss": 0.9, "epoch": 1.0, "step": 2},
    {"eval_loss": 1.0, "eval_accuracy": 0.5, "eval_f1": 0.4, "epoch": 1.0, "step": 2},
    {"loss": 0.7, "epoch": 2.0, "step": 4},
    {"eval_loss": 1.2, "eval_accuracy": 0.6, "eval_f1": 0.5, "epoch": 2.0, "step": 4},
    {"train_runtime": 3.0, "train_loss": 0.9, "epoch": 2.0, "step": 4},
    {"eval_loss": 1.0, "eval_accuracy": 0.5, "eval_f1": 0.4, "epoch": 2.0, "step": 4},  # the best one, once more
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, instead of files."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    return figures


def lines(figure: Figure) -> list[dict[str, list[Sequence[float]]]]:
    """For each panel of a figure, the points of each curve."""
    return [{line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figure.axes]


def assert_uncut_png(path: Path) -> None:
    """A PNG file with something on it that does not reach its border."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("L"))
    assert pixels.std() > 10
    assert all((edge == 255).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


def test_results_table() -> None:
    assert results_table(METRICS).splitlines() == [
        "| Accuracy | Weighted F1 | Macro F1 |",
        "|----------|-------------|----------|",
        "| 0.7500   | 0.6667      | 0.5000   |",
        "",
        "| Label      | Precision | Recall | F1     | Support |",
        "|------------|-----------|--------|--------|---------|",
        r"| neg\|ative | 0.5000    | 1.0000 | 0.6667 | 1       |",
        "| positive   | 1.0000    | 0.6667 | 0.8000 | 3       |",
    ]


def test_results_table_escapes_and_counts_names() -> None:
    table = results_table(METRICS, ["*sad*", "so_so"])
    assert r"| \*sad\* " in table and "| so_so " in table
    with pytest.raises(ValueError):
        results_table(METRICS, ["only one"])


def test_results_table_leaves_out_what_was_not_measured() -> None:
    table = results_table({"mse": 0.25, "mae": 0.5, "pearsonr": None})
    assert table.splitlines()[0] == "| Mean squared error | Mean absolute error |"
    assert "None" not in table and "Accuracy" not in table


def test_wrapping_leaves_tables_and_code_alone() -> None:
    code = "```python\n" + "x = 1  # " + "long " * 30 + "\n\n\ny = 2\n```"
    table = "| " + "wide " * 30 + "|\n|---|\n| 1 |"
    text = f"# Title\n\n\nA ragged\nparagraph.\n\n{table}\n\n{code}\n\n- one\n  item\n- two\n\n> a\n> quote"
    wrapped = f"# Title\n\nA ragged paragraph.\n\n{table}\n\n{code}\n\n- one item\n- two\n\n> a quote"
    assert wrap_markdown(text) == wrapped and wrap_markdown(wrapped) == wrapped
    assert wrap_markdown("- " + "word " * 8 + "\n\n> " + "word " * 8, 22).splitlines() == [
        "- word word word word", "  word word word word", "", "> word word word word", "> word word word word"
    ]  # fmt: skip


@pytest.mark.parametrize("word", ["-", "---", "#", "1.", "2)", "+", ">", "==="])
def test_a_word_does_not_become_markup_by_wrapping(word: str) -> None:
    for width in range(8, 30):
        lines = wrap_markdown(f"some words {word} and more words {word}", width).splitlines()
        assert not any(line.split()[0] == word for line in lines)


def test_confusion_matrix_shows_counts_and_shares(drawn: list[Figure]) -> None:
    plot_confusion_matrix([[1, 0], [1, 2]], ["sad", "happy"], "unused.png", title="Of the test split")
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["1\n100%", "0\n0%", "1\n33%", "2\n67%"]
    assert [text.get_color() for text in axes.texts] == ["white", "black", "black", "white"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sad", "happy"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Predicted label", "True label")
    assert axes.get_title() == "Of the test split"


def test_pale_and_empty_rows_can_be_read(drawn: list[Figure]) -> None:
    plot_confusion_matrix([[1, 1, 1], [1, 1, 1], [0, 0, 0]], "abc", "unused.png")
    texts = drawn[0].axes[0].texts
    assert {text.get_color() for text in texts} == {"black"}
    assert (texts[0].get_text(), texts[8].get_text()) == ("1\n33%", "0\n0%")


@pytest.mark.parametrize("names", [["negative", "neutral", "positive"], ["$\\broken$", "a long " * 6, "c"]])
def test_confusion_matrix_picture(tmp_path: Path, names: list[str]) -> None:
    # An empty class, and a name that matplotlib would take for a formula.
    plot_confusion_matrix([[5, 1, 0], [0, 0, 0], [2, 1, 9]], names, tmp_path / "matrix.png")
    assert_uncut_png(tmp_path / "matrix.png")


def test_curves_end_with_training(drawn: list[Figure]) -> None:
    plot_curves(HISTORY, "unused.png")
    assert lines(drawn[0]) == [
        {"training": [[0.5, 1.1], [1.0, 0.9], [2.0, 0.7]], "validation": [[1.0, 1.0], [2.0, 1.2]]},
        {"accuracy": [[1.0, 0.5], [2.0, 0.6]], "weighted F1": [[1.0, 0.4], [2.0, 0.5]]},
    ]
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in drawn[0].axes] == [
        ("Epoch", "Loss"),
        ("Epoch", "Validation score"),
    ]


def test_the_epoch_whose_weights_were_kept_is_marked(drawn: list[Figure]) -> None:
    plot_curves(HISTORY, "unused.png", chosen_epoch=2.0)
    assert [curves["weights kept"] for curves in lines(drawn[0])] == [[[2.0, 0.0], [2.0, 1.0]]] * 2


def test_curves_that_lie_on_each_other_are_both_seen(drawn: list[Figure]) -> None:
    plot_curves(HISTORY, "unused.png")
    below, above = drawn[0].axes[1].lines
    assert below.get_linewidth() > above.get_linewidth() and (below.get_linestyle(), above.get_linestyle()) == (
        "-",
        "--",
    )


def test_curves_of_regression(drawn: list[Figure]) -> None:
    history = [{"eval_mse": 0.3, "eval_mae": 0.4, "epoch": 1.0}, {"eval_mse": 0.2, "eval_mae": 0.3, "epoch": 2.0}]
    plot_curves([{"loss": 1.0, "epoch": 1.0}, {"loss": 0.9, "epoch": 2.0}, *history], "unused.png")
    assert lines(drawn[0])[1] == {
        "mean squared error": [[1.0, 0.3], [2.0, 0.2]],
        "mean absolute error": [[1.0, 0.4], [2.0, 0.3]],
    }
    assert drawn[0].axes[1].get_ylabel() == "Validation error"


def test_curves_picture(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    plot_curves(HISTORY, path)
    assert_uncut_png(path)
    plot_curves([HISTORY[2], HISTORY[5]], path)
    assert not path.exists(), "one evaluation is no curve, and the picture of an earlier run was left"


def test_no_state_is_shared(tmp_path: Path) -> None:
    plot_confusion_matrix([[1, 0], [0, 1]], "ab", tmp_path / "matrix.png")
    plot_curves(HISTORY, tmp_path / "curves.png")
    assert pyplot.get_fignums() == []
