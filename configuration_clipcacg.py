"""Configuration of CLIP-CA-CG, an image-text sentiment model.

Source: Lu, Ni and Ding, "Cross-Modal Sentiment Analysis Based on CLIP Image-Text Attention Interaction".
"""

from __future__ import annotations

import copy
import difflib
import inspect
import math
import os
import shutil
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers import __version__ as transformers_version
from transformers.dynamic_module_utils import get_relative_import_files

LABELS = ("negative", "neutral", "positive")
CLIP_MODES = ("encoder", "feature", "none")
MODALITIES = ("both", "image", "text")
MODALITY_COMBINATIONS = ("classifier", "average")

# Dual encoders that `clip_mode="encoder"` runs: two towers, and patches and words that can be pooled one at a time.
DUAL_ENCODERS = (
    "altclip", "chinese_clip", "clip", "clipseg", "metaclip_2", "siglip", "vision-text-dual-encoder"
)  # fmt: skip
PADDED_DUAL_ENCODERS = ("siglip",)  # they read texts that are padded to the full length, the padding included

# Every checkpoint names all four classes, whichever of them wrote it; see `ClipCaCgConfig.save_pretrained`.
AUTO_MAP = {
    "AutoConfig": "configuration_clipcacg.ClipCaCgConfig",
    "AutoModel": "modeling_clipcacg.ClipCaCgModel",
    "AutoModelForSequenceClassification": "modeling_clipcacg.ClipCaCgForSequenceClassification",
    "AutoProcessor": "processing_clipcacg.ClipCaCgProcessor",
}

# Keywords of every config besides those that `PreTrainedConfig().to_dict()` lists.
COMMON_FIELDS = (
    "num_labels",
    "torch_dtype",
    "attn_implementation",
    "experts_implementation",
    "name_or_path",
    "auto_map",
    "custom_pipelines",
    "quantization_config",
)
# What `from_backbones` passes to every `from_pretrained` that loads a part of a backbone.
LOADING_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
BACKBONES = ("text", "vision", "clip")
LOADING_KEYWORDS = {
    *LOADING_OPTIONS,
    *(f"{backbone}_{option}" for backbone in BACKBONES for option in LOADING_OPTIONS),
}

CUSTOM_PIPELINES = {
    "image-text-sentiment": {
        "impl": "pipeline_clipcacg.ImageTextSentimentPipeline",
        "pt": ["AutoModelForSequenceClassification"],
    }
}

# The published weights that the defaults must fit. `RobertaConfig()` alone does not fit roberta-base.
ROBERTA_BASE = {
    "model_type": "roberta",
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}
RESNET_50 = {"model_type": "resnet"}
CLIP_VIT_B_32 = {"model_type": "clip"}


# Attribute of the config class of an encoder that brought its own code: its model class. transformers may execute this
# module twice, so neither a dict of it nor `isinstance` would do.
MODEL_CLASS = "clipcacg_model_class"


class CustomCodeConfig(PreTrainedConfig):
    """Stands for the config of an encoder with code of its own, until `trust_remote_code=True` allows to run it.

    Args:
        fields: Content of the config, whose `auto_map` names the classes in the checkpoint's folder.
    """

    def __init__(self, fields: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.custom_code_fields = fields or {}
        self.model_type = self.custom_code_fields.get("model_type", "")  # type: ignore[misc]  # of this one

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as they are, with the version that transformers takes out again."""
        return copy.deepcopy(self.custom_code_fields) | {"transformers_version": transformers_version}


class ClipCaCgConfig(PreTrainedConfig):
    """Everything that fixes the shape and the loss of a CLIP-CA-CG model.

    Args:
        text_config: Config object or dict of any text encoder that `AutoConfig` knows. Of a model with a decoder, such
            as T5, the encoder is built; of a dual encoder, such as CLIP, the text tower. Default: roberta-base.
        vision_config: Config object or dict of any encoder whose `AutoModel` returns a feature map or a grid of tokens
            as its `last_hidden_state`, timm's included, or of a dual encoder. Default: resnet-50.
        clip_config: Config object or dict of a model in `DUAL_ENCODERS`, or None for none. Default:
            clip-vit-base-patch32. Only `clip_mode="encoder"` builds it.
        hidden_size: Width d of the fusion.
        num_attention_heads: Heads of each cross-attention; must divide `hidden_size`.
        dropout: Dropout probability of the fusion, in [0, 1). The paper's value is 0.3.
        projection_dim: Width c of the shared space of `clip_mode="feature"`. With `"encoder"` it is CLIP's own.
        clip_mode: How equation 5 is read. `"encoder"`: CLIP's pretrained towers read the raw image and text;
            `"feature"`: CLIP-style projections of the model's own features; `"none"`: the ablation w/o Clip.
        use_cross_attention: False is the ablation w/o CA (equations 6-10 are skipped).
        use_gating: False is the ablation w/o CG (concatenation and an MLP replace equations 12-15).
        share_clip_text: Let CLIP's text tower be the text encoder too. The model then has one tower, which it runs
            once, and reads `clip_input_ids` alone. `text_config` must be `clip_config`, which is then its default.
        share_clip_vision: The same for CLIP's vision tower, `vision_config` and `clip_pixel_values`.
        modality: `"both"`, or one of the ablations `"image"` (V only) and `"text"` (T only).
        contrastive_loss_weight: Weight of the symmetric contrastive loss of `clip_mode="feature"`, the only mode
            that has one: CLIP's own towers are trained already. Our choice: 0.1.
        logit_scale_init_value: Logarithm of the inverse temperature of that loss at the start; CLIP's ln(1 / 0.07).
        modality_dropout: Probability in training that the model does not read one side of an example, the image or the
            text, in [0, 1). Any value above 0 adds the learned states that stand in for what is missing, so that the
            model can answer posts that lack a side. The paper has none.
        class_weights: Weight of each class in the cross-entropy, one number for each label, or None for equal weights.
        label_smoothing: Label smoothing of the cross-entropy, in [0, 1).
        label_thresholds: With several labels per example, the probability from which each label applies, one number
            for each label; None for 0.5.
        temperature: What `logits` are divided by where they become probabilities, above 0; 1 changes nothing. Training
            fits it on the validation split. With several labels per example one number divides the logits of all
            sigmoids; with `modality_combination="average"` it divides the logarithms of the averaged probabilities.
            `forward`, the two heads and regressions do not use it. Source: Guo et al., "On Calibration of Modern
            Neural Networks", ICML 2017.
        use_modality_heads: Add two Linear heads that predict the text's own label and the image's own label. Our
            addition, for a classifier with `modality="both"`.
        modality_loss_weight: Weight of the heads' cross-entropies in the training loss. Our choice: 1.
        modality_combination: What `logits` are in evaluation mode. `"classifier"`: equation 16, as in the paper;
            `"average"`: the mean of the classifier's probabilities and of those that MVSA's label rule makes of the
            two heads. The rule needs the labels negative, neutral and positive, in any order.
        text_columns: Columns of the training table whose texts were joined by a space, or None. `forward` does not
            depend on them; the commands read the same columns again.
        image_column: Column of its images, or None.
        **kwargs: What every transformers config takes: `num_labels`, `id2label`, `problem_type`, `dtype`, ...
            Three labels without names are 0 negative, 1 neutral, 2 positive, and that is also the default.

    Raises:
        TypeError: For a keyword that is no field.
        ValueError: For a combination that cannot be built; the message prints the values.

    Source:
        Section III of the paper; the defaults are Table II and section IV.B, or named above as our choice.
    """

    model_type = "clipcacg"
    # Without vision_config: transformers passes the attention implementation to every config listed here, and
    # convolutional networks refuse it.
    sub_configs = {"text_config": AutoConfig, "clip_config": AutoConfig}
    # The Trainer would otherwise keep these outputs in memory for every example of an evaluation.
    keys_to_ignore_at_inference = [
        "fused_embeds",
        "image_embeds",
        "text_embeds",
        "gate",
        "contrastive_loss",
        "has_image",
        "has_text",
        "text_logits",
        "image_logits",
        "modality_loss",
        "image_attentions",
        "text_attentions",
        "image_hidden_states",
        "text_hidden_states",
    ]
    # Declared, because transformers takes an undeclared field of this name for one of text generation, and saves none.
    temperature: float = 1.0

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        clip_config: PreTrainedConfig | dict[str, Any] | None = CLIP_VIT_B_32,
        hidden_size: int = 768,
        num_attention_heads: int = 8,
        dropout: float = 0.3,
        projection_dim: int = 512,
        clip_mode: str = "encoder",
        use_cross_attention: bool = True,
        use_gating: bool = True,
        share_clip_text: bool = False,
        share_clip_vision: bool = False,
        modality: str = "both",
        contrastive_loss_weight: float = 0.1,
        logit_scale_init_value: float = 2.6592,
        class_weights: list[float] | None = None,
        label_smoothing: float = 0.0,
        label_thresholds: list[float] | None = None,
        use_modality_heads: bool = False,
        modality_loss_weight: float = 1.0,
        modality_combination: str = "classifier",
        modality_dropout: float = 0.0,
        text_columns: list[str] | None = None,
        image_column: str | None = None,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        check_keywords(type(self).__name__, kwargs, self.known_fields())
        self.clip_config = None if clip_config is None else _sub_config("clip", clip_config, "clip")
        default_text = self.clip_config if share_clip_text else ROBERTA_BASE
        default_vision = self.clip_config if share_clip_vision else RESNET_50
        self.text_config = _sub_config("text", text_config or default_text or ROBERTA_BASE, "roberta")
        self.vision_config = _sub_config("vision", vision_config or default_vision or RESNET_50, "resnet")
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.dropout = dropout
        self.projection_dim = projection_dim
        self.clip_mode = clip_mode
        self.use_cross_attention = use_cross_attention
        self.use_gating = use_gating
        self.share_clip_text = share_clip_text
        self.share_clip_vision = share_clip_vision
        self.modality = modality
        self.contrastive_loss_weight = contrastive_loss_weight
        self.logit_scale_init_value = logit_scale_init_value
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing
        self.label_thresholds = label_thresholds
        self.temperature = temperature
        self.use_modality_heads = use_modality_heads
        self.modality_loss_weight = modality_loss_weight
        self.modality_combination = modality_combination
        self.modality_dropout = modality_dropout
        self.text_columns = text_columns
        self.image_column = image_column
        if kwargs.get("id2label") is None and kwargs.get("label2id"):
            kwargs["id2label"] = {index: label for label, index in kwargs["label2id"].items()}
        if kwargs.get("id2label") is None and kwargs.get("num_labels") in (None, len(LABELS)):
            kwargs |= {
                "id2label": dict(enumerate(LABELS)),
                "label2id": {label: index for index, label in enumerate(LABELS)},
            }
        super().__init__(**kwargs)
        self.check_values()
        for name in self.shared:
            if _fields(getattr(self, f"{name}_config")) != _fields(self.clip_config):
                raise ValueError(
                    f"share_clip_{name}=True needs a {name}_config that equals clip_config, or none at all."
                )
            setattr(self, f"{name}_config", self.clip_config)

    def check_values(self) -> None:
        """Refuse what cannot be built.

        Raises:
            ValueError: If a mode is unknown, a number is out of its range, or two values contradict each other.
        """
        choices_of = {
            "clip_mode": CLIP_MODES,
            "modality": MODALITIES,
            "modality_combination": MODALITY_COMBINATIONS,
        }
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}.")
        if self.modality == "both" and self.clip_mode == "encoder" and self.clip_config is None:
            raise ValueError(
                "clip_mode='encoder' runs CLIP's own towers and needs a clip_config, but clip_config is None. Give "
                "one (from_backbones: clip_model=), or choose clip_mode='feature' or 'none'."
            )
        if self.clip_config is not None and self.clip_config.model_type not in DUAL_ENCODERS:
            raise ValueError(
                f"clip_config must be of a dual encoder ({', '.join(DUAL_ENCODERS)}), not of "
                f"{self.clip_config.model_type!r}."
            )
        if self.shared and "clip" not in self.encoders:
            raise ValueError(
                f"share_clip_{self.shared[0]}=True needs CLIP's towers, which the model has with modality='both' and "
                f"clip_mode='encoder', not with modality={self.modality!r} and clip_mode={self.clip_mode!r}."
            )
        if (
            self.share_clip_text
            and self.clip_config is not None
            and self.clip_config.model_type in PADDED_DUAL_ENCODERS
        ):
            raise ValueError(
                f"share_clip_text=True does not work with {self.clip_config.model_type!r}, whose text tower reads "
                "padding as words; a text encoder does not."
            )
        for name in ("hidden_size", "num_attention_heads", "projection_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, but {self.hidden_size} is not a multiple of "
                f"{self.num_attention_heads}."
            )
        for name in ("dropout", "label_smoothing", "modality_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0 and finite, not {self.temperature}.")
        if self.modality_dropout and self.modality != "both":
            raise ValueError(
                f"modality_dropout={self.modality_dropout} needs modality='both': a model with "
                f"modality={self.modality!r} has only one side to read."
            )
        if self.problem_type == "regression" and self.num_labels != 1:
            raise ValueError(f"A regression predicts one value: num_labels must be 1, not {self.num_labels}.")
        for name in ("class_weights", "label_thresholds"):
            numbers = getattr(self, name)
            if numbers is not None and len(numbers) != self.num_labels:
                raise ValueError(
                    f"{name} needs one number for each label: {self.num_labels} numbers, not {len(numbers)}."
                )
        if self.use_modality_heads and (self.modality != "both" or self.task != "single_label_classification"):
            raise ValueError(
                "use_modality_heads=True needs modality='both' and one of several labels for each example, not "
                f"modality={self.modality!r} and {self.num_labels} label(s) with problem_type={self.problem_type!r}."
            )
        if self.modality_combination == "average":
            if not self.use_modality_heads:
                raise ValueError("modality_combination='average' needs use_modality_heads=True.")
            if not self.has_sentiment_labels:
                raise ValueError(
                    f"modality_combination='average' needs the labels {', '.join(LABELS)}, not "
                    f"{', '.join(self.label_names)}: its rule combines these three alone."
                )

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model reads of an example: "image", "text" or both."""
        return {"both": ("image", "text"), "image": ("image",), "text": ("text",)}[self.modality]

    @property
    def encoders(self) -> tuple[str, ...]:
        """Pretrained encoders that the model is built on: some of "text", "vision" and "clip"."""
        if self.modality != "both":
            return ("vision",) if self.modality == "image" else ("text",)
        own = tuple(name for name in ("text", "vision") if name not in self.shared)
        return (*own, "clip") if self.clip_mode == "encoder" else own

    @property
    def shared(self) -> tuple[str, ...]:
        """Which of "text" and "vision" are not encoders of their own, but CLIP's towers."""
        return tuple(name for name in ("text", "vision") if getattr(self, f"share_clip_{name}"))

    @property
    def required_inputs(self) -> tuple[str, ...]:
        """Names of the inputs that `forward` needs; attention masks are optional."""
        inputs = {
            "text": ("input_ids",),
            "vision": ("pixel_values",),
            "clip": ("clip_input_ids", "clip_pixel_values"),
        }
        return tuple(name for encoder in self.encoders for name in inputs[encoder])

    @property
    def task(self) -> str:
        """`problem_type`, or transformers' rule where it is None: one label is a regression, several are classes."""
        return self.problem_type or ("regression" if self.num_labels == 1 else "single_label_classification")

    @property
    def label_names(self) -> list[str]:
        """Names of the labels, in the order of their indices."""
        names: Any = self.id2label
        return [names[index] for index in range(len(names))]

    @property
    def has_sentiment_labels(self) -> bool:
        """Whether the labels are negative, neutral and positive, in any order."""
        return sorted(self.label_names) == sorted(LABELS)

    @classmethod
    def known_fields(cls) -> set[str]:
        """Names of the keywords of `__init__`, those of subclasses and of every transformers config among them."""
        names = {*PreTrainedConfig().to_dict(), *COMMON_FIELDS}
        for owner in cls.__mro__[: cls.__mro__.index(ClipCaCgConfig) + 1]:
            names |= inspect.signature(owner).parameters.keys()
        return names - {"kwargs"}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a config from the content of `config.json`; arguments as in `PreTrainedConfig.from_dict`.

        Fields that only a newer release knows become attributes. A sub-config given as an object replaces the saved
        one, whose model type may be known to custom code alone.
        """
        newer = config_dict.keys() - cls.known_fields()
        known = {name: config_dict[name] for name in config_dict.keys() - newer}
        objects = {name for name, value in kwargs.items() if isinstance(value, PreTrainedConfig)}
        built = super().from_dict(known | {name: kwargs.pop(name) for name in objects}, **kwargs)
        config = built[0] if isinstance(built, tuple) else built
        for name in newer:
            setattr(config, name, config_dict[name])
        return built

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what `config.json` holds.

        transformers omits `id2label` when it equals its own default of two labels, which is not ours.
        """
        fields = super().to_diff_dict() | {"id2label": self.id2label, "label2id": self.label2id}
        for name in ("text_config", "vision_config", "clip_config"):
            config, saved = getattr(self, name), fields[name] or {}
            saved.pop("_name_or_path", None)  # the folder on this machine that the backbone came from
            model_class = getattr(type(config), MODEL_CLASS, None)
            if not hasattr(config, "custom_code_fields"):
                saved.pop("auto_map", None)
            if model_class is not None:
                classes = {"AutoConfig": type(config), "AutoModel": model_class}
                saved["auto_map"] = {
                    auto: f"{known.__module__.rpartition('.')[2]}.{known.__name__}" for auto, known in classes.items()
                }
        return fields

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `config.json` and, beside it, the code that `trust_remote_code=True` runs.

        Every checkpoint is written through this method: by `model.save_pretrained`, by the Trainer, and by a model
        that was itself loaded with remote code. It adds what makes a checkpoint complete: the code files, the
        pipeline, and the full `auto_map` without the name of the repository that the code came from.

        Args:
            save_directory: Folder to write to; made if it does not exist.
            push_to_hub: Also upload the folder.
            **kwargs: As in `PreTrainedConfig.save_pretrained`.
        """
        self.auto_map = dict(AUTO_MAP)
        # A copy: `pipeline()` replaces the names with classes, which JSON cannot hold.
        self.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        for name, source in self.code_files().items():
            target = Path(save_directory) / name
            if not (target.exists() and target.samefile(source)):
                shutil.copyfile(source, target)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def code_files(self) -> dict[str, Path]:
        """Return the Python files of a checkpoint by name: the model's own, and those that its encoders brought.

        Raises:
            ValueError: If two different files have the same name.
        """
        files = {path.name: path for path in _code_files()}
        for config in (self.text_config, self.vision_config, self.clip_config):
            model_class = getattr(type(config), MODEL_CLASS, None)
            for custom_class in () if model_class is None else (type(config), model_class):
                module = str(sys.modules[custom_class.__module__].__file__)
                for path in map(Path, (module, *get_relative_import_files(module))):
                    if files.setdefault(path.name, path).read_bytes() != path.read_bytes():
                        raise ValueError(
                            f"A checkpoint cannot hold two files called {path.name}, but the code of "
                            f"{type(config).__name__} has one, and so has other code of this model."
                        )
        return files


def check_keywords(subject: str, keywords: Iterable[str], known: Collection[str]) -> None:
    """Refuse unknown keywords; names with a leading underscore are transformers' own.

    Args:
        subject: What takes the keywords, for the message.
        keywords: Their names.
        known: The allowed names.

    Raises:
        TypeError: The message has the nearest allowed name.
    """
    for name in keywords:
        if name not in known and not name.startswith("_"):
            raise TypeError(f"{subject} has no keyword {name!r}.{did_you_mean(name, known)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question with the known name that is most like a misspelt one, or nothing if none is."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.75)
    return f" Did you mean {close[0]}?" if close else ""


def split_keywords(keywords: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Split the keywords of `from_backbones`.

    Args:
        keywords: Loading options, for all backbones (`token`) or for one (`text_token`), and fields of the config.

    Returns:
        "text", "vision" and "clip" to the loading options of that backbone; and the rest, which are fields.
    """
    options = {}
    for backbone in BACKBONES:
        given = {option: keywords.get(f"{backbone}_{option}", keywords.get(option)) for option in LOADING_OPTIONS}
        options[backbone] = {option: value for option, value in given.items() if value is not None}
    return options, {name: value for name, value in keywords.items() if name not in LOADING_KEYWORDS}


def check_sources(sources: dict[str, Any], options: dict[str, dict[str, Any]], fields: dict[str, Any]) -> None:
    """Check that the encoders that share CLIP's towers come from where CLIP comes from.

    Args:
        sources: "text", "vision" and "clip" to a Hub name or folder.
        options: The same names to loading options, as `split_keywords` returns them.
        fields: Fields of the config.

    Raises:
        ValueError: If a source or its options differ from CLIP's.
    """
    for name in ("text", "vision"):
        origins = [(str(sources[part]), options[part]) for part in (name, "clip")]
        if fields.get(f"share_clip_{name}") and origins[0] != origins[1]:
            raise ValueError(
                f"share_clip_{name}=True needs one source, with the same loading options, as {name}_model and as "
                f"clip_model, not {sources[name]} and {sources['clip']}."
            )


def _fields(config: Any) -> dict[str, Any]:
    """The fields of a config without the folder or repository that it came from."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def _sub_config(backbone: str, config: PreTrainedConfig | dict[str, Any], default_model_type: str) -> PreTrainedConfig:
    """Return a new config object from the caller's object or dict, which is not changed."""
    config = copy.deepcopy(config)
    if isinstance(config, PreTrainedConfig):
        return config
    config = {"model_type": default_model_type, **config}
    if config.get("auto_map", {}).keys() >= {"AutoConfig", "AutoModel"}:
        return CustomCodeConfig(config)
    if config["model_type"] not in CONFIG_MAPPING:
        raise ValueError(
            f"{backbone}_config: transformers {transformers_version} has no model type {config['model_type']!r}: "
            "update transformers."
        )
    return AutoConfig.for_model(**config)


def _code_files() -> list[Path]:
    """Return the paths of the model's four Python files.

    The imports are inside the function because those modules import this one. The Hub's loader follows them as well,
    so fetching one file fetches all four.
    """
    from .modeling_clipcacg import __file__ as modeling
    from .pipeline_clipcacg import __file__ as pipeline
    from .processing_clipcacg import __file__ as processing

    return [Path(file) for file in (__file__, modeling, pipeline, processing)]


__all__ = ["ClipCaCgConfig"]
