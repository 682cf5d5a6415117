"""The recipe of a training run: its flags, and the Trainer that follows those which transformers does not have."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from clipcacg.scripts.data.loading import DataArguments

CONFIGS = Path(__file__).parents[1] / "configs"
OF_TABLES = ("tuning", "systems")  # keys of a config that are for reproduce.py alone


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
