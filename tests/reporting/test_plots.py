"""Plots are tested by what was drawn into the figure, and as files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from clipcacg.scripts.reporting.plots import plot_confusion_matrix, plot_coverage, plot_curves, plot_reliability

HISTORY = [
    {"loss": 1.1, "epoch": 0.5, "step": 1},
    {"loss": 0.9, "epoch": 1.0, "step": 2},
    {"eval_loss": 1.0, "eval_accuracy": 0.5, "eval_f1": 0.4, "epoch": 1.0, "step": 2},
    {"loss": 0.7, "epoch": 2.0, "step": 4},
    {"eval_loss": 1.2, "eval_accuracy": 0.6, "eval_f1": 0.5, "epoch": 2.0, "step": 4},
    {"train_runtime": 3.0, "train_loss": 0.9, "epoch": 2.0, "step": 4},
    {"eval_loss": 1.0, "eval_accuracy": 0.5, "eval_f1": 0.4, "epoch": 2.0, "step": 4},  # the best one again
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would have been saved as files."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    return figures


def lines(figure: Figure) -> list[dict[str, list[Sequence[float]]]]:
    """The points of each curve, by panel."""
    return [{line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figure.axes]


def assert_uncut_png(path: Path) -> None:
    """Check that a PNG file shows something and that nothing reaches its border."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("L"))
    assert pixels.std() > 10
    assert all((edge == 255).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


def test_confusion_matrix_shows_counts_and_shares(drawn: list[Figure]) -> None:
    plot_confusion_matrix([[1, 0], [1, 2]], ["sad", "happy"], "unused.png", title="Of the test split")
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["1\n100%", "0\n0%", "1\n33%", "2\n67%"]
    assert [text.get_color() for text in axes.texts] == ["white", "black", "black", "white"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sad", "happy"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Predicted label", "True label")
    assert axes.get_title() == "Of the test split"


@pytest.mark.parametrize("names", [["negative", "neutral", "positive"], ["$\\broken$", "a long " * 6, "c"]])
def test_confusion_matrix_file(tmp_path: Path, names: list[str]) -> None:
    # An empty class, and a name that matplotlib would read as a formula.
    plot_confusion_matrix([[5, 1, 0], [0, 0, 0], [2, 1, 9]], names, tmp_path / "matrix.png")
    assert_uncut_png(tmp_path / "matrix.png")


def test_curves_end_where_training_ends(drawn: list[Figure]) -> None:
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


def test_curves_file(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    plot_curves(HISTORY, path)
    assert_uncut_png(path)
    plot_curves([HISTORY[2], HISTORY[5]], path)
    assert not path.exists(), "a single evaluation is not a curve, and the file of an earlier run must go"


def errors(*bins: tuple[float, float, int]) -> dict[str, object]:
    return {"ece": 0.1, "bins": [dict(zip(("confidence", "accuracy", "count"), one, strict=True)) for one in bins]}


SURE = {
    "calibration": {
        "temperature": 2.0,
        "before": errors((0.5, 0.4, 3), (0.9, 0.6, 5)),
        "after": errors((0.6, 0.5, 8)),
    },
    "accuracy_by_coverage": {"coverage": [0.5, 1.0], "accuracy": [0.9, 0.8], "aurc": 0.1},
    "selective": {"min_confidence": 0.7, "wanted_accuracy": 0.85, "answered": 0.75, "accuracy": 0.82},
}


def test_reliability_before_and_after(drawn: list[Figure], tmp_path: Path) -> None:
    plot_reliability({"validation": {}, "test": SURE}, tmp_path / "unused.png")
    before, after, *counts = drawn[0].axes
    assert [axes.lines[1].get_xydata().tolist() for axes in (before, after)] == [
        [[0.5, 0.4], [0.9, 0.6]],
        [[0.6, 0.5]],
    ]
    assert [[bar.get_height() for bar in axes.patches] for axes in counts] == [[3, 5], [8]]
    assert "temperature 2" in after.get_title() and "test" in after.get_title()


def test_coverage_of_each_split_with_what_was_chosen(drawn: list[Figure], tmp_path: Path) -> None:
    less = {"accuracy_by_coverage": SURE["accuracy_by_coverage"]}
    plot_coverage({"validation": less, "test": SURE}, tmp_path / "unused.png")
    curves = lines(drawn[0])[0]
    assert curves["validation"] == curves["test"] == [[0.5, 0.9], [1.0, 0.8]]
    assert curves["test, min_confidence 0.7"] == [[0.75, 0.82]]


def test_files_of_what_was_not_measured_go(tmp_path: Path) -> None:
    for plot in (plot_reliability, plot_coverage):
        plot({"test": SURE}, tmp_path / "plot.png")
        assert_uncut_png(tmp_path / "plot.png")
        plot({"test": {"mse": 1.0}}, tmp_path / "plot.png")
        assert not (tmp_path / "plot.png").exists()
