"""The model card of a run, made from facts: what was not measured does not appear, and no path of this machine does.

The sentences stand in `model_card_template.md`, a Jinja template; this file fills it.
"""

import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PretrainedConfig, TrainingArguments

from report import CONFUSION_MATRIX_FILE, CURVES_FILE, SCORES, escape_markdown, markdown_table, results_table

TEMPLATE = Path(__file__).with_name("model_card_template.md")
DATA_KINDS = ("mvsa-single", "mvsa-multiple", "sample", "other")
LIBRARIES = ("torch", "transformers", "datasets", "accelerate", "huggingface_hub")
RECIPE = (
    "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps optim learning_rate "
    "lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay max_grad_norm bf16 fp16 seed"
).split()
READS = {
    "both": "the picture and the text of a post",
    "image": "the picture of a post",
    "text": "the text of a post",
}
INPUTS = {"image": 'images=Image.open("post.jpg")', "text": 'text="What a lovely morning!"'}


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide about a result."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def hardware_name(args: TrainingArguments) -> str:
    """Class of machine that a Trainer runs on: "2 x NVIDIA A100-SXM4-40GB", or "CPU with 8 cores, 2 processes"."""
    count = args.world_size * max(1, args.n_gpu)
    if args.device.type == "cuda":
        return f"{count} x {torch.cuda.get_device_name(args.device)}"
    return f"{args.device.type.upper()} with {os.cpu_count()} cores, {count} process{'es' if count > 1 else ''}"


def training_recipe(args: TrainingArguments) -> dict[str, Any]:
    """The settings that someone who repeats a run needs; those that are off (None or -1) are left out."""
    values = args.to_dict()  # turns enumerations into plain strings
    return {name: values[name] for name in RECIPE if values.get(name) not in (None, -1)}


@dataclass(frozen=True)
class RunFacts:
    """What the model card tells about a run.

    Args:
        config: the model's config; its `id2label` names the classes.
        data_kind: one of `DATA_KINDS`: decides which data section, limits and data terms the card has.
        dataset_name: name, Hub id or folder of the data.
        splits: how the data was split, in words, such as "random 8:1:1 (seed 42)".
        num_posts: posts of each split that were used.
        base_models: part that the model has -> pretrained weights that it started from, a Hub id or a folder.
        hub_model_id: "user/name" if the model goes to the Hub; without it the card calls the model by its folder.
        training: hyper-parameters, see `training_recipe`.
        seconds: training time.
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
    base_models: Mapping[str, str] = field(default_factory=dict)
    hub_model_id: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
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


def write_model_card(folder: str | Path, facts: RunFacts) -> Path:
    """Write the model card of a run into its checkpoint folder, as README.md, over one that is there.

    The pictures `CONFUSION_MATRIX_FILE` (of the test split if it was measured) and `CURVES_FILE` are shown if they are
    in the folder.

    Args:
        folder: the checkpoint folder.
        facts: what the card tells.

    Returns:
        The path of the card.
    """
    folder = Path(folder).absolute()
    model_id = facts.hub_model_id or folder.name
    pictures = {"confusion_matrix": CONFUSION_MATRIX_FILE, "curves": CURVES_FILE}
    card = ModelCard.from_template(
        card_data(facts, model_id),
        template_path=str(TEMPLATE),
        **card_text(facts, model_id),
        **{name: file if (folder / file).is_file() else None for name, file in pictures.items()},
    )
    card.text += "\n"  # Jinja drops the last line break
    card.save(folder / "README.md")
    return folder / "README.md"


def card_data(facts: RunFacts, model_id: str) -> ModelCardData:
    """The card's YAML front matter: what the Hub searches and lists."""
    results = eval_results(facts)
    return ModelCardData(
        language=None if facts.data_kind == "other" else "en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag=hub_task(facts),
        tags=["image-text-sentiment", "sentiment-analysis", "multimodal", facts.config.model_type, "custom_code"],
        base_model=[name for name in facts.base_models.values() if name and is_hub_id(name)] or None,
        datasets=[facts.dataset_name] if is_hub_dataset(facts.dataset_name) else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=model_id.split("/")[-1] if results else None,  # a part of the model-index, which needs results
        eval_results=results or None,
    )


def hub_task(facts: RunFacts) -> str:
    """The Hub's task that is nearest to what the model does.

    Source: our choice, for want of an image-text classification on the Hub. text-classification is the task of
        AutoModelForSequenceClassification; image-text-to-text would promise a model that writes.
    """
    return "image-classification" if facts.config.modality == "image" else "text-classification"


def eval_results(facts: RunFacts) -> list[EvalResult]:
    """Every overall score that was measured, with its split, for the `model-index` of the front matter."""
    name = public_name(facts.dataset_name)
    return [
        EvalResult(
            task_type=hub_task(facts),
            task_name="Image-text sentiment",
            dataset_type=name if is_hub_dataset(name) else re.sub(r"\W+", "-", name.lower()).strip("-"),
            dataset_name=name,
            dataset_split=split,
            dataset_args={"splits": public_name(facts.splits)},
            metric_type=score.removesuffix("_macro"),  # the Hub knows one f1; the title tells the mean over classes
            metric_name=title,
            metric_value=round(float(scores[score]), 4),
        )
        for split, scores in facts.results.items()
        for score, title in SCORES.items()
        if scores.get(score) is not None
    ]


def card_text(facts: RunFacts, model_id: str) -> dict[str, Any]:
    """The values of the template's variables; names that come from outside are escaped."""
    recipe = [(name, public_name(str(value))) for name, value in facts.training.items()]
    label_names = None if facts.regression else facts.label_names
    return {
        "config": facts.config,
        "kind": facts.data_kind,
        "regression": facts.regression,
        "title": escape_markdown(model_id.split("/")[-1]),
        "reads": READS[facts.config.modality],
        "variant": variant(facts.config),
        "labels": ", ".join(map(escape_markdown, label_names or [])),
        "parts_table": markdown_table(parts(facts)),
        "on_hub": facts.hub_model_id is not None,
        "usage": usage(facts, model_id),
        "dataset": escape_markdown(public_name(facts.dataset_name)),
        "splits": escape_markdown(public_name(facts.splits)),
        "posts_table": markdown_table([("Split", "Posts"), *facts.num_posts.items()]),
        "recipe_table": markdown_table([("Setting", "Value"), *recipe]) if recipe else None,
        "hardware": escape_markdown(facts.hardware or ""),
        "duration": None if facts.seconds is None else timedelta(seconds=round(facts.seconds)),
        "versions": ", ".join(f"{name} {number}" for name, number in facts.versions.items()),
        "results": {split: results_table(scores, label_names) for split, scores in facts.results.items()},
    }


def variant(config: PretrainedConfig) -> str:
    """The model's name and, if it is one of the paper's ablations, which one."""
    if config.modality != "both":
        return f"the {config.modality}-only ablation of CLIP-CA-CG"
    is_there = {
        "CLIP features": config.clip_mode != "none",
        "cross-attention": config.use_cross_attention,
        "the gate": config.use_gating,
    }
    missing = " and ".join(part for part, there in is_there.items() if not there)
    return f"the ablation without {missing} of CLIP-CA-CG" if missing else "CLIP-CA-CG"


def parts(facts: RunFacts) -> list[tuple[str, Any]]:
    """Rows of the table of the model's parts and switches, without the switches that one modality alone ignores."""
    switches = ["modality", "hidden_size", "dropout"]
    if facts.config.modality == "both":
        switches += ["clip_mode", "use_cross_attention", "use_gating"]
    started_from = [(part, public_name(name)) for part, name in facts.base_models.items() if name]
    return [("Part", "Setting"), *started_from, *((name, getattr(facts.config, name)) for name in switches)]


def usage(facts: RunFacts, model_id: str) -> str:
    """Python code for a reader to copy: load the model, read one post, print what the model says of it."""
    modality = facts.config.modality
    inputs = ", ".join(INPUTS.values()) if modality == "both" else INPUTS[modality]
    show = [
        "for index, probability in enumerate(logits.softmax(dim=-1)[0].tolist()):",
        '    print(f"{model.config.id2label[index]}: {probability:.3f}")',
    ]
    lines = [
        "import torch",
        *([] if modality == "text" else ["from PIL import Image"]),
        "from transformers import AutoModelForSequenceClassification, AutoProcessor",
        "",
        f"name = {json.dumps(model_id, ensure_ascii=False)}",
        "processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)",
        "model = AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=True).eval()",
        "",
        f'inputs = processor({inputs}, return_tensors="pt")',
        "with torch.no_grad():",
        "    logits = model(**inputs).logits",
        *(['print(f"sentiment: {logits.item():.3f}")'] if facts.regression else show),
    ]
    return "\n".join(lines)


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a repository on the Hub and is no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def is_hub_dataset(name: str) -> bool:
    """The same for data, where a name without a slash is a title rather than a repository."""
    return "/" in name and is_hub_id(name)


def public_name(name: str) -> str:
    """A name that may leave this machine: of a local path, its last part only."""
    return name if is_hub_id(name) else re.split(r"[\\/]", name.rstrip("\\/"))[-1]
