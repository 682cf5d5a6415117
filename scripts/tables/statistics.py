"""Scores over all measured posts with bootstrap intervals, and paired differences with McNemar's test."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from clipcacg.scripts.data.splitting import linked_groups
from clipcacg.scripts.tables.rows import Row

SCORES = {"accuracy": "Accuracy", "f1": "Weighted F1", "f1_macro": "Macro F1"}
RESAMPLES = 9999


def summarise(
    lines: Sequence[dict[str, Any]], predictions: pd.DataFrame, rows: dict[str, Row], reference: str = "full"
) -> pd.DataFrame:
    """Summarise the runs of each protocol and row, over the measured posts of all folds together.

    Args:
        lines: Output of `select`.
        predictions: Output of `answers` for these lines.
        rows: Rows of the table in its order, by name.
        reference: Row that every other one is compared with.

    Returns:
        The columns of the CSV file. Scores are in percent, and missing where every run of a row failed.
    """
    table = []
    for protocol in dict.fromkeys(line["protocol"] for line in lines):
        mine = predictions[predictions["protocol"] == protocol]
        mine = mine.assign(group=groups_of(mine))
        answered = {name: part for name, part in mine.groupby("row", sort=False)}
        compared = [name for name in rows if name in answered and name != reference and reference in answered]
        section = []
        for name, row in rows.items():
            runs = [line for line in lines if (line["protocol"], line["row"]) == (protocol, name)]
            if not runs:
                continue
            facts = describe(name, row, runs)
            if name in answered:
                facts |= scores(answered[name])
            if name in compared:
                facts |= {"reference": reference}
                facts |= paired_test(answered[reference], answered[name], comparisons=len(compared))
            section.append(facts)
        part = pd.DataFrame(section)
        if "p" in part:
            part["p_holm"] = holm(part["p"])
        table.append(part)
    return pd.concat(table, ignore_index=True)


def describe(name: str, row: Row, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the table says about a row besides its scores: data, numbers of runs, settings, sizes and seconds."""
    done = [line for line in runs if "error" not in line]
    last = (done or runs)[-1]
    facts = {key: last[key] for key in ("data", "protocol", "measured")} | {"row": name, "label": row.label}
    facts |= {"fidelity": row.fidelity, "runs": len(done), "failed": len(runs) - len(done)}
    facts |= {f"{key}s": len({line[key] for line in done}) for key in ("fold", "seed")}
    published = row.published.get(last["published_on"], (None, None))
    facts |= {"published_accuracy": published[0], "published_f1": published[1], "trials": last["trials"]}
    facts["substitutions"] = "; ".join([*row.substitutions, *last["notes"]])
    if done:
        facts["choosing_posts"] = round(np.mean([line["posts"]["validation"] for line in done]))
        facts["chosen"] = chosen_values(done)
        facts["validation_accuracy"] = np.mean([100 * line["metrics"]["validation"]["accuracy"] for line in done])
        facts |= {f"{size}_parameters": last["parameters"][size] for size in ("trainable", "total")}
        facts["seconds"] = np.mean([line["seconds"] for line in done])
    return facts


def chosen_values(runs: Sequence[dict[str, Any]]) -> str:
    """Return each value that trials chose, with the number of folds that chose it: "dropout 0.1 (7), 0.3 (3)"."""
    values = {line["fold"]: line["values"] for line in runs}
    parts = []
    for name in runs[-1]["values"]:
        counts = pd.Series([str(found[name]) for found in values.values()]).value_counts()
        shown = [f"{value} ({count})" if len(values) > 1 else value for value, count in counts.items()]
        parts.append(f"{name} {', '.join(shown)}")
    return "; ".join(parts)


def groups_of(predictions: pd.DataFrame) -> np.ndarray:
    """Return the group of duplicates of each prediction, by the keys that its post shares with others."""
    posts = predictions.drop_duplicates("id")
    group = dict(zip(posts["id"], linked_groups(posts["keys"].tolist()), strict=True))
    return predictions["id"].map(group).to_numpy(dtype=int)


def scores(answered: pd.DataFrame) -> dict[str, Any]:
    """Score the predictions of one row.

    Args:
        answered: One line per post and seed, with the columns id, group, seed, label and prediction.

    Returns:
        For each of `SCORES` its mean over the seeds, its sample standard deviation over them (`_std`), and its 95%
        interval (`_low`, `_high`): percentiles of a bootstrap over groups of duplicates. Also the number of posts and
        groups. All scores in percent.
    """
    _, group = np.unique(answered["group"], return_inverse=True)
    _, seed = np.unique(answered["seed"], return_inverse=True)
    label, prediction = (answered[name].to_numpy(dtype=int) for name in ("label", "prediction"))
    classes = max(label.max(), prediction.max()) + 1
    counts = np.zeros((group.max() + 1, seed.max() + 1, classes, classes), dtype=np.float32)
    np.add.at(counts, (group, seed, label, prediction), 1)
    measured, drawn = scores_of(counts.sum(axis=0, dtype=float)), scores_of(resample(counts))
    facts = {"measured_posts": answered["id"].nunique(), "groups": len(counts)}
    for name, values in measured.items():
        low, high = np.percentile(drawn[name].mean(axis=-1), [2.5, 97.5])
        deviation = values.std(ddof=1) if len(values) > 1 else None
        facts |= {name: values.mean(), f"{name}_std": deviation, f"{name}_low": low, f"{name}_high": high}
    return facts


def scores_of(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Return `SCORES` in percent, (...), of confusion matrices (..., labels, predictions); an F1 of 0/0 is 0."""
    right, true, predicted = np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1), confusion.sum(-2)
    f1, total = 2 * right / np.maximum(true + predicted, 1), true.sum(-1)
    return {
        "accuracy": 100 * right.sum(-1) / total,
        "f1": 100 * (f1 * true).sum(-1) / total,
        "f1_macro": 100 * f1.mean(-1),
    }


def paired_test(ours: pd.DataFrame, theirs: pd.DataFrame, comparisons: int = 1) -> dict[str, float]:
    """Compare two rows on the posts that both predicted.

    Args:
        ours, theirs: One line per post and seed, with the columns id, group, label and prediction.
        comparisons: Number of rows that are compared with ours.

    Returns:
        `difference`: mean accuracy of ours minus theirs over posts and seeds, in percentage points. `low`, `high`: its
        95% interval, percentiles of a bootstrap over groups of duplicates. `corrected_low`, `corrected_high`: its
        interval at 1 - 0.05 / comparisons, so that all intervals hold together with 95% (Bonferroni). `p`: two-sided,
        from McNemar's exact test if each row has one prediction per post. With several seeds, from the permutation
        form of that test: the two rows are swapped at random, for a whole group of duplicates and all seeds at once.
        Empty if no post is common.

    Source: our choice. A majority vote over seeds, the other way to one prediction per post, would test an ensemble.
    """
    sides = [frame.assign(right=frame["label"] == frame["prediction"]) for frame in (ours, theirs)]
    means = [frame.groupby("id").agg(right=("right", "mean"), group=("group", "first")) for frame in sides]
    both = means[0].join(means[1]["right"].rename("other"), how="inner")
    if both.empty:
        return {}
    _, group = np.unique(both["group"], return_inverse=True)
    gains = (both["right"] - both["other"]).to_numpy(dtype=float)
    if all(frame["id"].is_unique for frame in sides):
        only_ours, only_theirs = int((gains > 0).sum()), int((gains < 0).sum())
        p = binomtest(only_ours, only_ours + only_theirs).pvalue if only_ours + only_theirs else 1.0
    else:
        p = swapping_p(np.bincount(group, gains))
    sums = resample(np.stack([np.bincount(group, gains), np.bincount(group)], axis=1).astype(np.float32))
    drawn = 100 * sums[:, 0] / sums[:, 1]
    tail = 2.5 / comparisons
    low, high, corrected_low, corrected_high = np.percentile(drawn, [2.5, 97.5, tail, 100 - tail])
    facts = {"difference": 100 * gains.mean(), "low": low, "high": high, "p": float(p)}
    return facts | {"corrected_low": corrected_low, "corrected_high": corrected_high}


def swapping_p(gains: np.ndarray) -> float:
    """Two-sided p of the sum of gains (groups,) under random signs."""
    gains = gains[np.abs(gains) > 1e-9]
    signs = np.random.default_rng(0).integers(2, size=(RESAMPLES, len(gains)), dtype=np.int8) * 2 - 1
    sums = np.abs(signs @ gains.astype(np.float32))
    return float((1 + (sums >= abs(gains.sum()) - 1e-3).sum()) / (1 + RESAMPLES))


def resample(values: np.ndarray) -> np.ndarray:
    """Sums (RESAMPLES, ...) of bootstrap samples of rows, from values (groups, ...) per group."""
    drawn = draws(len(values))
    flat = values.reshape(len(values), -1)
    sums = [drawn[start : start + 1000].astype(np.float32) @ flat for start in range(0, RESAMPLES, 1000)]
    return np.concatenate(sums).reshape(RESAMPLES, *values.shape[1:])


@lru_cache(maxsize=2)
def draws(groups: int) -> np.ndarray:
    """How often each bootstrap sample, from a fixed seed, has each group: (RESAMPLES, groups)."""
    generator = np.random.default_rng(0)
    drawn = np.empty((RESAMPLES, groups), dtype=np.uint8)
    for row in drawn:
        row[:] = np.bincount(generator.integers(groups, size=groups), minlength=groups)
    return drawn


def holm(p: pd.Series) -> pd.Series:
    """Correct p values for their number by Holm's method; missing ones stay missing."""
    known = p.dropna().sort_values()
    factors = np.arange(len(known), 0, -1)
    return (known * factors).cummax().clip(upper=1.0).reindex(p.index)
