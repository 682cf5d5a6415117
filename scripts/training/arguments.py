"""The flags of a training run, and the YAML files that set them."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import is_deepspeed_available

from clipcacg.configuration_clipcacg import BACKBONES, did_you_mean
from clipcacg.scripts.data.errors import InputError, parse_flags
from clipcacg.scripts.data.loading import OF_DATA_SETS, DataArguments

CONFIGS = Path(__file__).parents[1] / "configs"
OF_TABLES = ("tuning", "systems")  # keys of a config that only reproduce.py reads
LOWER_IS_BETTER = ("loss", "mse", "mae")  # endings of metrics

# Flags that need all posts.
WITHOUT_STREAM = ("data_dir", "group_duplicates", "augment", "cache_features", "hp_search")

# A flag on the command line beats every default of a YAML file. A setting of the file is switched off if a flag that
# it would override is set, or if a flag that it needs is off.
# Setting: (its value when off, flags that it would override, flags that it needs)
SWITCHED_OFF: dict[str, tuple[Any, tuple[str, ...], tuple[str, ...]]] = {
    "adam": (False, ("optim", "optim_args"), ()),
    "step_decay_epochs": (None, ("lr_scheduler_type", "lr_scheduler_kwargs"), ()),
    "max_steps": (-1, ("num_train_epochs",), ()),
    "bf16": (False, ("fp16",), ()),
    "fp16": (False, ("bf16",), ()),
    "freeze_text": (False, ("freeze_text_layers",), ()),
    "freeze_vision": (False, ("freeze_vision_blocks",), ()),
    "model_name_or_path": (None, ("text_model", "vision_model", "clip_model"), ()),
    "data_dir": (None, ("dataset_name",), ()),
    "dataset_name": (None, ("data_dir",), ()),
    "splits": ("random", ("dataset_name",), ()),
    "text_label_column": (None, ("data_dir",), ()),
    "image_label_column": (None, ("data_dir",), ()),
    **{flag: (None, ("data_dir",), ()) for flag in OF_DATA_SETS if flag != "streaming"},
    "use_conflicting_posts": (False, ("dataset_name",), ("use_modality_heads",)),
    "streaming": (False, WITHOUT_STREAM, ()),
    "shuffle_buffer": (None, WITHOUT_STREAM, ("streaming",)),
    "group_duplicates": (False, ("streaming",), ()),
    "augment": (False, ("streaming",), ()),
    "cache_features": (False, ("streaming",), ()),
    "augment_views": (0, ("streaming",), ("augment", "cache_features")),
    "early_stopping_patience": (0, (), ("eval_strategy",)),
    "load_best_model_at_end": (False, (), ("eval_strategy", "save_strategy")),
    "average_checkpoints": (0, (), ("eval_strategy", "save_strategy", "load_best_model_at_end")),
}
OFF = (False, 0, None, "no")

# Of the loading options of `from_backbones` those that make sense as a flag.
LOADING_FLAGS = {
    "revision": "Branch, tag or commit of --{0}_model on the Hub.",
    "subfolder": "Folder inside --{0}_model.",
    "token": "Access token for --{0}_model; not stored.",
    "cache_dir": "Folder for the download of --{0}_model.",
    "trust_remote_code": "Run the code that --{0}_model, or this encoder of --model_name_or_path, brings.",
}

LoadingArguments = dataclasses.make_dataclass(
    "LoadingArguments",
    [
        (
            f"{backbone}_{option}",
            bool if option == "trust_remote_code" else str | None,
            field(default=False if option == "trust_remote_code" else None, metadata={"help": text.format(backbone)}),
        )
        for backbone in BACKBONES
        for option, text in LOADING_FLAGS.items()
    ],
)


@dataclass
class ModelArguments(LoadingArguments):
    """The model to train: a CLIP-CA-CG checkpoint, or backbones and fields of `ClipCaCgConfig`."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Start from this CLIP-CA-CG checkpoint."})
    text_model: str | None = field(default=None, metadata={"help": "Text encoder; default: the sample's tiny one."})
    vision_model: str | None = field(default=None, metadata={"help": "Vision encoder; default: the sample's."})
    clip_model: str | None = field(default=None, metadata={"help": "For --clip_mode encoder; default: the sample's."})
    clip_mode: Literal["encoder", "feature", "none"] = field(
        default="encoder",
        metadata={"help": "CLIP's own towers, CLIP-style heads on the features, or none (w/o Clip)."},
    )
    modality: Literal["both", "image", "text"] = field(
        default="both", metadata={"help": "both, image (V only) or text (T only)."}
    )
    use_cross_attention: bool = field(default=True, metadata={"help": "False: w/o CA."})
    use_gating: bool = field(default=True, metadata={"help": "False: w/o CG."})
    share_clip_text: bool = field(
        default=False,
        metadata={
            "help": "--text_model is --clip_model: run its text tower once, for both uses. --freeze_clip freezes it."
        },
    )
    share_clip_vision: bool = field(
        default=False, metadata={"help": "--vision_model is --clip_model: the same for its vision tower."}
    )
    hidden_size: int = field(default=768, metadata={"help": "Width of the fusion."})
    num_attention_heads: int = field(default=8, metadata={"help": "Heads of the cross-attention."})
    projection_dim: int = field(default=512, metadata={"help": "Width of the shared space of --clip_mode feature."})
    dropout: float = field(default=0.3, metadata={"help": "Dropout of the fusion."})
    contrastive_loss_weight: float = field(default=0.1, metadata={"help": "For --clip_mode feature."})
    use_modality_heads: bool = field(
        default=False, metadata={"help": "Learn the labels of the text alone and of the image alone, too."}
    )
    modality_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the two heads' losses."})
    modality_combination: Literal["auto", "classifier", "average"] = field(
        default="auto",
        metadata={
            "help": "Predict with the classifier, or with its average with the two heads; auto: what is better on the "
            "validation split after training."
        },
    )
    modality_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Withhold the image or the text of a training post with this probability: the model learns to "
            "answer posts that lack one."
        },
    )
    freeze_text: bool = field(default=False, metadata={"help": "Do not train the text encoder."})
    freeze_text_layers: int = field(
        default=0, metadata={"help": "Do not train the text encoder's embeddings and this many of its lower layers."}
    )
    freeze_vision: bool = field(default=False, metadata={"help": "Do not train the vision encoder."})
    freeze_vision_blocks: int = field(
        default=0,
        metadata={
            "help": "Do not train the vision encoder's stem and this many of its first stages, or of its blocks if "
            "it has no stages."
        },
    )
    freeze_clip: bool = field(default=False, metadata={"help": "Do not train the CLIP towers."})
    class_weights: Literal["none", "balanced"] = field(
        default="none", metadata={"help": "balanced: weight classes by their inverse frequency."}
    )
    cache_features: bool = field(
        default=False,
        metadata={
            "help": "Store the outputs of frozen encoders and layers on disk, so later runs only read them. Stored "
            "layers have no dropout."
        },
    )
    cache_dtype: Literal["float32", "float16"] = field(
        default="float32", metadata={"help": "Type of the stored outputs; float16 takes half the space."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Truncate texts to this many tokens; stays in the checkpoint."}
    )

    def loading_options(self) -> dict[str, Any]:
        """The loading options among the flags, under the names that `from_backbones` takes."""
        options = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(LoadingArguments)}
        return {name: value for name, value in options.items() if value}

    @property
    def trusts_code(self) -> bool:
        """Whether a backbone's own code may run; a checkpoint, or a push, then runs that of all its backbones."""
        return any(getattr(self, f"{part}_trust_remote_code") for part in BACKBONES)

    def config_fields(self) -> dict[str, Any]:
        """The fields of `ClipCaCgConfig` among the flags."""
        names = (
            "clip_mode modality use_cross_attention use_gating share_clip_text share_clip_vision hidden_size "
            "num_attention_heads projection_dim dropout contrastive_loss_weight modality_dropout"
        )
        fields = {name: getattr(self, name) for name in names.split()}
        return fields | self.head_fields()

    def head_fields(self) -> dict[str, Any]:
        """Those of them that add modality heads, to a checkpoint and to the concatenation baseline, too.

        With "auto" training evaluates the classifier; `run.choose_combination` chooses after it.
        """
        fields: dict[str, Any] = {"modality_combination": self.modality_combination.replace("auto", "classifier")}
        if self.use_modality_heads:
            fields |= {"use_modality_heads": True, "modality_loss_weight": self.modality_loss_weight}
        return fields


@dataclass
class RecipeArguments(TrainingArguments):
    """Every flag of `TrainingArguments`, and what the paper's recipe needs beside them."""

    output_dir: str = field(default="outputs/sample", metadata={"help": "Folder of the checkpoint and the results."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start again where an earlier run left checkpoints, and delete those."}
    )
    adam: bool = field(default=False, metadata={"help": "Adam with coupled weight decay instead of --optim."})
    backbone_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the backbones; default: --learning_rate."}
    )
    layerwise_lr_decay: float = field(
        default=1.0,
        metadata={"help": "Multiply the backbones' learning rate by this per layer, from the top layer down."},
    )
    step_decay_epochs: int | None = field(
        default=None, metadata={"help": "Divide the learning rate by 10 every N epochs; no --lr_scheduler_type."}
    )
    early_stopping_patience: int = field(
        default=0, metadata={"help": "Stop after N evaluations without improvement; 0: never."}
    )
    average_checkpoints: int = field(
        default=0,
        metadata={
            "help": "Average the weights of this many best evaluations, greedily by validation, at the end; 0 or 1: "
            "keep the best. Their checkpoints and the last one stay on disk, whatever --save_total_limit says."
        },
    )
    augment: bool = field(
        default=False,
        metadata={"help": "Change training images (TrivialAugment) and texts (words deleted and swapped) at random."},
    )
    augment_views: int = field(
        default=0,
        metadata={
            "help": "With --augment and --cache_features, store this many changed versions of each training post, and "
            "draw one per epoch."
        },
    )
    hp_search: int = field(
        default=0,
        metadata={
            "help": "Try N settings on the validation split (learning rates, dropout, epochs, weight decay), "
            "and train with the best. A flag on the command line is not searched."
        },
    )
    wanted_accuracy: float | None = field(
        default=None,
        metadata={
            "help": "Choose on the validation split the min_confidence from which answers have this accuracy, and say "
            "how many test posts it answers and how well."
        },
    )
    # TrainingArguments has the next two flags with other defaults.
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Continue the count of early stopping after a resume."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the model does not know the columns of the posts."}
    )
    # And this one demands a value there.
    debug: str | None = field(
        default="",
        metadata={
            "nargs": "?",
            "const": "",
            "help": "Print the traceback of an error in the input too; or one of transformers' debug features.",
        },
    )
    given: frozenset[str] = field(default=frozenset(), init=False)  # names of the flags on the command line

    def __post_init__(self) -> None:
        if self.greater_is_better is None and self.metric_for_best_model:
            self.greater_is_better = not self.metric_for_best_model.endswith(LOWER_IS_BETTER)
        super().__post_init__()


def names_data(argv: Sequence[str]) -> bool:
    """Whether the command line names data; without it a command reads the drawn sample."""
    return any(word.replace("-", "_").startswith(("__data_dir", "__dataset_name")) for word in argv)


def parse_arguments(argv: list[str], description: str = "") -> tuple[ModelArguments, DataArguments, RecipeArguments]:
    """Read the flags, and the defaults from a YAML file if the first word names one.

    Without a file the defaults are those of `sample.yaml`, or of `mvsa_single.yaml` if the flags name data.

    Raises:
        InputError: If the file or a flag is at fault.
    """
    classes = (ModelArguments, DataArguments, RecipeArguments)
    parser = HfArgumentParser(classes, usage="%(prog)s [CONFIG.yaml] [flags]", description=description)
    config = CONFIGS / ("mvsa_single.yaml" if names_data(argv) else "sample.yaml")
    if argv and argv[0].endswith((".yaml", ".yml")):
        config, argv = Path(argv[0]), argv[1:]
    defaults = read_config(config, parser, OF_TABLES)
    defaults = {key: value for key, value in defaults.items() if key not in OF_TABLES}
    if config.name == "sample.yaml" and any(word.startswith("--output_dir") for word in argv):
        defaults["overwrite_output_dir"] = False  # the sample's own folder may be overwritten, no other
    given = given_flags(classes, argv)
    if given.get("deepspeed") and not is_deepspeed_available():
        raise InputError("--deepspeed needs the package deepspeed: pip install deepspeed.")
    parser.set_defaults(**yielding(defaults, given))
    model, data, recipe = parse_flags(parser, argv)
    recipe.given = frozenset(given)
    if recipe.augment_views and not (recipe.augment and model.cache_features):
        raise InputError("--augment_views needs --augment and --cache_features; without them nothing is stored.")
    return model, data, recipe


def given_flags(classes: Sequence[type], argv: Sequence[str]) -> dict[str, Any]:
    """The flags that a command line gives, and their values.

    Args:
        classes: The dataclasses of the command.
        argv: Words of the command line.
    """
    parser = HfArgumentParser(classes, add_help=False)
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return vars(parser.parse_known_args(list(argv))[0])


def yielding(defaults: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Change the defaults of a YAML file so that every flag on the command line has an effect.

    Args:
        defaults: Key of the file to value.
        given: See `given_flags`.
    """
    defaults = dict(defaults)
    for setting, (off, overridden, needed) in SWITCHED_OFF.items():
        is_overridden = any(given.get(flag) not in OFF for flag in overridden)
        lacks = any(flag in given and given[flag] in OFF for flag in needed)
        if setting in defaults and (is_overridden or lacks):
            defaults[setting] = off
    # Steps are counted only under the strategy "steps".
    strategies = {
        kind: given.get(f"{kind}_strategy", "steps" if f"{kind}_steps" in given else None)
        for kind in ("eval", "save", "logging")
    }
    defaults |= {f"{kind}_strategy": value for kind, value in strategies.items() if value is not None}
    # Where the best checkpoint is kept, checkpoints are written when the model is evaluated.
    if given.get("load_best_model_at_end", defaults.get("load_best_model_at_end")):
        for kind, other in (("eval", "save"), ("save", "eval")):
            asked = strategies[kind]
            if strategies[other] is None and asked in ("steps", "epoch"):
                steps = given.get(f"{kind}_steps", defaults.get(f"{kind}_steps"))
                defaults |= {f"{other}_strategy": asked} | ({} if steps is None else {f"{other}_steps": steps})
    return defaults


def read_config(file: Path, parser: argparse.ArgumentParser, other_keys: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file of flags, and check every value as argparse checks a flag's.

    Args:
        file: Maps names of flags, without dashes, to values.
        parser: Knows the flags, their types and choices.
        other_keys: Further keys that the file may have; their values are not checked.

    Returns:
        Key to value, converted to the flag's type.

    Raises:
        InputError: If the file cannot be read, or a key or a value is not one of those allowed.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        keys = [str(key) for key in values.keys()]
    except (OSError, yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} is not a YAML file of flags: {' '.join(str(error).split())}") from error
    flags = {action.dest: action for action in reversed(parser._actions)}  # of --x and --no_x the former
    unknown = sorted(set(keys) - flags.keys() - set(other_keys))
    if unknown:
        hint = did_you_mean(unknown[0], [*flags, *other_keys])
        raise InputError(f"Unknown key {', '.join(unknown)} in {file}. Allowed: the flags that --help lists.{hint}")
    return {key: value if key in other_keys else checked(file, flags[key], value) for key, value in values.items()}


def checked(file: Path, action: argparse.Action, value: Any) -> Any:
    """Convert one value of a YAML file.

    Raises:
        InputError: The message names the file, the key, and what is allowed.
    """
    of_trainer = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    if value is None and action.default is None:
        return None
    if isinstance(value, (dict, list)) and action.type is str and action.dest in of_trainer:
        return value  # such as lr_scheduler_kwargs and report_to, which TrainingArguments checks itself
    is_list = isinstance(value, list) and action.nargs == "+"
    try:
        items = [action.type(str(item)) for item in (value if is_list else [value])]
        wrong = [item for item in items if action.choices is not None and item not in action.choices]
        wrong += [value] if isinstance(value, (dict, list)) and not is_list else []
    except (argparse.ArgumentTypeError, TypeError, ValueError):
        wrong = [value]
    if wrong:
        kind = "true or false" if action.const is True else f"a value of type {getattr(action.type, '__name__', '')}"
        allowed = "one of " + ", ".join(map(str, action.choices)) if action.choices is not None else kind
        hint = " (YAML reads a bare no as false: put it in quotes)" if value is False and action.choices else ""
        raise InputError(f"{file}: {action.dest} must be {allowed}, got {value!r}{hint}.")
    return items if is_list else items[0]
