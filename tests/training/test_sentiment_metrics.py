"""The metric's scores against values computed by hand, and two processes that use it at once."""

import json
import warnings
from pathlib import Path

import commands
import evaluate
import pytest

METRIC = str(Path(__file__).parents[2] / "scripts" / "training" / "sentiment_metrics")
NAMES = ["negative", "neutral", "positive"]

# Ten posts: rows of the matrix are [2 0 1], [1 1 0], [1 1 3]. By hand, negative: precision 2/4, recall 2/3, F1 4/7;
# neutral: 1/2, 1/2, 1/2; positive: 3/4, 3/5, 2/3.
REFERENCES = [0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
PREDICTIONS = [0, 0, 2, 1, 0, 2, 2, 2, 1, 0]
WEIGHTED_F1 = (3 * 4 / 7 + 2 * 1 / 2 + 5 * 2 / 3) / 10


@pytest.fixture
def classes() -> evaluate.Metric:
    return evaluate.load(METRIC, keep_in_memory=True)


@pytest.fixture
def values() -> evaluate.Metric:
    return evaluate.load(METRIC, "regression", keep_in_memory=True)


def test_scores_by_hand(classes: evaluate.Metric) -> None:
    result = classes.compute(predictions=PREDICTIONS, references=REFERENCES, label_names=NAMES)
    assert result["accuracy"] == pytest.approx(6 / 10)
    assert result["f1"] == pytest.approx(WEIGHTED_F1)
    assert result["f1_macro"] == pytest.approx((4 / 7 + 1 / 2 + 2 / 3) / 3)
    assert result["confusion_matrix"] == [[2, 0, 1], [1, 1, 0], [1, 1, 3]]
    assert list(result["per_class"]) == NAMES
    assert result["per_class"]["negative"] == pytest.approx(
        {"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7, "support": 3}
    )
    assert result["per_class"]["positive"] == pytest.approx(
        {"precision": 3 / 4, "recall": 3 / 5, "f1": 2 / 3, "support": 5}
    )


def test_several_labels_by_hand() -> None:
    metric = evaluate.load(METRIC, "multilabel", keep_in_memory=True)
    true, predicted = [[1, 0, 1], [0, 1, 0], [0, 0, 0]], [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    result = metric.compute(predictions=predicted, references=true, label_names=NAMES)
    # By hand: 2 right decisions for a label, 2 wrong ones, 1 missed; F1 of the labels 2/3, 2/3 and 0.
    assert result["f1_micro"] == pytest.approx(4 / 7) and result["f1_macro"] == pytest.approx(4 / 9)
    assert result["per_class"]["neutral"] == pytest.approx(
        {"precision": 1 / 2, "recall": 1.0, "f1": 2 / 3, "support": 1}
    )
    with pytest.raises(ValueError, match="from 0 to 1, got 0.5"):
        metric.compute(predictions=[[0.5]], references=[[1]])


def test_absent_class_counts_zero_without_warnings(classes: evaluate.Metric) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = classes.compute(predictions=PREDICTIONS, references=REFERENCES, label_names=["mixed", *NAMES, "none"])
    assert [len(row) for row in result["confusion_matrix"]] == [5] * 5
    assert result["per_class"]["none"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert result["f1_macro"] == pytest.approx((4 / 7 + 1 / 2 + 2 / 3) / 5)
    assert result["f1"] == pytest.approx(WEIGHTED_F1)


def test_result_is_plain_json(classes: evaluate.Metric, values: evaluate.Metric) -> None:
    for result in (
        classes.compute(predictions=PREDICTIONS, references=REFERENCES, label_names=NAMES),
        values.compute(predictions=[1.0, 2.0], references=[1.0, 3.0]),
    ):
        assert json.loads(json.dumps(result)) == result
        assert all(type(value) in (float, dict, list) for value in result.values())


@pytest.mark.parametrize(
    "predictions, references, names", [([0, 3], [0, 0], ["0", "1", "2", "3"]), ([0, 0], [0, 0], ["0", "1"])]
)
def test_classes_without_names_are_named_by_index(
    classes: evaluate.Metric, predictions: list[int], references: list[int], names: list[str]
) -> None:
    assert list(classes.compute(predictions=predictions, references=references)["per_class"]) == names


def test_batches_are_scored_together(classes: evaluate.Metric) -> None:
    for start in range(0, 10, 4):
        batch = slice(start, start + 4)
        classes.add_batch(predictions=PREDICTIONS[batch], references=REFERENCES[batch])
    assert classes.compute()["f1"] == pytest.approx(WEIGHTED_F1)


@pytest.mark.parametrize("wrong", [0.9, -1, 3, float("nan")])
@pytest.mark.parametrize("side", ["predictions", "references"])
def test_only_class_indices_are_accepted(classes: evaluate.Metric, side: str, wrong: float) -> None:
    inputs = {"predictions": [0, 1], "references": [0, 1], side: [0, wrong]}
    with pytest.raises(ValueError, match=f"class indices from 0 to 2, got {wrong}"):
        classes.compute(**inputs, label_names=NAMES)


@pytest.mark.parametrize("config_name", [None, "regression"])
def test_no_posts_is_an_error(config_name: str | None) -> None:
    with pytest.raises(ValueError, match="No posts"):
        evaluate.load(METRIC, config_name, keep_in_memory=True).compute(predictions=[], references=[])


def test_unknown_configuration_is_an_error() -> None:
    with pytest.raises(ValueError, match="regresion"):
        evaluate.load(METRIC, "regresion")


def test_regression_by_hand(values: evaluate.Metric) -> None:
    # Deviations from the means are (-4/3, -1/3, 5/3) and (-2, 0, 2): r = 6 / sqrt(42/9 * 8). The tolerance is that of
    # double precision: half the digits were lost once, in single.
    result = values.compute(predictions=[1.0, 2.0, 4.0], references=[1.0, 3.0, 5.0])
    expected = {"mse": 2 / 3, "mae": 2 / 3, "pearsonr": 6 / (42 / 9 * 8) ** 0.5}
    assert result == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "predictions, references",
    [([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]), ([1.0], [2.0]), ([2, 2 + 2e-7], [1, 2])],
)
def test_undefined_correlation_is_none(
    values: evaluate.Metric, predictions: list[float], references: list[float]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = values.compute(predictions=predictions, references=references)
    assert result["pearsonr"] is None and result["mse"] > 0


SCRIPT = f"""
import evaluate
for keep_in_memory in (True, False):
    metric = evaluate.load({METRIC!r}, keep_in_memory=keep_in_memory)
    for _ in range(5):
        print(metric.compute(predictions={PREDICTIONS}, references={REFERENCES})["accuracy"])
"""


def test_two_processes_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "working_folder"
    folder.mkdir()
    files = [tmp_path / name for name in ("one", "other")]
    both = [commands.start(["-c", SCRIPT], folder, output) for output in files]
    for process, output in zip(both, files, strict=True):
        process.join()
        assert process.exitcode == 0 and output.read_text().split() == ["0.6"] * 10
    assert list(folder.iterdir()) == []
