"""Labels are read from their values: what each kind of label column becomes, from loading to prediction."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from mvsa_folder import make_folder
from transformers import pipeline

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.scripts import train
from clipcacg.scripts.data import load_mvsa, load_posts
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.labels import align, check_classes, label_fields, label_names, task_of
from clipcacg.scripts.data.loading import DataArguments
from clipcacg.scripts.evaluate_checkpoint import main as evaluate
from clipcacg.scripts.predict import main as predict
from clipcacg.scripts.training import run
from clipcacg.scripts.training.arguments import parse_arguments
from clipcacg.scripts.training.metrics import best_threshold

TASKS = {
    "regression": "regression", "classes": "single_label_classification", "lists": "multi_label_classification"
}  # fmt: skip
NAN, INF = float("nan"), float("inf")


def write(path: Path, labels: list[Any]) -> str:
    """Write a table of texts and labels, as CSV with the cells that `labels` spells, or as JSON lines."""
    if path.suffix == ".csv":
        cells = ['"{}"'.format(str(label).replace('"', '""')) if "," in str(label) else label for label in labels]
        path.write_text("text,label\n" + "".join(f"a,{cell}\n" for cell in cells), encoding="utf-8")
    else:
        rows = [json.dumps({"text": "a"} | ({} if label is ... else {"label": label})) for label in labels]
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def read(path: str, **more: Any) -> datasets.Dataset:
    return load_posts(DataArguments(dataset_name=path, splits=None, **more), "text")["test"]


@pytest.mark.parametrize(
    ("kind", "labels", "task", "names", "read_as"),
    [
        # Whole numbers are classes, in every way to write them. Floats were a regression before.
        ("csv", [0, 1, 1, 2], "classes", ["0", "1", "2"], [0, 1, 1, 2]),
        ("csv", ["0.0", "1.0", "2.0"], "classes", ["0", "1", "2"], [0, 1, 2]),
        ("jsonl", [0.0, 2, 1.0], "classes", ["0", "1", "2"], [0, 2, 1]),
        ("jsonl", ["0", "2", "1"], "classes", ["0", "1", "2"], [0, 2, 1]),
        ("csv", [-1, 0, 1], "classes", ["-1", "0", "1"], [0, 1, 2]),
        ("csv", [10, 9, 2], "classes", ["2", "9", "10"], [2, 1, 0]),
        ("csv", ["1e0", "2"], "classes", ["1", "2"], [0, 1]),
        # Other numbers are values. Those in quotes were classes before, and whole ones always.
        ("csv", [0.5, 1, 2], "regression", None, [0.5, 1, 2]),
        ("jsonl", [1, 2.0, 0.5], "regression", None, [1, 2, 0.5]),
        ("jsonl", ["0.5", "-1.5"], "regression", None, [0.5, -1.5]),
        ("csv", ["0,5", "-1,5"], "regression", None, [0.5, -1.5]),
        ("csv", list(range(40)), "regression", None, list(range(40))),
        # Words are classes, however they are written. Each spelling was a class before.
        ("csv", ["sad", "happy"], "classes", ["happy", "sad"], [1, 0]),
        ("csv", ["good", "good ", "GOOD", "bad"], "classes", ["bad", "good"], [1, 1, 1, 0]),
        ("jsonl", ["good", " good\t", "Good", "bad"], "classes", ["bad", "good"], [1, 1, 1, 0]),
        ("jsonl", ["very  good", "very good", "bad"], "classes", ["bad", "very good"], [1, 1, 0]),
        ("jsonl", ["caf\u00e9", "cafe\u0301", "bar"], "classes", ["bar", "caf\u00e9"], [1, 1, 0]),
        ("jsonl", ["STRASSE", "stra\u00dfe", "Weg"], "classes", ["Weg", "stra\u00dfe"], [1, 1, 0]),
        ("jsonl", ["\u2639\ufe0f", "\U0001f600", "\u2639"], "classes", ["\u2639", "\U0001f600"], [0, 1, 0]),
        ("jsonl", ["bad\u200b", "good", "\ufeffbad"], "classes", ["bad\u200b", "good"], [0, 1, 0]),
        ("jsonl", ["none", "some"], "classes", ["none", "some"], [0, 1]),
        ("jsonl", ["1 star", "2 stars"], "classes", ["1 star", "2 stars"], [0, 1]),
        ("jsonl", ["infinity", "beyond"], "classes", ["beyond", "infinity"], [1, 0]),
        # True and False keep their names; before, the classes were called 0 and 1.
        ("csv", ["True", "False"], "classes", ["False", "True"], [1, 0]),
        ("csv", ["true", "false"], "classes", ["False", "True"], [1, 0]),
        ("jsonl", [True, False], "classes", ["False", "True"], [1, 0]),
        # Lists are several labels of a post. They ended in a traceback before, and in CSV were words.
        ("jsonl", [["joy", "fun"], [], ["fun"]], "lists", ["fun", "joy"], [[0, 1], [], [0]]),
        ("jsonl", [["Joy"], ["joy ", "joy"], ["fun"]], "lists", ["fun", "joy"], [[1], [1], [0]]),
        ("jsonl", [[0, 10], [2]], "lists", ["0", "2", "10"], [[0, 2], [1]]),
        ("csv", ['["joy", "fun"]', "[]", '["fun"]'], "lists", ["fun", "joy"], [[0, 1], [], [0]]),
        ("csv", ["['joy', 'fun']", "['fun']"], "lists", ["fun", "joy"], [[0, 1], [0]]),
        ("csv", ["['joy' 'fun']", "['fun']"], "lists", ["fun", "joy"], [[0, 1], [0]]),  # as datasets writes a CSV
        ("csv", ["[joy, fun]", "[fun]"], "lists", ["fun", "joy"], [[0, 1], [0]]),
        ("csv", ["[0 2]", "[1]"], "lists", ["0", "1", "2"], [[0, 2], [1]]),
    ],
)
def test_labels_are_read_from_their_values(
    kind: str, labels: list[Any], task: str, names: list[str] | None, read_as: list[Any], tmp_path: Path
) -> None:
    posts = read(write(tmp_path / f"posts.{kind}", labels))
    assert (task_of(posts), label_names(posts), posts["label"][:]) == (TASKS[task], names, read_as)


README = (Path(__file__).parents[2] / "scripts/README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(
    r"^\| (`.*`) \| (.*) \|$", README.partition("| cells of the column |")[2].partition("\n\n")[0], re.M
)


@pytest.mark.parametrize(("cells", "read_as"), EXAMPLES)
def test_the_examples_of_the_readme(cells: str, read_as: str, tmp_path: Path) -> None:
    path = write(tmp_path / "posts.csv", re.findall("`([^`]*)`", cells))
    try:
        posts = read(path)
        kinds = {
            "regression": "values",
            "single_label_classification": "classes",
            "multi_label_classification": "several of",
        }
        found = " ".join([kinds[task_of(posts)], ", ".join(label_names(posts) or [])]).strip()
    except InputError as error:
        found = str(error).splitlines()[-1].strip().replace(f" of {path}", "")
    assert found == read_as


@pytest.mark.parametrize(
    ("kind", "labels", "row", "reason"),
    # Before, these were a regression or a class of their own, or ended in a traceback or in "the loss is nan".
    [
        ("csv", [0, 1, "", 2], 3, "it has no label"),
        ("csv", ["0.5", "nan", "1.5"], 2, "it has no label"),
        ("csv", ["bad", "null", "good"], 2, "it has no label"),
        ("csv", ["bad", "None", "good"], 2, "it has no label"),
        ("csv", ["bad", "  ", "good"], 2, "it has no label"),
        ("csv", ["True", "False", ""], 3, "it has no label"),
        ("jsonl", [1, NAN, 2], 2, "it has no label"),
        ("jsonl", ["bad", NAN, "good"], 2, "it has no label"),
        ("jsonl", ["bad", "good", None], 3, "it has no label"),
        ("jsonl", ["bad", "NaN", "good"], 2, "it has no label"),
        ("jsonl", ["bad", "", "good"], 2, "it has no label"),
        ("jsonl", ["bad", ..., "good"], 2, "it has no label"),
        ("jsonl", [True, None, False], 2, "it has no label"),
        ("jsonl", [["a"], None, ["b"]], 2, "it has no label"),
        ("jsonl", [1.5, INF, 2.5], 2, "its label is inf"),
        ("jsonl", ["bad", "good", 1], 3, "its label 1 is a number, and most labels are words"),
        ("jsonl", [1, 2, "bad"], 3, "its label 'bad' is a word, and most labels are numbers"),
        ("csv", [0, 0, 0, "?"], 4, r"its label '\?' is a word, and most labels are numbers"),
        ("csv", ["0.5", "1.5", "?"], 3, r"its label '\?' is a word, and most labels are numbers"),
        ("jsonl", [1, 2, True], 3, "its label 'True' is a word, and most labels are numbers"),
        ("jsonl", ["bad", {"is": "good"}, "good"], 2, "its label {'is': 'good'} is a dict, and most labels are words"),
        ("jsonl", [["a"], ["b"], "a"], 3, "its label 'a' is a word, and most labels are lists"),
        ("jsonl", [["a", "b"], ["a", None], ["b"]], 2, r"not all of its labels \['a', None\] are words"),
        ("jsonl", [["a", "b"], ["a", 1], ["b"]], 2, r"not all of its labels \['a', 1.0\] are words"),
    ],
)
def test_a_row_without_a_usable_label_is_named_or_left_out(
    kind: str, labels: list[Any], row: int, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = [label for number, label in enumerate(labels, 1) if number != row]
    path = write(tmp_path / f"posts.{kind}", labels + 8 * good)  # at most a tenth of the rows may be bad
    with pytest.raises(InputError, match=f"row {row} of .*: {reason}"):
        read(path)
    posts = read(path, on_error="skip")
    assert len(posts) == 9 * len(good) and f"row {row} of {path}" in caplog.text
    assert posts["label"][:] == 9 * posts["label"][: len(good)]


@pytest.mark.parametrize(
    ("labels", "task", "answer"),
    [
        ([{"is": 1}, {"is": 2}], "auto", "row 1 of .* has the label {'is': 1}. Labels are words, numbers, or lists"),
        ([[["a"]], [["b"]]], "auto", r"row 1 of .* has the label \[\['a'\]\]. Labels are words, numbers, or lists"),
        (["2020-01-01", "2020-01-02"], "auto", "row 1 of .* has the label datetime"),
        ([None, None], "auto", "row 1 of .*: it has no label"),
        ([[0, 1, 1], [1, 0, 0]], "auto", "lists of 0 and 1: give the names of each post's labels instead"),
        (["bad", "good"], "regression", "its label 'bad' is a word, and --task regression needs numbers"),
        ([["a"], ["b"]], "regression", r"its label \['a'\] is a list, and --task regression needs numbers"),
    ],
)
def test_labels_that_no_model_can_learn_are_refused(labels: list[Any], task: str, answer: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=answer):
        read(write(tmp_path / "posts.jsonl", labels), task=task)


def test_a_flag_decides_what_numbers_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    whole, halves = write(tmp_path / "whole.csv", [3, 1, 2]), write(tmp_path / "halves.csv", [0.5, 10, 2])
    assert label_names(read(whole)) == ["1", "2", "3"]
    assert "whole numbers, read as classes: 1, 2, 3. --task regression reads values." in caplog.text
    assert read(whole, task="regression")["label"][:] == [3, 1, 2]
    assert label_names(read(halves)) is None
    assert "are numbers, read as values. --task classification reads classes." in caplog.text
    assert label_names(read(halves, task="classification")) == ["0.5", "2", "10"]
    mixed = write(tmp_path / "mixed.jsonl", ["4+", 1, 2])
    assert label_names(read(mixed, task="classification")) == ["1", "2", "4+"]
    with pytest.raises(InputError, match="--task regression is for --dataset_name alone"):
        DataArguments(data_dir="posts", task="regression")


def test_variants_of_a_class_are_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(write(tmp_path / "posts.csv", ["good", "GOOD", "good ", "good", "bad"]))
    assert "are one class: 'good' (2) = 'good ' (1) = 'GOOD' (1), called 'good'" in caplog.text


def declared(names: list[str], labels: list[Any]) -> datasets.Dataset:
    label: Any = datasets.ClassLabel(names=names)
    label = datasets.List(label) if isinstance(labels[0], list) else label
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    return datasets.Dataset.from_dict({"text": ["a"] * len(labels), "label": labels}, features=features)


@pytest.mark.parametrize(
    ("train", "test", "read_as"), [([0, 1], [0, 1], [1, 0]), ([[0], [1]], [[0, 1], [0]], [[0, 1], [1]])]
)
def test_classes_in_another_order_are_mapped_by_name(
    train: list[Any], test: list[Any], read_as: list[Any], tmp_path: Path
) -> None:
    declared(["bad", "good"], train).to_parquet(tmp_path / "train.parquet")
    declared(["good", "bad"], test).to_parquet(tmp_path / "test.parquet")
    posts = load_posts(DataArguments(dataset_name=str(tmp_path)), "text")
    assert label_names(posts["test"]) == label_names(posts["train"]) == ["bad", "good"]
    assert posts["test"]["label"][:] == read_as
    assert align(posts["test"], ["GOOD", "fair", "Bad "])["label"][:] == [
        sorted(2 - 2 * i for i in label) if isinstance(label, list) else 2 - 2 * label for label in read_as
    ]
    with pytest.raises(InputError, match="The data has the labels good, the model bad, worse"):
        align(posts["test"], ["bad", "worse"])


def test_classes_that_a_split_lacks_are_named(caplog: pytest.LogCaptureFixture) -> None:
    names = ["bad", "fair", "good"]
    posts = datasets.DatasetDict(train=declared(names, [0, 1, 1]), test=declared(names, [0, 2, 2]))
    check_classes(posts)
    assert "The train split has no post of good (2 in test): the model cannot learn it." in caplog.text
    assert "The test split has no post of fair (2 in train): its scores do not cover it." in caplog.text
    with pytest.raises(InputError, match="none of good: leave the flag out, or add posts"):
        run.balanced_weights(posts["train"])
    with pytest.raises(InputError, match="the label of all 2 posts is fair"):
        check_classes(datasets.DatasetDict(train=declared(names, [1, 1])))
    values = datasets.Dataset.from_dict({"label": [0.5, 0.5]})
    with pytest.raises(InputError, match="the label of all 2 posts is 0.5"):
        check_classes(datasets.DatasetDict(train=values))


@pytest.mark.parametrize("header", ["text,image", "image,text", "Image, Text"])
def test_the_header_of_mvsa_names_the_order_of_its_columns(header: str, tmp_path: Path) -> None:
    make_folder(tmp_path / "posts", f"ID\t{header}\n1\tnegative,neutral\n2\tneutral,positive\n", ["1", "2"])
    assert load_mvsa(tmp_path / "posts")["text_label"][0] == (0 if header == "text,image" else 1)
    assert load_mvsa(tmp_path / "posts")["image_label"][1] == (2 if header == "text,image" else 1)


@pytest.mark.parametrize(
    ("labels", "probabilities", "threshold"),
    [
        ([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], 0.25),
        ([0, 1, 1], [0.7, 0.8, 0.9], 0.75),
        ([0, 1, 1], [0.3, 0.8, 0.9], 0.5),
        ([0, 0, 0], [0.3, 0.8, 0.9], 0.5),
        ([1, 1], [0.2, 0.4], 0.1),
    ],
)
def test_the_threshold_with_the_best_f1(labels: list[int], probabilities: list[float], threshold: float) -> None:
    assert best_threshold(np.array(labels), np.array(probabilities)) == pytest.approx(threshold)


def words(table: Path, backbones: Path, output: Path, more: str = "") -> list[str]:
    """Flags of a short run on a table of texts."""
    tiny = f"--modality text --text_model {backbones}/text --vision_model {backbones}/vision --hidden_size 16"
    few = "--num_attention_heads 2 --num_train_epochs 2 --use_cpu --disable_tqdm True --dataloader_num_workers 0"
    return f"--dataset_name {table} --output_dir {output} {tiny} {few} {more}".split()


def save(path: Path, rows: list[tuple[str, Any]]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return path


def test_several_labels_per_post_from_training_to_prediction(
    backbones: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    some: list[list[str]] = [["joy"], ["fun", "joy"], [], ["fun"], ["joy", "rare"]]
    rows = [(f"so {' '.join(labels)} day {number}", labels) for number in range(20) for labels in some]
    table, output = save(tmp_path / "posts.jsonl", rows), tmp_path / "model"
    train.main(words(table, backbones, output, "--learning_rate 0.003"))
    config = ClipCaCgConfig.from_pretrained(output)
    assert config.task == "multi_label_classification" and config.label_names == ["fun", "joy", "rare"]
    thresholds = dict(zip(config.label_names, config.label_thresholds, strict=True))

    found = json.loads((output / "all_results.json").read_text())
    assert 0 <= found["eval_f1_macro"] <= 1 and 0 < found["test_f1_micro"] <= 1
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    hits = {label: 0 for label in thresholds}
    for line in lines:
        assert line["labels"] == [name for name, p in line["probabilities"].items() if p >= thresholds[name]]
        for label in set(line["labels"]) & set(rows[int(line["id"]) - 1][1]):
            hits[label] += 1
    scores = found["test_per_class"]
    assert {name: round(scores[name]["recall"] * scores[name]["support"]) for name in scores} == hits

    # Both read the thresholds from the checkpoint.
    evaluate([str(output), "--dataset_name", str(table), "--output", str(tmp_path / "scores.json")])
    assert json.loads((tmp_path / "scores.json").read_text())["per_class"]["joy"]["support"] == 60
    capsys.readouterr()
    predict([str(output), "--text", "so joy"])
    line = json.loads(capsys.readouterr().out)
    assert line["labels"] == [name for name, p in line["probabilities"].items() if p >= thresholds[name]]
    entries = pipeline("image-text-sentiment", model=str(output), trust_remote_code=True)({"text": "so joy"})
    assert {entry["label"]: round(entry["score"], 6) for entry in entries} == line["probabilities"]
    card = (output / "README.md").read_text()
    assert f"rare {thresholds['rare']:.2f}." in card and "Micro F1" in card and "of which several can apply" in card
    single_labels = label_fields(declared(["no", "maybe", "so", "yes"], [0, 1]))
    arguments, _, _ = parse_arguments(words(table, backbones, output, f"--model_name_or_path {output}"))
    assert run.build(arguments, False, single_labels)[0].config.label_thresholds is None

    single = save(tmp_path / "single.jsonl", [("so good", "joy"), ("so bad", "fun")])
    with pytest.raises(SystemExit, match="The data has one class per post, the model predicts lists of labels"):
        evaluate([str(output), "--dataset_name", str(single), "--output", str(tmp_path / "no.json")])


def test_a_checkpoint_remembers_its_task(backbones: Path, tmp_path: Path) -> None:
    table = save(tmp_path / "posts.jsonl", [(f"so good {number}", number % 3) for number in range(30)])
    train.main(words(table, backbones, tmp_path / "model", "--task regression"))
    flags = [str(tmp_path / "model"), "--dataset_name", str(table), "--output", str(tmp_path / "scores.json")]
    evaluate(flags)
    assert json.loads((tmp_path / "scores.json").read_text())["mse"] > 0
    with pytest.raises(SystemExit, match="--task classification: the checkpoint was trained for regression"):
        evaluate([*flags, "--task", "classification"])


@pytest.mark.parametrize("count", [2, 6])
def test_few_posts_and_classes_of_one_post_are_trained_on(count: int, backbones: Path, tmp_path: Path) -> None:
    rows = [(f"so {number}", "bad" if number == 0 else "good") for number in range(count)]
    train.main(words(save(tmp_path / "posts.jsonl", rows), backbones, tmp_path / "model"))
    assert ClipCaCgConfig.from_pretrained(tmp_path / "model").label_names == ["bad", "good"]


def test_the_classes_of_a_checkpoint_keep_their_places(backbones: Path, tmp_path: Path) -> None:
    other = declared(["Good", "BAD"], [0] * 9 + [1])
    other.to_parquet(tmp_path / "other.parquet")
    parsed = parse_arguments(words(tmp_path / "other.parquet", backbones, tmp_path / "out"))
    for part in run.build(parsed[0], False, label_fields(declared(["bad", "good"], [0, 1]))):
        part.save_pretrained(tmp_path / "model")
    flags = f"--dataset_name {tmp_path}/other.parquet --output {tmp_path}/scores.json"
    evaluate([str(tmp_path / "model"), *flags.split()])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {name: row["support"] for name, row in scores["per_class"].items()} == {"bad": 1, "good": 9}
    again = (
        f"--dataset_name {tmp_path}/other.parquet --model_name_or_path {tmp_path}/model --output_dir {tmp_path}/out"
    )
    posts = run.load_training_posts(*parse_arguments(again.split()))
    assert (
        label_names(posts["train"]) == ["bad", "good"] and sum(posts["train"]["label"][:]) == len(posts["train"]) - 1
    )


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        (json.dumps(["très bien", "x"]), ["très bien", "x"]),
        ("[very good, bad]", ["bad", "very good"]),
        ("['a' 'b']", ["a", "b"]),
        ("[1, 2]", ["1", "2"]),
    ],
)
def test_a_list_in_a_cell_is_read_as_it_was_written(cell: str, names: list[str], tmp_path: Path) -> None:
    dataset = read(write(tmp_path / "posts.csv", [cell, cell]))
    assert label_names(dataset) == names and sorted(dataset["label"][0]) == [0, 1]


@pytest.mark.parametrize("cell", ["[True, False]", "[true, false]", "[0. 1.]", "[0, 1]"])
def test_lists_that_mark_labels_by_their_place_are_refused(cell: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lists of 0 and 1"):
        read(write(tmp_path / "posts.csv", [cell, cell]))


def test_unknown_labels_of_a_modality_stay_unknown_in_another_order() -> None:
    classes = datasets.ClassLabel(names=["bad", "good"])
    posts = datasets.Dataset.from_dict({"label": [0, 1], "text_label": [-100, 0]})
    posts = posts.cast_column("label", classes).cast_column("text_label", datasets.Value("int64"))
    posts = posts.remove_columns("text_label").add_column("text_label", [-100, 0], feature=classes)
    aligned = align(posts, ["Good", "bad"])
    assert aligned["label"][:] == [1, 0] and aligned["text_label"][:] == [-100, 1]


def test_training_further_keeps_the_classes_and_the_kind_of_a_checkpoint(backbones: Path, tmp_path: Path) -> None:
    table = save(tmp_path / "three.jsonl", [(f"t {n}", ["bad", "fine", "good"][n % 3]) for n in range(30)])
    train.main(words(table, backbones, tmp_path / "three"))
    fewer = save(tmp_path / "two.jsonl", [(f"t {n}", ["Bad", "good"][n % 2]) for n in range(30)])
    more = ["--model_name_or_path", str(tmp_path / "three"), "--output_dir", str(tmp_path / "two"), "--max_steps", "1"]
    train.main(["--dataset_name", str(fewer), *more])
    assert json.loads((tmp_path / "two/config.json").read_text())["label2id"] == {"bad": 0, "fine": 1, "good": 2}
    values = save(tmp_path / "values.jsonl", [(f"t {n}", n % 5) for n in range(30)])
    train.main(words(values, backbones, tmp_path / "values", "--task regression"))
    more[1] = str(tmp_path / "values")
    with pytest.raises(SystemExit, match="predicts values, and the labels are read as classes"):
        train.main(["--dataset_name", str(values), *more, "--overwrite_output_dir"])
