"""The model card as the Hub parses it, as a reader sees it, and its code as Python runs it."""

import ast
import re
from pathlib import Path

import commands
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers import TimmWrapperConfig, TrainerState, TrainingArguments

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data.sample import make_tiny_backbones
from clipcacg.scripts.reporting.model_card import FACTS_FILE, REQUIREMENTS, TIMM, rename_card, write_model_card
from clipcacg.scripts.reporting.plots import CONFUSION_MATRIX_FILE, CURVES_FILE
from clipcacg.scripts.reporting.run_facts import (
    RunFacts,
    hardware_name,
    how_it_ended,
    library_versions,
    training_recipe,
)

SCORES = {
    "accuracy": 0.75,
    "f1": 2 / 3,
    "f1_macro": 0.5,
    "per_class": {
        name: {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": support}
        for name, support in (("negative", 1), ("neutral", 2), ("positive", 5))
    },
}
REGRESSION = {"num_labels": 1, "problem_type": "regression"}
MULTI_LABEL = {"problem_type": "multi_label_classification"}


def facts(config: dict | None = None, **changes: object) -> RunFacts:
    """Facts of a run on MVSA-Single, with changes."""
    fields = {
        "config": ClipCaCgConfig(**(config or {})),
        "data_kind": "mvsa-single",
        "dataset_name": "MVSA_Single",
        "splits": "clmlf",
        "num_posts": {"train": 3611, "validation": 450},
        "base_models": {"text": "FacebookAI/roberta-base", "clip": None},
        "training": {"learning_rate": 1e-4},
        "test": SCORES,
    }
    return RunFacts(**{**fields, **changes})


def read(folder: Path, run: RunFacts) -> ModelCard:
    """Write a card and load it as the Hub does."""
    return ModelCard.load(write_model_card(folder, run))


def usage(card: ModelCard) -> list[str]:
    """The card's two code blocks: the pipeline, and the same step by step."""
    return re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)


def flat(card: ModelCard) -> str:
    """The text in one line, because lines can break anywhere."""
    return " ".join(card.text.split())


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


def test_what_was_not_measured_does_not_appear(tmp_path: Path) -> None:
    card = read(tmp_path, facts(test=None))
    assert not any(word in card.content for word in ("model-index", "model_name", "metrics"))
    assert "This run was not evaluated." in card.text
    for word in ("Accuracy |", "### ", "Training time", "Hardware", ".png", "None", "test split"):
        assert word not in card.text.partition("## Limits")[0], word


def test_calibration_appears_if_it_was_measured(tmp_path: Path) -> None:
    assert "calibration of the probabilities was not measured" in flat(read(tmp_path, facts()))
    errors = {"ece": 0.2, "ece_adaptive": 0.19, "brier": 0.5, "nll": 1.1, "bins": []}
    after = {**errors, "ece": 0.05}
    measured = {**SCORES, "calibration": {"temperature": 1.75, "before": errors, "after": after}}
    text = flat(read(tmp_path, facts({"temperature": 1.75}, test=measured, validation=measured)))
    assert (
        "## Calibration" in text
        and "divided by 1.75 " in text
        and "calibration of the probabilities was not" not in text
    )
    assert re.search(r"\| test +\| 1 +\| 0.2000 +\| 0.1900", text) and re.search(r"\| test +\| 1.75 +\| 0.0500", text)
    assert "fitted on the validation posts" in text and ".png" not in text
    same = {**SCORES, "calibration": {"temperature": 1.0, "before": errors, "after": errors}}
    text = flat(read(tmp_path, facts(test=same)))
    assert "the temperature is 1." in text and "fitted on" not in text and len(re.findall(r"\| test +\|", text)) == 1


def test_plots_appear_if_they_exist(tmp_path: Path) -> None:
    for name in (CONFUSION_MATRIX_FILE, CURVES_FILE):
        (tmp_path / name).touch()
    text = read(tmp_path, facts()).text
    assert f"({CURVES_FILE})" in text
    text = read(tmp_path, facts(validation=SCORES)).text
    under = text.partition(f"![Confusion matrix of the test split]({CONFUSION_MATRIX_FILE})")[0]
    assert "### Test split" in under and "### Validation split" not in under


@pytest.mark.parametrize(
    "kind, there, absent",
    [
        (
            "mvsa-single",
            ["One annotator labeled", "2016"],
            ["demonstration", "majority of the three", "42", "%"],
        ),
        ("mvsa-multiple", ["majority of the three", "Three annotators"], ["demonstration", "CLMLF", "%"]),
        ("sample", ["**This model is a demonstration.**", "drawn", "never seen"], ["niu2016", "tweets", "annotator"]),
        ("other", ["gives each post one of the labels above"], ["demonstration", "tweets", "niu2016"]),
    ],
)
def test_data_and_limits(tmp_path: Path, kind: str, there: list[str], absent: list[str]) -> None:
    text = flat(read(tmp_path, facts(data_kind=kind, splits="random")))
    assert all(words in text for words in there) and not any(words in text for words in absent)
    assert "predicts its sentiment: negative, neutral or positive." in text


@pytest.mark.parametrize("kind, title", [("mvsa-single", "MVSA-Single"), ("mvsa-multiple", "MVSA-Multiple")])
def test_data_has_its_name_and_not_that_of_its_folder(tmp_path: Path, kind: str, title: str) -> None:
    card = read(tmp_path, facts(data_kind=kind, dataset_name="/data/mvsa_of_jane"))
    assert f"{title} (Niu et al." in card.text and card.data.eval_results[0].dataset_name == title
    assert "mvsa_of_jane" not in card.content


def test_splits(tmp_path: Path) -> None:
    leaks, kept = "42 are also training texts", "in the same split"
    text = flat(read(tmp_path, facts()))
    assert "Splits: clmlf, as published with CLMLF" in text and leaks in text and kept not in text
    settings = {"group_duplicates": True, "max_eval_samples": 128}
    card = read(tmp_path, facts(split_settings=settings))
    text = flat(card)
    assert leaks not in text and text.count(kept) == 2 and "Scores are on at most 128 posts per split" in text
    assert card.data.eval_results[0].dataset_args == {"splits": "clmlf", **settings}
    assert "Training used" not in text


def test_chosen_epoch_and_the_warning_about_its_scores(tmp_path: Path) -> None:
    log = [{"step": 10 * epoch, "epoch": float(epoch), "eval_loss": 1.0} for epoch in (1, 2, 3)]
    state = TrainerState(epoch=3.0, global_step=30, best_global_step=20, log_history=[*log, {"step": 20, "loss": 1.0}])
    settings = {"output_dir": str(tmp_path), "eval_strategy": "epoch", "save_strategy": "epoch", "report_to": "none"}
    best = TrainingArguments(**settings, load_best_model_at_end=True, metric_for_best_model="f1")
    ended = how_it_ended(best, state)
    assert ended == {"epochs": 3.0, "chosen_epoch": 2.0, "chosen_by": "Weighted F1"}
    assert how_it_ended(TrainingArguments(**settings), state) == {"epochs": 3.0}
    text = flat(read(tmp_path, facts(**ended, validation=SCORES)))
    assert (
        "took 3 epochs. The weights are those after epoch 2, the best on the validation split by Weighted F1." in text
    )
    assert "epoch was chosen on these posts" in text.partition("### Validation")[2]
    text = flat(read(tmp_path, facts(**ended, validation=SCORES, test=None)))
    assert "No test split was evaluated. Settings and the epoch are chosen" in text and "those of the test" not in text
    one = TrainerState(epoch=1.0, global_step=10, best_global_step=10, log_history=log[:1])
    assert how_it_ended(best, one) == {"epochs": 1.0}, "with one evaluation there is no choice"
    assert "took 1 epoch. The weights are those after the last epoch." in flat(read(tmp_path, facts(epochs=1.0)))


def test_accuracy_of_the_most_frequent_label(tmp_path: Path) -> None:
    text = flat(read(tmp_path, facts()))
    assert 'always predicting "positive", the most frequent label, has an accuracy of 0.6250' in text


def test_parts_and_their_sizes(tmp_path: Path) -> None:
    feature = {"clip_mode": "feature", "clip_config": None}
    card = read(tmp_path, facts(feature, num_parameters=31_900_000, max_tokens=128))
    assert "| FacebookAI/roberta-base (roberta, 12 layers, width 768) |" in card.text and "| 31.9 million" in card.text
    assert "resnet, 3-4-6-3 blocks, widths 256-512-1024-2048" in card.text and "truncated after 128 tokens" in flat(
        card
    )
    assert "| contrastive_loss_weight |" in card.text and "contains no weights of CLIP" in flat(card)
    text = read(tmp_path, facts()).text
    assert "text: 12 layers, width 512; image: 12 layers, width 768" in text and "contrastive" not in text


def test_requirements(tmp_path: Path) -> None:
    timm = facts({"vision_config": TimmWrapperConfig(architecture="resnet18")})
    for run, needs_timm in ((facts(), False), (timm, True)):
        card = read(tmp_path, run)
        told = re.findall(r'"(\S+)"', re.search("pip install (.*)", card.text)[1])
        assert told == [*REQUIREMENTS, *([TIMM] if needs_timm else [])]
        assert ("timm" in library_versions(run.config)) == needs_timm
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert all(f'    "{name}",\n' in project for name in REQUIREMENTS) and f'timm = ["{TIMM}"]' in project


def test_unknown_data_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="'mvsa'"):
        facts(data_kind="mvsa")


def test_no_paths_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    local = tmp_path / "jane" / "tiny-text"
    local.mkdir(parents=True)
    # The first one looks like a repository on the Hub, but is a folder.
    base_models = {"text": "jane/tiny-text", "vision": "../jane/tiny-vision", "clip": r"C:\jane\tiny-clip"}
    run = facts(base_models=base_models, data_kind="other", dataset_name=str(local), splits=f"{tmp_path}/mine.json")
    card = read(tmp_path / "model", run)
    assert all(f"| {name} (" in card.text for name in ("tiny-text", "tiny-vision", "tiny-clip"))
    assert card.data.base_model is None and card.data.datasets is None and "Splits: mine.json." in card.text
    for text in (card.content, (tmp_path / "model" / FACTS_FILE).read_text()):
        assert "jane" not in text and str(tmp_path) not in text


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
    assert r": \<i\>up\|down\</i\>, \_no\_ or so_so: #1." in flat(card) and "<i>" not in card.text
    assert all('name = "my `model` [1]"' in code for code in usage(card))


@pytest.mark.parametrize(
    "config, words",
    [
        ({}, "(IJACSA 15(2), 2024)."),
        ({"clip_mode": "none", "use_gating": False}, ", without CLIP features and the gate: an ablation."),
        ({"modality": "image"}, ", without the text: an ablation."),
        ({}, "a sequence, not one vector: the product of the image and text embeddings"),
    ],
)
def test_variant(tmp_path: Path, config: dict, words: str) -> None:
    assert words in flat(read(tmp_path, facts(config)))


def test_recipe_and_hardware(tmp_path: Path) -> None:
    settings = {"learning_rate": 0.00002, "warmup_steps": 0.1, "max_grad_norm": 0.0, "seed": 7}
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)
    recipe = training_recipe(args)
    assert recipe["learning_rate"] == 0.00002 and recipe["lr_scheduler_type"] == "linear" and "max_steps" not in recipe
    card = read(tmp_path, facts(training=recipe, seconds=3723.4, hardware=hardware_name(args)))
    rows = dict(re.findall(r"^\| (\w+) +\| (.*?) +\|$", card.text, re.MULTILINE))
    told = {"num_train_epochs": "3", "learning_rate": "0.00002", "warmup_steps": "10% of all steps"}
    assert rows.items() >= {**told, "max_grad_norm": "off", "optim": "AdamW (adamw_torch_fused)"}.items()
    assert rows["use_gating"] == "yes" and "bf16" not in rows and "one run with seed 7." in flat(card)
    text = flat(card)
    assert "Training time: 1:02:03 (h:mm:ss), including evaluations." in text
    assert re.search(r"Hardware: CPU with \d+ cores, 1 process\.", text)
    assert all(f"{name} " in text for name in ("transformers", "torchvision", "pillow"))
    assert "since the run was last resumed" in flat(read(tmp_path, facts(seconds=60, resumed=True)))


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_backbones(tmp_path_factory.mktemp("card") / "backbones")


def checkpoint(folder: Path, backbones: Path, **config: object) -> ModelCard:
    """A tiny checkpoint with its card, and an image beside it."""
    parts = {"text_model": backbones / "text", "vision_model": backbones / "vision"}
    model = ClipCaCgForSequenceClassification.from_backbones(**parts, clip_mode="feature", hidden_size=32, **config)
    model.save_pretrained(folder)
    ClipCaCgProcessor.from_backbones(**parts).save_pretrained(folder)
    Image.new("RGB", (80, 60), "orange").save(folder.parent / "post.jpg")
    return read(folder, RunFacts(model.config, "sample", "drawn sample", "random", {"train": 1}))


@pytest.mark.parametrize("config", [{"modality": "text"}, {"modality": "image"}, REGRESSION, MULTI_LABEL])
def test_usage_of_variants(
    tmp_path: Path, backbones: Path, config: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short, long = usage(checkpoint(tmp_path / "model", backbones, **config))
    monkeypatch.chdir(tmp_path)
    exec(short, {})
    labelled = ast.literal_eval(capsys.readouterr().out)
    exec(long, {})
    answer = ast.literal_eval(capsys.readouterr().out)
    scores = {entry["label"]: pytest.approx(entry["score"], abs=1e-5) for entry in labelled}
    if config is REGRESSION:
        assert answer == {"value": labelled[0]["score"]}
    elif config is MULTI_LABEL:
        assert answer == {
            "labels": [name for name, score in answer["scores"].items() if score >= 0.5],
            "scores": scores,
        }
    else:
        assert answer == {"label": labelled[0]["label"], "scores": scores}
    for code, image, text in ((short, '"image"', '"text"'), (long, "Image", "text=")):
        assert (image in code) == (config != {"modality": "text"})
        assert (text in code) == (config != {"modality": "image"})


def test_usage_in_a_fresh_process(tmp_path: Path, backbones: Path) -> None:
    code = "".join(usage(checkpoint(tmp_path / "model", backbones)))
    output = commands.run(["-c", code], tmp_path).stdout
    labelled, answer = map(ast.literal_eval, output.splitlines())
    assert answer["label"] == labelled[0]["label"]
    assert list(answer["scores"]) == ["negative", "neutral", "positive"]
    assert sum(answer["scores"].values()) == pytest.approx(1)


def test_a_renamed_card_is_the_one_that_training_would_have_written(tmp_path: Path) -> None:
    fields = {"validation": SCORES, "training": {"learning_rate": 1e-4, "warmup_steps": 0.1}, "seconds": 1.5}
    folder, run = tmp_path / "my_[model]", facts(**fields)
    text = read(folder, run).text
    assert r"# my\_\[model\]" in text and "model's folder" in text
    run.config.save_pretrained(folder)
    for name in ("user/1.0", "user/__x__"):
        assert rename_card(folder, name)
        renamed = ModelCard.load(folder / "README.md")
        assert renamed.content == read(tmp_path / "other", facts(hub_model_id=name, **fields)).content
        assert renamed.data.model_name == name.split("/")[1] and renamed.text.count(f'name = "{name}"') == 2
        assert "[model" not in renamed.content and "model's folder" not in renamed.content


def test_an_edited_card_stays(tmp_path: Path) -> None:
    run = facts()
    card = write_model_card(tmp_path, run)
    run.config.save_pretrained(tmp_path)
    card.write_text(card.read_text() + "\nA sentence of mine.\n")
    edited = card.read_bytes()
    assert not rename_card(tmp_path, "user/name") and card.read_bytes() == edited
    (tmp_path / FACTS_FILE).unlink()
    assert not rename_card(tmp_path, "user/name") and card.read_bytes() == edited
