"""The result files and the tables made from them, compared with values computed by hand."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from clipcacg.scripts.tables.lines import PREDICTIONS_FILE, RUNS_FILE, append_line, read_lines, select
from clipcacg.scripts.tables.rendering import write_tables
from clipcacg.scripts.tables.rows import Row
from clipcacg.scripts.tables.statistics import paired_test

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
        "metrics": {"test": scores, "validation": {**scores, "accuracy": 0.875}},
    } | more  # fmt: skip


def fill(folder: Path, *lines: dict[str, Any]) -> None:
    for entry in lines:
        append_line(folder / RUNS_FILE, entry)


def answer(folder: Path, run: str, correct: str) -> None:
    """Predictions of posts 0, 1, ..., which all have the label 1."""
    labels = [1] * len(correct)
    ids = [str(number) for number in range(len(correct))]
    entry = {"run": run, "id": ids, "label": labels, "prediction": [int(mark == "+") for mark in correct]}
    append_line(folder / PREDICTIONS_FILE, entry)


def answered(*runs: str) -> pd.DataFrame:
    """One string of + (correct) and - per run."""
    return pd.DataFrame(
        [{"id": str(post), "correct": mark == "+"} for correct in runs for post, mark in enumerate(correct)]
    )


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
    assert paired_test(answered("+-+"), answered("+-+")) == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}


def test_the_bootstrap_of_several_seeds_by_hand() -> None:
    # Gains of 1 and 0 on two posts: a resample's mean is 0, 1/2 or 1 with 1/4, 1/2, 1/4, so p = 2 * 1/4.
    found = paired_test(answered("++", "++"), answered("-+"))
    assert found["p"] == pytest.approx(0.5, abs=0.02)
    assert (found["difference"], found["low"], found["high"]) == (50.0, 0.0, 100.0)
    # Half a gain on each of 100 posts has no variance.
    sure = paired_test(answered("+" * 100, "-" * 100), answered("-" * 100))
    assert (sure["low"], sure["high"], sure["p"]) == (50.0, 50.0, pytest.approx(2 / 10000))
    # With many posts the half-width is that of a normal distribution.
    gains = np.random.default_rng(1).permutation(["+"] * 300 + ["-"] * 700)
    wide = paired_test(answered("".join(gains), "".join(gains)), answered("-" * 1000))
    assert (wide["high"] - wide["low"]) / 2 == pytest.approx(100 * 1.96 * np.sqrt(0.3 * 0.7 / 1000), rel=0.05)


def test_only_common_posts_are_compared() -> None:
    assert paired_test(answered("+++"), answered("-"))["difference"] == 100
    assert paired_test(answered("+++"), answered().reindex(columns=["id", "correct"])) == {}


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


def test_mean_and_deviation_by_hand_in_every_format(tmp_path: Path) -> None:
    fill(tmp_path, line("full", 1, 0.70), line("full", 2, 0.72), line("full", 3, 0.77), line("other", 1, 0.5))
    for run, correct in (("full1", "++"), ("full2", "++"), ("full3", "++"), ("other1", "-+")):
        answer(tmp_path, run, correct)
    assert write_tables(tmp_path, ROWS, HASHES, [3, 4]) == [tmp_path / "table3.md", tmp_path / "table4.md"]
    page = (tmp_path / "table3.md").read_text()
    assert page.startswith("# Table III") and "## MVSA-Single, split clmlf, measured on the test split" in page
    other, ours = [row for row in page.splitlines() if row.startswith(("| Other", "| CLIP"))]
    # Mean 73; deviations -3, -1, 4: sqrt(26 / 2) = 3.61. Macro F1 never varies. Seconds 11, 12, 13.
    for cell in ("73.00 ± 3.61", "63.00 ± 3.61", "25.00 ± 0.00", "12.0 ± 1.0", "1,234", "56,789", "75.38/75.21"):
        assert f"| {cell} " in ours
    words = (r"Other \| system", "B", "75.33/73.46", "50.00", "+50.00 (+0.00 to +100.00)", "8", "87.50", "dropout 0.1")
    for cell in words:
        assert f"| {cell} " in other
    assert "a for b; c for d; word vectors: glove" in other
    assert "Published acc/F1, from mixed splits and F1 kinds" in page and "Code: abc." in page
    with (tmp_path / "table3.csv").open() as file:
        table = {row["row"]: row for row in csv.DictReader(file)}
    assert float(table["full"]["accuracy_std"]) == pytest.approx(np.sqrt(13)) and table["full"]["p"] == ""
    assert float(table["other"]["p"]) == pytest.approx(0.5, abs=0.02) and table["other"]["accuracy_std"] == ""
    assert Image.open(tmp_path / "table3.png").size[0] > 800
    assert "Other" not in (tmp_path / "table4.md").read_text()


def test_titles_name_smoke_tests_and_validation(tmp_path: Path) -> None:
    scores = line("full", 1, 0.7)["metrics"]
    alone = {"validation": scores["validation"]}
    fill(tmp_path, line("full", 1, 0.7, measured="validation", metrics=alone, published_on="sample", notes=[]))
    write_tables(tmp_path, ROWS, HASHES, [4], smoke=True)
    title = "Smoke test, not a result. Table IV: ablations, measured on VALIDATION posts"
    page = (tmp_path / "table4.md").read_text()
    assert page.startswith(f"# {title}\n") and "87.50" in page and "Published acc" not in page
    assert "Scores on validation are optimistic" in page
    with (tmp_path / "table4.csv").open() as file:
        assert next(csv.DictReader(file))["title"] == title


def test_a_failed_run_is_listed_and_an_empty_folder_has_no_table(tmp_path: Path) -> None:
    assert write_tables(tmp_path, ROWS, HASHES, [3, 4]) == []
    failed = {key: value for key, value in line("other", 1, 0.0).items() if key not in ("metrics", "seconds")}
    fill(tmp_path, failed | {"error": "ImportError: no vader"})
    write_tables(tmp_path, ROWS, HASHES, [3])
    assert "other: `ImportError: no vader`" in (tmp_path / "table3.md").read_text()
    fill(tmp_path, line("full", 1, 0.7))
    write_tables(tmp_path, ROWS, HASHES, [3])
    page = (tmp_path / "table3.md").read_text()
    assert "0, 1 failed" in page and "70.00" in page and (tmp_path / "table3.png").is_file()
