"""Posts per second and the time left, on a terminal and in a file."""

import io
import re
from pathlib import Path

import pytest
from inputs import flags

from clipcacg.scripts import evaluate_checkpoint, predict, train
from clipcacg.scripts.data import features, progress
from clipcacg.scripts.data.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_lines_and_a_terminal_one_line_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0)
    printed = {kind: kind() for kind in (io.StringIO, Terminal)}
    for file in printed.values():
        with Progress(40, "reading", file=file, initial=8) as bar:
            for _ in range(4):
                bar.update(8)
    lines = printed[io.StringIO].getvalue().split("\n")
    assert len(lines) >= 5 and all(line.startswith("reading: ") for line in lines if line)
    assert re.search(r"24/40 \[00:00<\d\d:\d\d, [\d.]+ ?posts/s\]", lines[2]), lines
    assert "\r" in printed[Terminal].getvalue() and "\n" not in printed[Terminal].getvalue().strip()


def test_a_short_part_leaves_no_line_in_a_file() -> None:
    file = io.StringIO()
    with Progress(2, "evaluating", is_part=True, file=file) as bar:
        bar.update(2)
    assert not file.getvalue().strip()


@pytest.mark.slow
def test_the_long_commands_show_posts_per_second_and_the_time_left(
    posts_folder: Path,
    backbones: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(features, "CACHE_FOLDER", tmp_path / "features")  # in the common one they may lie already

    def shown(what: str) -> str:
        found = re.findall(rf"^{what}: .* (\d+/\d+) \[[\d:]+<[\d:?]+, .*posts/s\]$", capsys.readouterr().err, re.M)
        return found[-1] if found else "nothing"

    model = tmp_path / "model"
    more = "--disable_tqdm False --freeze_text --cache_features --max_train_samples 40 --num_train_epochs 1"
    train.main(flags(posts_folder, backbones, model, *more.split()))
    printed = capsys.readouterr().err
    for what, posts in (("features of text", r"\d+"), ("training", "40"), ("evaluating", "12")):
        assert re.search(rf"^{what}: .* {posts}/{posts} \[.*posts/s\]$", printed, re.M), printed
    evaluate_checkpoint.main([str(model), "--data_dir", str(posts_folder), "--output", str(tmp_path / "scores.json")])
    assert shown("evaluating") == "117/117"  # three posts have no label
    predict.main([str(model), "--input", str(posts_folder), "--output", str(tmp_path / "all.jsonl")])
    assert shown("predicting") == "120/120"
