"""Means and standard deviations over runs, and paired differences with confidence intervals."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest, bootstrap

from clipcacg.scripts.tables.lines import answers
from clipcacg.scripts.tables.rows import Row

SCORES = {"accuracy": "Accuracy", "f1": "Weighted F1", "f1_macro": "Macro F1"}
OURS = "full"  # the row that all others are compared with
RESAMPLES = 9999


def summarise(lines: Sequence[dict[str, Any]], rows: dict[str, Row], folder: Path) -> pd.DataFrame:
    """Summarise runs by protocol and row: means, sample standard deviations, and the difference to our model.

    Args:
        lines: Output of `select`.
        rows: Rows of the table in its order, by name.
        folder: Folder with the predictions.

    Returns:
        The columns of the CSV file. Scores are in percent, and missing where every run of a row failed.
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
    """Mean and sample standard deviation of the scores and seconds of one row's runs, with sizes and chosen values."""
    chosen = ", ".join(f"{name} {value}" for name, value in runs[-1]["values"].items())
    facts: dict[str, Any] = {"trials": runs[-1]["trials"], "chosen": chosen}
    for split, prefix in ((runs[-1]["measured"], ""), ("validation", "validation_")):
        for name in SCORES:
            values = pd.Series([100 * run["metrics"][split][name] for run in runs if split in run["metrics"]])
            facts |= {f"{prefix}{name}": values.mean(), f"{prefix}{name}_std": values.std()}
    facts |= {f"{name}_parameters": runs[-1]["parameters"][name] for name in ("trainable", "total")}
    seconds = pd.Series([run["seconds"] for run in runs])
    return facts | {"seconds": seconds.mean(), "seconds_std": seconds.std()}


def paired_test(ours: pd.DataFrame, theirs: pd.DataFrame) -> dict[str, float]:
    """Compare two systems on the posts that both predicted.

    Args:
        ours, theirs: One row per post and run, with the columns id and correct (bool).

    Returns:
        `difference`: mean accuracy of ours minus theirs, in percentage points. `low`, `high`: its 95% confidence
        interval, percentiles of a bootstrap over posts with all their predictions. `p`: two-sided, from McNemar's
        exact test if each system has one prediction per post, otherwise 2 min(P(d* <= 0), P(d* >= 0)) of the
        bootstrap. Empty if no post is common.
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
    """Means (RESAMPLES,) of bootstrap samples with a fixed seed."""
    if len(values) == 1 or not np.ptp(values):
        return np.full(RESAMPLES, values[0])
    settings = {"n_resamples": RESAMPLES, "method": "percentile", "batch": 500, "rng": np.random.default_rng(0)}
    return bootstrap((values,), np.mean, vectorized=True, **settings).bootstrap_distribution
