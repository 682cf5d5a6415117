"""What a finished run leaves beside its weights: the plots, the model card, and the facts that the card states."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import NO_LIMIT
from clipcacg.scripts.data.labels import label_names
from clipcacg.scripts.data.loading import DataArguments
from clipcacg.scripts.data.mvsa import labelled
from clipcacg.scripts.data.sample import MARKER
from clipcacg.scripts.data.sources import SPLIT_NAMES
from clipcacg.scripts.reporting.model_card import write_model_card
from clipcacg.scripts.reporting.plots import (
    CONFUSION_MATRIX_FILE,
    COVERAGE_FILE,
    CURVES_FILE,
    RELIABILITY_FILE,
    plot_confusion_matrix,
    plot_coverage,
    plot_curves,
    plot_reliability,
)
from clipcacg.scripts.reporting.run_facts import (
    RunFacts,
    hardware_name,
    how_it_ended,
    library_versions,
    training_recipe,
)
from clipcacg.scripts.training.arguments import ModelArguments, RecipeArguments
from clipcacg.scripts.training.trainer import SentimentTrainer

logger = logging.getLogger(__name__)


def data_kind(arguments: DataArguments, posts: datasets.DatasetDict) -> str:
    """The kind of data that the model card describes; a folder of `make_sample.py` looks like MVSA and is not."""
    if arguments.is_sample or (arguments.data_dir and (Path(arguments.data_dir) / MARKER).is_file()):
        return "sample"
    return f"mvsa-{next(iter(posts.values())).info.config_name}" if arguments.data_dir else "other"


def complete_checkpoint(
    trainer: SentimentTrainer,
    posts: datasets.DatasetDict,
    results: dict[str, dict[str, Any]],
    arguments: tuple[ModelArguments, DataArguments],
    seconds: float,
    resumed: bool = False,
    averaged_steps: Sequence[int] = (),
) -> None:
    """Add the plots and the model card, and remove what is useful on this machine only."""
    folder, (model_arguments, data_arguments) = Path(trainer.args.output_dir), arguments
    config, state = trainer.model.config, trainer.state
    ended = how_it_ended(trainer.args, state, averaged_steps)
    for split, scores in list(results.items())[-1:]:
        if "confusion_matrix" in scores:
            title, file = f"Confusion matrix of the {split} split", folder / CONFUSION_MATRIX_FILE
            plot_confusion_matrix(scores["confusion_matrix"], label_names(posts["train"]), file, title)
    if results:
        plot_reliability(results, folder / RELIABILITY_FILE)
        plot_coverage(results, folder / COVERAGE_FILE)
    plot_curves(state.log_history, folder / CURVES_FILE, ended.get("chosen_epoch"))
    # A pickle of the arguments, which holds paths of this machine, as does the Trainer's state.
    (folder / "training_args.bin").unlink(missing_ok=True)
    state.best_model_checkpoint = state.best_model_checkpoint and Path(state.best_model_checkpoint).name
    state.save_to_json(str(folder / "trainer_state.json"))
    limit = trainer.processing_class.tokenizer.model_max_length
    facts = RunFacts(
        config=config,
        data_kind=data_kind(data_arguments, posts),
        dataset_name=data_arguments.dataset_name or data_arguments.data_dir or "the drawn sample",
        splits=split_name(data_arguments, posts),
        num_posts=num_posts(posts),
        split_settings=split_settings(data_arguments),
        base_models=base_models(model_arguments, trainer.model),
        hub_model_id=trainer.args.hub_model_id,
        num_parameters=trainer.model.num_parameters(),
        max_tokens=limit if limit < NO_LIMIT else None,
        training=recipe(trainer.args, model_arguments, config.label_smoothing),
        **ended,
        seconds=seconds,
        resumed=resumed,
        hardware=hardware_name(trainer.args),
        versions=library_versions(config),
        validation=results.get("validation"),
        test=results.get("test"),
    )
    write_model_card(folder, facts)
    logger.info("The checkpoint, the results and the model card are in %s", folder)


def num_posts(posts: datasets.DatasetDict) -> dict[str, int]:
    """Number of posts of each split; the conflicting posts, which only the heads see, are counted by themselves."""
    counts = {split: len(labelled(dataset)) for split, dataset in posts.items()}
    conflicting = len(posts["train"]) - counts["train"]
    return counts | ({"train, modality heads only": conflicting} if conflicting else {})


def split_name(arguments: DataArguments, posts: datasets.DatasetDict) -> str:
    """How the data was split; a split that came with the data set has kept its name."""
    drawn = f"(seed {arguments.split_seed})"
    if arguments.dataset_name is None:
        return f"random 8:1:1 {drawn}" if arguments.splits == "random" else str(arguments.splits)
    ours = SPLIT_NAMES | {own: split for split, own in arguments.own_splits().items()}
    brought = {split for split, rows in posts.items() if ours.get(str(rows.split)) == split}
    if "validation" not in posts or "validation" in brought:
        return "those of the data set"
    if "test" not in posts or "test" in brought:
        return f"those of the data set, with a random ninth of its training posts for validation {drawn}"
    return f"random 8:1:1 {drawn}"


def split_settings(arguments: DataArguments) -> dict[str, Any]:
    """The other flags that decide which posts a split holds, those that were set."""
    names = ["max_train_samples", "max_eval_samples", "group_duplicates"]
    return {name: value for name in names if (value := getattr(arguments, name))}


def recipe(arguments: RecipeArguments, model_arguments: ModelArguments, label_smoothing: float) -> dict[str, Any]:
    """The settings that the model card lists, ours included."""
    values = training_recipe(arguments)
    if arguments.adam:
        values["optim"] = "Adam with coupled weight decay"
    if arguments.step_decay_epochs:
        values["lr_scheduler_type"] = f"divided by 10 every {arguments.step_decay_epochs} epochs"
    frozen = [part for part in ("text", "vision", "clip") if getattr(model_arguments, f"freeze_{part}")]
    layers = 0 if "text" in frozen else model_arguments.freeze_text_layers
    blocks = 0 if "vision" in frozen else model_arguments.freeze_vision_blocks
    chosen = model_arguments.use_modality_heads and model_arguments.modality_combination == "auto"
    ours = {
        "backbone_learning_rate": arguments.backbone_learning_rate,
        "early_stopping_patience": arguments.early_stopping_patience,
        "frozen_backbones": ", ".join(frozen),
        "frozen_text_layers": f"embeddings and the first {layers}" if layers else "",
        "frozen_vision_blocks": f"stem and the first {blocks}" if blocks else "",
        "layerwise_lr_decay": arguments.layerwise_lr_decay if arguments.layerwise_lr_decay != 1 else "",
        "class_weights": model_arguments.class_weights.replace("none", ""),
        "average_checkpoints": arguments.average_checkpoints if arguments.average_checkpoints > 1 else 0,
        "augment": arguments.augment,
        "augment_views": arguments.augment_views if arguments.augment else 0,
        "modality_combination": "the better one on the validation split" * chosen,
        "label_smoothing": label_smoothing,
        "hp_search": f"the best of {arguments.hp_search} trials on validation" if arguments.hp_search else "",
    }
    return values | {name: value for name, value in ours.items() if value}


def base_models(arguments: ModelArguments, model: ClipCaCgForSequenceClassification) -> dict[str, str]:
    """Part of the model to the pretrained weights it started from; the sample's random ones do not count."""
    if arguments.model_name_or_path:
        return {"model": arguments.model_name_or_path}
    parts = {name.partition(".")[0]: None for name in model.backbones()}
    return {part: name for part in parts if (name := getattr(arguments, f"{part}_model"))}
