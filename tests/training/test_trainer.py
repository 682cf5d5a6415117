"""The optimizer, the schedule and the losses of a training run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from inputs import flags

from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.labels import label_fields
from clipcacg.scripts.training import run
from clipcacg.scripts.training.arguments import parse_arguments
from clipcacg.scripts.training.checks import check_flags
from clipcacg.scripts.training.trainer import SentimentTrainer

Make = Callable[..., SentimentTrainer]


@pytest.fixture
def make(posts_folder: Path, backbones: Path, tmp_path: Path) -> Make:
    """A function that builds a Trainer from flags, as `train.py` does."""

    def build(*more: str) -> SentimentTrainer:
        encoders = None if "--model_name_or_path" in more else backbones
        model_arguments, data_arguments, arguments = parse_arguments(flags(posts_folder, encoders, tmp_path, *more))
        check_flags(model_arguments, arguments)
        posts = run.load_training_posts(model_arguments, data_arguments, arguments)
        model, processor = run.build(model_arguments, data_arguments.is_sample, label_fields(posts["train"]))
        run.set_loss(model, arguments, model_arguments, posts["train"])
        return run.make_trainer(arguments, model, processor, posts)

    return build


def test_the_papers_optimizer_and_schedule(make: Make) -> None:
    trainer = make("--adam", "--step_decay_epochs", "1", "--backbone_learning_rate", "0.0002", "--freeze_vision")
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.Adam
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.0002, 0.001]
    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert in_optimizer == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    vision = trainer.model.backbones()["vision"]
    assert not any(id(p) in in_optimizer for p in vision.parameters())
    steps = len(trainer.get_train_dataloader())
    scheduler = trainer.create_scheduler(2 * steps, optimizer)
    for _ in range(steps):
        assert max(scheduler.get_last_lr()) == 0.001
        optimizer.step()
        scheduler.step()
    assert max(scheduler.get_last_lr()) == pytest.approx(0.0001)


@pytest.mark.parametrize("optimizer", [["--adam"], []])
def test_weight_decay_reaches_matrices_alone(optimizer: list[str], make: Make) -> None:
    trainer = make(*optimizer, "--weight_decay", "0.01", "--clip_mode", "feature")
    decay = {
        id(parameter): group["weight_decay"]
        for group in trainer.create_optimizer().param_groups
        for parameter in group["params"]
    }
    decayed = {name for name, parameter in trainer.model.named_parameters() if decay[id(parameter)]}
    assert set(decay.values()) == {0, 0.01}
    assert decayed == {name for name, parameter in trainer.model.named_parameters() if parameter.ndim >= 2}
    for module in trainer.model.modules():
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.BatchNorm2d)) and module.weight is not None:
            assert not decay[id(module.weight)] and not decay[id(module.bias)]
    others = [name for name in dict(trainer.model.named_parameters()) if "logit_scale" in name or "lambda" in name]
    assert len(others) == 2 and not decayed & set(others)


@pytest.mark.parametrize("own", [[], ["--backbone_learning_rate", "0.0004"]])
def test_the_learning_rate_falls_per_layer_of_each_backbone(own: list[str], make: Make) -> None:
    trainer = make(*own, "--layerwise_lr_decay", "0.5", "--weight_decay", "0.01", "--freeze_vision_blocks", "1")
    groups = trainer.create_optimizer().param_groups
    assert [group["lr"] for group in groups] == sorted([group["lr"] for group in groups], reverse=True)
    in_group = {id(parameter): group for group in groups for parameter in group["params"]}
    top = 0.0004 if own else 0.001
    below_top = {
        "text": {"embeddings.": 2, "layer.0.": 1, "layer.1.": 0},
        "vision": {"stages.1.": 1, "stages.2.": 0},
        "clip.text": {"embeddings.": 2, "layers.0.": 1, "layers.1.": 0, "final_layer_norm.": 0, "text_projection": 0},
        "clip.vision": {"embeddings.": 2, "pre_layrnorm.": 2, "layers.0.": 1, "layers.1.": 0, "post_layernorm.": 0},
    }
    for name, encoder in trainer.model.backbones().items():
        for part, depth in below_top[name].items():
            found = [(n, p) for n, p in encoder.named_parameters() if part in n and id(p) in in_group]
            assert found, (name, part)
            for _, parameter in found:
                group = in_group[id(parameter)]
                assert group["lr"] == pytest.approx(top * 0.5**depth)
                assert group["weight_decay"] == (0.01 if parameter.ndim >= 2 else 0)
    assert in_group[id(trainer.model.classifier.weight)]["lr"] == 0.001
    assert in_group.keys() == {id(p) for p in trainer.model.parameters() if p.requires_grad}


def test_smoothing_and_class_weights_reach_the_models_own_loss(make: Make) -> None:
    trainer = make("--label_smoothing_factor", "0.1", "--class_weights", "balanced")
    assert trainer.label_smoother is None and trainer.model.config.label_smoothing == 0.1
    counts = torch.bincount(torch.tensor(trainer.train_dataset["label"]))
    weights = torch.tensor(trainer.model.config.class_weights)
    assert torch.allclose(weights * counts, torch.full((3,), counts.sum() / 3))


def test_the_contrastive_loss_is_logged_and_is_no_part_of_the_evaluation_loss(make: Make) -> None:
    weight, few = ["--contrastive_loss_weight", "0.5"], ["--max_steps", "4", "--logging_steps", "2"]
    still = ["--learning_rate", "0", "--dropout", "0", "--save_strategy", "no", "--load_best_model_at_end", "False"]
    trainer = make("--clip_mode", "feature", "--freeze_text", "--freeze_vision", *weight, *few, *still)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    losses = []
    for size in (1, 8):
        trainer.args.per_device_eval_batch_size = size
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    # Nothing was learned, so over the training posts too the loss is the task's, plus half of what was logged.
    trainer.args.per_device_eval_batch_size = 1
    for entry in logs:
        assert entry["contrastive_loss"] > 0.5  # of 16 posts, ln 16 = 2.8 by chance
    task = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    mean = sum(entry["loss"] - 0.5 * entry["contrastive_loss"] for entry in logs) / 2
    assert mean == pytest.approx(task, abs=0.1)


def test_a_run_without_a_log_keeps_no_list_of_losses(make: Make) -> None:
    more = ["--clip_mode", "feature", "--freeze_text", "--freeze_vision", "--save_strategy", "no"]
    trainer = make(*more, "--load_best_model_at_end", "False", "--max_steps", "3", "--logging_strategy", "no")
    trainer.train()
    assert not [name for name, value in vars(trainer).items() if isinstance(value, list) and len(value) >= 3]
    assert trainer.part_steps == {"contrastive_loss": 3}


def test_other_models_log_no_contrastive_loss(make: Make) -> None:
    more = ["--clip_mode", "none", "--freeze_text", "--freeze_vision", "--save_strategy", "no"]
    trainer = make(*more, "--load_best_model_at_end", "False", "--max_steps", "1", "--logging_steps", "1")
    trainer.train()
    assert not any("contrastive_loss" in entry for entry in trainer.state.log_history)


HEADS = ["--use_modality_heads", "--clip_mode", "none", "--freeze_text", "--freeze_vision"]


def test_conflicting_posts_reach_the_heads_and_not_the_class_weights(make: Make) -> None:
    trainer = make(*HEADS, "--use_conflicting_posts", "--class_weights", "balanced")
    labels = torch.cat([batch["labels"] for batch in trainer.get_train_dataloader()])
    assert (labels == -100).sum() > 0 and len(trainer.model.config.class_weights) == 3
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["text_labels"].shape == batch["image_labels"].shape == batch["labels"].shape
    assert "text_labels" not in next(iter(make().get_train_dataloader()))


def test_the_heads_loss_is_logged_and_their_outputs_are_not_kept(make: Make) -> None:
    trainer = make(*HEADS, "--max_steps", "1", "--logging_steps", "1")
    trainer.train()
    assert [entry["modality_loss"] > 0.5 for entry in trainer.state.log_history if "loss" in entry] == [True]
    predicted = trainer.predict(trainer.eval_dataset)
    assert predicted.predictions.shape == (len(trainer.eval_dataset), 3)
    assert predicted.label_ids.shape == (len(trainer.eval_dataset),)


@pytest.mark.parametrize(("asked", "better"), [("auto", "average"), ("auto", "classifier"), ("average", "classifier")])
def test_the_combination_is_the_better_one_on_validation(make: Make, asked: str, better: str) -> None:
    trainer = make(*HEADS, "--modality_combination", asked)
    posts, model = {"validation": trainer.eval_dataset}, trainer.model
    often, rarely = trainer.model.config.label2id["positive"], trainer.model.config.label2id["neutral"]
    assert trainer.eval_dataset["label"][:].count(often) > trainer.eval_dataset["label"][:].count(rarely)
    answers = {model.classifier: rarely, model.modality_heads.text: often, model.modality_heads.image: often}
    if better == "classifier":
        answers = {layer: rarely + often - answer for layer, answer in answers.items()}
    for layer, answer in answers.items():
        layer.weight.data.zero_()
        layer.bias.data = 9.0 * torch.eye(3)[answer] if layer is not model.classifier else torch.eye(3)[answer]
    run.choose_combination(trainer, posts, asked)
    assert model.config.modality_combination == (better if asked == "auto" else asked)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--text_model nowhere/nothing", "--text_model nowhere/nothing cannot be loaded: "),
        ("--vision_model {posts}", "--vision_model .* cannot be loaded: "),
        ("--hidden_size 30", "The model cannot be built: .*hidden_size"),
        ("--use_conflicting_posts", "--use_conflicting_posts trains modality heads alone: add --use_modality_heads"),
        ("--use_modality_heads --modality text", "The model cannot be built: use_modality_heads=True needs"),
        ("--freeze_text_layers 9", "cannot be frozen: text_layers must be between 0 and 1 .*9"),
        ("--freeze_vision_blocks 4", "cannot be frozen: vision_blocks must be between 0 and 2 .*4"),
        ("--modality image", "--train_sampling_strategy group_by_length needs texts"),
        ("--layerwise_lr_decay 1.5", "--layerwise_lr_decay must be above 0 and at most 1, got 1.5"),
        ("--model_name_or_path nowhere/nothing", "The checkpoint nowhere/nothing cannot be loaded: "),
        ("--model_name_or_path {backbones}/text", "cannot be loaded: its model type is 'roberta', not 'clipcacg'"),
        ("--resume_from_checkpoint nowhere", "--resume_from_checkpoint nowhere is not a folder"),
    ],
)
def test_a_name_or_a_setting_that_cannot_be_used_is_named(
    flags: str, said: str, make: Make, posts_folder: Path, backbones: Path
) -> None:
    with pytest.raises(InputError, match=said) as error:
        trainer = make(*flags.format(posts=posts_folder, backbones=backbones).split())
        run.where_to_resume(trainer.args)
    assert "\n" not in str(error.value)
