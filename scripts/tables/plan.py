"""Which runs a command makes: nested trials for every row and fold, and what `runs.jsonl` already has."""

import logging
import subprocess
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from clipcacg.scripts.baselines.logistic_regression import MODALITIES
from clipcacg.scripts.data.lines import append_line, read_lines, short_hash
from clipcacg.scripts.tables.lines import PREDICTIONS_FILE, RUNS_FILE, read_predictions
from clipcacg.scripts.tables.rendering import write_tables
from clipcacg.scripts.tables.rows import ROWS, WORD_VECTORS, ReproduceArguments, Settings, folds_of
from clipcacg.scripts.tables.runs import Fold, load_fold
from clipcacg.scripts.tables.workers import Outcome, make_runs
from clipcacg.scripts.training.metrics import load_metric, score

logger = logging.getLogger(__name__)


class Plan:
    """The runs of every row and fold, in order, and the results folder that they are written to.

    Selection is nested. On every fold each row tries its grid with the first seed, and the values with the best
    accuracy on that fold's validation posts serve the runs of that row and fold. The best trial is itself the run of
    the first seed. A trial's line has no test scores, so no choice can depend on them.

    Source: our choice. The mean over the validation parts of all folds would be less noisy, but nearly every post of
    a fold's test part is in the validation part of another fold, so test posts would choose their own settings.

    Args:
        own: Which runs to make.
        settings: The config of all rows.
        folds: The posts of every fold. Their `facts` identify them below.
    """

    def __init__(self, own: ReproduceArguments, settings: Settings, folds: Sequence[Fold]) -> None:
        self.folder, self.settings, self.own, self.seeds = Path(settings.training.output_dir), settings, own, own.seeds
        self.configs = {name: settings.describe(name) for name in ROWS}
        self.hashes = {name: short_hash(config) for name, config in self.configs.items()}
        self.trials = {name: settings.trials(name) for name in ROWS}
        self.trial_counts = {name: len(trials) for name, trials in self.trials.items()}
        self.trial_counts |= {f"regression_{modality}": len(settings.choices_of_c()) for modality in MODALITIES}
        names = own.row_names()
        if "text_label" not in folds[0].posts["train"].column_names:
            with_heads = [name for name in names if settings.for_row(name).model.use_modality_heads]
            names = [name for name in names if name not in with_heads]
            for name in with_heads:
                logger.warning("%s is skipped: the posts have no labels of text and image alone", name)
        self.cells = [(name, fold.facts) for fold in folds for name in names]  # those that may lack a run
        self.commit, self.failed = commit(), set[str]()
        self.in_progress = set[str]()
        self.seconds: dict[str, list[float]] = defaultdict(list)  # row to what its runs took
        self.done: dict[str, dict[str, Any]] = {}  # run to its line
        known = [line for line in read_lines(self.folder / RUNS_FILE) if "error" not in line]
        predictions = read_predictions(self.folder).keys()
        for line in known:
            if line["run"] in predictions:
                self.done[line["run"]] = line
                self.seconds[line["row"]].append(line["seconds"])
        if lost := len(known) - len(self.done):
            logger.warning(
                "%d runs of %s are made again, because predictions.jsonl beside it lacks them or is of an older form",
                lost,
                self.folder / RUNS_FILE,
            )

    def missing(self, name: str, fold: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the lines of the runs that can be made now: of trials first, and then of all seeds.

        Choosing is part of this, since it takes no run: it writes the line of the first seed.
        """
        seeds: list[int | None] = [None] if ROWS[name].floor else [*self.seeds]  # floors are deterministic
        trials, values = self.trials[name], self.trials[name][0]
        if len(trials) > 1:
            lines = [self.line(name, fold, seeds[0], values, is_trial=True) for values in trials]
            if unknown := self.unknown(lines):
                return unknown
            values = self.choose(name, fold, lines)
            if values is None:
                return []
        return self.unknown([self.line(name, fold, seed, values) for seed in seeds])

    def unknown(self, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [line for line in lines if line["run"] not in self.done and line["run"] not in self.failed]

    def choose(self, name: str, fold: dict[str, Any], lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """Return the values with the best validation accuracy, the first in a tie; None if every trial failed."""
        finished = [self.done[line["run"]] for line in lines if line["run"] in self.done]
        run = self.line(name, fold, self.seeds[0], lines[0]["values"])
        if not finished:
            if run["run"] not in self.failed:
                self.write_error(run, "every trial failed")
            return None
        best = max(finished, key=lambda line: line["metrics"]["validation"]["accuracy"])
        run = self.line(name, fold, self.seeds[0], best["values"]) | {"commit": best["commit"]}
        if run["run"] not in self.done:
            predictions = read_predictions(self.folder)[best["run"]]
            names = list(best["metrics"]["validation"]["per_class"])
            answers = np.eye(len(names))[predictions["prediction"]], np.asarray(predictions["label"])
            scores = {fold["measured"]: score(*answers, load_metric(), names)}
            facts = {key: best[key] for key in best.keys() - run.keys()} | {"metrics": scores | best["metrics"]}
            self.write(run, facts, {key: value for key, value in predictions.items() if key != "run"})
        return best["values"]

    def line(
        self, name: str, fold: dict[str, Any], seed: int | None, values: dict[str, Any], is_trial: bool = False
    ) -> dict[str, Any]:
        """Return what is known before a run starts. Its `run` is a hash of everything that identifies it."""
        notes = []
        key = {"kind": "trial" if is_trial else "run", "row": name, "seed": seed, "values": values}
        key |= {"config_hash": self.hashes[name]}
        key |= {part: fold[part] for part in ("protocol", "fold", "data_hash")}
        if name in WORD_VECTORS and self.settings.word_vectors:
            notes.append(f"text encoder: {Path(self.settings.word_vectors).name}")
        facts = {
            "trials": self.trial_counts[name],
            "notes": notes,
            "commit": self.commit,
            "config": self.configs[name],
        }
        return {"run": short_hash(key), **key, **fold, **facts} | ({"measured": "validation"} if is_trial else {})

    def next_line(self) -> dict[str, Any] | None:
        """Return the line of the next run; None if all are made or in progress."""
        for cell in list(self.cells):
            lines = self.missing(*cell)
            if not lines:
                self.cells.remove(cell)
                if self.cells and cell[1] not in [fold for _, fold in self.cells]:
                    self.write_tables()
            for line in lines:
                if line["run"] not in self.in_progress:
                    self.in_progress.add(line["run"])
                    return line
        return None

    def record(self, line: dict[str, Any], outcome: Outcome) -> None:
        """Write the result of a run, and log it with the time that the others will take."""
        self.in_progress.remove(line["run"])
        parts = [f"{line['row']},", line["kind"], *(f"{key} {line[key]}" for key in ("fold", "seed") if line[key])]
        what = " ".join([*parts, *(f"{key} {value}" for key, value in line["values"].items())])
        if outcome.error:
            logger.error("%s failed: %s\n%s", what, outcome.error, outcome.traceback)
            self.write_error(line, outcome.error)
            return
        found, is_trial = outcome.found, line["kind"] == "trial"
        scores = {part: value for part, value in found["metrics"].items() if part == "validation" or not is_trial}
        self.write(line, found | {"metrics": scores}, outcome.predictions)
        self.seconds[line["row"]].append(outcome.seconds)
        accuracies = ", ".join(f"{split} {value['accuracy']:.4f}" for split, value in scores.items())
        logger.info("%s: accuracy %s in %.0f seconds; %s", what, accuracies, outcome.seconds, self.time_left())

    def write(self, line: dict[str, Any], found: dict[str, Any], predictions: dict[str, list]) -> None:
        append_line(self.folder / PREDICTIONS_FILE, {"run": line["run"], **predictions})
        append_line(self.folder / RUNS_FILE, line | found)  # last, because it marks the run as done
        self.done[line["run"]] = line | found

    def write_error(self, line: dict[str, Any], error: str) -> None:
        self.failed.add(line["run"])
        append_line(self.folder / RUNS_FILE, line | {"error": error})

    def write_tables(self) -> list[Path]:
        return write_tables(self.folder, ROWS, self.hashes, self.own.table, self.own.smoke, self.own.reference)

    def runs_per_fold(self, name: str) -> int:
        """Number of runs of a row on a fold, trials included. The best trial is the run of the first seed."""
        return 1 if ROWS[name].floor else len(self.trials[name]) + len(self.seeds) - 1

    def left(self) -> Counter[str]:
        """Number of runs that each row still needs, those in progress included."""
        counts: Counter[str] = Counter()
        for name, fold in self.cells:
            lines = self.missing(name, fold)
            # What the trials will choose is not known yet, but the number of further seeds is.
            further = len(self.seeds) - 1 if lines and lines[0]["kind"] == "trial" else 0
            counts[name] += len(lines) + further
        return counts

    def announce(self) -> None:
        """Log how many runs the command makes."""
        folds, seeds, terms = len({fold["fold"] for _, fold in self.cells}), len(self.seeds), Counter[str]()
        for name, _ in self.cells[: len(self.cells) // folds]:
            parts = [plural(len(self.trials[name]), "trial"), plural(seeds - 1, "more seed")]
            if ROWS[name].floor:
                terms["1 run"] += 1
            elif len(self.trials[name]) == 1:
                terms[plural(seeds, "seed")] += 1
            else:
                terms[f"({' + '.join(parts)})" if seeds > 1 else parts[0]] += 1
        shown = [f"{plural(count, 'row')} x {plural(folds, 'fold')} x {term}" for term, count in terms.items()]
        total, left = sum(self.runs_per_fold(name) for name, _ in self.cells), self.left().total()
        logger.info("%s = %d runs: %d done, %d left", " + ".join(shown), total, total - left, left)

    def time_left(self) -> str:
        """Estimate the time that the runs left will take, from the mean of each row's runs, or of all runs."""
        counts, every = self.left(), np.mean(np.concatenate(list(self.seconds.values())))
        if not counts.total():
            return "no run left"
        means = {name: np.mean(self.seconds[name]) if self.seconds.get(name) else every for name in counts}
        seconds = sum(count * means[name] for name, count in counts.items()) / self.own.jobs
        return f"runs left: {counts.total()}, about {timedelta(seconds=round(seconds))}"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


def commit() -> str | None:
    """The commit of this code, marked "-dirty" if files have changed; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def reproduce(own: ReproduceArguments, settings: Settings) -> tuple[list[Path], int]:
    """Make all runs that are missing, and write the tables after each fold.

    Returns:
        The Markdown files of the tables, and the number of runs that failed.

    Raises:
        InputError: If the posts cannot be loaded or have no classes, or the folds do not exist.
    """
    folds = [load_fold(number, settings) for number in folds_of(own, settings.data)]
    plan = Plan(own, settings, folds)
    plan.announce()
    with closing(make_runs(plan.next_line, settings, folds[0], own.jobs)) as results:
        for line, outcome in results:
            plan.record(line, outcome)
    return plan.write_tables(), len(plan.failed)
