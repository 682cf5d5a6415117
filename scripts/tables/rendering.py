"""Runs as lines of a file, and the tables made of them: Markdown, CSV, a plot with error bars, and a paired test.

`reproduce.py` writes the lines and says which rows a table has. Two files lie in a results folder:

    runs.jsonl           a line a run: what was trained on what, its scores, sizes and seconds, or its error
    predictions.jsonl    a line a run: its answer to each post that was measured, beside the true one

The second is what the paired test reads. It holds labels of the data set, so it is not for publishing.
"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import binomtest, bootstrap

from clipcacg.scripts.reporting.tables import markdown_table

logger = logging.getLogger(__name__)

RUNS_FILE, PREDICTIONS_FILE = "runs.jsonl", "predictions.jsonl"
SCORES = {"accuracy": "Accuracy", "f1": "Weighted F1", "f1_macro": "Macro F1"}
TITLES = {3: "Table III: systems and floors", 4: "Table IV: ablations"}
SMOKE = "Smoke test, not a result"
OURS = "full"  # the row that every other one is tested against
RESAMPLES = 9999


class Row(NamedTuple):
    """A row of a table: how it is called, what it is, and what stands beside its numbers.

    Args:
        label: What the table calls it.
        tables: In which ones it stands.
        fields: Of `ModelArguments`, for CLIP-CA-CG and its ablations.
        system: Key in `baselines.SYSTEMS`, for another system.
        floor: "majority", or the modality that a logistic regression reads.
        fidelity: A, B or C; see `baselines/shared.py`.
        substitutions: What it departs from its original in.
        published: "mvsa_single" and "mvsa_multiple" to the paper's accuracy and F1 in percent.
    """

    label: str
    tables: tuple[int, ...]
    fields: dict[str, Any] | None = None
    system: str | None = None
    floor: str | None = None
    fidelity: str = ""
    substitutions: tuple[str, ...] = ()
    published: dict[str, tuple[float, float]] = {}


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Write a line that is on the disk when this returns; one that a kill broke off before stays apart from it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            file.write(b"" if file.read(1) == b"\n" else b"\n")
        file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that may not exist, without those that are broken off."""
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines() if path.exists() else [], start=1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            if text:
                logger.warning("%s:%d is broken off and passed over", path, number)
    return lines


def paired_test(ours: pd.DataFrame, theirs: pd.DataFrame) -> dict[str, float]:
    """Compare two systems on the posts that both answered.

    Args:
        ours, theirs: One row a post and run, with the columns id and correct (bool).

    Returns:
        difference (mean accuracy of ours less theirs, in points), low and high (its 95% interval: percentiles of a
        bootstrap over posts, each with all its answers), and p, two-sided: McNemar's exact test where each post has
        one answer a side, and else 2 min(P(d* <= 0), P(d* >= 0)) of the same bootstrap. Empty without a common post.
    """
    sides = [frame.groupby("id")["correct"].agg(["mean", "size"]) for frame in (ours, theirs)]
    both = pd.concat(sides, axis=1, join="inner", keys=["ours", "theirs"])
    if both.empty:
        return {}
    gains = (both["ours", "mean"] - both["theirs", "mean"]).to_numpy(dtype=float)
    drawn = resampled_means(gains)
    low, high = np.percentile(drawn, [2.5, 97.5])
    if (both.xs("size", axis=1, level=1) == 1).all(axis=None):
        only_ours, only_theirs = int((gains > 0).sum()), int((gains < 0).sum())
        p = binomtest(only_ours, only_ours + only_theirs).pvalue if only_ours + only_theirs else 1.0
    else:
        tail = min((drawn <= 1e-12).sum(), (drawn >= -1e-12).sum())
        p = min(1.0, 2 * (tail + 1) / (len(drawn) + 1))
    return {"difference": 100 * gains.mean(), "low": 100 * low, "high": 100 * high, "p": float(p)}


def resampled_means(values: np.ndarray) -> np.ndarray:
    """Means (RESAMPLES,) of as many values, drawn with replacement; the same ones each time."""
    if len(values) == 1 or not np.ptp(values):
        return np.full(RESAMPLES, values[0])
    settings = {"n_resamples": RESAMPLES, "method": "percentile", "batch": 500, "rng": np.random.default_rng(0)}
    return bootstrap((values,), np.mean, vectorized=True, **settings).bootstrap_distribution


def select(lines: Sequence[dict[str, Any]], hashes: dict[str, str]) -> list[dict[str, Any]]:
    """The runs of these rows as they are configured now, each once; of a fold's data the latest state counts.

    Args:
        lines: Of `runs.jsonl`, in its order.
        hashes: Row name to the hash of its config.
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


def answers(lines: Sequence[dict[str, Any]], folder: Path) -> pd.DataFrame:
    """One row a run and measured post, with the columns row, protocol, id and correct."""
    found = {line["run"]: line for line in read_lines(folder / PREDICTIONS_FILE)}
    frames = [pd.DataFrame({"row": [], "protocol": [], "id": [], "correct": []})]
    for line in lines:
        if answer := found.get(line["run"]):
            correct = np.asarray(answer["label"]) == np.asarray(answer["prediction"])
            facts = {"row": line["row"], "protocol": line["protocol"]}
            frames.append(pd.DataFrame({"id": answer["id"], "correct": correct, **facts}))
    return pd.concat(frames[1:] or frames, ignore_index=True)


def summarise(lines: Sequence[dict[str, Any]], rows: dict[str, Row], folder: Path) -> pd.DataFrame:
    """Runs to one line a protocol and row: means, sample standard deviations, and the test against our model.

    Args:
        lines: What `select` gives.
        rows: Of the table, by name and in its order.
        folder: Holds the predictions.

    Returns:
        The columns of the CSV file; scores in percent. A row of which every run failed has none.
    """
    known, table = answers(lines, folder), []
    for protocol in dict.fromkeys(line["protocol"] for line in lines):
        for name, row in rows.items():
            runs = [line for line in lines if (line["protocol"], line["row"]) == (protocol, name)]
            done = [line for line in runs if "error" not in line]
            if not runs:
                continue
            facts = {key: runs[-1][key] for key in ("data", "protocol", "measured")} | {"row": name}
            facts |= {"label": row.label, "fidelity": row.fidelity}
            facts |= {"runs": len(done), "failed": len(runs) - len(done)}
            published = row.published.get(runs[-1]["published_on"], (None, None))
            facts |= {"published_accuracy": published[0], "published_f1": published[1]}
            if done:
                facts |= means(done)
                mine = known[known["protocol"] == protocol]
                if name != OURS:
                    facts |= paired_test(mine[mine["row"] == OURS], mine[mine["row"] == name])
            table.append(facts | {"substitutions": "; ".join([*row.substitutions, *(done or runs)[-1]["notes"]])})
    return pd.DataFrame(table)


def means(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the runs of one row have in common, and the mean and standard deviation of the rest."""
    chosen = ", ".join(f"{name} {value}" for name, value in runs[-1]["values"].items())
    facts: dict[str, Any] = {"trials": runs[-1]["trials"], "chosen": chosen}
    for split, prefix in ((runs[-1]["measured"], ""), ("validation", "validation_")):
        for name in SCORES:
            values = pd.Series([100 * run["metrics"][split][name] for run in runs if split in run["metrics"]])
            facts |= {f"{prefix}{name}": values.mean(), f"{prefix}{name}_std": values.std()}
    facts |= {f"{name}_parameters": runs[-1]["parameters"][name] for name in ("trainable", "total")}
    seconds = pd.Series([run["seconds"] for run in runs])
    return facts | {"seconds": seconds.mean(), "seconds_std": seconds.std()}


def spread(mean: float, deviation: float, digits: int = 2) -> str:
    """A mean and, if there is one, its standard deviation."""
    if pd.isna(mean):
        return "–"
    return f"{mean:.{digits}f}" + ("" if pd.isna(deviation) else f" ± {deviation:.{digits}f}")


def cells(row: dict[str, Any]) -> dict[str, str]:
    """A row of `summarise` as the Markdown table shows it."""

    def number(name: str, form: str) -> str:
        return "–" if pd.isna(row.get(name)) else format(row[name], form)

    published = "/".join(number(f"published_{name}", ".2f") for name in ("accuracy", "f1"))
    shown = {"System": row["label"], "Fidelity": row["fidelity"] or "–"}
    shown["Published acc/F1, from mixed splits and F1 kinds"] = "–" if published == "–/–" else published
    for name, title in SCORES.items():
        shown[title] = spread(row.get(name), row.get(f"{name}_std"))
    if row.get("measured") != "validation":
        shown["Validation accuracy"] = spread(row.get("validation_accuracy"), row.get("validation_accuracy_std"))
    shown["CLIP-CA-CG less this, 95%"] = "–"
    if not pd.isna(row.get("difference")):
        shown["CLIP-CA-CG less this, 95%"] = f"{row['difference']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"
    shown["p"] = number("p", ".4f")
    shown |= {"Trainable": number("trainable_parameters", ",.0f"), "Parameters": number("total_parameters", ",.0f")}
    shown |= {"Seconds": spread(row.get("seconds"), row.get("seconds_std"), 1), "Trials": number("trials", ".0f")}
    shown["Chosen"] = row.get("chosen") or "–"
    shown["Runs"] = f"{row['runs']}" + (f", {row['failed']} failed" if row["failed"] else "")
    return shown | {"Substitutions": row["substitutions"] or "–"}


def heading(part: pd.DataFrame) -> str:
    """The data, protocol and split of one protocol's rows."""
    first = part.iloc[0]
    return f"{first['data']}, {first['protocol']}, measured on the {first['measured']} split"


NOTES = """\
Mean ± sample standard deviation over runs, scores in percent. A run is a seed and, where there are folds, a fold.
Epochs{tuning} are chosen on validation. Seconds are those of training, on {hardware}, with the outputs of
frozen encoders computed beforehand. Code: {commits}.

Fidelity: A follows official code; B has a known structure and assumed sizes; C is a proxy. Every row is trained by the
recipe of this table, not by its own paper's. Published figures come from mixed splits and mixed kinds of F1: they are
no measure of ours. The difference is in accuracy, over the same posts, with a bootstrap's interval; p is McNemar's
exact test where each post was answered once a side, and the same bootstrap's otherwise. It speaks of other posts, not
of other seeds, and is not corrected for the number of rows."""


def to_markdown(summary: pd.DataFrame, title: str, lines: Sequence[dict[str, Any]]) -> str:
    """The whole page: a section a protocol, notes, and the errors."""
    parts = [f"# {title}"]
    for _, part in summary.groupby("protocol", sort=False):
        table = pd.DataFrame([cells(row) for row in part.to_dict("records")]).fillna("–")
        table = table.loc[:, (table != "–").any()]
        parts += [f"## {heading(part)}", markdown_table([list(table), *table.to_numpy().tolist()])]
    done = [line for line in lines if "error" not in line]
    facts = {
        "hardware": " and ".join(sorted({line["hardware"] for line in done})) or "no machine yet",
        "commits": ", ".join(sorted({line["commit"] or "not in git" for line in lines})),
        "tuning": " and settings" if any(line["trials"] > 1 and line["config"].get("grid") for line in done) else "",
    }
    parts.append(NOTES.format(**facts))
    if (summary["measured"] == "validation").any():
        parts.append("Where validation is measured, its posts have also chosen the epochs: expect less on others.")
    errors = dict.fromkeys(
        f"- {line['row']}: `{' '.join(line['error'].split())}`" for line in lines if "error" in line
    )
    return "\n\n".join([*parts, *(["Failed:", "\n".join(errors)] if errors else [])]) + "\n"


def plot(summary: pd.DataFrame, title: str, path: Path) -> None:
    """Draw accuracy and weighted F1 of each row with one standard deviation to both sides, a panel a protocol."""
    parts = [part for _, part in summary.groupby("protocol", sort=False)]
    most = max(map(len, parts))
    figure = Figure(figsize=(9, (1.6 + 0.42 * most) * len(parts)), dpi=150, layout="constrained")
    for axes, part in zip(figure.subplots(len(parts), 1, squeeze=False)[:, 0], parts, strict=True):
        places = np.arange(len(part))
        for shift, name in ((-0.12, "accuracy"), (0.12, "f1")):
            if name in part:
                bars = part[f"{name}_std"].fillna(0.0)
                axes.errorbar(part[name], places + shift, xerr=bars, fmt="o", capsize=3, label=SCORES[name])
                axes.legend(fontsize=8)
        axes.set_yticks(places, part["label"], fontsize=8)
        axes.set_ylim(len(part) - 0.5, -0.5)
        axes.set_title(fill(heading(part), 70), fontsize=9)
        axes.set_xlabel("percent; bars: one standard deviation over runs")
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(fill(title, 80), fontsize=11)
    figure.savefig(path, format="png")


def write_tables(
    folder: Path, rows: dict[str, Row], hashes: dict[str, str], tables: Sequence[int], smoke: bool = False
) -> list[Path]:
    """Make `table3` and `table4` as .md, .csv and .png of what `runs.jsonl` holds.

    Args:
        folder: Holds the runs, and gets the tables.
        rows: All that may be shown, by name.
        hashes: Row name to the hash of its config.
        tables: 3, 4 or both.
        smoke: Title them as no result.

    Returns:
        The Markdown files; of a table without a run there is none.
    """
    written, lines = [], select(read_lines(folder / RUNS_FILE), hashes)
    for table in tables:
        shown = {name: row for name, row in rows.items() if table in row.tables}
        runs = [line for line in lines if line["row"] in shown]
        if not runs:
            continue
        summary, path = summarise(runs, shown, folder), folder / f"table{table}.md"
        title = f"{SMOKE}. {TITLES[table]}" if smoke else TITLES[table]
        title += ", measured on VALIDATION posts" if (summary["measured"] == "validation").all() else ""
        path.write_text(to_markdown(summary, title, runs), encoding="utf-8")
        summary.assign(title=title).to_csv(path.with_suffix(".csv"), index=False)
        plot(summary, title, path.with_suffix(".png"))
        written.append(path)
    return written
