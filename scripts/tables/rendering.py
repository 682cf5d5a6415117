"""Tables III and IV as Markdown, CSV and a plot with error bars."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from clipcacg.scripts.reporting.tables import markdown_table
from clipcacg.scripts.tables.lines import RUNS_FILE, read_lines, select
from clipcacg.scripts.tables.rows import Row
from clipcacg.scripts.tables.statistics import SCORES, summarise

TITLES = {3: "Table III: systems and floors", 4: "Table IV: ablations"}
SMOKE = "Smoke test, not a result"


def write_tables(
    folder: Path, rows: dict[str, Row], hashes: dict[str, str], tables: Sequence[int], smoke: bool = False
) -> list[Path]:
    """Write `table3` and `table4` as .md, .csv and .png from `runs.jsonl`.

    Args:
        folder: Folder of the runs and the tables.
        rows: All rows, by name.
        hashes: Row name to config hash.
        tables: 3, 4 or both.
        smoke: Whether the titles call this a smoke test.

    Returns:
        The Markdown files of the tables that have a run.
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


def to_markdown(summary: pd.DataFrame, title: str, lines: Sequence[dict[str, Any]]) -> str:
    """Return the whole page: one section per protocol, notes, and errors."""
    parts = [f"# {title}"]
    for _, part in summary.groupby("protocol", sort=False):
        table = pd.DataFrame([cells(row) for row in part.to_dict("records")]).fillna("–")
        table = table.loc[:, (table != "–").any()]
        parts += [f"## {heading(part)}", markdown_table([list(table), *table.to_numpy().tolist()])]
    done = [line for line in lines if "error" not in line]
    facts = {
        "hardware": " and ".join(sorted({line["hardware"] for line in done})) or "no machine",
        "commits": ", ".join(sorted({line["commit"] or "not in git" for line in lines})),
        "tuning": " and settings" if any(line["trials"] > 1 and line["config"].get("grid") for line in done) else "",
    }
    parts.append(NOTES.format(**facts))
    if (summary["measured"] == "validation").any():
        parts.append("Scores on validation are optimistic, because the same posts chose the epochs.")
    errors = dict.fromkeys(
        f"- {line['row']}: `{' '.join(line['error'].split())}`" for line in lines if "error" in line
    )
    return "\n\n".join([*parts, *(["Failed:", "\n".join(errors)] if errors else [])]) + "\n"


NOTES = """\
Mean ± sample standard deviation over runs, scores in percent. A run has one seed and, with folds, one fold.
Epochs{tuning} are chosen on validation. Seconds are training time on {hardware}, with the outputs of frozen encoders
computed beforehand. Code: {commits}.

Fidelity: A follows official code; B has a known structure and assumed sizes; C is a proxy. Every row is trained with
the recipe of this table, not with that of its own paper. Published figures come from mixed splits and mixed kinds of
F1, so they are not comparable with ours. The difference is in accuracy on the same posts, with a bootstrap confidence
interval; p is from McNemar's exact test if each post was predicted once per system, otherwise from the same bootstrap.
Both generalise to other posts, not to other seeds, and are not corrected for the number of rows."""


def heading(part: pd.DataFrame) -> str:
    """Data, protocol and measured split of one protocol's rows."""
    first = part.iloc[0]
    return f"{first['data']}, {first['protocol']}, measured on the {first['measured']} split"


def cells(row: dict[str, Any]) -> dict[str, str]:
    """Format a row of `summarise` for the Markdown table: title to cell."""

    def number(name: str, form: str) -> str:
        return "–" if pd.isna(row.get(name)) else format(row[name], form)

    published = "/".join(number(f"published_{name}", ".2f") for name in ("accuracy", "f1"))
    shown = {"System": row["label"], "Fidelity": row["fidelity"] or "–"}
    shown["Published acc/F1, from mixed splits and F1 kinds"] = "–" if published == "–/–" else published
    for name, title in SCORES.items():
        shown[title] = spread(row.get(name), row.get(f"{name}_std"))
    if row.get("measured") != "validation":
        shown["Validation accuracy"] = spread(row.get("validation_accuracy"), row.get("validation_accuracy_std"))
    shown["CLIP-CA-CG minus this, 95% CI"] = "–"
    if not pd.isna(row.get("difference")):
        shown["CLIP-CA-CG minus this, 95% CI"] = f"{row['difference']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"
    shown["p"] = number("p", ".4f")
    shown |= {"Trainable": number("trainable_parameters", ",.0f"), "Parameters": number("total_parameters", ",.0f")}
    shown |= {"Seconds": spread(row.get("seconds"), row.get("seconds_std"), 1), "Trials": number("trials", ".0f")}
    shown["Chosen"] = row.get("chosen") or "–"
    shown["Runs"] = f"{row['runs']}" + (f", {row['failed']} failed" if row["failed"] else "")
    return shown | {"Substitutions": row["substitutions"] or "–"}


def spread(mean: float, deviation: float, digits: int = 2) -> str:
    """Format a mean and its standard deviation if there is one."""
    if pd.isna(mean):
        return "–"
    return f"{mean:.{digits}f}" + ("" if pd.isna(deviation) else f" ± {deviation:.{digits}f}")


def plot(summary: pd.DataFrame, title: str, path: Path) -> None:
    """Plot accuracy and weighted F1 of each row with one standard deviation, one panel per protocol."""
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
