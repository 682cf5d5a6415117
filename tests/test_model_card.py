"""The card as the Hub's own parser, a reader and a reader's Python see it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers import TrainingArguments

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from make_sample import make_tiny_backbones
from model_card import RunFacts, hardware_name, training_recipe, write_model_card
from report import CONFUSION_MATRIX_FILE, CURVES_FILE

SCORES = {
    "accuracy": 0.75,
    "f1": 2 / 3,
    "f1_macro": 0.5,
    "per_class": {
        name: {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 1}
        for name in ("negative", "neutral", "positive")
    },
}
REGRESSION = {"num_labels": 1, "problem_type": "regression"}


def facts(config: dict | None = None, **changes: object) -> RunFacts:
    """Facts of a run on MVSA-Single with what a test needs changed."""
    fields = {
        "config": ClipCaCgConfig(**(config or {})),
        "data_kind": "mvsa-single",
        "dataset_name": "MVSA-Single",
        "splits": "clmlf",
        "num_posts": {"train": 3611, "validation": 450},
        "base_models": {"Text encoder": "FacebookAI/roberta-base", "CLIP": None},
        "training": {"learning_rate": 1e-4},
        "test": SCORES,
    }
    return RunFacts(**{**fields, **changes})


def read(folder: Path, run: RunFacts) -> ModelCard:
    """Write a card and load it as the Hub does."""
    return ModelCard.load(write_model_card(folder, run))


def usage(card: ModelCard) -> str:
    return re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]


def test_front_matter(tmp_path: Path) -> None:
    card = read(tmp_path, facts(hub_model_id="user/moods", validation={"accuracy": 0.8}))
    data = card.data
    assert (data.license, data.library_name) == ("apache-2.0", "transformers")
    assert data.pipeline_tag == data.eval_results[0].task_type == "text-classification"
    assert "image-text-sentiment" in data.tags and data.base_model == ["FacebookAI/roberta-base"]
    assert (data.model_name, data.language, data.metrics) == ("moods", "en", ["accuracy", "f1"])
    results = {(result.dataset_split, result.metric_name): result.metric_value for result in data.eval_results}
    assert results == {
        ("test", "Accuracy"): 0.75,
        ("test", "Weighted F1"): 0.6667,
        ("test", "Macro F1"): 0.5,
        ("validation", "Accuracy"): 0.8,
    }
    assert {result.dataset_type for result in data.eval_results} == {"mvsa-single"}
    assert str(card) == (tmp_path / "README.md").read_text(), "the card does not survive being loaded"


def test_nothing_unmeasured(tmp_path: Path) -> None:
    card = read(tmp_path, facts(test=None))
    assert not any(word in card.content for word in ("model-index", "model_name", "metrics"))
    assert "Nothing was measured" in card.text
    for word in ("Accuracy |", "### ", "Training time", "Hardware", ".png", "None", "test split"):
        assert word not in card.text.partition("## Limits")[0], word


def test_pictures_appear_if_they_exist(tmp_path: Path) -> None:
    for name in (CONFUSION_MATRIX_FILE, CURVES_FILE):
        (tmp_path / name).touch()
    text = read(tmp_path, facts()).text
    assert f"![Confusion matrix of the test split]({CONFUSION_MATRIX_FILE})" in text and f"({CURVES_FILE})" in text


@pytest.mark.parametrize(
    "kind, there, absent",
    [
        ("mvsa-single", ["one annotator", "2016", "CLMLF"], ["demonstration", "majority of the three"]),
        ("mvsa-multiple", ["majority of the three", "66 %"], ["demonstration", "CLMLF"]),
        ("sample", ["**This model is a demonstration.**", "drawn", "never seen"], ["niu2016", "tweets", "annotator"]),
        ("other", ["these labels: negative, neutral, positive"], ["demonstration", "tweets", "niu2016"]),
    ],
)
def test_data_and_limits(tmp_path: Path, kind: str, there: list[str], absent: list[str]) -> None:
    text = read(tmp_path, facts(data_kind=kind, splits="random")).text
    assert all(words in text for words in there) and not any(words in text for words in absent)


def test_unknown_data_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="'mvsa'"):
        facts(data_kind="mvsa")


def test_no_paths_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    local = tmp_path / "jane" / "tiny-text"
    local.mkdir(parents=True)
    # The first one looks like a repository on the Hub, but is a folder here.
    base_models = {"Text encoder": "jane/tiny-text", "Vision": "../jane/tiny-vision", "CLIP": r"C:\jane\tiny-clip"}
    run = facts(base_models=base_models, data_kind="other", dataset_name=str(local), splits=f"{tmp_path}/mine.json")
    card = read(tmp_path / "model", run)
    assert all(f"| {name} " in card.text for name in ("tiny-text", "tiny-vision", "tiny-clip"))
    assert card.data.base_model is None and card.data.datasets is None and "Splits: mine.json." in card.text
    assert "jane" not in card.content and str(tmp_path) not in card.content


def test_hub_data(tmp_path: Path) -> None:
    data = read(tmp_path, facts(data_kind="other", dataset_name="user/memes")).data
    assert data.datasets == ["user/memes"] and data.eval_results[0].dataset_type == "user/memes"
    assert data.language is None


def test_strange_names_stay_names(tmp_path: Path) -> None:
    name = '--- "a": {{ b }} | <b>*c*</b>\n---'
    labels = {0: "<i>up|down</i>", 1: "_no_", 2: "so_so: #1"}
    run = facts({"id2label": labels, "label2id": {}}, data_kind="other", dataset_name=name, splits=name)
    card = read(tmp_path / "my `model` [1]", run)
    assert card.data.eval_results[0].dataset_args == {"splits": name.rpartition("/")[2]}
    assert card.data.model_name == "my `model` [1]" and r"# my \`model\` \[1\]" in card.text
    assert r": \<i\>up\|down\</i\>, \_no\_, so_so: #1." in " ".join(card.text.split()) and "<i>" not in card.text
    assert 'name = "my `model` [1]"' in usage(card)


@pytest.mark.parametrize(
    "config, words",
    [
        ({}, "It is CLIP-CA-CG by"),
        ({"clip_mode": "none", "use_gating": False}, "the ablation without CLIP features and the gate of"),
        ({"modality": "image"}, "It is the image-only ablation of CLIP-CA-CG by"),
    ],
)
def test_variant(tmp_path: Path, config: dict, words: str) -> None:
    assert words in read(tmp_path, facts(config)).text


def test_recipe_and_hardware(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), learning_rate=0.002, use_cpu=True, report_to="none")
    recipe = training_recipe(args)
    assert recipe["learning_rate"] == 0.002 and recipe["lr_scheduler_type"] == "linear" and "max_steps" not in recipe
    text = read(tmp_path, facts(training=recipe, seconds=3723.4, hardware=hardware_name(args))).text
    assert "| learning_rate " in text and "| 0.002 " in text
    assert "Training time: 1:02:03" in text and re.search(r"Hardware: CPU with \d+ cores, 1 process\.", text)
    assert "transformers 5." in text


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_backbones(tmp_path_factory.mktemp("card") / "backbones")


def checkpoint(folder: Path, backbones: Path, **config: object) -> ModelCard:
    """A tiny checkpoint with its card, and a picture beside it."""
    parts = {"text_model": backbones / "text", "vision_model": backbones / "vision"}
    model = ClipCaCgForSequenceClassification.from_backbones(**parts, clip_mode="feature", hidden_size=32, **config)
    model.save_pretrained(folder)
    ClipCaCgProcessor.from_backbones(**parts).save_pretrained(folder)
    Image.new("RGB", (80, 60), "orange").save(folder.parent / "post.jpg")
    return read(folder, RunFacts(model.config, "sample", "drawn sample", "random", {"train": 1}))


@pytest.mark.parametrize("config", [{"modality": "text"}, {"modality": "image"}, REGRESSION])
def test_usage_of_variants(
    tmp_path: Path, backbones: Path, config: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = usage(checkpoint(tmp_path / "model", backbones, **config))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    printed = capsys.readouterr().out
    assert printed.startswith("sentiment: ") if config is REGRESSION else printed.count("0.") == 3
    assert ("Image" in code) == (config != {"modality": "text"}) and ("text=" in code) == (
        config != {"modality": "image"}
    )


def test_usage_in_a_fresh_process(tmp_path: Path, backbones: Path) -> None:
    code = usage(checkpoint(tmp_path / "model", backbones))
    command, environment = [sys.executable, "-c", code], {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    output = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    probabilities = dict(line.split(": ") for line in output.splitlines())
    assert list(probabilities) == ["negative", "neutral", "positive"]
    assert sum(map(float, probabilities.values())) == pytest.approx(1, abs=0.002)
