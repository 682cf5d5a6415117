"""The Trainer with the paper's optimizer and schedule, and what may befall a run as errors that say what to do."""

import errno
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from clipcacg.scripts.training.arguments import RecipeArguments

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # how torch says it without a type
NO_FILE = ("PytorchStreamWriter", "unexpected pos", "file write failed")  # likewise
LESS_MEMORY = (
    "a smaller --per_device_train_batch_size with more --gradient_accumulation_steps, --gradient_checkpointing, "
    "--bf16, or --freeze_text, --freeze_vision and --freeze_clip, with --cache_features besides"
)


@contextmanager
def training_faults(output_dir: str) -> Iterator[None]:
    """Turn what may befall any run, in whichever library, into an error that says what to do about it.

    Raises:
        OSError: If a file cannot be written to `output_dir`.
        ValueError: If memory runs out.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError, SafetensorError) as error:
        message = " ".join(str(error).split("\n")[0].split())
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in message for words in NO_MEMORY):
            raise ValueError(f"The memory is full ({message or 'MemoryError'}): try {LESS_MEMORY}.") from error
        is_full = getattr(error, "errno", None) in DISK_FULL or any(words in message for words in NO_FILE)
        if is_full or isinstance(error, SafetensorError):
            raise OSError(
                f"{output_dir} cannot be written to ({message}): the checkpoints before this one are whole, so make "
                "room, and go on with --resume_from_checkpoint True."
            ) from error
        raise


class SentimentTrainer(Trainer):
    """The Trainer with the paper's optimizer and schedule, and a learning rate of their own for the backbones."""

    args: RecipeArguments

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the Trainer's, but not beyond a loss that would spoil the weights for good.

        Raises:
            FloatingPointError: If the loss is not a finite number.
        """
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise FloatingPointError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}, at a learning rate of "
                f"{self._get_learning_rate():.3g}: try a lower --learning_rate, --warmup_steps, or --bf16 in place of "
                "--fp16. The checkpoints before it are whole."
            )
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.args.should_save:
            # Its state, which is written last, tells that a checkpoint is whole. One that is written over is not.
            folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(*args, **kwargs)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        if self.optimizer is None:
            if self.args.adam:
                betas = (self.args.adam_beta1, self.args.adam_beta2)
                optimizer_class = partial(torch.optim.Adam, betas=betas, eps=self.args.adam_epsilon)
                settings: dict[str, Any] = {"lr": self.args.learning_rate}
            else:
                optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(self.parameter_groups(model), **settings)
        return self.optimizer

    def parameter_groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """Backbones and the rest, each with and without weight decay; Adam as in the paper decays everything."""
        encoders = self.accelerator.unwrap_model(model).backbones().values()
        in_backbone = {id(parameter) for encoder in encoders for parameter in encoder.parameters()}
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                key = (id(parameter) in in_backbone, self.args.adam or name in decayed)
                groups.setdefault(key, []).append(parameter)
        own = self.args.backbone_learning_rate
        rates = {True: self.args.learning_rate if own is None else own, False: self.args.learning_rate}
        return [
            {"params": parameters, "lr": rates[backbone], "weight_decay": self.args.weight_decay if decay else 0.0}
            for (backbone, decay), parameters in groups.items()
        ]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.args.step_decay_epochs is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        steps = self.args.step_decay_epochs * math.ceil(len(self.train_dataset) / batch)
        self.lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer or self.optimizer, step_size=steps, gamma=0.1)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_eval_sampler(self, eval_dataset: datasets.Dataset) -> torch.utils.data.Sampler:
        # In their order, however training samples: predictions are written beside the IDs of the posts.
        return torch.utils.data.SequentialSampler(eval_dataset)
