"""Plots are tested by what was drawn into the figure, and as files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from clipcacg.scripts.reporting.plots import plot_confusion_matrix, plot_curves

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
