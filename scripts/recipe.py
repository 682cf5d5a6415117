"""The recipe of a training run: its flags, and the Trainer that follows those which transformers does not have."""

import errno
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from safetensors import SafetensorError
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from posts import DataArguments

CONFIGS = Path(__file__).parent / "configs"
OF_TABLES = ("tuning", "systems")  # keys of a config that are for reproduce.py alone
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # how torch says it without a type
NO_FILE = ("PytorchStreamWriter", "unexpected pos", "file write failed")  # likewise
LESS_MEMORY = (
    "a smaller --per_device_train_batch_size with more --gradient_accumulation_steps, --gradient_checkpointing, "
    "--bf16, or --freeze_text, --freeze_vision and --freeze_clip, with --cache_features besides"
)


@dataclass
class ModelArguments:
    """What is trained: a checkpoint of ours, or backbones and the fields of `ClipCaCgConfig`."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Go on from this CLIP-CA-CG checkpoint."})
    text_model: str | None = field(default=None, metadata={"help": "Text encoder; default: the sample's tiny one."})
    vision_model: str | None = field(default=None, metadata={"help": "Vision encoder; default: likewise."})
    clip_model: str | None = field(default=None, metadata={"help": "For --clip_mode encoder; default: likewise."})
    clip_mode: str = field(default="encoder", metadata={"help": "encoder, feature or none (w/o Clip)."})
    modality: str = field(default="both", metadata={"help": "both, image (V only) or text (T only)."})
    use_cross_attention: bool = field(default=True, metadata={"help": "False: w/o CA."})
    use_gating: bool = field(default=True, metadata={"help": "False: w/o CG."})
    hidden_size: int = field(default=768, metadata={"help": "Width of the fusion."})
    num_attention_heads: int = field(default=8, metadata={"help": "Heads of the cross-attention."})
    projection_dim: int = field(default=512, metadata={"help": "Width of the shared space of --clip_mode feature."})
    dropout: float = field(default=0.3, metadata={"help": "Dropout of the fusion."})
    contrastive_loss_weight: float = field(default=0.1, metadata={"help": "For --clip_mode feature."})
    freeze_text: bool = field(default=False, metadata={"help": "Do not train the text encoder."})
    freeze_text_layers: int = field(
        default=0, metadata={"help": "Do not train its embeddings and so many of its lower layers."}
    )
    freeze_vision: bool = field(default=False, metadata={"help": "Do not train the vision encoder."})
    freeze_clip: bool = field(default=False, metadata={"help": "Do not train the CLIP towers."})
    class_weights: str = field(default="none", metadata={"help": "none, or balanced: by inverse frequency."})
    cache_features: bool = field(
        default=False, metadata={"help": "Compute the outputs of frozen backbones once, and keep them on disk."}
    )
    cache_dtype: str = field(default="float32", metadata={"help": "Of these: float32, or float16 for half the space."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens to keep of a text; stays in the checkpoint."}
    )

    def config_fields(self) -> dict[str, Any]:
        names = "clip_mode modality use_cross_attention use_gating hidden_size num_attention_heads projection_dim"
        return {name: getattr(self, name) for name in f"{names} dropout contrastive_loss_weight".split()}


@dataclass
class RecipeArguments(TrainingArguments):
    """Every flag of `TrainingArguments`, and what the paper's recipe needs beside them."""

    output_dir: str = field(default="outputs/sample", metadata={"help": "Where the checkpoint and the results go."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew where an earlier run left checkpoints, and delete those."}
    )
    adam: bool = field(default=False, metadata={"help": "Adam with coupled weight decay instead of --optim."})
    backbone_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the backbones; default: --learning_rate."}
    )
    step_decay_epochs: int | None = field(
        default=None, metadata={"help": "Divide the learning rate by 10 every so many epochs; no --lr_scheduler_type."}
    )
    early_stopping_patience: int = field(
        default=0, metadata={"help": "Stop after so many evaluations without a better one; 0: never."}
    )
    augment: bool = field(default=False, metadata={"help": "Crop, flip and colour training pictures at random."})


def parse_arguments(argv: list[str], description: str = "") -> tuple[ModelArguments, DataArguments, RecipeArguments]:
    """Read a YAML file of defaults, if the first word names one, and the flags that override it.

    Without a file the defaults are those of `sample.yaml`, or of `mvsa_single.yaml` if data is named.

    Raises:
        ValueError: If the file is no YAML, or holds a key that is no flag, or a flag cannot be heeded.
    """
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, RecipeArguments),
        usage="%(prog)s [CONFIG.yaml] [flags]",
        description=description,
    )
    has_data = any(word.startswith(("--data_dir", "--dataset_name")) for word in argv)
    config = CONFIGS / ("mvsa_single.yaml" if has_data else "sample.yaml")
    if argv and argv[0].endswith((".yaml", ".yml")):
        config, argv = Path(argv[0]), argv[1:]
    try:
        defaults = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        defaults = {key: value for key, value in defaults.items() if key not in OF_TABLES}
        unknown = sorted(map(str, defaults.keys() - {action.dest for action in parser._actions}))
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{config} is not a YAML file of flags: {' '.join(str(error).split())}") from error
    if unknown:
        raise ValueError(f"{config}: no flag is called {', '.join(unknown)}; --help lists them all.")
    if config.name == "sample.yaml" and any(word.startswith("--output_dir") for word in argv):
        defaults["overwrite_output_dir"] = False  # said of the sample's own folder only
    parser.set_defaults(**defaults)
    parsed = parser.parse_args_into_dataclasses(argv)
    if parsed[-1].dataloader_drop_last:
        raise ValueError("--dataloader_drop_last would drop posts from evaluation and test as well: leave it out.")
    return parsed


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
