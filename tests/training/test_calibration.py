"""Temperature, calibration errors and coverage, against other libraries' values and values by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from inputs import flags, results, table_of_images

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.scripts import evaluate_checkpoint, train
from clipcacg.scripts.training import run
from clipcacg.scripts.training.arguments import parse_arguments
from clipcacg.scripts.training.calibration import (
    accuracy_by_coverage,
    answers,
    calibration,
    calibration_scores,
    choose_min_confidence,
    fit_temperature,
)

ONE = ClipCaCgConfig(clip_mode="none")
SEVERAL = ClipCaCgConfig(clip_mode="none", problem_type="multi_label_classification")


def drawn(count: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, `scale` times too large, and labels drawn from the probabilities of the logits before."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(count, 3))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return (scale * logits).astype(np.float32), labels


def logits_of(*confidences: float) -> np.ndarray:
    """Logits whose second label has these probabilities, and the others share the rest."""
    rest = (1 - np.array(confidences)) / 2
    return np.log(np.stack([rest, confidences, rest], axis=1))


def test_scores_are_those_of_other_libraries() -> None:
    rng = np.random.default_rng(0)
    logits = (2 * rng.normal(size=(200, 3))).astype(np.float32)
    found = calibration_scores(logits, (logits + 3 * rng.normal(size=(200, 3))).argmax(axis=1), ONE)
    # torchmetrics 1.9: multiclass_calibration_error(..., n_bins=15, norm="l1").
    assert found["ece"] == pytest.approx(0.139456, abs=1e-6)
    # scikit-learn 1.9: brier_score_loss and log_loss.
    assert found["brier"] == pytest.approx(0.553611, abs=1e-6) and found["nll"] == pytest.approx(0.936435, abs=1e-6)
    assert sum(one["count"] for one in found["bins"]) == 200


def test_bins_of_equal_mass_by_hand() -> None:
    """Thirty answers in 15 bins of two; in one bin of equal width they would cancel out."""
    logits = logits_of(*[0.70] * 2, *[0.701] * 28)
    labels = np.array([0, 0] + [1] * 28)
    found = calibration_scores(logits, labels, ONE)
    assert found["ece_adaptive"] == pytest.approx((2 * 0.70 + 28 * 0.299) / 30)
    assert found["ece"] == pytest.approx(28 / 30 - (2 * 0.70 + 28 * 0.701) / 30)


def test_the_temperature_undoes_logits_that_are_too_large() -> None:
    logits, labels = drawn(20_000, scale=2.5)
    temperature = fit_temperature(logits, labels, ONE)
    assert temperature == pytest.approx(2.5, rel=0.05)
    found = calibration(logits, labels, ClipCaCgConfig(clip_mode="none", temperature=temperature))
    assert found["before"]["ece"] > 0.1 and found["after"]["ece"] < 0.01
    assert all(found["after"][name] < found["before"][name] for name in ("ece_adaptive", "brier", "nll"))


def test_the_temperature_of_several_labels() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5_000, 3))
    applies = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    temperature = fit_temperature((3 * logits).astype(np.float32), applies, SEVERAL)
    assert temperature == pytest.approx(3, rel=0.05)
    found = calibration_scores(logits, applies, SEVERAL)
    assert found["ece"] < 0.02 and sum(one["count"] for one in found["bins"]) == 15_000


def test_the_temperature_stays_where_every_answer_is_right() -> None:
    logits, _ = drawn(50)
    assert fit_temperature(logits, logits.argmax(axis=1), ONE) == 1.0
    assert fit_temperature(logits, (logits > 0).astype(np.float32), SEVERAL) == 1.0


@pytest.mark.parametrize(
    ("wanted", "min_confidence", "answered", "accuracy"),
    [
        (0.5, 0.0, 1.0, 3 / 5),
        (0.7, 0.65, 4 / 5, 3 / 4),
        (1.0, 0.85, 2 / 5, 1.0),  # the two that are 0.8 sure cannot be parted: one of them is wrong
    ],
)
def test_the_least_confidence_with_a_wanted_accuracy(
    wanted: float, min_confidence: float, answered: float, accuracy: float
) -> None:
    logits, labels = logits_of(0.8, 0.5, 0.9, 0.8, 0.95), np.array([1, 0, 1, 0, 1])
    chosen = choose_min_confidence(logits, labels, ONE, wanted)
    assert chosen == {
        "wanted_accuracy": wanted,
        "validation_posts": 5,
        "min_confidence": pytest.approx(min_confidence),
    }
    found = answers(logits, labels, ONE, chosen)
    assert (found["answered"], found["accuracy"]) == (answered, accuracy)


def test_an_accuracy_that_no_confidence_gives() -> None:
    chosen = choose_min_confidence(logits_of(0.9, 0.8), np.array([0, 1]), ONE, 0.6)
    assert chosen["min_confidence"] is None
    found = answers(logits_of(0.9), np.array([1]), ONE, chosen)
    assert found["answered"] == 0 and found["accuracy"] is None


def test_the_surest_answers_come_first() -> None:
    confidence = np.linspace(0.4, 0.9, 40)
    found = accuracy_by_coverage(confidence, confidence > 0.6)  # 24 of 40
    by_share = dict(zip(found["coverage"], found["accuracy"], strict=True))
    assert by_share[0.6] == by_share[0.05] == 1 and by_share[1.0] == pytest.approx(24 / 40)
    assert by_share[0.8] == pytest.approx(24 / 32)
    assert found["aurc"] == pytest.approx(sum((n - 24) / n for n in range(25, 41)) / 40)


def test_a_run_is_calibrated_on_validation_and_checked_on_test(
    posts_folder: Path, backbones: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """From training to the config, the scores, the predictions, the card and an evaluation of the checkpoint."""
    wanted = ["--wanted_accuracy", "0.4"]
    few = ["--max_steps", "4", "--save_steps", "4", "--eval_steps", "4", "--learning_rate", "0.01"]
    train.main(flags(posts_folder, backbones, tmp_path / "model", *few, *wanted))
    config = ClipCaCgConfig.from_pretrained(tmp_path / "model")
    found = results(tmp_path / "model")
    assert config.temperature != 1
    for prefix in ("eval", "test"):
        assert found[f"{prefix}_calibration"]["temperature"] == config.temperature
        assert len(found[f"{prefix}_accuracy_by_coverage"]["accuracy"]) == 20
    errors = found["eval_calibration"]
    assert errors["after"]["nll"] < errors["before"]["nll"]
    selective = found["test_selective"]
    assert selective["min_confidence"] == found["eval_selective"]["min_confidence"]
    assert found["eval_selective"]["accuracy"] >= 0.4
    card = " ".join((tmp_path / "model/README.md").read_text().split())
    assert "## Calibration" in card and f"| validation | {config.temperature:.4g} " in card
    assert (
        "(reliability.png)" in card
        and "(coverage.png)" in card
        and "calibration of the probabilities was not" not in card
    )

    data = ["--data_dir", str(posts_folder), "--splits", "random", "--output", str(tmp_path / "found.json")]
    capsys.readouterr()
    evaluate_checkpoint.main([str(tmp_path / "model"), *data, *wanted])
    again = json.loads((tmp_path / "found.json").read_text())
    assert again["calibration"]["after"]["nll"] == pytest.approx(found["test_calibration"]["after"]["nll"], abs=1e-5)
    assert again["selective"] == pytest.approx(selective, abs=1e-5)
    said = f"chosen on {selective['validation_posts']} validation posts for an accuracy of 0.4"
    assert said in capsys.readouterr().out
    assert (tmp_path / "found_reliability.png").is_file() and (tmp_path / "found_coverage.png").is_file()

    more = ["--model_name_or_path", str(tmp_path / "model")]
    arguments, _, _ = parse_arguments(flags(posts_folder, None, tmp_path / "more", *more))
    assert run.build(arguments, False, {})[0].config.temperature == 1.0  # training goes on, and fits it anew


def test_wanted_accuracy_is_refused_where_it_cannot_be_chosen(
    checkpoint: Path, posts_folder: Path, backbones: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="--wanted_accuracy must be above 0 and at most 1, got 80"):
        train.main(flags(posts_folder, backbones, tmp_path, "--wanted_accuracy", "80"))
    rows = table_of_images(tmp_path, lambda number: 0.5 - number)
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = "--image_column photo --text_column tweet --label_column mood".split()
    command = ["--dataset_name", str(tmp_path / "posts.jsonl"), *columns, "--wanted_accuracy", "0.8"]
    with pytest.raises(SystemExit, match="--wanted_accuracy is for one class per post"):
        train.main([*command, "--output_dir", str(tmp_path / "model")])
    data = [str(checkpoint), "--data_dir", str(posts_folder), "--wanted_accuracy", "0.8"]
    with pytest.raises(SystemExit, match="--wanted_accuracy chooses on the validation split: name another --split"):
        evaluate_checkpoint.main([*data, "--splits", "random", "--split", "validation"])
    with pytest.raises(SystemExit, match="--wanted_accuracy needs validation posts to choose by: .* Allowed: test"):
        evaluate_checkpoint.main(data)
