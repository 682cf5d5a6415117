"""The model card of a run, made from facts: what was not measured does not appear, and no path of this machine does.

The sentences stand in `model_card_template.md`, a Jinja template, and the facts in `run_facts.py`; this file puts the
facts into words.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PretrainedConfig

from clipcacg.scripts.reporting.plots import CONFUSION_MATRIX_FILE, CURVES_FILE
from clipcacg.scripts.reporting.run_facts import RunFacts, uses_timm
from clipcacg.scripts.reporting.tables import SCORES, escape_markdown, markdown_table, results_table

TEMPLATE = Path(__file__).with_name("model_card_template.md")
DATA_TITLES = {"mvsa-single": "MVSA-Single", "mvsa-multiple": "MVSA-Multiple", "sample": "the drawn sample"}
# What a checkpoint needs to be loaded; timm as well where its vision encoder is one of timm.
REQUIREMENTS = ("torch>=2.6", "torchvision>=0.21", "transformers>=5.20", "pillow>=11")
TIMM = "timm>=1.0"
PARTS = {"text": "Text encoder", "vision": "Vision encoder", "clip": "CLIP"}
SIZES = {
    "num_hidden_layers": "{} layers",
    "depths": "{} blocks",
    "hidden_size": "width {}",
    "hidden_sizes": "widths {}",
}
READS = {
    "both": "the picture and the text of a post",
    "image": "the picture of a post",
    "text": "the text of a post",
}
POST = {"image": '"post.jpg"', "text": '"What a lovely morning!"'}
INPUTS = {"image": 'images=Image.open("post.jpg")', "text": 'text="What a lovely morning!"'}


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
    name = data_title(facts)
    return [
        EvalResult(
            task_type=hub_task(facts),
            task_name="Image-text sentiment",
            dataset_type=name if is_hub_dataset(name) else re.sub(r"\W+", "-", name.lower()).strip("-"),
            dataset_name=name,
            dataset_split=split,
            dataset_args={"splits": public_name(facts.splits), **facts.split_settings},
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
    recipe = [(name, readable(name, value)) for name, value in facts.training.items()]
    label_names = None if facts.regression else facts.label_names
    return {
        "facts": facts,
        "config": facts.config,
        "kind": facts.data_kind,
        "regression": facts.regression,
        "title": escape_markdown(model_id.split("/")[-1]),
        "reads": READS[facts.config.modality],
        "lacks": lacks(facts.config),
        "labels": listed([escape_markdown(name) for name in label_names or []]),
        "parts_table": markdown_table(parts(facts)),
        "requirements": [*REQUIREMENTS, *([TIMM] if uses_timm(facts.config) else [])],
        "on_hub": facts.hub_model_id is not None,
        "hub_task": hub_task(facts),
        "pipeline_usage": pipeline_usage(facts, model_id),
        "usage": usage(facts, model_id),
        "dataset": escape_markdown(data_title(facts)),
        "splits": escape_markdown(public_name(facts.splits)),
        "posts_table": markdown_table([("Split", "Posts"), *facts.num_posts.items()]),
        "recipe_table": markdown_table([("Setting", "Value"), *recipe]) if recipe else None,
        "hardware": escape_markdown(facts.hardware or ""),
        "duration": None if facts.seconds is None else timedelta(seconds=round(facts.seconds)),
        "versions": ", ".join(f"{name} {number}" for name, number in facts.versions.items()),
        "results": {split: results_table(scores, label_names) for split, scores in facts.results.items()},
        "commonest": {split: commonest(scores, label_names) for split, scores in facts.results.items()},
    }


def lacks(config: PretrainedConfig) -> str:
    """What one of the paper's ablations leaves out; nothing, if it is none."""
    if config.modality != "both":
        return "the text" if config.modality == "image" else "the picture"
    is_there = {
        "CLIP features": config.clip_mode != "none",
        "cross-attention": config.use_cross_attention,
        "the gate": config.use_gating,
    }
    return " and ".join(part for part, there in is_there.items() if not there)


def listed(words: Sequence[str]) -> str:
    """Words as a sentence lists them: "negative, neutral or positive"."""
    return " or ".join([", ".join(words[:-1]), *words[-1:]] if len(words) > 1 else words)


def commonest(scores: Mapping[str, Any], label_names: Sequence[str] | None) -> tuple[str, str] | None:
    """The commonest class of the posts that were scored, and its share of them: what always answering it scores."""
    supports = [row["support"] for row in scores.get("per_class", {}).values()]
    if not supports or not label_names:
        return None
    return escape_markdown(label_names[supports.index(max(supports))]), f"{max(supports) / sum(supports):.4f}"


def readable(name: str, value: Any) -> str:
    """The value of a setting as a person would write it."""
    if name == "warmup_steps" and 0 < value < 1:
        return f"{value:.0%} of all steps"
    if name == "max_grad_norm" and not value:
        return "off"
    if name == "optim" and str(value).startswith("adamw"):
        return f"AdamW ({value})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return np.format_float_positional(value, trim="-") if isinstance(value, float) else public_name(str(value))


def parts(facts: RunFacts) -> list[tuple[str, Any]]:
    """Rows of the table of the model's parts and switches, without those that its mode ignores."""
    config, both = facts.config, facts.config.modality == "both"
    encoders = {
        "text": None if config.modality == "image" else config.text_config,
        "vision": None if config.modality == "text" else config.vision_config,
        "clip": config.clip_config if both and config.clip_mode == "encoder" else None,
    }
    rows: list[tuple[str, Any]] = [("Part", "Setting")]
    if facts.base_models.get("model"):
        rows.append(("Started from", public_name(facts.base_models["model"])))
    for part, encoder in encoders.items():
        if encoder is not None:
            built, name = architecture(encoder), facts.base_models.get(part)
            rows.append((PARTS[part], f"{public_name(name)} ({built})" if name else built))
    if facts.num_parameters:
        rows.append(("Parameters", f"{facts.num_parameters / 1e6:.1f} million"))
    if facts.max_tokens and config.modality != "image":
        rows.append(("max_length", f"{facts.max_tokens} tokens"))
    switches = ["modality", "hidden_size", "dropout"]
    if both:
        switches += ["clip_mode", "use_cross_attention", "use_gating"]
        switches += ["num_attention_heads"] if config.use_cross_attention else []
        switches += ["projection_dim", "contrastive_loss_weight"] if config.clip_mode == "feature" else []
    return [*rows, *((name, readable(name, getattr(config, name))) for name in switches)]


def architecture(config: PretrainedConfig) -> str:
    """A backbone in words: "roberta, 12 layers, width 768"."""
    if config.model_type == "timm_wrapper":
        return f"{config.architecture} of timm"
    if config.model_type == "clip":
        towers = {"text": config.text_config, "picture": config.vision_config}
        return "; ".join(f"{side}: {architecture(tower).partition(', ')[2]}" for side, tower in towers.items())
    sizes = {words: getattr(config, name, None) for name, words in SIZES.items()}
    told = [
        words.format("-".join(map(str, s)) if isinstance(s, (list, tuple)) else s) for words, s in sizes.items() if s
    ]
    return ", ".join([config.model_type, *told])


def pipeline_usage(facts: RunFacts, model_id: str) -> str:
    """Python code for a reader to copy: the short way."""
    read = POST if facts.config.modality == "both" else {facts.config.modality: POST[facts.config.modality]}
    post = ", ".join(f'"{name}": {value}' for name, value in read.items())
    return f"""from transformers import pipeline

name = {json.dumps(model_id, ensure_ascii=False)}
sentiment = pipeline("image-text-sentiment", model=name, trust_remote_code=True)
print(sentiment({{{post}}}))"""


def usage(facts: RunFacts, model_id: str) -> str:
    """Python code for a reader to copy: the same step by step."""
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


def data_title(facts: RunFacts) -> str:
    """What the data is called, whatever its folder is."""
    return DATA_TITLES.get(facts.data_kind) or public_name(facts.dataset_name)


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
