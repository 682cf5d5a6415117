"""Training, from the command line to the files of a finished run."""

import json
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import commands
import datasets
import pytest
import torch
from inputs import SCRIPTS, flags, results, table_of_images
from safetensors.torch import load_file
from transformers import pipeline

from clipcacg.scripts import evaluate_checkpoint, predict, train
from clipcacg.scripts.data.loading import DataArguments, load_posts
from clipcacg.scripts.training import record, run
from clipcacg.scripts.training.arguments import parse_arguments

CODE = {f"{part}_clipcacg.py" for part in ("configuration", "modeling", "pipeline", "processing")}
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


@pytest.fixture(scope="module")
def trained(posts_folder: Path, backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that the command wrote, run as a module from an empty folder."""
    output = tmp_path_factory.mktemp("trained") / "model"
    commands.run(["-m", "clipcacg.scripts.train", *flags(posts_folder, backbones, output)], output.parent)
    return output


def test_a_run_leaves_scores_predictions_plots_and_a_complete_checkpoint(trained: Path) -> None:
    scores = results(trained)
    measured = {"accuracy", "f1", "f1_macro", "per_class", "confusion_matrix"}
    assert {f"{prefix}_{name}" for prefix in ("eval", "test") for name in measured} <= set(scores)
    lines = [json.loads(line) for line in (trained / "predictions.jsonl").read_text().splitlines()]
    posts = sum(map(sum, scores["test_confusion_matrix"]))
    assert not (trained / "skipped_results.json").exists()  # no row was left out
    assert len(lines) == posts and set(lines[0]["probabilities"]) == {"negative", "neutral", "positive"}
    names = {path.name for path in trained.iterdir()}
    assert CODE | {"model.safetensors", "config.json", "processor_config.json", "README.md"} <= names
    assert {"confusion_matrix.png", "training_curves.png", "clip_tokenizer"} <= names
    assert {"reliability.png", "coverage.png"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in names)
    state = json.loads((trained / "trainer_state.json").read_text())
    assert state["log_history"] and (trained / state["best_model_checkpoint"]).is_dir()
    assert str(trained.parent) not in (trained / "trainer_state.json").read_text()


def card(folder: Path) -> str:
    """A model card in one line."""
    return " ".join((folder / "README.md").read_text().split())


def test_the_card_states_which_weights_were_kept(trained: Path) -> None:
    state = json.loads((trained / "trainer_state.json").read_text())
    scores = {e["epoch"]: e["eval_accuracy"] for e in state["log_history"] if "eval_accuracy" in e}
    best = max(scores, key=scores.get)  # the first of equals, as the Trainer chooses
    assert re.search(
        rf"2 epochs\..* after epoch {best:g}, the best on the validation split by Accuracy", card(trained)
    )
    assert "**This model is a demonstration.**" in card(trained) and "MVSA" not in card(trained)
    assert "random 8:1:1 (seed 42)" in card(trained) and "128 tokens" in card(trained)
    assert re.search(r"\| Parameters +\| 0\.\d million", (trained / "README.md").read_text())


def test_the_card_states_the_flags_of_ours(tmp_path: Path) -> None:
    frozen = ["--freeze_vision", "--freeze_text_layers", "3", "--class_weights", "balanced"]
    for more, layers in (([], "embeddings and the first 3"), (["--freeze_text"], None)):
        model_arguments, _, arguments = parse_arguments([*frozen, *more, "--output_dir", str(tmp_path)])
        told = record.recipe(arguments, model_arguments, label_smoothing=0.1)
        assert "vision" in told["frozen_backbones"] and told.get("frozen_text_layers") == layers
        assert (told["label_smoothing"], told["class_weights"]) == (0.1, "balanced")


def test_how_the_data_was_split(tmp_path: Path, posts_folder: Path) -> None:
    def name(**arguments: Any) -> str:
        data = DataArguments(**arguments, max_train_samples=9)
        return record.split_name(data, load_posts(data))

    image = str(posts_folder / "data/1.jpg")
    rows = [{"text": f"a day {number}", "image": image, "label": number % 2} for number in range(60)]
    for folder, splits in (("all", ["train", "dev", "test"]), ("two", ["train", "test"]), ("one", ["train"])):
        (tmp_path / folder).mkdir()
        for number, split in enumerate(splits):
            datasets.Dataset.from_list(rows[number::3]).to_csv(tmp_path / folder / f"{split}.csv")
    (tmp_path / "parquet").mkdir()
    for split in ("train", "dev", "test"):
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "parquet" / f"{split}.parquet")
    for folder in ("all", "parquet"):
        for streaming in (False, True):
            found = name(dataset_name=str(tmp_path / folder), streaming=streaming)
            assert found == "those of the data set", (folder, streaming)
    carved = "those of the data set, with a random ninth of its training posts for validation (seed 3)"
    assert name(dataset_name=str(tmp_path / "two"), split_seed=3) == carved
    assert name(dataset_name=str(tmp_path / "one")) == "random 8:1:1 (seed 42)"
    assert name(data_dir=str(posts_folder), split_seed=3) == "random 8:1:1 (seed 3)"
    (tmp_path / "mine.json").write_text(json.dumps({"train": ["1", "2"], "test": ["3"]}))
    assert name(data_dir=str(posts_folder), splits=f"{tmp_path}/mine.json") == f"{tmp_path}/mine.json"
    asked = {"group_duplicates": True, "max_eval_samples": 5}
    assert record.split_settings(DataArguments(data_dir="x", **asked)) == asked
    assert record.split_settings(DataArguments()) == {}


def test_each_prediction_has_the_id_of_its_post(trained: Path, posts_folder: Path, tmp_path: Path) -> None:
    predict.main([str(trained), "--input", str(posts_folder), "--output", str(tmp_path / "all.jsonl")])
    everything = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    by_id = {line["id"]: line["probabilities"] for line in everything}
    for line in map(json.loads, (trained / "predictions.jsonl").read_text().splitlines()):
        assert line["probabilities"] == pytest.approx(by_id[line["id"]], abs=1e-5)


def test_evaluation_of_the_checkpoint_repeats_the_test_scores(trained: Path, posts_folder: Path) -> None:
    arguments = [str(trained), "--data_dir", str(posts_folder), "--splits", "random", "--output", "scores/found.json"]
    done = commands.run([SCRIPTS / "evaluate_checkpoint.py", *arguments], trained.parent)
    found = json.loads((trained.parent / "scores/found.json").read_text())
    expected = results(trained)
    for name in ("accuracy", "f1", "f1_macro", "confusion_matrix"):
        assert found[name] == expected[f"test_{name}"]
    assert "Weighted F1" in done.stdout and (trained.parent / "scores/found.png").is_file()


@pytest.mark.slow
def test_a_run_with_modality_heads(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    """From the command to the pipeline, which all predict with the average."""
    heads = ["--use_modality_heads", "--use_conflicting_posts", "--modality_combination", "average"]
    train.main(flags(posts_folder, backbones, tmp_path / "model", *heads, "--max_steps", "4", "--save_steps", "4"))
    assert json.loads((tmp_path / "model/config.json").read_text())["modality_combination"] == "average"
    told = card(tmp_path / "model")
    assert "mean of the classifier's and of those that the label rule makes" in told
    assert re.search(r"train, modality heads only \| +[1-9]", told) and "modality_combination | average" in told
    data = ["--data_dir", str(posts_folder), "--splits", "random", "--use_conflicting_posts"]
    evaluate_checkpoint.main([str(tmp_path / "model"), *data, "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["confusion_matrix"] == results(tmp_path / "model")["test_confusion_matrix"]
    predict.main([str(tmp_path / "model"), "--input", str(posts_folder), "--output", str(tmp_path / "all.jsonl")])
    by_id = {line["id"]: line for line in map(json.loads, (tmp_path / "all.jsonl").read_text().splitlines())}
    line = json.loads((tmp_path / "model/predictions.jsonl").read_text().splitlines()[0])
    assert by_id[line["id"]]["probabilities"] == pytest.approx(line["probabilities"], abs=1e-5)
    text = (posts_folder / f"data/{line['id']}.txt").read_text().rstrip()
    post = {"image": f"{posts_folder}/data/{line['id']}.jpg", "text": text}
    answer = pipeline("image-text-sentiment", model=str(tmp_path / "model"), trust_remote_code=True)(post)
    scores = {entry["label"]: entry["score"] for entry in answer}
    assert scores == pytest.approx(line["probabilities"], abs=1e-4)


def test_a_run_with_modality_dropout(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    """From the flag to posts that lack a side, which evaluation and the pipeline answer alike."""
    train.main(flags(posts_folder, backbones, tmp_path / "model", "--modality_dropout", "0.3", "--max_steps", "4"))
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["modality_dropout"] == 0.3
    data = [str(tmp_path / "model"), "--data_dir", str(posts_folder), "--splits", "random"]
    found = {}
    for side in (None, "image", "text"):
        withheld = ["--withhold", side] if side else []
        evaluate_checkpoint.main([*data, *withheld, "--output", str(tmp_path / "found.json")])
        found[side] = json.loads((tmp_path / "found.json").read_text())
        assert found[side]["withheld"] == side
    assert found[None]["confusion_matrix"] == results(tmp_path / "model")["test_confusion_matrix"]

    sentiment = pipeline("image-text-sentiment", model=str(tmp_path / "model"), trust_remote_code=True)
    image = str(posts_folder / "data/1.jpg")
    rows = [{"text": "so good"}, {"image": image, "text": ""}, {"text": " "}, {"image": image, "text": "so good"}]
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps({"image": None, **row}) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="1 of 4 posts could not be read"):
        predict.main([data[0], "--input", str(tmp_path / "posts.jsonl"), "--output", str(tmp_path / "out.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert "no image and no text" in lines.pop(2)["error"]
    for line, row in zip(lines, [*rows[:2], rows[3]], strict=True):
        scores = {entry["label"]: entry["score"] for entry in sentiment(row)}
        assert line["probabilities"] == pytest.approx(scores, abs=1e-5)

    posts = load_posts(DataArguments(data_dir=str(posts_folder)))["test"]
    for side, kept in (("image", "text"), ("text", "image")):
        values = posts["text"][:] if kept == "text" else [image["path"] for image in posts["image"]]
        answers = [best["label"] for (best,) in sentiment([{kept: value} for value in values], top_k=1)]
        predicted = Counter(answers)
        matrix = found[side]["confusion_matrix"]
        names = config["label2id"]
        assert {
            name: sum(row[index] for row in matrix) for name, index in names.items() if predicted[name]
        } == predicted


def test_training_on_a_table_with_empty_cells(
    posts_folder: Path, backbones: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Posts without an image are bad rows, unless the model learns to do without one."""
    rows = [f"{posts_folder}/data/{n}.jpg,so good,{n % 2}" for n in range(1, 41)]
    rows[3], rows[4] = ",so good,1", f"{posts_folder}/data/5.jpg,,0"
    (tmp_path / "posts.csv").write_text("\n".join(["image,text,label", *rows]))
    few = ["--max_steps", "2", "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "False"]
    command = partial(with_dataset, tmp_path / "posts.csv", posts_folder, backbones)
    with pytest.raises(SystemExit, match="row 4 of .*posts.csv: it has no image"):
        train.main(command(tmp_path / "refused", *few))
    train.main(command(tmp_path / "model", *few, "--modality_dropout", "0.1"))
    assert results(tmp_path / "model")["test_loss"] > 0
    check = [str(tmp_path / "model"), "--dataset_name", str(tmp_path / "posts.csv"), "--output"]
    evaluate_checkpoint.main([*check, str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    kinds = found["by_kind"]
    assert {kind: scores["posts"] for kind, scores in kinds.items()} == {
        "complete": 38, "image only": 1, "text only": 1
    }  # fmt: skip
    right = sum(scores["posts"] * scores["accuracy"] for scores in kinds.values())
    assert right == pytest.approx(40 * found["accuracy"])
    printed = capsys.readouterr().out
    assert re.search(r"\| Kind +\| Posts +\| Accuracy", printed) and re.search(r"\| image only +\| 1 ", printed)
    rows[3] = ",,1"
    (tmp_path / "posts.csv").write_text("\n".join(["image,text,label", *rows]))
    with pytest.raises(SystemExit, match="row 4 of .*posts.csv: it has no image"):
        train.main(command(tmp_path / "refused", *few, "--modality_dropout", "0.1"))


def test_evaluation_withholds_nothing_that_a_model_needs(checkpoint: Path, posts_folder: Path) -> None:
    with pytest.raises(SystemExit, match="--withhold text is for models trained with --modality_dropout"):
        evaluate_checkpoint.main([str(checkpoint), "--data_dir", str(posts_folder), "--withhold", "text"])


def test_evaluation_refuses_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    for output, said in ((tmp_path, "is a folder"), (tmp_path / "taken/scores.json", "cannot be written: ")):
        with pytest.raises(SystemExit, match=f"--output {output} {said}"):
            evaluate_checkpoint.main(["a checkpoint that is not read", "--output", str(output)])


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_result(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    steps = ["--save_strategy", "steps", "--save_steps", "3", "--eval_strategy", "steps", "--eval_steps", "3"]
    command = {}
    for name in ("whole", "killed"):
        arguments = flags(posts_folder, backbones, tmp_path / name, *steps, "--save_total_limit", "9")
        command[name] = [SCRIPTS / "train.py", *arguments]
    commands.run(command["whole"], tmp_path)
    # The Trainer writes trainer_state.json last.
    commands.run_killed(command["killed"], tmp_path, (tmp_path / "killed/checkpoint-3/trainer_state.json").exists)
    assert not (tmp_path / "killed/all_results.json").exists()
    commands.run([*command["killed"], "--resume_from_checkpoint", "True"], tmp_path)
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    for name in ("eval_accuracy", "eval_loss", "test_accuracy", "test_f1", "test_loss", "test_confusion_matrix"):
        assert results(tmp_path / "whole")[name] == results(tmp_path / "killed")[name]
    assert "was last resumed" in card(tmp_path / "killed") and "last resumed" not in card(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    """Up to rounding, where nothing depends on the batch of one process: no dropout, BatchNorm or contrastive loss."""
    shutil.copytree(backbones, tmp_path / "backbones")
    config = json.loads((tmp_path / "backbones/text/config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tmp_path / "backbones/text/config.json").write_text(json.dumps(config))
    more = ["--dropout", "0", "--freeze_vision", "--clip_mode", "feature", "--contrastive_loss_weight", "0"]
    more += ["--average_checkpoints", "2"]
    # Grouping by length depends on the batch of one process; 12 validation posts fill three batches of 2 x 2.
    more += ["--train_sampling_strategy", "random", "--per_device_eval_batch_size", "2"]
    for processes, size in ((1, 16), (2, 8)):
        batch = ["--per_device_train_batch_size", str(size), "--max_train_samples", "80", "--use_cpu"]
        arguments = flags(posts_folder, tmp_path / "backbones", tmp_path / str(processes), *more, *batch)
        command = [*TORCHRUN, str(processes), str(SCRIPTS / "train.py"), *arguments]
        subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    one, two = results(tmp_path / "1"), results(tmp_path / "2")
    for name in ("eval_accuracy", "test_accuracy", "test_f1", "eval_loss", "test_loss"):
        assert one[name] == pytest.approx(two[name], abs=1e-4)


@pytest.mark.slow
def test_two_processes_write_one_evaluation(trained: Path, posts_folder: Path, tmp_path: Path) -> None:
    script = [str(SCRIPTS / "evaluate_checkpoint.py"), str(trained), "--data_dir", str(posts_folder), "--output"]
    command = [*TORCHRUN, "2", *script, "two.json"]
    done = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.count("Weighted F1") == 1
    subprocess.run([sys.executable, *script, "one.json"], check=True, cwd=tmp_path, capture_output=True)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert two["confusion_matrix"] == one["confusion_matrix"] and two["posts"] == one["posts"]


def test_an_occupied_output_folder_is_refused(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7/trainer_state.json").write_text("{}")
    with pytest.raises(SystemExit, match="--resume_from_checkpoint True"):
        train.main(flags(posts_folder, backbones, tmp_path))
    assert (tmp_path / "checkpoint-7").is_dir()


def test_an_incomplete_checkpoint_is_skipped(tmp_path: Path) -> None:
    for number, state in ((20, "{}"), (100, '{"epo'), (120, None)):
        (tmp_path / f"checkpoint-{number}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{number}/trainer_state.json").write_text(state)
    assert run.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")


def with_dataset(name: Path, posts: Path, backbones: Path, output: Path, *more: str) -> list[str]:
    """The flags with `--dataset_name` in place of `--data_dir`."""
    arguments = flags(posts, backbones, output, "--dataset_name", str(name), *more)
    where = arguments.index("--data_dir")
    return arguments[:where] + arguments[where + 2 :]


COLUMNS = ["--image_column", "photo", "--text_column", "tweet", "--label_column", "mood"]


def test_a_csv_with_labels_in_words(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    rows = table_of_images(tmp_path, lambda number: ("sad, very", "glad")[number])
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "posts.csv")
    output = tmp_path / "model"
    train.main(with_dataset(tmp_path / "posts.csv", posts_folder, backbones, output, *COLUMNS, "--augment"))
    config = json.loads((output / "config.json").read_text())
    assert config["id2label"] == {"0": "glad", "1": "sad, very"}
    assert results(output)["test_per_class"].keys() == {"glad", "sad, very"}


def test_json_lines_with_floats_are_a_regression(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    rows = table_of_images(tmp_path, lambda number: 0.5 - number)
    datasets.Dataset.from_list(rows).to_json(tmp_path / "posts.jsonl")
    output = tmp_path / "model"
    train.main(with_dataset(tmp_path / "posts.jsonl", posts_folder, backbones, output, *COLUMNS))
    config = json.loads((output / "config.json").read_text())
    assert config["problem_type"] == "regression" and results(output)["test_mse"] < 1
    assert "value" in json.loads((output / "predictions.jsonl").read_text().splitlines()[0])


def test_without_a_validation_split_the_last_epoch_is_kept(
    posts_folder: Path, backbones: Path, tmp_path: Path
) -> None:
    ids = [path.stem for path in (posts_folder / "data").glob("*.txt")]
    (tmp_path / "split.json").write_text(json.dumps({"train": ids[:60], "test": ids[60:90]}))
    more = ["--splits", str(tmp_path / "split.json"), "--modality", "image", "--max_train_samples", "20"]
    more += ["--train_sampling_strategy", "random"]
    train.main(flags(posts_folder, backbones, tmp_path / "model", *more))
    scores = results(tmp_path / "model")
    assert "test_accuracy" in scores and "eval_accuracy" not in scores
    assert json.loads((tmp_path / "model/config.json").read_text())["modality"] == "image"
    assert scores["test_calibration"]["temperature"] == 1
    with pytest.raises(SystemExit, match="--wanted_accuracy needs a validation split"):
        train.main(flags(posts_folder, backbones, tmp_path / "other", *more, "--wanted_accuracy", "0.8"))


def test_training_starts_from_a_checkpoint(trained: Path, posts_folder: Path, tmp_path: Path) -> None:
    # Frozen, or training would move its BatchNorm statistics at any learning rate.
    more = ["--model_name_or_path", str(trained), "--learning_rate", "0", "--num_train_epochs", "1", "--freeze_vision"]
    train.main(flags(posts_folder, None, tmp_path / "model", *more))
    assert results(tmp_path / "model")["test_confusion_matrix"] == results(trained)["test_confusion_matrix"]


def test_an_empty_cell_of_a_table_is_an_empty_text(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    texts = ["" if number % 5 == 0 else "so good" for number in range(1, 41)]
    rows = [f"{posts_folder}/data/{number}.jpg,{text},{number % 2}" for number, text in enumerate(texts, start=1)]
    (tmp_path / "posts.csv").write_text("\n".join(["image,text,label", *rows]))
    output = tmp_path / "model"
    train.main(with_dataset(tmp_path / "posts.csv", posts_folder, backbones, output, "--max_steps", "2"))
    assert results(output)["test_loss"] > 0


def test_data_without_a_training_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test.csv").write_text("text,label\nso good,1\nso bad,0\n")
    with pytest.raises(SystemExit, match="There is no training split: the split train is missing in .*data"):
        train.main(f"--dataset_name {tmp_path}/data --modality text --output_dir {tmp_path}/out".split())


def test_splits_without_training_posts_are_named(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps({"test": ["1", "2"]}))
    more = ["--splits", str(tmp_path / "mine.json")]
    with pytest.raises(SystemExit, match=rf"train is missing in {posts_folder} with --splits \S+/mine.json"):
        train.main(flags(posts_folder, backbones, tmp_path / "model", *more))


def test_posts_of_one_class_are_refused(tmp_path: Path) -> None:
    rows = "".join(f"so good {number},happy\n" for number in range(20))
    (tmp_path / "posts.csv").write_text(f"text,label\n{rows}")
    with pytest.raises(SystemExit, match="at least two classes, .* the label of all 20 posts is happy"):
        train.main(f"--dataset_name {tmp_path}/posts.csv --modality text --output_dir {tmp_path}/out".split())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_used_again() -> None:
    def page_faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(10_000_000)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    run.keep_freed_memory()
    page_faults()  # the blocks are new
    assert page_faults() < 10_000, "each tensor of 40 MB has that many pages"
