"""The best weights of a run and their greedy average."""

import shutil
from pathlib import Path

import pytest
import torch
from inputs import SCRIPTS, flags, results
from safetensors.torch import load_file
from transformers import TrainerState, TrainingArguments

from clipcacg.scripts import reproduce, train
from clipcacg.scripts.data.lines import read_lines
from clipcacg.scripts.tables.lines import RUNS_FILE
from clipcacg.scripts.training.arguments import parse_arguments
from clipcacg.scripts.training.averaging import KeepBest, greedy_average
from clipcacg.scripts.training.run import checkpoints

STEPS = ["--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2"]


@pytest.mark.parametrize(
    ("measured", "chosen", "weight"),
    [([0.7, 0.8], [0, 1, 2], 3.0), ([0.5, 0.6], [0, 2], 3.0), ([0.5, 0.4], [0], 1.0), ([float("nan")] * 2, [0], 1.0)],
)
def test_weights_join_the_average_unless_it_gets_worse(
    measured: list[float], chosen: list[int], weight: float
) -> None:
    candidates = [
        {"w": torch.tensor([value], dtype=torch.bfloat16), "running_mean": torch.tensor([value]), "batches": count}
        for value, count in ((1.0, torch.tensor(7)), (3.0, torch.tensor(8)), (5.0, torch.tensor(9)))
    ]
    seen = iter(measured)
    average, indices, values = greedy_average(candidates, 0.6, lambda weights: next(seen))
    assert indices == chosen and values[0] == 0.6 and len(values) == 3
    assert average["w"].item() == average["running_mean"].item() == weight
    assert average["w"].dtype == torch.bfloat16 and average["batches"].item() == 7


def test_the_best_weights_in_memory_are_copies_and_frozen_ones_are_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    arguments = TrainingArguments("x", metric_for_best_model="loss", greater_is_better=False, report_to="none")
    kept, before = KeepBest(2), []
    for epoch, loss in ((1.0, 0.5), (2.0, 0.5), (3.0, 0.7), (4.0, 0.4)):
        before.append({name: value.clone() for name, value in model.state_dict().items()})
        state = TrainerState(epoch=epoch, global_step=int(10 * epoch))
        kept.on_evaluate(arguments, state, None, model=model, metrics={"eval_loss": loss})
        with torch.no_grad():
            model[0].weight += 1
            model[1].running_mean += 1
    assert [(one.epoch, one.step, one.value) for one in kept.best] == [(4.0, 40, -0.4), (1.0, 10, -0.5)]
    for one, weights in zip(kept.best, (before[3], before[0]), strict=True):
        assert one.weights.keys() == weights.keys() - {"0.bias"}
        assert all(torch.equal(value, weights[name]) for name, value in one.weights.items())


def test_a_run_averages_its_best_checkpoints(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    more = [*STEPS, "--average_checkpoints", "3", "--metric_for_best_model", "loss", "--greater_is_better", "False"]
    more += ["--learning_rate", "0.02", "--freeze_vision"]
    command = flags(posts_folder, backbones, tmp_path / "whole", *more)
    train.main(command)
    scores, folders = results(tmp_path / "whole"), checkpoints(tmp_path / "whole")
    tried = scores["averaging"]
    losses = [one["eval_loss"] for one in tried]
    assert losses == sorted(losses) and len(tried) == 3
    assert {f"checkpoint-{one['step']}" for one in tried} | {"checkpoint-12"} == {folder.name for folder in folders}
    steps = scores["averaged_steps"]
    assert len(steps) > 1 and steps[0] == tried[0]["step"] and set(steps) <= {one["step"] for one in tried}
    final = load_file(tmp_path / "whole/model.safetensors")
    parts = [load_file(tmp_path / f"whole/checkpoint-{step}/model.safetensors") for step in steps]
    for name, value in final.items():
        expected = sum(part[name] for part in parts) / len(parts) if value.is_floating_point() else parts[0][name]
        assert torch.allclose(value, expected, atol=1e-6), name
    best = min(one["average_eval_loss"] for one in tried)
    assert scores["eval_loss"] == pytest.approx(best, abs=1e-6) and best <= losses[0]
    card = " ".join((tmp_path / "whole/README.md").read_text().split())
    assert "average of those after the epochs" in card

    # A run that was interrupted in its first or second epoch ends with the same average.
    for step in (10, 12):
        shutil.rmtree(tmp_path / f"whole/checkpoint-{step}", ignore_errors=True)
    assert checkpoints(tmp_path / "whole")
    train.main([*command, "--resume_from_checkpoint", "True"])
    assert results(tmp_path / "whole")["averaged_steps"] == steps
    resumed = load_file(tmp_path / "whole/model.safetensors")
    assert all(torch.equal(value, resumed[name]) for name, value in final.items())


@pytest.mark.slow
def test_a_row_of_the_tables_averages_in_memory(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    names = [word for part in ("text", "vision", "clip") for word in (f"--{part}_model", str(backbones / part))]
    few = ["--num_train_epochs", "3", "--average_checkpoints", "2", "--seeds", "42", "--rows", "text_only"]
    reproduce.main(
        ["--smoke", "--data_dir", str(posts_folder), *names, *few, "--output_dir", str(tmp_path), "--table", "4"]
    )
    (line,) = read_lines(tmp_path / RUNS_FILE)
    tried = line["averaging"]
    assert len(tried) == 2 and set(line["averaged_steps"]) <= {one["step"] for one in tried}
    best = max(one["average_eval_accuracy"] for one in tried)
    assert line["metrics"]["validation"]["accuracy"] == pytest.approx(best)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_averaging_needs_to_know_the_best(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    more = ["--average_checkpoints", "3", "--load_best_model_at_end", "False"]
    with pytest.raises(SystemExit, match="--average_checkpoints needs --load_best_model_at_end"):
        train.main(flags(posts_folder, backbones, tmp_path, *more))


@pytest.mark.slow
def test_the_recipe_end_to_end_is_autogluons(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    recipe = SCRIPTS / "configs/mvsa_single_offline_full.yaml"
    arguments = parse_arguments([str(recipe), "--data_dir", "x"])[2]
    assert (arguments.learning_rate, arguments.layerwise_lr_decay, arguments.max_grad_norm) == (2e-4, 0.9, 1.0)
    assert (arguments.lr_scheduler_type, arguments.get_warmup_steps(300)) == ("cosine", 30)
    assert (arguments.num_train_epochs, arguments.train_batch_size, arguments.average_checkpoints) == (3, 32, 3)

    names = ["--text_model", str(backbones / "text"), "--vision_model", str(backbones / "vision")]
    few = "--hidden_size 32 --num_train_epochs 1 --per_device_train_batch_size 8 --splits random".split()
    few += "--freeze_text_layers 1 --freeze_vision_blocks 1".split()
    where = ["--data_dir", str(posts_folder), "--output_dir", str(tmp_path), "--disable_tqdm", "True"]
    train.main([str(recipe), *where, *names, *few])
    scores = results(tmp_path)
    assert len(scores["averaging"]) == 3 and scores["averaged_steps"]
    assert scores["eval_accuracy"] == max(one["average_eval_accuracy"] for one in scores["averaging"])
    start, end = (load_file(path / "model.safetensors") for path in (backbones / "vision", tmp_path))
    trained = {name.removeprefix("model.image_branch.backbone."): value for name, value in end.items()}
    weights = [name for name in start if name in trained and name.endswith("weight") and start[name].dim() == 4]
    assert torch.equal(start[weights[0]], trained[weights[0]]), "the stem is frozen"
    assert not torch.equal(start[weights[-1]], trained[weights[-1]])
