"""The model card of a run: `model_card_template.md`, a Jinja template, filled with `RunFacts`.

A card contains only what was measured, and no path of this machine.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined
from transformers import PretrainedConfig

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.scripts.data.errors import as_input_error
from clipcacg.scripts.reporting.plots import CONFUSION_MATRIX_FILE, COVERAGE_FILE, CURVES_FILE, RELIABILITY_FILE
from clipcacg.scripts.reporting.run_facts import RunFacts, is_hub_id, uses_timm
from clipcacg.scripts.reporting.tables import (
    SCORES,
    calibration_tables,
    escape_markdown,
    markdown_table,
    results_table,
)

CARD_FILE, FACTS_FILE = "README.md", "run_facts.json"
TEMPLATE = Path(__file__).with_name("model_card_template.md")
DATA_TITLES = {"mvsa-single": "MVSA-Single", "mvsa-multiple": "MVSA-Multiple", "sample": "the drawn sample"}
# What loading a checkpoint needs, and timm if the vision encoder comes from it.
REQUIREMENTS = ("torch>=2.8", "torchvision>=0.23", "transformers>=5.20", "pillow>=11")
TIMM = "timm>=1.0"
ENCODERS = {"text": "Text encoder", "vision": "Vision encoder", "clip": "CLIP"}
SIZES = {
    "num_hidden_layers": "{} layers",
    "depths": "{} blocks",
    "hidden_size": "width {}",
    "hidden_sizes": "widths {}",
}


def write_model_card(folder: str | Path, facts: RunFacts) -> Path:
    """Write the model card of a run as README.md into its checkpoint folder, and its facts beside it.

    Overwrites earlier files. The card shows the plots that are in the folder.

    Args:
        folder: The checkpoint folder.
        facts: Facts about the run.

    Returns:
        Path of the card.
    """
    card = Path(folder).absolute() / CARD_FILE
    content = render_card(card.parent, facts).encode()
    card.parent.mkdir(parents=True, exist_ok=True)
    card.write_bytes(content)
    record = {"card_sha256": hashlib.sha256(content).hexdigest(), **facts.to_dict()}
    (card.parent / FACTS_FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return card


def rename_card(folder: Path, repo_id: str) -> bool:
    """Write the model card again with the model's name on the Hub, unless somebody has edited it.

    Args:
        folder: The checkpoint folder.
        repo_id: "user/name".

    Returns:
        Whether the card was written. False: it is not the one that `write_model_card` wrote, and stays as it is.

    Raises:
        InputError: If `run_facts.json` or `config.json` cannot be read, or the card cannot be written.
    """
    if not (folder / FACTS_FILE).is_file():
        return False
    hint = f"Delete {folder / FACTS_FILE} to push {CARD_FILE} as it is, because it cannot be written from these facts"
    with as_input_error(hint, OSError, TypeError, ValueError, KeyError):
        record = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        if hashlib.sha256((folder / CARD_FILE).read_bytes()).hexdigest() != record.pop("card_sha256"):
            return False
        facts = RunFacts(config=ClipCaCgConfig.from_pretrained(folder), **record)
    with as_input_error(f"{folder / CARD_FILE} cannot be written", OSError):
        write_model_card(folder, replace(facts, hub_model_id=repo_id))
    return True


def render_card(folder: Path, facts: RunFacts) -> str:
    """The text of the model card."""
    # Markdown, not HTML: names that come from outside are escaped by `escape_markdown`.
    environment = Environment(  # noqa: S701
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    model_id = facts.hub_model_id or folder.name
    plots = {"confusion_matrix": CONFUSION_MATRIX_FILE, "curves": CURVES_FILE}
    plots |= {"reliability": RELIABILITY_FILE, "coverage": COVERAGE_FILE}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=card_data(facts, model_id).to_yaml(),
        **template_values(facts, model_id),
        **{name: file if (folder / file).is_file() else None for name, file in plots.items()},
    )


def card_data(facts: RunFacts, model_id: str) -> ModelCardData:
    """The YAML front matter of the card, which the Hub searches and lists."""
    results = eval_results(facts)
    return ModelCardData(
        language=None if facts.data_kind == "other" else "en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag=hub_task(facts),
        tags=["image-text-sentiment", "sentiment-analysis", "multimodal", facts.config.model_type, "custom_code"],
        base_model=[name for name in facts.base_models.values() if is_hub_id(name)] or None,
        datasets=[facts.dataset_name] if is_hub_dataset(facts.dataset_name) else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=model_id.split("/")[-1] if results else None,  # belongs to the model-index, which needs results
        eval_results=results or None,
    )


def hub_task(facts: RunFacts) -> str:
    """The Hub's task that is closest to what the model does.

    Source: our choice, because the Hub has no task for classifying an image and a text together. text-classification
        is the task of AutoModelForSequenceClassification; image-text-to-text means a model that generates text.
    """
    return "image-classification" if facts.config.modality == "image" else "text-classification"


def eval_results(facts: RunFacts) -> list[EvalResult]:
    """Every overall score that was measured, by split, for the `model-index` of the front matter."""
    name = data_title(facts)
    return [
        EvalResult(
            task_type=hub_task(facts),
            task_name="Image-text sentiment",
            dataset_type=name if is_hub_dataset(name) else re.sub(r"\W+", "-", name.lower()).strip("-"),
            dataset_name=name,
            dataset_split=split,
            dataset_args={"splits": facts.splits, **facts.split_settings},
            metric_type=score.partition("_")[0],  # the Hub knows one f1; the title says which mean it is
            metric_name=title,
            metric_value=round(float(scores[score]), 4),
        )
        for split, scores in facts.results.items()
        for score, title in SCORES.items()
        if scores.get(score) is not None
    ]


def template_values(facts: RunFacts, model_id: str) -> dict[str, Any]:
    """Values of the template's variables. Names that come from outside are escaped."""
    recipe = [(name, readable(name, value)) for name, value in facts.training.items()]
    names = facts.label_names
    return {
        "facts": facts,
        "config": facts.config,
        "kind": facts.data_kind,
        "task": facts.config.task,
        "title": escape_markdown(model_id.split("/")[-1]),
        "name": json.dumps(model_id, ensure_ascii=False),
        "without": left_out(facts.config),
        "labels": [escape_markdown(name) for name in names],
        "parts_table": markdown_table([("Part", "Setting"), *parts(facts)]),
        "requirements": [*REQUIREMENTS, *([TIMM] if uses_timm(facts.config) else [])],
        "hub_task": hub_task(facts),
        "dataset": escape_markdown(data_title(facts)),
        "splits": escape_markdown(facts.splits),
        "posts_table": markdown_table([("Split", "Posts"), *facts.num_posts.items()]),
        "recipe_table": markdown_table([("Setting", "Value"), *recipe]) if recipe else None,
        "hardware": escape_markdown(facts.hardware or ""),
        "duration": None if facts.seconds is None else timedelta(seconds=round(facts.seconds)),
        "versions": ", ".join(f"{name} {number}" for name, number in facts.versions.items()),
        "results": {split: results_table(scores, names or None) for split, scores in facts.results.items()},
        "majority": {split: majority(scores, names) for split, scores in facts.results.items()},
        "calibration_tables": calibration_tables(facts.results),
        "thresholds": [f"{value:.2f}" for value in facts.config.label_thresholds or ()],
    }


def left_out(config: PretrainedConfig) -> str:
    """What the model leaves out of the paper's, as an ablation; "" if nothing."""
    if config.modality != "both":
        return "the text" if config.modality == "image" else "the image"
    has = {
        "CLIP features": config.clip_mode != "none",
        "cross-attention": config.use_cross_attention,
        "the gate": config.use_gating,
    }
    return " and ".join(part for part, present in has.items() if not present)


def majority(scores: Mapping[str, Any], label_names: Sequence[str]) -> tuple[str, str] | None:
    """The most frequent label of the posts that were scored and its share: the accuracy of always predicting it."""
    supports = [row["support"] for row in scores.get("per_class", {}).values()]
    if "accuracy" not in scores or not supports or not label_names:
        return None
    return escape_markdown(label_names[supports.index(max(supports))]), f"{max(supports) / sum(supports):.4f}"


def readable(name: str, value: Any) -> str:
    """The value of a setting in words."""
    if name == "warmup_steps" and 0 < value < 1:
        return f"{value:.0%} of all steps"
    if name == "max_grad_norm" and not value:
        return "off"
    if name == "optim" and str(value).startswith("adamw"):
        return f"AdamW ({value})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return np.format_float_positional(value, trim="-") if isinstance(value, float) else str(value)


def parts(facts: RunFacts) -> list[tuple[str, Any]]:
    """Rows of the table of the model's encoders and settings, without settings that its mode ignores."""
    config, both, rows = facts.config, facts.config.modality == "both", []
    if source := facts.base_models.get("model"):
        rows.append(("Started from", source.removeprefix("./")))
    for part in config.encoders:
        built, name = architecture(getattr(config, f"{part}_config")), facts.base_models.get(part)
        rows.append((ENCODERS[part], f"{name.removeprefix('./')} ({built})" if name else built))
    if facts.num_parameters:
        rows.append(("Parameters", f"{facts.num_parameters / 1e6:.1f} million"))
    if facts.max_tokens and "text" in config.encoders:
        rows.append(("max_length", f"{facts.max_tokens} tokens"))
    settings = ["modality", "hidden_size", "dropout"]
    if both:
        settings += ["clip_mode", "use_cross_attention", "use_gating"]
        settings += ["num_attention_heads"] if config.use_cross_attention else []
        settings += ["projection_dim", "contrastive_loss_weight"] if config.clip_mode == "feature" else []
        settings += ["modality_loss_weight", "modality_combination"] if config.use_modality_heads else []
        settings += ["modality_dropout"] if config.modality_dropout else []
    return [*rows, *((name, readable(name, getattr(config, name))) for name in settings)]


def architecture(config: PretrainedConfig) -> str:
    """An encoder in words: "roberta, 12 layers, width 768"."""
    if config.model_type == "timm_wrapper":
        return f"{config.architecture} of timm"
    if config.model_type == "clip":
        towers = {"text": config.text_config, "image": config.vision_config}
        return "; ".join(f"{side}: {architecture(tower).partition(', ')[2]}" for side, tower in towers.items())
    sizes = {words: getattr(config, name, None) for name, words in SIZES.items()}
    words = [
        words.format("-".join(map(str, s)) if isinstance(s, (list, tuple)) else s) for words, s in sizes.items() if s
    ]
    return ", ".join([config.model_type, *words])


def data_title(facts: RunFacts) -> str:
    """The name of the data, independent of its folder."""
    return DATA_TITLES.get(facts.data_kind) or facts.dataset_name.removeprefix("./")


def is_hub_dataset(name: str) -> bool:
    """Whether data is on the Hub. A name without a slash is a title, not a repository."""
    return "/" in name and is_hub_id(name)
