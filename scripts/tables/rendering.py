"""Tables III and IV as Markdown, CSV and a plot with 95% intervals."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from clipcacg.scripts.data.lines import read_lines
from clipcacg.scripts.reporting.tables import escape_markdown, markdown_table
from clipcacg.scripts.tables.lines import RUNS_FILE, answers, select
from clipcacg.scripts.tables.rows import Row
from clipcacg.scripts.tables.statistics import SCORES, summarise

TITLES = {3: "Table III: systems and simple baselines", 4: "Table IV: ablations"}
SMOKE = "Smoke test, not a result"


def write_tables(
    folder: Path,
    rows: dict[str, Row],
    hashes: dict[str, str],
    tables: Sequence[int],
    smoke: bool = False,
    reference: str = "full",
) -> list[Path]:
    """Write `table3` and `table4` as .md, .csv and .png from the lines of the runs.

    Args:
        folder: Folder of the runs and the tables.
        rows: All rows, by name.
        hashes: Row name to config hash.
        tables: 3, 4 or both.
        smoke: Whether the titles call this a smoke test.
        reference: Row that the others are compared with.

    Returns:
        The Markdown files of the tables that have a run. Runs without predictions do not count.
    """
    written, lines = [], select(read_lines(folder / RUNS_FILE), hashes)
    predictions = answers(lines, folder)
    answered = set(predictions["run"])
    lines = [line for line in lines if "error" in line or line["run"] in answered]
    for table in tables:
        shown = {name: row for name, row in rows.items() if table in row.tables}
        runs = [line for line in lines if line["row"] in shown]
        if not runs:
            continue
        summary, path = summarise(runs, predictions, shown, reference), folder / f"table{table}.md"
        title = f"{SMOKE}. {TITLES[table]}" if smoke else TITLES[table]
        title += ", measured on VALIDATION posts" if (summary["measured"] == "validation").all() else ""
        path.write_text(to_markdown(summary, title, runs, rows[reference].label), encoding="utf-8")
        summary.assign(title=title).to_csv(path.with_suffix(".csv"), index=False)
        plot(summary, title, path.with_suffix(".png"))
        written.append(path)
    return written


def to_markdown(summary: pd.DataFrame, title: str, lines: Sequence[dict[str, Any]], reference: str) -> str:
    """Return the whole page: for each protocol the scores, what is significant, and details; notes, and errors."""
    parts = [f"# {title}"]
    for _, part in summary.groupby("protocol", sort=False):
        rows = part.to_dict("records")
        parts += [f"## {heading(part)}", posts(part), table_of([score_cells(row, reference) for row in rows])]
        parts += [significance(part, reference), table_of([detail_cells(row) for row in rows])]
        for key, words in (("chosen", "Chosen by the trials"), ("substitutions", "Different from the original")):
            items = [f"- {row['label']}: {row[key]}" for row in rows if isinstance(row.get(key), str) and row[key]]
            parts += [f"{words}:", "\n".join(map(escape_item, items))] if items else []
    done = [line for line in lines if "error" not in line]
    hardware = " and ".join(sorted({line["hardware"] for line in done})) or "no machine"
    commits = ", ".join(sorted({line["commit"] or "not in git" for line in lines}))
    parts.append(NOTES.format(hardware=hardware, commits=commits))
    errors = dict.fromkeys(
        f"- {line['row']}: `{' '.join(line['error'].split())}`" for line in lines if "error" in line
    )
    return "\n\n".join([*filter(None, parts), *(["Failed:", "\n".join(errors)] if errors else [])]) + "\n"


NOTES = """\
Scores are in percent, over the measured posts of all folds together. In brackets: 95% intervals, from a bootstrap over
groups of duplicate posts. With several seeds a score is the mean over seeds. p is from McNemar's exact test if each
post was predicted once per row; with several seeds, from its permutation form, which swaps the two rows at random for
whole groups of duplicates. Holm's method corrects p for the number of rows. Intervals and p generalize to other posts,
not to other seeds. The CSV file has the standard deviation over seeds, and the differences with intervals that are
corrected for the number of rows (Bonferroni).

Validation accuracy is the mean over runs; it is optimistic, because it chose. Trials are those of each row and fold,
with the first seed; for a logistic regression, values of C. Seconds are the mean training time of a run, with the
outputs of frozen encoders computed beforehand, on {hardware}. Code: {commits}.

Fidelity: A follows official code; B has a known structure and assumed sizes; C is a proxy. Every row is trained with
the recipe of this table, not with that of its own paper. Published figures come from mixed splits and mixed kinds of
F1, so they are not comparable with ours."""


def heading(part: pd.DataFrame) -> str:
    """Data, protocol and measured split of one protocol's rows."""
    first = part.iloc[0]
    return f"{first['data']}, {first['protocol']}, measured on the {first['measured']} split"


def posts(part: pd.DataFrame) -> str:
    """Name the posts that chose and those that measured."""
    if "accuracy" not in part:
        return ""
    most = part.loc[part["measured_posts"].idxmax()]
    chose = "epochs and settings" if (part["chosen"] != "").any() else "epochs"
    where = f" of each of {most['folds']} folds" if most["folds"] > 1 else ""
    choosing, measured = f"{most['choosing_posts']:,.0f}", f"{most['measured_posts']:,.0f}"
    if most["measured"] == "validation":
        return f"The {measured} validation posts{where} chose {chose} and measured the scores, which are optimistic."
    return (
        f"The validation posts{where} ({choosing}) chose {chose}. The {measured} test posts"
        f"{' of these folds together' if where else ''}, in {most['groups']:,.0f} groups of duplicates, measured the "
        "scores and chose nothing."
    )


def significance(part: pd.DataFrame, reference: str) -> str:
    """Say in words which differences are significant after Holm's correction."""
    if "p_holm" not in part:
        return ""
    compared = part[part["p_holm"].notna()]
    clear = compared["p_holm"] < 0.05
    kinds = {
        f"{reference} is significantly better than": compared[clear & (compared["difference"] > 0)],
        f"{reference} is significantly worse than": compared[clear & (compared["difference"] < 0)],
        f"{reference} does not differ significantly from": compared[~clear],
    }
    sentences = [f"- {words}: {', '.join(found['label'])}." for words, found in kinds.items() if len(found)]
    return "\n".join(["By accuracy, after Holm's correction:", "", *map(escape_item, sentences)])


def escape_item(item: str) -> str:
    return f"- {escape_markdown(item.removeprefix('- '))}"


def table_of(rows: Sequence[dict[str, str]]) -> str:
    """Format rows as a Markdown table, without columns that are empty everywhere."""
    table = pd.DataFrame(rows)
    table = table.loc[:, (table != "–").any()]
    return markdown_table([list(table), *table.to_numpy().tolist()])


def number(row: dict[str, Any], name: str, form: str) -> str:
    return "–" if pd.isna(row.get(name)) else format(row[name], form)


def interval(row: dict[str, Any], name: str, low: str, high: str, form: str = ".1f") -> str:
    """Format a value with its 95% interval."""
    if pd.isna(row.get(name)):
        return "–"
    return f"{row[name]:{form}} ({row[low]:{form}} to {row[high]:{form}})"


def score_cells(row: dict[str, Any], reference: str) -> dict[str, str]:
    """Format the scores of a row of `summarise`: title to cell."""
    shown = {"System": row["label"]}
    for name, title in SCORES.items():
        shown[title] = interval(row, name, f"{name}_low", f"{name}_high")
    shown[f"{reference} minus this, accuracy"] = interval(row, "difference", "low", "high", "+.1f")
    shown |= {"p, corrected": number(row, "p_holm", ".4f"), "Posts": number(row, "measured_posts", ",.0f")}
    shown |= {"Folds": f"{row['folds']}", "Seeds": f"{row['seeds']}"}
    return shown | {"Failed runs": f"{row['failed']}" if row["failed"] else "–"}


def detail_cells(row: dict[str, Any]) -> dict[str, str]:
    """Format what else the table says about a row of `summarise`: title to cell."""
    shown = {"System": row["label"]}
    if row["measured"] != "validation":
        shown["Validation accuracy"] = number(row, "validation_accuracy", ".1f")
    shown |= {"Trials": number(row, "trials", ".0f"), "Trained weights": number(row, "trainable_parameters", ",.0f")}
    shown |= {"All weights": number(row, "total_parameters", ",.0f"), "Seconds": number(row, "seconds", ",.0f")}
    shown["Fidelity"] = row["fidelity"] or "–"
    published = "/".join(number(row, f"published_{name}", ".2f") for name in ("accuracy", "f1"))
    return shown | {"Published accuracy/F1": "–" if published == "–/–" else published}


def plot(summary: pd.DataFrame, title: str, path: Path) -> None:
    """Plot accuracy and weighted F1 of each row with 95% intervals, one panel per protocol."""
    parts = [part for _, part in summary.groupby("protocol", sort=False)]
    most = max(map(len, parts))
    figure = Figure(figsize=(9, (1.6 + 0.42 * most) * len(parts)), dpi=150, layout="constrained")
    for axes, part in zip(figure.subplots(len(parts), 1, squeeze=False)[:, 0], parts, strict=True):
        places = np.arange(len(part))
        for shift, name in ((-0.12, "accuracy"), (0.12, "f1")):
            if name in part:
                bars = [part[name] - part[f"{name}_low"], part[f"{name}_high"] - part[name]]
                axes.errorbar(part[name], places + shift, xerr=bars, fmt="o", capsize=3, label=SCORES[name])
                axes.legend(fontsize=8)
        axes.set_yticks(places, part["label"], fontsize=8)
        axes.set_ylim(len(part) - 0.5, -0.5)
        axes.set_title(fill(heading(part), 70), fontsize=9)
        axes.set_xlabel("percent; bars: 95% interval over posts")
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(fill(title, 80), fontsize=11)
    figure.savefig(path, format="png")
