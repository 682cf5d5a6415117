"""The Trainer with the paper's optimizer and schedule, and errors of a run that say what to do."""

import errno
import math
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from clipcacg.modeling_clipcacg import layers_of_modules
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.faults import Faults
from clipcacg.scripts.data.progress import Progress
from clipcacg.scripts.training.arguments import RecipeArguments

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LESS_MEMORY = (
    "a smaller --per_device_train_batch_size with more --gradient_accumulation_steps, --gradient_checkpointing, "
    "--bf16, or --freeze_text, --freeze_vision and --freeze_clip, with --cache_features besides"
)


@contextmanager
def training_faults(output_dir: str) -> Iterator[None]:
    """Turn full memory and a full disk, in whichever library, into an error that says what to do.

    Raises:
        InputError: If memory runs out, or `output_dir` cannot be written to.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch raises a bare RuntimeError where the CPU's memory is full; Only the message identifies it.
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
        if not is_memory:
            raise
        reason = first_line(error) or type(error).__name__
        raise InputError(f"The memory is full ({reason}): try {LESS_MEMORY}.") from error
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise cannot_write(output_dir, error) from error


@contextmanager
def writing_faults(output_dir: str) -> Iterator[None]:
    """Turn what safetensors and torch raise in place of an `OSError` when a file cannot be written.

    Raises:
        InputError: If `output_dir` cannot be written to.
    """
    try:
        yield
    except SafetensorError as error:
        raise cannot_write(output_dir, error) from error
    except RuntimeError as error:
        # A RuntimeError raised in `torch.serialization` means a failed write.
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") != "torch.serialization":
            raise
        raise cannot_write(output_dir, error) from error


def cannot_write(output_dir: str, error: Exception) -> InputError:
    return InputError(
        f"{output_dir} cannot be written to ({first_line(error)}): earlier checkpoints are complete. Make room, and "
        "continue with --resume_from_checkpoint True."
    )


def first_line(error: Exception) -> str:
    return " ".join(str(error).partition("\n")[0].split())


class SeededLengthSampler(LengthGroupedSampler):
    """Group posts by length in an order that follows from the seed and the epoch alone.

    transformers' own class draws from the global generator, whose state at the start of an epoch is unknown to a run
    that resumes within it. Such a run would repeat some posts and skip others.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; the data loader calls this."""
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


class NotFinite(InputError):
    """The loss is not a finite number."""


class EarlyStopping(EarlyStoppingCallback):
    """Early stopping with the patience of this command, also after a resume.

    transformers' own class takes it from the checkpoint.
    """

    def on_train_begin(self, args: RecipeArguments, *_: Any, **__: Any) -> None:
        self.early_stopping_patience = args.early_stopping_patience


class PostProgress(ProgressCallback):
    """The Trainer's bars, in posts in place of steps."""

    def on_train_begin(
        self, args: RecipeArguments, state: TrainerState, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            total = state.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            if has_length(train_dataloader):  # whose last batch may be smaller
                per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
                total = round(len(train_dataloader.dataset) * state.max_steps / per_epoch)
            self.training_bar = Progress(
                total, "training", initial=total * state.global_step // max(1, state.max_steps)
            )

    def on_step_end(self, args: RecipeArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.training_bar.update(
                self.training_bar.total * state.global_step // state.max_steps - self.training_bar.n
            )

    def on_prediction_step(
        self, args: RecipeArguments, state: TrainerState, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and has_length(eval_dataloader):
            if self.prediction_bar is None:
                total = len(eval_dataloader.dataset)
                self.prediction_bar = Progress(total, "evaluating", is_part=self.training_bar is not None)
            bar = self.prediction_bar
            bar.update(min(args.eval_batch_size * args.world_size, bar.total - bar.n))


def show_posts(trainer: Trainer) -> None:
    """Let a Trainer that shows its progress show it in posts."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(PostProgress())


class SentimentTrainer(Trainer):
    """The Trainer with the paper's optimizer and schedule, and a separate learning rate for the backbones.

    Logs the model's `contrastive_loss` and `modality_loss`, averaged over the steps since the last log as `loss` is.

    Args:
        faults: With `on_error="skip"`, it takes the posts that `PostCollator` replaces in training batches.
        *args, **kwargs: As in `Trainer`.
    """

    args: RecipeArguments

    def __init__(self, *args: Any, faults: Faults | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        show_posts(self)
        self.faults = faults or Faults()
        self.part_sums: dict[str, torch.Tensor] = {}
        self.part_steps: Counter[str] = Counter()

    def get_train_dataloader(self) -> DataLoader:
        collator = self.data_collator
        if self.faults.on_error == "skip":
            self.data_collator = replace(collator, replace_bad=True)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        self.faults.add(dict(inputs.pop("bad_posts", ())))
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        for name in ("contrastive_loss", "modality_loss"):
            part = getattr(outputs, name, None)
            if model.training and part is not None:
                self.part_sums[name] = self.part_sums.get(name, 0) + part.detach().float().mean()
                self.part_steps[name] += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for name, total in self.part_sums.items():
                logs[name] = self.accelerator.gather(total / self.part_steps[name]).mean().item()
            self.part_sums, self.part_steps = {}, Counter()
        super().log(logs, start_time)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Stop at a loss that is not finite, before it reaches the weights of the next checkpoint.

        Raises:
            NotFinite: If the loss is not a finite number.
        """
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise NotFinite(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}, at a learning rate of "
                f"{self._get_learning_rate():.3g}: try a lower --learning_rate, --warmup_steps, or --bf16 in place of "
                "--fp16. Earlier checkpoints are complete."
            )
        return loss

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        with writing_faults(self.args.output_dir):
            super().save_model(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.args.should_save:
            # The Trainer writes its state last, so the state marks a checkpoint as complete. Where a checkpoint is
            # overwritten, the old mark must go first.
            folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        # A resumed run may have callbacks that the checkpoint's state does not know.
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks.setdefault(type(callback).__name__, {})
        with writing_faults(self.args.output_dir):
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
        """The trainable parameters by learning rate and weight decay, the highest rate first.

        A backbone's top layer learns at its own rate, and each layer below at `layerwise_lr_decay` times the rate of
        the one above.

        Only matrices decay, convolution kernels and embeddings among them: not the biases, normalization layers,
        temperature and lambda. Source: our choice, as is customary; the paper states the rate alone.
        """
        rates, own = {}, self.args.backbone_learning_rate
        for encoder in self.accelerator.unwrap_model(model).backbones().values():
            layers = layers_of_modules(encoder)
            top = max(layers.values(), default=0)
            for name, parameter in encoder.named_parameters():
                below_top = top - layers.get(name.rpartition(".")[0], 0)
                rate = self.args.learning_rate if own is None else own
                rates[id(parameter)] = rate * self.args.layerwise_lr_decay**below_top
        groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
        for parameter in model.parameters():
            if parameter.requires_grad:
                key = rates.get(id(parameter), self.args.learning_rate), parameter.ndim >= 2
                groups.setdefault(key, []).append(parameter)
        return [
            {"params": groups[rate, decay], "lr": rate, "weight_decay": self.args.weight_decay if decay else 0.0}
            for rate, decay in sorted(groups, reverse=True)  # the Trainer logs the first group's rate
        ]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.args.step_decay_epochs is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        decay = self.args.step_decay_epochs * math.ceil(len(self.train_dataset) / batch)
        warmup = self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            return (step / warmup if step < warmup else 1.0) * 0.1 ** (step // decay)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> torch.utils.data.Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if type(sampler) is not LengthGroupedSampler:
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeededLengthSampler(sampler.batch_size, lengths=list(sampler.lengths), seed=seed)

    def _get_eval_sampler(self, eval_dataset: datasets.Dataset) -> torch.utils.data.Sampler:
        # Predictions are written beside the posts' IDs, so evaluation keeps their order even under group_by_length.
        return torch.utils.data.SequentialSampler(eval_dataset)
