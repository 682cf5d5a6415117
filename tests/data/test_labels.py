"""Labels are read from their values: what each kind of label column becomes, from loading to prediction."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from clipcacg.scripts.data import load_posts
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.labels import label_names, task_of
from clipcacg.scripts.data.loading import DataArguments

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
        # Whole numbers are classes, in every way to write them.
        ("csv", [0, 1, 1, 2], "classes", ["0", "1", "2"], [0, 1, 1, 2]),
        ("csv", ["0.0", "1.0", "2.0"], "classes", ["0", "1", "2"], [0, 1, 2]),
        ("jsonl", [0.0, 2, 1.0], "classes", ["0", "1", "2"], [0, 2, 1]),
        ("jsonl", ["0", "2", "1"], "classes", ["0", "1", "2"], [0, 2, 1]),
        ("csv", [-1, 0, 1], "classes", ["-1", "0", "1"], [0, 1, 2]),
        ("csv", [10, 9, 2], "classes", ["2", "9", "10"], [2, 1, 0]),
        ("csv", ["1e0", "2"], "classes", ["1", "2"], [0, 1]),
        # Other numbers are values.
        ("csv", [0.5, 1, 2], "regression", None, [0.5, 1, 2]),
        ("jsonl", [1, 2.0, 0.5], "regression", None, [1, 2, 0.5]),
        ("jsonl", ["0.5", "-1.5"], "regression", None, [0.5, -1.5]),
        ("csv", list(range(40)), "regression", None, list(range(40))),
        # Words are classes, however they are written.
        ("csv", ["sad", "happy"], "classes", ["happy", "sad"], [1, 0]),
        ("csv", ["good", "good ", "GOOD", "bad"], "classes", ["bad", "good"], [1, 1, 1, 0]),
        ("jsonl", ["good", " good\t", "Good", "bad"], "classes", ["bad", "good"], [1, 1, 1, 0]),
        ("jsonl", ["very  good", "very good", "bad"], "classes", ["bad", "very good"], [1, 1, 0]),
        ("jsonl", ["caf\u00e9", "cafe\u0301", "bar"], "classes", ["bar", "caf\u00e9"], [1, 1, 0]),
        ("jsonl", ["STRASSE", "stra\u00dfe", "Weg"], "classes", ["Weg", "stra\u00dfe"], [1, 1, 0]),
        ("jsonl", ["none", "some"], "classes", ["none", "some"], [0, 1]),
        ("jsonl", ["1 star", "2 stars"], "classes", ["1 star", "2 stars"], [0, 1]),
        ("jsonl", ["infinity", "beyond"], "classes", ["beyond", "infinity"], [1, 0]),
        # True and False keep their names.
        ("csv", ["True", "False"], "classes", ["False", "True"], [1, 0]),
        ("csv", ["true", "false"], "classes", ["False", "True"], [1, 0]),
        ("jsonl", [True, False], "classes", ["False", "True"], [1, 0]),
        # Lists are several labels of a post.
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


@pytest.mark.parametrize(
    ("kind", "labels", "row", "reason"),
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
