"""Training, from the command line to what it leaves behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clipcacg.scripts import predict
from clipcacg.scripts.data.loading import DataArguments, load_posts
from clipcacg.scripts.training import run as train

SCRIPTS = Path(__file__).parents[2] / "scripts"
CODE = {f"{part}_clipcacg.py" for part in ("configuration", "modeling", "pipeline", "processing")}
FAST = "--hidden_size 32 --num_attention_heads 4 --train_sampling_strategy group_by_length".split()


def flags(posts: Path, backbones: Path, output: Path, *more: str) -> list[str]:
    """The sample's config on a small data set of the same kind, two epochs."""
    names = {part: str(backbones / part) for part in ("text", "vision", "clip")}
    return [
        str(SCRIPTS / "configs" / "sample.yaml"), "--data_dir", str(posts), "--output_dir", str(output),
        "--text_model", names["text"], "--vision_model", names["vision"], "--clip_model", names["clip"],
        "--num_train_epochs", "2", "--overwrite_output_dir", "False", "--disable_tqdm", "True", *FAST, *more,
    ]  # fmt: skip


def launch(script: str, arguments: list[str], *options: str) -> list[str]:
    """The command line of a script under `accelerate launch`."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *options]
    return [*launcher, str(SCRIPTS / script), *arguments]


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "all_results.json").read_text())


@pytest.fixture(scope="module")
def trained(posts_folder: Path, backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that the script, launched for real, left behind."""
    output = tmp_path_factory.mktemp("trained") / "model"
    command = launch("train.py", flags(posts_folder, backbones, output))
    subprocess.run(command, check=True, cwd=output.parent, capture_output=True, text=True)
    return output


def test_a_run_leaves_scores_predictions_pictures_and_a_whole_checkpoint(trained: Path) -> None:
    scores = results(trained)
    for prefix in ("eval", "test"):
        assert {f"{prefix}_{name}" for name in ("accuracy", "f1", "f1_macro", "per_class", "confusion_matrix")} <= set(
            scores
        )
    lines = [json.loads(line) for line in (trained / "predictions.jsonl").read_text().splitlines()]
    posts = sum(map(sum, scores["test_confusion_matrix"]))
    assert len(lines) == posts and set(lines[0]["probabilities"]) == {"negative", "neutral", "positive"}
    names = {path.name for path in trained.iterdir()}
    assert CODE | {"model.safetensors", "config.json", "processor_config.json", "README.md"} <= names
    assert {"confusion_matrix.png", "training_curves.png", "clip_tokenizer"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in names)
    state = json.loads((trained / "trainer_state.json").read_text())
    assert state["log_history"] and (trained / state["best_model_checkpoint"]).is_dir()
    assert str(trained.parent) not in (trained / "trainer_state.json").read_text()


def card(folder: Path) -> str:
    """A model card in one line."""
    return " ".join((folder / "README.md").read_text().split())


def test_the_card_tells_which_weights_were_kept(trained: Path) -> None:
    state = json.loads((trained / "trainer_state.json").read_text())
    scores = {e["epoch"]: e["eval_accuracy"] for e in state["log_history"] if "eval_accuracy" in e}
    best = max(scores, key=scores.get)  # the first of equals, as the Trainer chooses
    assert f'went through 2 epochs. The weights are those after epoch {best:g}, the best by "Accuracy"' in card(
        trained
    )
    assert "**This model is a demonstration.**" in card(trained) and "MVSA" not in card(trained)
    assert "random 8:1:1 (seed 42)" in card(trained) and "cut after 128 tokens" in card(trained)
    assert re.search(r"\| Parameters +\| 0\.\d million", (trained / "README.md").read_text())


def test_the_card_tells_what_was_frozen(tmp_path: Path) -> None:
    frozen = ["--freeze_vision", "--freeze_text_layers", "3", "--output_dir", str(tmp_path)]
    for more, layers in (([], "embeddings and the first 3"), (["--freeze_text"], None)):
        model_arguments, _, arguments = train.parse_arguments([*frozen, *more])
        told = train.recipe(arguments, model_arguments, 0.0)
        assert "vision" in told["frozen_backbones"] and told.get("frozen_text_layers") == layers


def test_how_the_data_was_split(tmp_path: Path, posts_folder: Path) -> None:
    def name(**arguments: Any) -> str:
        data = DataArguments(**arguments, max_train_samples=9)
        return train.split_name(data, load_posts(data))

    rows = [{"text": f"a day {number}", "image": f"{number}.png", "label": number % 2} for number in range(60)]
    for folder, splits in (("all", ["train", "dev", "test"]), ("two", ["train", "test"]), ("one", ["train"])):
        (tmp_path / folder).mkdir()
        for number, split in enumerate(splits):
            datasets.Dataset.from_list(rows[number::3]).to_csv(tmp_path / folder / f"{split}.csv")
    assert name(dataset_name=str(tmp_path / "all"), splits="clmlf") == "those of the data set"
    carved = "those of the data set, with a random ninth of its training posts for validation (seed 3)"
    assert name(dataset_name=str(tmp_path / "two"), split_seed=3) == carved
    assert name(dataset_name=str(tmp_path / "one")) == "random 8:1:1 (seed 42)"
    assert name(data_dir=str(posts_folder), split_seed=3) == "random 8:1:1 (seed 3)"
    (tmp_path / "mine.json").write_text(json.dumps({"train": ["1", "2"], "test": ["3"]}))
    assert name(data_dir=str(posts_folder), splits=f"{tmp_path}/mine.json") == f"{tmp_path}/mine.json"


def test_settings_of_the_split_that_were_heeded() -> None:
    asked = {"group_duplicates": True, "max_eval_samples": 5}
    assert train.split_settings(DataArguments(data_dir="x", **asked)) == asked
    assert train.split_settings(DataArguments(dataset_name="x", **asked)) == {"max_eval_samples": 5}
    assert train.split_settings(DataArguments()) == {}


def test_predictions_stand_beside_the_ids_of_their_posts(trained: Path, posts_folder: Path, tmp_path: Path) -> None:
    predict.main([str(trained), "--input", str(posts_folder), "--output", str(tmp_path / "all.jsonl")])
    everything = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    by_id = {line["id"]: line["probabilities"] for line in everything}
    for line in map(json.loads, (trained / "predictions.jsonl").read_text().splitlines()):
        assert line["probabilities"] == pytest.approx(by_id[line["id"]], abs=1e-5)


def test_evaluation_of_the_checkpoint_repeats_the_test_scores(trained: Path, posts_folder: Path) -> None:
    arguments = [str(trained), "--data_dir", str(posts_folder), "--splits", "random", "--output", "scores/found.json"]
    command = [sys.executable, str(SCRIPTS / "evaluate_checkpoint.py"), *arguments]
    done = subprocess.run(command, check=True, cwd=trained.parent, capture_output=True, text=True)
    found = json.loads((trained.parent / "scores/found.json").read_text())
    expected = results(trained)
    for name in ("accuracy", "f1", "f1_macro", "confusion_matrix"):
        assert found[name] == expected[f"test_{name}"]
    assert "Weighted F1" in done.stdout and (trained.parent / "scores/found.png").is_file()


def test_a_killed_run_goes_on_to_the_very_same_result(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    steps = ["--save_strategy", "steps", "--save_steps", "3", "--eval_strategy", "steps", "--eval_steps", "3"]
    command = {
        name: launch("train.py", flags(posts_folder, backbones, tmp_path / name, *steps, "--save_total_limit", "9"))
        for name in ("whole", "killed")
    }
    subprocess.run(command["whole"], check=True, cwd=tmp_path, capture_output=True)
    process = subprocess.Popen(
        command["killed"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    # The Trainer writes trainer_state.json last.
    while not (tmp_path / "killed/checkpoint-3/trainer_state.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/all_results.json").exists()
    resumed = [*command["killed"], "--resume_from_checkpoint", "True"]
    subprocess.run(resumed, check=True, cwd=tmp_path, capture_output=True)
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    for name in ("eval_accuracy", "eval_loss", "test_accuracy", "test_f1", "test_loss", "test_confusion_matrix"):
        assert results(tmp_path / "whole")[name] == results(tmp_path / "killed")[name]
    assert "its last part" in card(tmp_path / "killed") and "its last part" not in card(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    """To rounding, where nothing depends on the batch of one process: no dropout, BatchNorm or contrastive loss."""
    shutil.copytree(backbones, tmp_path / "backbones")
    config = json.loads((tmp_path / "backbones/text/config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tmp_path / "backbones/text/config.json").write_text(json.dumps(config))
    more = ["--dropout", "0", "--freeze_vision", "--clip_mode", "feature", "--contrastive_loss_weight", "0"]
    # Grouping by length goes by the batch of one process; 12 posts to validate fill three batches of 2 x 2.
    more += ["--train_sampling_strategy", "random", "--per_device_eval_batch_size", "2"]
    for processes, size in ((1, 16), (2, 8)):
        batch = ["--per_device_train_batch_size", str(size), "--max_train_samples", "80"]
        arguments = flags(posts_folder, tmp_path / "backbones", tmp_path / str(processes), *more, *batch)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command = [*torchrun, "--standalone", str(SCRIPTS / "train.py"), *arguments, "--use_cpu"]
        subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    one, two = results(tmp_path / "1"), results(tmp_path / "2")
    for name in ("eval_accuracy", "test_accuracy", "test_f1", "eval_loss", "test_loss"):
        assert one[name] == pytest.approx(two[name], abs=1e-4)


def test_the_yaml_gives_defaults_and_flags_override_them(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("learning_rate: 0.25\nmodality: text\nuse_gating: false\nfreeze_text: true\n")
    model, _, arguments = train.parse_arguments([str(config), "--modality", "image", "--output_dir", str(tmp_path)])
    assert (arguments.learning_rate, model.modality, model.use_gating, model.freeze_text) == (
        0.25,
        "image",
        False,
        True,
    )
    assert train.parse_arguments([])[2].output_dir == "outputs/sample"
    assert train.parse_arguments(["--data_dir", "somewhere"])[2].adam
    config.write_text("learning_rate: 0.5\ntuning: {dropout: [0.1]}\nsystems: {}\n")  # both for reproduce.py
    assert train.parse_arguments([str(config)])[2].learning_rate == 0.5
    config.write_text("learning_rat: 0.25\n")
    with pytest.raises(ValueError, match="learning_rat;"):
        train.parse_arguments([str(config)])


@pytest.mark.parametrize("name", ["mvsa_single", "mvsa_multiple"])
def test_the_mvsa_configs_are_the_papers_recipe(name: str) -> None:
    model, _, arguments = train.parse_arguments([str(SCRIPTS / f"configs/{name}.yaml")])
    assert (model.text_model, model.vision_model) == ("FacebookAI/roberta-base", "microsoft/resnet-50")
    assert (model.clip_model, model.clip_mode, model.dropout) == ("openai/clip-vit-base-patch32", "encoder", 0.3)
    assert (arguments.adam, arguments.learning_rate, arguments.weight_decay) == (True, 1e-4, 1e-5)
    assert (arguments.step_decay_epochs, arguments.num_train_epochs) == (10, 100)
    assert arguments.per_device_train_batch_size == {"mvsa_single": 64, "mvsa_multiple": 128}[name]


def test_the_papers_optimizer_and_schedule(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    more = ["--adam", "--step_decay_epochs", "1", "--backbone_learning_rate", "0.0002", "--freeze_vision"]
    trainer = build_trainer(flags(posts_folder, backbones, tmp_path, *more))
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.Adam
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.0002, 0.001]
    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    vision = trainer.model.backbones()["vision"]
    assert not any(id(p) in in_optimizer for p in vision.parameters())
    assert in_optimizer == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    steps = len(trainer.get_train_dataloader())
    scheduler = trainer.create_scheduler(2 * steps, optimizer)
    for _ in range(steps):
        assert max(scheduler.get_last_lr()) == 0.001
        optimizer.step()
        scheduler.step()
    assert max(scheduler.get_last_lr()) == pytest.approx(0.0001)


def build_trainer(argv: list[str]) -> train.SentimentTrainer:
    model_arguments, data_arguments, arguments = train.parse_arguments(argv)
    posts = load_posts(data_arguments)
    train.adapt_to_data(arguments, posts, model_arguments.modality)
    model, processor = train.build(model_arguments, data_arguments.is_sample, train.label_names(posts))
    train.set_loss(model, arguments, model_arguments, posts["train"])
    return train.make_trainer(arguments, model, processor, posts)


def test_smoothing_and_class_weights_reach_the_models_own_loss(
    posts_folder: Path, backbones: Path, tmp_path: Path
) -> None:
    more = ["--label_smoothing_factor", "0.1", "--class_weights", "balanced"]
    model_arguments, _, arguments = train.parse_arguments(flags(posts_folder, backbones, tmp_path, *more))
    told = train.recipe(arguments, model_arguments, label_smoothing=0.1)
    assert (told["label_smoothing"], told["class_weights"]) == (0.1, "balanced")
    trainer = build_trainer(flags(posts_folder, backbones, tmp_path, *more))
    assert trainer.label_smoother is None and trainer.model.config.label_smoothing == 0.1
    counts = torch.bincount(torch.tensor(trainer.train_dataset["label"]))
    weights = torch.tensor(trainer.model.config.class_weights)
    assert torch.allclose(weights * counts, torch.full((3,), counts.sum() / 3))


def test_an_occupied_output_folder_is_refused(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7/trainer_state.json").write_text("{}")
    with pytest.raises(SystemExit, match="--resume_from_checkpoint True"):
        train.main(flags(posts_folder, backbones, tmp_path))
    assert (tmp_path / "checkpoint-7").is_dir()


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for number, state in ((20, "{}"), (100, '{"epo'), (120, None)):
        (tmp_path / f"checkpoint-{number}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{number}/trainer_state.json").write_text(state)
    assert train.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")


def table_of_pictures(folder: Path, label: Any) -> list[dict[str, Any]]:
    """Forty posts with a red or a blue picture each; `label` is a function of that."""
    rows = []
    for number in range(40):
        colour = ("red", "blue")[number % 2]
        Image.new("RGB", (40, 30), colour).save(folder / f"{number}.png")
        rows.append({"picture": f"{number}.png", "tweet": f"a {colour} day {number}", "mood": label(number % 2)})
    return rows


COLUMNS = ["--image_column", "picture", "--text_column", "tweet", "--label_column", "mood"]


def any_dataset(name: Path, posts: Path, backbones: Path, output: Path, *more: str) -> list[str]:
    arguments = flags(posts, backbones, output, "--dataset_name", str(name), *more)
    where = arguments.index("--data_dir")
    return arguments[:where] + arguments[where + 2 :]


def test_a_csv_with_labels_in_words(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    rows = table_of_pictures(tmp_path, lambda number: ("sad, very", "glad")[number])
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "posts.csv")
    output = tmp_path / "model"
    train.main(any_dataset(tmp_path / "posts.csv", posts_folder, backbones, output, *COLUMNS, "--augment"))
    config = json.loads((output / "config.json").read_text())
    assert config["id2label"] == {"0": "glad", "1": "sad, very"}
    assert results(output)["test_per_class"].keys() == {"glad", "sad, very"}


def test_json_lines_with_floats_are_a_regression(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    rows = table_of_pictures(tmp_path, lambda number: 0.5 - number)
    datasets.Dataset.from_list(rows).to_json(tmp_path / "posts.jsonl")
    output = tmp_path / "model"
    train.main(any_dataset(tmp_path / "posts.jsonl", posts_folder, backbones, output, *COLUMNS))
    config = json.loads((output / "config.json").read_text())
    assert config["problem_type"] == "regression" and results(output)["test_mse"] < 1
    assert "value" in json.loads((output / "predictions.jsonl").read_text().splitlines()[0])


def test_an_imagefolder_with_metadata(tmp_path: Path) -> None:
    for split, size in (("train", 30), ("test", 10)):
        folder = tmp_path / split
        folder.mkdir()
        rows = table_of_pictures(folder, int)[:size]
        rows = [{"file_name": row["picture"], "text": row["tweet"], "label": row["mood"]} for row in rows]
        datasets.Dataset.from_list(rows).to_json(folder / "metadata.jsonl")
    posts = load_posts(DataArguments(dataset_name=str(tmp_path)))
    assert {split: len(dataset) for split, dataset in posts.items()} == {"train": 26, "test": 10, "validation": 4}
    assert posts["train"].features["label"].names == ["0", "1"]


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    datasets.Dataset.from_list(table_of_pictures(tmp_path, int)).to_csv(tmp_path / "posts.csv")
    with pytest.raises(ValueError, match="no column label, text, image; it has picture, tweet, mood"):
        load_posts(DataArguments(dataset_name=str(tmp_path / "posts.csv")))


def test_no_validation_split_keeps_the_last_epoch(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    ids = [path.stem for path in (posts_folder / "data").glob("*.txt")]
    (tmp_path / "split.json").write_text(json.dumps({"train": ids[:60], "test": ids[60:90]}))
    more = ["--splits", str(tmp_path / "split.json"), "--modality", "image", "--max_train_samples", "20"]
    train.main(flags(posts_folder, backbones, tmp_path / "model", *more))
    scores = results(tmp_path / "model")
    assert "test_accuracy" in scores and "eval_accuracy" not in scores
    assert json.loads((tmp_path / "model/config.json").read_text())["modality"] == "image"


def test_training_goes_on_from_a_checkpoint_of_ours(
    trained: Path, posts_folder: Path, backbones: Path, tmp_path: Path
) -> None:
    # Frozen, or training would move its BatchNorm statistics at any learning rate.
    more = ["--model_name_or_path", str(trained), "--learning_rate", "0", "--num_train_epochs", "1", "--freeze_vision"]
    train.main(flags(posts_folder, backbones, tmp_path / "model", *more))
    assert results(tmp_path / "model")["test_confusion_matrix"] == results(trained)["test_confusion_matrix"]


def test_splits_by_other_names_and_data_in_one_piece(tmp_path: Path) -> None:
    rows = table_of_pictures(tmp_path, lambda number: bool(number))
    columns = {"image_column": "picture", "text_column": "tweet", "label_column": "mood"}
    for split, part in (("train", rows[:20]), ("dev", rows[20:30]), ("test", rows[30:])):
        (tmp_path / "three").mkdir(exist_ok=True)
        named = [{**row, "picture": f"../{row['picture']}"} for row in part]
        datasets.Dataset.from_list(named).to_csv(tmp_path / "three" / f"{split}.csv")
    posts = load_posts(DataArguments(dataset_name=str(tmp_path / "three"), **columns))
    assert {split: len(dataset) for split, dataset in posts.items()} == {"train": 20, "validation": 10, "test": 10}
    assert all(Path(value["path"]).is_file() for value in posts["test"]["image"])
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "whole.csv")
    posts = load_posts(DataArguments(dataset_name=str(tmp_path / "whole.csv"), splits=None, **columns))
    assert {split: len(dataset) for split, dataset in posts.items()} == {"test": 40}


def test_an_empty_cell_of_a_table_is_an_empty_text(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    texts = ["" if number % 5 == 0 else "so good" for number in range(1, 41)]
    rows = [f"{posts_folder}/data/{number}.jpg,{text},{number % 2}" for number, text in enumerate(texts, start=1)]
    (tmp_path / "posts.csv").write_text("\n".join(["image,text,label", *rows]))
    more = ["--max_steps", "2", "--dataset_name", str(tmp_path / "posts.csv")]
    words = flags(posts_folder, backbones, tmp_path / "model", *more)
    at = words.index("--data_dir")
    train.main(words[:at] + words[at + 2 :])
    assert results(tmp_path / "model")["test_loss"] > 0


@pytest.mark.parametrize(
    ("hidden", "answer"),
    [(["test"], None), (["train"], "train"), (["train", "test"], "train"), (["validation"], "validation")],
)
def test_labels_that_are_kept_back(
    hidden: list[str], answer: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    label = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    for split in ("train", "validation", "test"):
        labels = [-1] * 4 if split in hidden else [0, 1, 0, 1]
        dataset = datasets.Dataset.from_dict({"text": ["so"] * 4, "label": labels}, features=features)
        dataset.to_parquet(tmp_path / f"data/{split}.parquet")
    arguments = DataArguments(dataset_name=str(tmp_path / "data"))
    if answer:
        with pytest.raises(ValueError, match=f"The split {answer} has posts without a label"):
            load_posts(arguments, "text")
    else:
        assert set(load_posts(arguments, "text")) == {"train", "validation"}
        assert "the labels of the split test are kept back" in caplog.text


def test_the_last_posts_are_never_dropped() -> None:
    with pytest.raises(ValueError, match="--dataloader_drop_last would drop posts from evaluation and test"):
        train.parse_arguments(["--dataloader_drop_last"])


def test_data_without_a_training_split_is_told(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test.csv").write_text("text,label\nso good,1\nso bad,0\n")
    with pytest.raises(SystemExit, match="There is no training split: the posts of .*data are for testing"):
        train.main(f"--dataset_name {tmp_path}/data --modality text --output_dir {tmp_path}/out".split())


@pytest.mark.slow
def test_two_processes_write_one_evaluation(trained: Path, posts_folder: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(SCRIPTS / "evaluate_checkpoint.py"), str(trained), "--data_dir", str(posts_folder)]
    command = [*torchrun, *script, "--output", str(tmp_path / "two.json")]
    done = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.count("Weighted F1") == 1
    subprocess.run([sys.executable, *script, "--output", "one.json"], check=True, cwd=tmp_path, capture_output=True)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert two["confusion_matrix"] == one["confusion_matrix"] and two["posts"] == one["posts"]
