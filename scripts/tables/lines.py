"""The result files of `reproduce.py`: lines that are appended, read back and selected.

A results folder has two files:

    runs.jsonl           one line per run: model, data, scores, sizes and seconds, or its error
    predictions.jsonl    one line per run: its prediction for each measured post, the true label, and the post's keys

Posts that share a key are duplicates. The statistics read the second file. It contains labels of the data set, so do
not publish it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from clipcacg.scripts.data.lines import read_lines

RUNS_FILE, PREDICTIONS_FILE = "runs.jsonl", "predictions.jsonl"


def select(lines: Sequence[dict[str, Any]], hashes: dict[str, str]) -> list[dict[str, Any]]:
    """Select the runs of these rows with their present config, each run once, on the latest data of each fold.

    Args:
        lines: Lines of `runs.jsonl` in file order.
        hashes: Row name to config hash.

    Returns:
        One line per row, protocol, fold and seed. An error is selected only if no later attempt succeeded.
    """
    current = [line for line in lines if line["kind"] == "run" and hashes.get(line["row"]) == line["config_hash"]]
    latest = {(line["protocol"], line["fold"]): line["data_hash"] for line in current}
    current = [line for line in current if line["data_hash"] == latest[line["protocol"], line["fold"]]]
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in current:
        key = tuple(line[name] for name in ("row", "protocol", "fold", "seed"))
        if "error" not in line or "error" in newest.get(key, line):
            newest[key] = line
    return list(newest.values())


def read_predictions(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of `predictions.jsonl` by run. Lines without keys, of an earlier version, are left out."""
    return {line["run"]: line for line in read_lines(folder / PREDICTIONS_FILE) if "keys" in line}


def answers(lines: Sequence[dict[str, Any]], folder: Path) -> pd.DataFrame:
    """Return one row per run and measured post: run, row, protocol, seed, id, label, prediction and keys."""
    found = read_predictions(folder)
    columns = ["id", "label", "prediction", "keys"]
    frames = [pd.DataFrame(columns=["run", "row", "protocol", "seed", *columns])]
    for line in lines:
        if answer := found.get(line["run"]):
            facts = {name: line[name] for name in ("run", "row", "protocol")} | {"seed": line["seed"] or 0}
            frames.append(pd.DataFrame({name: answer[name] for name in columns} | facts))
    return pd.concat(frames[1:] or frames, ignore_index=True)
