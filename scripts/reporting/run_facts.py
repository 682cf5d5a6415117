"""What the model card tells about a run, and how to learn it from the Trainer: what was not measured stays None."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from transformers import PretrainedConfig, TrainerState, TrainingArguments

from clipcacg.scripts.reporting.tables import SCORES

DATA_KINDS = ("mvsa-single", "mvsa-multiple", "sample", "other")
LIBRARIES = ("torch", "torchvision", "transformers", "datasets", "accelerate", "huggingface_hub", "pillow")
RECIPE = (
    "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps optim learning_rate "
    "lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay max_grad_norm bf16 fp16 seed"
).split()


def uses_timm(config: PretrainedConfig) -> bool:
    """Whether the model cannot be loaded without timm."""
    return config.modality != "text" and config.vision_config.model_type == "timm_wrapper"


def library_versions(config: PretrainedConfig | None = None) -> dict[str, str]:
    """Versions of Python and of the libraries that decide about a result; of timm, if this model needs it."""
    names = (*LIBRARIES, "timm") if config is not None and uses_timm(config) else LIBRARIES
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def hardware_name(args: TrainingArguments) -> str:
    """Class of machine that a Trainer runs on: "2 x NVIDIA A100-SXM4-40GB", or "CPU with 8 cores, 2 processes"."""
    count = args.world_size * max(1, args.n_gpu)
    if args.device.type == "cuda":
        return f"{count} x {torch.cuda.get_device_name(args.device)}"
    return f"{args.device.type.upper()} with {os.cpu_count()} cores, {count} process{'es' if count > 1 else ''}"


def training_recipe(args: TrainingArguments) -> dict[str, Any]:
    """The settings that someone who repeats a run needs, by their flags; those that are off are left out."""
    values = args.to_dict()  # turns enumerations into plain strings
    told = {name: values[name] for name in RECIPE if values.get(name) not in (None, -1, {}, "")}
    return {name: value for name, value in told.items() if value is not False}


def how_it_ended(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """Facts for `RunFacts`: epochs that ran and, if the best of several was taken, which one and by what score."""
    facts: dict[str, Any] = {"epochs": state.epoch}
    evaluated = {entry["step"]: entry["epoch"] for entry in state.log_history if "eval_loss" in entry}
    best = state.best_global_step
    if args.load_best_model_at_end and best in evaluated and (len(evaluated) > 1 or best != state.global_step):
        chosen_by = args.metric_for_best_model.removeprefix("eval_")
        facts |= {"chosen_epoch": evaluated[best], "chosen_by": SCORES.get(chosen_by, chosen_by)}
    return facts


@dataclass(frozen=True)
class RunFacts:
    """What the model card tells about a run.

    Args:
        config: the model's config; its `id2label` names the classes.
        data_kind: one of `DATA_KINDS`: decides which data section, limits and data terms the card has.
        dataset_name: name, Hub id or folder of the data.
        splits: "clmlf", "cheema:1", or in other words how the data was split, such as "random 8:1:1 (seed 42)".
        num_posts: posts of each split that were used.
        split_settings: `group_duplicates`, `max_train_samples` and `max_eval_samples`, where they were set.
        base_models: "text", "vision" or "clip" -> pretrained weights that it started from, a Hub id or a folder; or
            "model" -> the checkpoint of ours that all of it did.
        hub_model_id: "user/name" if the model goes to the Hub; without it the card calls the model by its folder.
        num_parameters: of the whole model.
        max_tokens: tokens after which a text is cut.
        training: hyper-parameters, see `training_recipe`.
        epochs, chosen_epoch, chosen_by: see `how_it_ended`.
        seconds: training time, with the evaluations in between.
        resumed: whether the run was broken off, so that `seconds` are those of its last part.
        hardware: class of machine, see `hardware_name`.
        versions: library -> version.
        validation: what our metric returned on the validation split, None if it was not measured.
        test: the same on the test split.

    Raises:
        ValueError: an unknown `data_kind`.
    """

    config: PretrainedConfig
    data_kind: str
    dataset_name: str
    splits: str
    num_posts: Mapping[str, int]
    split_settings: Mapping[str, Any] = field(default_factory=dict)
    base_models: Mapping[str, str] = field(default_factory=dict)
    hub_model_id: str | None = None
    num_parameters: int | None = None
    max_tokens: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    epochs: float | None = None
    chosen_epoch: float | None = None
    chosen_by: str | None = None
    seconds: float | None = None
    resumed: bool = False
    hardware: str | None = None
    versions: Mapping[str, str] = field(default_factory=library_versions)
    validation: Mapping[str, Any] | None = None
    test: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse a data kind for which there are no sentences."""
        if self.data_kind not in DATA_KINDS:
            raise ValueError(f"Unknown data_kind {self.data_kind!r}: expected one of {', '.join(DATA_KINDS)}.")

    @property
    def regression(self) -> bool:
        """Whether the model predicts a number instead of a class, by the model's own rule."""
        return self.config.problem_type == "regression" or (
            self.config.problem_type is None and self.config.num_labels == 1
        )

    @property
    def label_names(self) -> list[str]:
        """Names of the classes in the order of their indices."""
        return [self.config.id2label[index] for index in range(self.config.num_labels)]

    @property
    def results(self) -> dict[str, Mapping[str, Any]]:
        """Split -> scores, for the splits that were measured."""
        return {name: scores for name in ("test", "validation") if (scores := getattr(self, name))}
