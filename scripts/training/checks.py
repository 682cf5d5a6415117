"""Flags that cannot be used, found before posts and model are loaded."""

import copy
import logging
from collections.abc import Sequence

import torch
from accelerate.utils import DynamoBackend
from huggingface_hub import get_token
from huggingface_hub.constants import HF_HUB_OFFLINE
from transformers import Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks, is_optuna_available
from transformers.training_args import ParallelMode

from clipcacg.scripts.data.errors import InputError, as_input_error
from clipcacg.scripts.reporting.hub import check_repo_id
from clipcacg.scripts.training.arguments import ModelArguments, RecipeArguments
from clipcacg.scripts.training.calibration import check_wanted_accuracy
from clipcacg.scripts.training.metrics import check_metric_name

logger = logging.getLogger(__name__)

# Flag to the lowest value that it takes.
AT_LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1, "step_decay_epochs": 1, "max_length": 1, "num_train_epochs": 0, "learning_rate": 0,
    "backbone_learning_rate": 0, "weight_decay": 0, "early_stopping_patience": 0, "average_checkpoints": 0,
    "augment_views": 0, "hp_search": 0,
}  # fmt: skip
# Flag to the value that must stay, and what the other would do.
MUST_STAY = {
    "dataloader_drop_last": (False, "it would drop posts of validation and test too"),
    "remove_unused_columns": (False, "it would remove the posts' texts and images"),
    "prediction_loss_only": (False, "the scores need the predictions"),
    "batch_eval_metrics": (False, "the scores are those of all posts together"),
    "eval_do_concat_batches": (True, "the scores are those of all posts together"),
    "label_names": (None, "the labels have their names from the data"),
    "length_column_name": ("length", "train.py makes this column"),
    "use_liger_kernel": (False, "Liger has no kernels for this model"),
}
CONTRADICTIONS = {"adam": ("optim", "optim_args"), "step_decay_epochs": ("lr_scheduler_type", "lr_scheduler_kwargs")}
NEED_VALIDATION = (
    "early_stopping_patience", "average_checkpoints", "load_best_model_at_end", "eval_strategy", "eval_steps",
    "wanted_accuracy",
)  # fmt: skip


def check_flags(model: ModelArguments, recipe: RecipeArguments) -> None:
    """Refuse flags that cannot be used, alone or together, before anything is loaded.

    Raises:
        InputError: The message names the flag.
    """
    for flag, least in AT_LEAST.items():
        value = getattr(model, flag, None) if hasattr(model, flag) else getattr(recipe, flag)
        if value is not None and not value >= least:
            raise InputError(f"--{flag} must be at least {least}, got {value}.")
    if recipe.bf16:
        warn_of_slow_bf16("cpu" if recipe.use_cpu or not torch.accelerator.is_available() else "accelerator")
    for flag, (only, reason) in MUST_STAY.items():
        if getattr(recipe, flag) != only:
            raise InputError(f"--{flag} {getattr(recipe, flag)} cannot be used: {reason}. Leave it out.")
    for flag, others in CONTRADICTIONS.items():
        for other in others:
            if getattr(recipe, flag) and {flag, other} <= recipe.given:
                raise InputError(f"--{flag} and --{other} contradict each other: give one of them.")
    if not 0 < recipe.layerwise_lr_decay <= 1:
        raise InputError(f"--layerwise_lr_decay must be above 0 and at most 1, got {recipe.layerwise_lr_decay}.")
    check_wanted_accuracy(recipe.wanted_accuracy)
    if recipe.early_stopping_patience and recipe.eval_strategy == "no":
        raise InputError("--early_stopping_patience needs evaluations: add --eval_strategy epoch.")
    if recipe.early_stopping_patience and recipe.metric_for_best_model is None:
        raise InputError("--early_stopping_patience needs --metric_for_best_model, such as loss or accuracy.")
    if recipe.average_checkpoints > 1 and not recipe.load_best_model_at_end:
        raise InputError("--average_checkpoints needs --load_best_model_at_end True, to know the best.")
    if recipe.metric_for_best_model:
        check_metric_name(recipe.metric_for_best_model)
    if recipe.fsdp and recipe.parallel_mode != ParallelMode.DISTRIBUTED:
        raise InputError("--fsdp needs several processes: start the command with accelerate launch or torchrun.")
    if recipe.hp_search:
        if not is_optuna_available():
            raise InputError("--hp_search needs the package optuna: pip install 'clipcacg[search]'.")
        if recipe.parallel_mode == ParallelMode.DISTRIBUTED:
            raise InputError("--hp_search runs in one process: start it with python, without a launcher.")
    if recipe.push_to_hub:
        check_push(recipe)
    for name in recipe.report_to:
        with as_input_error(f"--report_to {name} cannot be used", ImportError, RuntimeError, ValueError):
            for callback in get_reporting_integration_callbacks([name]):
                callback()
    check_optimizer(recipe)
    if recipe.torch_compile:
        check_compiler(recipe)


def warn_of_slow_bf16(device: str) -> None:
    """Warn if the device is a CPU on which PyTorch computes in bfloat16 far more slowly than in float32."""
    if device == "cpu" and torch.backends.mkldnn.is_available():
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # it needs AVX-512
            logger.warning("--bf16 is slow here: this CPU computes faster in float32. Leave it out.")


def check_push(recipe: RecipeArguments) -> None:
    """Refuse a push that would fail after the training.

    Raises:
        InputError: If the name is none, there is no access token, or the Hub must not be reached.
    """
    check_repo_id(recipe.hub_model_id, "--hub_model_id")
    if HF_HUB_OFFLINE:
        raise InputError("--push_to_hub needs the network, and HF_HUB_OFFLINE forbids it.")
    if not (recipe.hub_token or get_token()):
        raise InputError("--push_to_hub needs an access token: run hf auth login, or set HF_TOKEN.")


def check_optimizer(recipe: RecipeArguments) -> None:
    """Make the optimizer and the schedule for one parameter, since their faults show only then.

    Raises:
        InputError: If a package is missing, or a setting does not suit them.
    """
    faults = (ImportError, RuntimeError, ValueError, TypeError, KeyError, AttributeError)
    optimizer: torch.optim.Optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1, 1))])
    if not recipe.adam:
        with as_input_error(f"--optim {recipe.optim.value} cannot be used", *faults):
            plain = copy.copy(recipe)
            plain.optim_args = None
            found, without = (Trainer.get_optimizer_cls_and_kwargs(a, torch.nn.Module()) for a in (recipe, plain))
            if recipe.optim_args and found == without:
                raise InputError(f"--optim_args {recipe.optim_args} has no effect on --optim {recipe.optim.value}.")
            optimizer = found[0](optimizer.param_groups[0]["params"], **found[1])
    if recipe.step_decay_epochs is None:
        name, keywords = recipe.lr_scheduler_type, recipe.lr_scheduler_kwargs
        with as_input_error(f"--lr_scheduler_type {name.value} cannot be used", *faults):
            get_scheduler(name, optimizer, 1, 10, scheduler_specific_kwargs=keywords)


def check_compiler(recipe: RecipeArguments) -> None:
    """Compile a small function as `--torch_compile` compiles the model.

    Raises:
        InputError: If the backend or the mode is unknown, or the compiler does not work here.
    """
    backend, mode = recipe.torch_compile_backend, recipe.torch_compile_mode
    with as_input_error(f"--torch_compile cannot be used with {backend=}, {mode=}", RuntimeError, ValueError):
        name = DynamoBackend(str(backend).upper()).value.lower()
        torch.compile(torch.sin, backend=name, mode=mode)(torch.ones(2, device=recipe.device))


def check_validation(recipe: RecipeArguments, splits: Sequence[str]) -> None:
    """Refuse flags that need a validation split where there is none.

    Raises:
        InputError: The message names the flag.
    """
    for flag in NEED_VALIDATION:
        if flag in recipe.given and getattr(recipe, flag) not in (0, False, "no", None):
            raise InputError(f"--{flag} needs a validation split, and the data has only {', '.join(splits)}.")
    if recipe.hp_search:
        raise InputError(f"--hp_search needs a validation split, and the data has only {', '.join(splits)}.")
