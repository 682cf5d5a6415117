"""The result files and the tables made from them, compared with values computed by hand."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import f1_score

from clipcacg.scripts.data.lines import append_line, read_lines
from clipcacg.scripts.tables.lines import PREDICTIONS_FILE, RUNS_FILE, answers, select
from clipcacg.scripts.tables.rendering import write_tables
from clipcacg.scripts.tables.rows import Row
from clipcacg.scripts.tables.statistics import groups_of, holm, paired_test, scores, swapping_p

ROWS = {
    "other": Row(
        "Other | system", (3,), system="other", fidelity="B", substitutions=("a for b", "c for d"),
        published={"mvsa_single": (75.33, 73.46)},
    ),
    "full": Row("CLIP-CA-CG", (3, 4), {}, published={"mvsa_single": (75.38, 75.21)}),
}  # fmt: skip
HASHES = {"other": "o", "full": "f"}


def line(row: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    """A run as `reproduce.py` writes it."""
    scores = {"accuracy": accuracy, "f1": accuracy - 0.1, "f1_macro": 0.25}
    return {
        "run": f"{row}{seed}", "kind": "run", "row": row, "seed": seed, "fold": None, "protocol": "split clmlf",
        "config_hash": HASHES[row], "data_hash": "d", "data": "MVSA-Single", "published_on": "mvsa_single",
        "measured": "test", "trials": 8, "values": {"dropout": 0.1},
        "notes": ["word vectors: glove"] if row == "other" else [],
        "commit": "abc", "config": {}, "hardware": "a CPU", "seconds": 10.0 + seed, "best_epoch": 2.0,
        "parameters": {"trainable": 1234, "total": 56789},
        "posts": {"train": 80, "validation": 10, "test": 12},
        "metrics": {"test": scores, "validation": {**scores, "accuracy": 0.875}},
    } | more  # fmt: skip


def fill(folder: Path, *lines: dict[str, Any]) -> None:
    for entry in lines:
        append_line(folder / RUNS_FILE, entry)


def answer(folder: Path, run: str, correct: str, **more: Any) -> None:
    """Predictions of posts 0, 1, ..., which all have the label 1."""
    ids = [str(number) for number in range(len(correct))]
    entry = {"run": run, "id": ids, "label": [1] * len(correct), "keys": [[post] for post in ids]}
    entry["prediction"] = [int(mark == "+") for mark in correct]
    append_line(folder / PREDICTIONS_FILE, entry | more)


def answered(*runs: str, group: list[int] | None = None) -> pd.DataFrame:
    """One string of + (correct) and - per seed."""
    return pd.DataFrame(
        [
            {"id": post, "seed": seed, "group": group[post] if group else post, "label": 1, "prediction": mark == "+"}
            for seed, correct in enumerate(runs)
            for post, mark in enumerate(correct)
        ],
        columns=["id", "seed", "group", "label", "prediction"],
    )  # fmt: skip


def test_an_incomplete_line_is_ignored_and_stays_apart(tmp_path: Path) -> None:
    path = tmp_path / "deep" / RUNS_FILE
    assert read_lines(path) == []
    append_line(path, {"run": "ä"})
    with path.open("ab") as file:
        file.write(b'{"run": "half')
    assert read_lines(path) == [{"run": "ä"}]
    append_line(path, {"run": 2})
    assert read_lines(path) == [{"run": "ä"}, {"run": 2}] and path.read_bytes().endswith(b"\n")


def test_mcnemar_by_hand() -> None:
    # Only ours is right on 8 posts, only the other on 1: 2 (C(9,0) + C(9,1)) / 2^9 = 20 / 512.
    found = paired_test(answered("++++++++-++--"), answered("--------+++--"))
    assert found["p"] == pytest.approx(20 / 512)
    assert found["difference"] == pytest.approx(100 * 7 / 13)
    assert 0 < found["low"] < found["difference"] < found["high"] < 100
    same = paired_test(answered("+-+"), answered("+-+"))
    assert set(same.values()) == {0.0, 1.0} and same["p"] == 1


def test_several_seeds_by_hand() -> None:
    # A gain on one of two posts: a resample's mean is 0, 1/2 or 1. Swapping one post gives 1/2 or -1/2: p = 1.
    found = paired_test(answered("++", "++"), answered("-+"))
    assert (found["difference"], found["low"], found["high"], found["p"]) == (50.0, 0.0, 100.0, 1.0)
    # Half a gain on each of 100 posts has no variance.
    sure = paired_test(answered("+" * 100, "-" * 100), answered("-" * 100))
    assert (sure["low"], sure["high"], sure["p"]) == (50.0, 50.0, pytest.approx(1 / 10000))
    # With one seed the permutation form is McNemar's test.
    assert swapping_p(np.array([1.0] * 8 + [-1.0])) == pytest.approx(20 / 512, abs=0.005)


def test_the_interval_of_many_posts_is_that_of_a_normal_distribution() -> None:
    gains = "".join(np.random.default_rng(1).permutation(["+"] * 300 + ["-"] * 700))
    found = paired_test(answered(gains), answered("-" * 1000), comparisons=10)
    error = 100 * np.sqrt(0.3 * 0.7 / 1000)
    assert (found["high"] - found["low"]) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert (found["corrected_high"] - found["corrected_low"]) / 2 == pytest.approx(2.807 * error, rel=0.07)  # 0.5 %


def test_duplicates_are_drawn_together() -> None:
    # Four copies of each of 25 posts tell no more than the 25 posts: the interval is twice as wide as that of 100.
    single, copies = "+-" * 12 + "+", "".join(mark * 4 for mark in "+-" * 12 + "+")
    groups = [post // 4 for post in range(100)]
    grouped, apart = (scores(answered(copies, group=group)) for group in (groups, None))
    expected = scores(answered(single))
    assert (grouped["accuracy_low"], grouped["accuracy_high"]) == (expected["accuracy_low"], expected["accuracy_high"])
    assert (grouped["groups"], grouped["measured_posts"], apart["groups"]) == (25, 100, 100)
    wide, narrow = (found["accuracy_high"] - found["accuracy_low"] for found in (grouped, apart))
    assert wide / narrow == pytest.approx(2, rel=0.1)
    against = [
        paired_test(answered(copies, group=group), answered("-" * 100, group=group)) for group in (groups, None)
    ]
    assert against[0]["low"] < against[1]["low"] and against[0]["p"] == against[1]["p"]


def test_groups_are_linked_by_keys_across_folds() -> None:
    keys = [["text a", "image a"], ["image b"], ["text a", "image c"], ["image c"]]
    group = groups_of(pd.DataFrame({"id": ["1", "2", "3", "4", "1"], "keys": [*keys, keys[0]]}))
    assert group[0] == group[2] == group[3] == group[4] != group[1]


def test_scores_are_those_of_scikit_learn_and_their_mean_over_seeds() -> None:
    rng = np.random.default_rng(0)
    frames = [
        pd.DataFrame(
            {"id": range(200), "group": range(200), "seed": seed, "label": rng.integers(3, size=200)}
        ).assign(prediction=rng.integers(3, size=200))
        for seed in (1, 2)
    ]  # fmt: skip
    found = scores(pd.concat(frames))
    for name, average in (("f1", "weighted"), ("f1_macro", "macro")):
        values = [100 * f1_score(frame["label"], frame["prediction"], average=average) for frame in frames]
        assert found[name] == pytest.approx(np.mean(values)) and found[f"{name}_std"] == pytest.approx(
            np.std(values, ddof=1)
        )
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]


def test_holm_by_hand() -> None:
    # Sorted: 0.01 * 3, 0.02 * 2, then 0.03 * 1, which may not be below the one before.
    found = holm(pd.Series([0.03, np.nan, 0.01, 0.02]))
    assert found.tolist()[0] == pytest.approx(0.04) and np.isnan(found[1])
    assert found.tolist()[2:] == pytest.approx([0.03, 0.04])
    assert holm(pd.Series([0.6, 0.9])).tolist() == [1.0, 1.0]


def test_only_common_posts_are_compared() -> None:
    assert paired_test(answered("+++"), answered("-"))["difference"] == 100
    assert paired_test(answered("+++"), answered()) == {}


def test_selection_of_runs() -> None:
    lines = [
        line("full", 1, 0.5, data_hash="old"),
        line("full", 1, 0.6),
        line("full", 1, 0.7, config_hash="another"),
        line("full", 2, 0.5, error="no"),
        line("full", 2, 0.8),
        line("full", 3, 0.9, error="no"),
        line("full", 4, 0.9),
        line("full", 4, 0.9, error="no"),
        line("full", 5, 0.9, kind="trial"),
        line("full", 1, 0.4, protocol="folds of cheema", fold=2, data_hash="two"),
        line("full", 1, 0.3, protocol="folds of cheema", fold=1, data_hash="one"),
    ]
    chosen = select(lines, HASHES)
    assert [entry["metrics"]["test"]["accuracy"] for entry in chosen if "error" not in entry] == [
        0.6, 0.8, 0.9, 0.4, 0.3,
    ]  # fmt: skip
    assert [entry["seed"] for entry in chosen if "error" in entry] == [3]


def test_every_format_by_hand(tmp_path: Path) -> None:
    """Two folds of two posts each and two seeds of ours; one seed of the other row, which saw one fold."""
    for fold, seed, correct in ((1, 1, "++"), (2, 1, "+-"), (1, 2, "++"), (2, 2, "--")):
        run, number = f"full{seed}{fold}", 10.0 * fold + seed
        fill(tmp_path, line("full", seed, 0.0, run=run, fold=fold, seconds=number, values={"dropout": 0.1 * fold}))
        answer(tmp_path, run, correct, id=[f"{fold}a", f"{fold}b"], keys=[["same"], [f"{fold}"]])
    fill(tmp_path, line("other", 1, 0.0, fold=1))
    answer(tmp_path, "other1", "-+", id=["1a", "1b"], keys=[["same"], ["1"]])
    assert write_tables(tmp_path, ROWS, HASHES, [3, 4]) == [tmp_path / "table3.md", tmp_path / "table4.md"]
    page = (tmp_path / "table3.md").read_text()
    assert page.startswith("# Table III") and "## MVSA-Single, split clmlf, measured on the test split" in page
    assert (
        "The validation posts of each of 2 folds (10) chose epochs and settings. The 4 test posts of these folds "
        "together, in 3 groups of duplicates, measured the scores and chose nothing."
    ) in page
    with (tmp_path / "table3.csv").open() as file:
        table = {row["row"]: row for row in csv.DictReader(file)}
    ours, other = table["full"], table["other"]
    # The seeds are right on 3 and 2 of 4 posts; the other row on 1 of the 2 posts of its fold, where ours has 2.
    assert (float(ours["accuracy"]), float(ours["accuracy_std"])) == (62.5, pytest.approx(12.5 * np.sqrt(2)))
    assert [ours[name] for name in ("folds", "seeds", "runs", "groups", "p")] == ["2", "2", "4", "3", ""]
    assert float(ours["seconds"]) == 16.5 and ours["chosen"] == "dropout 0.1 (1), 0.2 (1)"
    assert (float(other["accuracy"]), float(other["difference"]), float(other["p_holm"])) == (50, 50, 1)
    rows = [row for row in page.splitlines() if row.startswith(("| Other", "| CLIP"))]
    for cells, row in zip(
        (("50.0 (", "+50.0 ("), ("62.5 (",), ("56,789", "75.33/73.46", "87.5"), ("1,234",)), rows, strict=True
    ):
        assert all(cell in row for cell in cells)
    assert "CLIP-CA-CG does not differ significantly from: Other \\| system." in page
    assert "Other \\| system: a for b; c for d; word vectors: glove" in page and "Code: abc." in page
    assert Image.open(tmp_path / "table3.png").size[0] > 800
    assert "Other" not in (tmp_path / "table4.md").read_text()
    write_tables(tmp_path, ROWS, HASHES, [3], reference="other")
    assert "Other \\| system minus this" in (tmp_path / "table3.md").read_text()


def test_a_significant_difference_is_said_in_words(tmp_path: Path) -> None:
    fill(tmp_path, line("full", 1, 0.0), line("other", 1, 0.0))
    answer(tmp_path, "full1", "+" * 30)
    answer(tmp_path, "other1", "-" * 30)
    write_tables(tmp_path, ROWS, HASHES, [3])
    assert "CLIP-CA-CG is significantly better than: Other" in (tmp_path / "table3.md").read_text()
    write_tables(tmp_path, ROWS, HASHES, [3], reference="other")
    assert "is significantly worse than: CLIP-CA-CG" in (tmp_path / "table3.md").read_text()


def test_titles_name_smoke_tests_and_validation(tmp_path: Path) -> None:
    alone = {"validation": line("full", 1, 0.7)["metrics"]["validation"]}
    fill(tmp_path, line("full", 1, 0.7, measured="validation", metrics=alone, published_on="sample", notes=[]))
    answer(tmp_path, "full1", "++-")
    write_tables(tmp_path, ROWS, HASHES, [4], smoke=True)
    title = "Smoke test, not a result. Table IV: ablations, measured on VALIDATION posts"
    page = (tmp_path / "table4.md").read_text()
    assert page.startswith(f"# {title}\n") and "Published accuracy" not in page
    assert "The 3 validation posts chose epochs and settings and measured the scores, which are optimistic." in page
    with (tmp_path / "table4.csv").open() as file:
        assert next(csv.DictReader(file))["title"] == title


def test_a_failed_run_is_listed_and_an_empty_folder_has_no_table(tmp_path: Path) -> None:
    assert write_tables(tmp_path, ROWS, HASHES, [3, 4]) == []
    failed = {key: value for key, value in line("other", 1, 0.0).items() if key not in ("metrics", "seconds")}
    fill(tmp_path, failed | {"error": "ImportError: no vader"})
    write_tables(tmp_path, ROWS, HASHES, [3])
    assert "other: `ImportError: no vader`" in (tmp_path / "table3.md").read_text()
    fill(tmp_path, line("full", 1, 0.7))
    answer(tmp_path, "full1", "++-")
    write_tables(tmp_path, ROWS, HASHES, [3])
    page = (tmp_path / "table3.md").read_text()
    assert "Failed runs" in page and "66.7 (" in page and (tmp_path / "table3.png").is_file()


def test_runs_of_an_older_form_are_left_out(tmp_path: Path) -> None:
    fill(tmp_path, line("full", 1, 0.7), line("other", 1, 0.7))
    append_line(tmp_path / PREDICTIONS_FILE, {"run": "full1", "id": ["1"], "label": [0], "prediction": [0]})
    assert write_tables(tmp_path, ROWS, HASHES, [3]) == []
    assert answers(read_lines(tmp_path / RUNS_FILE), tmp_path).empty
