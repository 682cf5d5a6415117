"""`--hp_search`: the trials, their file, and the run with the best of them."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from inputs import results
from transformers.training_args import ParallelMode

from clipcacg.scripts import train
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.training import checks, run
from clipcacg.scripts.training.arguments import RecipeArguments, parse_arguments
from clipcacg.scripts.training.search import TRIALS_FILE, search

pytest.importorskip("optuna")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A table of texts that tell their labels."""
    rows = "".join(f"so {['good', 'bad'][number % 2]} {number},{'ab'[number % 2]}\n" for number in range(60))
    (tmp_path / "posts.csv").write_text(f"text,label\n{rows}")
    return tmp_path / "posts.csv"


def words(own: Path, backbones: Path, output: Path, *more: str) -> list[str]:
    """Flags of a search with tiny encoders; the recipe is the one for own data, with three epochs."""
    config = own.parent / "mine.yaml"
    config.write_text(
        "{num_train_epochs: 3, learning_rate: 0.003, weight_decay: 0.01, per_device_train_batch_size: 16, report_to: "
        "none, eval_strategy: epoch, save_strategy: epoch, load_best_model_at_end: true, metric_for_best_model: loss, "
        "early_stopping_patience: 2}"
    )
    tiny = f"--modality text --text_model {backbones}/text --vision_model {backbones}/vision --hidden_size 16"
    few = f"--num_attention_heads 2 --use_cpu --disable_tqdm True --dataset_name {own} --output_dir {output}"
    return [str(config), *f"{tiny} {few}".split(), *more]


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / TRIALS_FILE).read_text().splitlines()]


def search_in(output: Path, own: Path, backbones: Path, *more: str) -> tuple[bool, Any, Any]:
    """Search without the run after it, where nothing can read a test post."""
    model, data, arguments = parse_arguments(words(own, backbones, output, *more))
    posts: Any = dict(run.load_training_posts(model, data, arguments)) | {"test": object()}
    return search(model, data, arguments, posts), model, arguments


@pytest.mark.slow
def test_the_best_trial_is_trained_again_and_saved(own: Path, backbones: Path, tmp_path: Path) -> None:
    output = tmp_path / "model"
    train.main(words(own, backbones, output, "--hp_search", "4", "--weight_decay", "0.02"))
    lines = read(output)
    assert [line["trial"] for line in lines] == [0, 1, 2, 3] and {line["metric"] for line in lines} == {"loss"}
    start = {"learning_rate": 0.003, "backbone_learning_rate": 0.003, "dropout": 0.3, "num_train_epochs": 3}
    assert lines[0]["values"] == pytest.approx(start)
    assert all(line["values"].keys() == start.keys() and line["epochs"] <= 3 for line in lines)
    best = min(lines, key=lambda line: line["score"])
    assert results(output)["eval_loss"] == pytest.approx(best["score"], rel=1e-5)
    assert len({line["score"] for line in lines}) > 1 and "test_accuracy" in results(output)
    assert json.loads((output / "config.json").read_text())["dropout"] == best["values"]["dropout"]
    facts = json.loads((output / "run_facts.json").read_text())["training"]
    assert facts["learning_rate"] == best["values"]["learning_rate"] and facts["weight_decay"] == 0.02
    assert facts["hp_search"] == "the best of 4 trials on validation"
    assert not list(output.glob("run-*"))


@pytest.mark.slow
def test_a_killed_search_continues_as_if_it_had_not_been(own: Path, backbones: Path, tmp_path: Path) -> None:
    made, whole, _ = search_in(tmp_path / "whole", own, backbones, "--hp_search", "3")
    lines = (tmp_path / "whole" / TRIALS_FILE).read_text().splitlines(keepends=True)
    assert made and len(lines) == 3
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / TRIALS_FILE).write_text(lines[0] + lines[1] + lines[2][:30])
    (tmp_path / "killed/checkpoint-7").mkdir()
    made, model, arguments = search_in(tmp_path / "killed", own, backbones, "--hp_search", "3")
    found = (tmp_path / "killed" / TRIALS_FILE).read_text().splitlines(keepends=True)
    assert made and found[:2] == lines[:2] and model.dropout == whole.dropout
    last, expected = json.loads(found[-1]), json.loads(lines[-1])
    assert last | {"seconds": 0, "settings": ""} == expected | {"seconds": 0, "settings": ""}
    assert not (tmp_path / "killed/checkpoint-7").exists()  # of a run with settings that may not be the best any more
    (tmp_path / "killed/checkpoint-9").mkdir()
    assert search_in(tmp_path / "killed", own, backbones, "--hp_search", "3")[0] is False
    assert (tmp_path / "killed/checkpoint-9").is_dir()  # the run with the best settings continues from it
    with pytest.raises(InputError, match="holds trials of other settings or data"):
        search_in(tmp_path / "killed", own, backbones, "--hp_search", "3", "--hidden_size", "32")
    more = ["--hp_search", "1", "--hidden_size", "32", "--overwrite_output_dir", "--num_train_epochs", "1"]
    assert search_in(tmp_path / "killed", own, backbones, *more)[0] and len(read(tmp_path / "killed")) == 1


@pytest.mark.slow
def test_trials_share_stored_features(
    own: Path, backbones: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = ["--freeze_text", "--cache_features", "--hp_search", "2", "--num_train_epochs", "1"]
    with caplog.at_level(logging.INFO):
        train.main(words(own, backbones, tmp_path / "model", *more))
    stored = [record.args[0] for record in caplog.records if record.msg.startswith("Features of")]
    assert sum(stored) == 60 and len(stored) == 2  # the search stores those of training and validation, once
    assert "backbone_learning_rate" not in read(tmp_path / "model")[0]["values"]


def test_a_trial_that_diverges_is_a_line_and_no_answer(own: Path, backbones: Path, tmp_path: Path) -> None:
    rates = ["--dropout", "0.1", "--weight_decay", "0", "--num_train_epochs", "1", "--hp_search", "1"]
    argv = words(own, backbones, tmp_path / "model", *rates)
    Path(argv[0]).write_text(Path(argv[0]).read_text().replace("0.003", "1.0e+30"))
    with pytest.raises(SystemExit, match="Every trial in .* failed: lower --learning_rate"):
        train.main(argv)
    assert "The loss of step" in read(tmp_path / "model")[0]["error"]


def test_a_search_that_cannot_be_is_refused(
    own: Path, backbones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = words(own, backbones, tmp_path / "model", "--hp_search", "2")
    fixed = "--dropout 0.1 --weight_decay 0 --num_train_epochs 1 --learning_rate 1 --backbone_learning_rate 1"
    with pytest.raises(SystemExit, match="--hp_search has nothing to search"):
        train.main([*argv, *fixed.split()])
    with pytest.raises(InputError, match="--hp_search needs a validation split, and the data has only train, test"):
        checks.check_validation(parse_arguments(argv)[2], ["train", "test"])
    with monkeypatch.context() as patch:
        patch.setattr(checks, "is_optuna_available", lambda: False)
        with pytest.raises(
            SystemExit, match=r"--hp_search needs the package optuna: pip install 'clipcacg\[search\]'"
        ):
            train.main(argv)
    monkeypatch.setattr(RecipeArguments, "parallel_mode", ParallelMode.DISTRIBUTED)
    with pytest.raises(SystemExit, match="--hp_search runs in one process"):
        train.main(argv)
