"""Facts about a run for its model card. Facts that were not measured stay None.

`write_model_card` keeps them as `run_facts.json` beside the checkpoint, so that the card can be rendered again under
the model's name on the Hub. The file names no folder of this machine and holds no token. It is not pushed: the card
has everything that it says.
"""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PretrainedConfig, TrainerState, TrainingArguments

from clipcacg.scripts.reporting.tables import SCORES

DATA_KINDS = ("mvsa-single", "mvsa-multiple", "sample", "other")
LIBRARIES = ("torch", "torchvision", "transformers", "datasets", "accelerate", "huggingface_hub", "pillow")
RECIPE = (
    "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps optim learning_rate "
    "lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay max_grad_norm bf16 fp16 seed"
).split()


def uses_timm(config: PretrainedConfig) -> bool:
    """Whether loading the model needs timm."""
    return "vision" in config.encoders and config.vision_config.model_type == "timm_wrapper"


def library_versions(config: PretrainedConfig | None = None) -> dict[str, str]:
    """Versions of Python and of the libraries that affect results, including timm if the model needs it."""
    names = (*LIBRARIES, "timm") if config is not None and uses_timm(config) else LIBRARIES
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def hardware_name(args: TrainingArguments) -> str:
    """Hardware that a Trainer runs on: "2 x NVIDIA A100-SXM4-40GB", or "CPU with 8 cores, 2 processes"."""
    count = args.world_size * max(1, args.n_gpu)
    if args.device.type == "cuda":
        return f"{count} x {torch.cuda.get_device_name(args.device)}"
    return f"{args.device.type.upper()} with {os.cpu_count()} cores, {count} process{'es' if count > 1 else ''}"


def training_recipe(args: TrainingArguments) -> dict[str, Any]:
    """Hyper-parameters needed to repeat a run, by flag. Settings that are off are left out."""
    values = args.to_dict()  # turns enumerations into plain strings
    settings = {name: values[name] for name in RECIPE if values.get(name) not in (None, -1, {}, "")}
    return {name: value for name, value in settings.items() if value is not False}


def how_it_ended(args: TrainingArguments, state: TrainerState, averaged_steps: Sequence[int] = ()) -> dict[str, Any]:
    """Fields of `RunFacts`: the epochs that ran and, if the best of several was kept, its epoch and score.

    With `averaged_steps`, the steps whose weights were averaged, also their epochs.
    """
    facts: dict[str, Any] = {"epochs": state.epoch}
    evaluated = {entry["step"]: entry["epoch"] for entry in state.log_history if "eval_loss" in entry}
    best = state.best_global_step
    if args.load_best_model_at_end and best in evaluated and (len(evaluated) > 1 or best != state.global_step):
        chosen_by = args.metric_for_best_model.removeprefix("eval_")
        facts |= {"chosen_epoch": evaluated[best], "chosen_by": SCORES.get(chosen_by, chosen_by)}
        if len(averaged_steps) > 1:
            facts["averaged_epochs"] = sorted(evaluated[step] for step in averaged_steps)
    return facts


def is_hub_id(name: str) -> bool:
    """Whether a name is a valid repository name on the Hub. That of a local folder starts with "./" and is not."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def last_part(path: str) -> str:
    """The last part of a path of any system."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def without_path(name: str) -> str:
    """A Hub name or a title as it is, a local path as "./" and its last part."""
    is_local = Path(name).exists() if is_hub_id(name) else name != last_part(name)
    return f"./{last_part(name)}" if is_local else name


@dataclass
class RunFacts:
    """Facts about a run for its model card. Local paths are cut to "./" and their last part.

    Args:
        config: Config of the model; its `id2label` names the classes.
        data_kind: One of `DATA_KINDS`. It selects the data section, limits and data terms of the card.
        dataset_name: Name, Hub id or folder of the data.
        splits: "clmlf", "cheema:1", or how the data was split in other words, such as "random 8:1:1 (seed 42)".
        num_posts: Number of posts used, by split.
        split_settings: `group_duplicates`, `max_train_samples` and `max_eval_samples` where they were set.
        base_models: "text", "vision" or "clip" -> pretrained weights that the encoder started from, a Hub id or a
            folder; or "model" -> the CLIP-CA-CG checkpoint that the whole model started from.
        hub_model_id: "user/name" on the Hub; None if the card names the model by its folder.
        num_parameters: Number of parameters of the whole model.
        max_tokens: Number of tokens after which a text is truncated.
        training: Hyper-parameters, see `training_recipe`.
        epochs, chosen_epoch, averaged_epochs, chosen_by: See `how_it_ended`.
        seconds: Training time including evaluations.
        resumed: Whether the run was interrupted and resumed, so that `seconds` covers only its last part.
        hardware: See `hardware_name`.
        versions: Version by library.
        validation: Output of our metric on the validation split, None if it was not evaluated.
        test: The same on the test split.

    Raises:
        ValueError: For an unknown `data_kind`.
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
    averaged_epochs: Sequence[float] = ()
    chosen_by: str | None = None
    seconds: float | None = None
    resumed: bool = False
    hardware: str | None = None
    versions: Mapping[str, str] = field(default_factory=library_versions)
    validation: Mapping[str, Any] | None = None
    test: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.data_kind not in DATA_KINDS:
            raise ValueError(f"Unknown data_kind {self.data_kind!r}. Allowed: {', '.join(DATA_KINDS)}.")
        self.dataset_name, self.splits = without_path(self.dataset_name), last_part(self.splits)
        self.base_models = {part: without_path(name) for part, name in self.base_models.items() if name}

    @property
    def label_names(self) -> list[str]:
        """Names of the classes in index order; none for a regression."""
        labels = 0 if self.config.task == "regression" else self.config.num_labels
        return [self.config.id2label[index] for index in range(labels)]

    @property
    def results(self) -> dict[str, Mapping[str, Any]]:
        """Scores by split, for the splits that were evaluated."""
        return {name: scores for name in ("test", "validation") if (scores := getattr(self, name))}

    def to_dict(self) -> dict[str, Any]:
        """Every field but the config, which `config.json` has."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "config"}
