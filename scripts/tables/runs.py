"""Train the rows of the tables, score them, and append each run to the results folder."""

import gc
import hashlib
import logging
import subprocess
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, set_seed

from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.baselines import SYSTEMS
from clipcacg.scripts.baselines.logistic_regression import CHOICES, fit, majority, pooled_features
from clipcacg.scripts.baselines.sentibank_sentistrength import LexiconCollator, SentiBankSentiStrength
from clipcacg.scripts.data.collator import PostCollator
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.features import add_digests, cache_features, frozen_backbones
from clipcacg.scripts.data.loading import DataArguments, label_names, load_posts
from clipcacg.scripts.data.mvsa import labelled
from clipcacg.scripts.reporting.model_card import DATA_TITLES
from clipcacg.scripts.reporting.run_facts import hardware_name
from clipcacg.scripts.tables.lines import PREDICTIONS_FILE, RUNS_FILE, append_line, read_lines
from clipcacg.scripts.tables.rendering import write_tables
from clipcacg.scripts.tables.rows import ROWS, WORD_VECTORS, ReproduceArguments, Settings, folds_of, short_hash
from clipcacg.scripts.training.averaging import KeepBest, load_average
from clipcacg.scripts.training.metrics import load_metric, score
from clipcacg.scripts.training.record import data_kind, split_name, split_settings
from clipcacg.scripts.training.run import (
    adapt_to_data,
    backbone_names,
    build,
    choose_combination,
    compute_features,
    label_fields,
    limit_and_freeze,
    make_trainer,
    set_loss,
)

logger = logging.getLogger(__name__)


@dataclass
class Fold:
    """The posts of one fold, which all rows share; `number` is None for a protocol without folds."""

    number: int | None
    posts: datasets.DatasetDict
    settings: Settings

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a run's line says about its posts."""
        kind = data_kind(self.settings.data, self.posts)
        return {
            "data": DATA_TITLES.get(kind) or Path(self.settings.data.dataset_name).name,
            "protocol": protocol(self.settings.data, self.posts),
            "fold": self.number,
            "data_hash": self.hash(),
            "posts": {split: len(dataset) for split, dataset in self.posts.items()},
            "published_on": kind.replace("-", "_"),
        }

    def hash(self) -> str:
        """Digest of ids, labels, texts and image bytes, by split and in order."""
        digest = hashlib.sha256()
        for split, dataset in sorted(self.posts.items()):
            columns = ["id", "label", "text_digest", "image_digest"]
            for row in dataset.select_columns(columns):
                digest.update(" ".join([split, *(str(row[column]) for column in columns)]).encode())
        return digest.hexdigest()[:16]

    @property
    def measured(self) -> str:
        return "test" if "test" in self.posts else "validation"

    @cached_property
    def pooled(self) -> tuple[dict[str, np.ndarray], int, int]:
        """Pooled features (posts, text + image width) per split, the text width, and the encoders' parameters."""
        settings = self.settings.for_row("regression_both")
        model, processor = build_system("concatenation", settings, label_names(self.posts["train"]))
        model.freeze_backbones(True, True, True)
        device, workers = settings.training.device, settings.training.dataloader_num_workers
        posts = datasets.DatasetDict({split: labelled(dataset) for split, dataset in self.posts.items()})
        posts, stores = cache_features(
            model, processor, posts, settings.model.cache_dtype, device=device, num_workers=workers
        )
        collate, pooled = PostCollator(processor, model.config, stores), {}
        for split, dataset in posts.items():
            batches = DataLoader(dataset, batch_size=64, collate_fn=collate, num_workers=workers)
            names = ("text_features", "attention_mask", "image_features")
            pooled[split] = np.concatenate([pooled_features(*(batch[name] for name in names)) for batch in batches])
        encoders = sum(sizes(encoder)["total"] for encoder in model.backbones().values())
        return pooled, model.config.text_config.hidden_size, encoders


def load_fold(number: int | None, settings: Settings) -> Fold:
    """Load the posts of a fold.

    Raises:
        InputError: If the posts have no classes, or no training or validation split.
    """
    if number is not None:
        settings = replace(settings, data=replace(settings.data, splits=f"cheema:{number}"))
    posts = load_posts(settings.data)
    if not {"train", "validation"} <= posts.keys():
        raise InputError(f"reproduce.py needs the splits train and validation, got {', '.join(posts)}.")
    if label_names(posts["train"]) is None:
        raise InputError("reproduce.py needs posts with classes, and these labels are numbers.")
    for column in ("text", "image"):
        posts = datasets.DatasetDict({split: add_digests(dataset, column) for split, dataset in posts.items()})
    return Fold(number, posts, settings)


def protocol(data: DataArguments, posts: datasets.DatasetDict) -> str:
    """Name the way the posts were split. Runs of one protocol share a section of a table, folds included."""
    split = split_name(data, posts)
    parts = ["folds of cheema" if split.startswith("cheema:") else f"split {Path(split).name}"]
    for name, value in split_settings(data).items():
        parts.append(name.replace("_", " ") + ("" if value is True else f" {value}"))
    return ", ".join(parts)


def build_system(name: str, settings: Settings, names: list[str]) -> tuple[PreTrainedModel, ClipCaCgProcessor]:
    """Build one of the other systems and its processor, as `training.run.build` builds ours."""
    backbones = backbone_names(settings.model, settings.data.is_sample)
    fields = {**settings.systems.get(name, {}), **label_fields(names), **settings.model.head_fields()}
    fields["dropout"] = settings.model.dropout
    model = SYSTEMS[name].from_backbones(**backbones, **fields)
    processor = ClipCaCgProcessor.from_backbones(**backbones)
    limit_and_freeze(model, processor, settings.model)
    return model, processor


def train_row(name: str, settings: Settings, seed: int, posts: datasets.DatasetDict) -> dict[str, Any]:
    """Train a row and predict the posts of the other splits.

    Returns:
        `logits`: split to (posts, labels); `parameters`: see `sizes`; `seconds` of training; `best_epoch`;
        `combination`, the model's `modality_combination`; with `--average_checkpoints` what `load_average` returns.
    """
    training, system = settings.training, ROWS[name].system
    training.seed = seed
    set_seed(seed)
    adapt_to_data(training, posts, settings.model.modality)
    if system:
        model, processor = build_system(system, settings, label_names(posts["train"]))
    else:
        model, processor = build(settings.model, settings.data.is_sample, label_names(posts["train"]))
    set_loss(model, training, settings.model, posts["train"])
    features = None
    if frozen_backbones(model):
        posts, features = compute_features(training, settings.model, model, processor, posts)
    trainer = make_trainer(training, model, processor, posts, features)
    trainer.remove_callback(PrinterCallback)
    if isinstance(model, SentiBankSentiStrength):
        trainer.data_collator = LexiconCollator(trainer.data_collator)
    kept = KeepBest(max(1, training.average_checkpoints))
    trainer.add_callback(kept)
    seconds = trainer.train().metrics["train_runtime"]
    averaging = load_average(trainer, kept.best)
    choose_combination(trainer, posts, settings.model.modality_combination)
    logits = {split: trainer.predict(posts[split]).predictions for split in posts if split != "train"}
    found = {"logits": logits, "parameters": sizes(model), "seconds": seconds, "best_epoch": kept.best[0].epoch}
    found |= {"combination": model.config.modality_combination}
    return found | (averaging if training.average_checkpoints > 1 else {})


def sizes(model: PreTrainedModel) -> dict[str, int]:
    """Number of trainable and of all parameters."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {"trainable": sum(n for n, trained in counts if trained), "total": sum(n for n, _ in counts)}


def fit_floor(name: str, fold: Fold) -> dict[str, Any]:
    """Fit a floor and return what `train_row` returns; the logits are one-hot."""
    posts, floor = fold.posts, ROWS[name].floor
    labels = {split: np.asarray(labelled(dataset)["label"]) for split, dataset in posts.items()}
    others, parameters, start = [split for split in posts if split != "train"], 0, time.perf_counter()
    if floor == "majority":
        answers, encoders = {split: majority(labels["train"], len(posts[split])) for split in others}, 0
    else:
        pooled, width, encoders = fold.pooled
        part = {"text": slice(width), "image": slice(width, None), "both": slice(None)}[floor]
        features, start = {split: states[:, part] for split, states in pooled.items()}, time.perf_counter()
        pipeline = fit(features["train"], labels["train"], features["validation"], labels["validation"])
        answers = {split: pipeline.predict(features[split]) for split in others}
        parameters = pipeline[-1].coef_.size + pipeline[-1].intercept_.size
    return {
        "logits": {split: np.eye(len(label_names(posts["train"])))[answer] for split, answer in answers.items()},
        "parameters": {"trainable": parameters, "total": parameters + encoders},
        "seconds": time.perf_counter() - start,
        "best_epoch": None,
    }


def run(name: str, fold: Fold, settings: Settings, seed: int | None, measured: str) -> tuple[dict[str, Any], Any]:
    """Make one run: train it, and score the validation split and the measured one.

    Returns:
        What its line says about it, and id, label and prediction of the measured posts.
    """
    wanted = {split: fold.posts[split] for split in ("train", "validation", measured)}
    if seed is None:
        found = fit_floor(name, fold)
    else:
        found = train_row(name, settings, seed, datasets.DatasetDict(wanted))
    metric, names, logits = load_metric(regression=False), label_names(fold.posts["train"]), found.pop("logits")
    labels = {split: np.asarray(fold.posts[split]["label"]) for split in logits}
    found["metrics"] = {split: score(logits[split], labels[split], metric, names) for split in logits}
    found["hardware"] = hardware_name(settings.training)
    predictions = logits[measured].argmax(axis=-1).tolist()
    posts = {"id": list(fold.posts[measured]["id"]), "label": labels[measured].tolist(), "prediction": predictions}
    return found, posts


class Runner:
    """Make runs one after the other, and skip those that `runs.jsonl` already has."""

    def __init__(self, own: ReproduceArguments, settings: Settings) -> None:
        self.folder, self.settings, self.failed = Path(settings.training.output_dir), settings, 0
        self.seeds = [settings.training.seed + number for number in range(own.seeds)]
        self.hashes = {name: short_hash(settings.describe(name)) for name in ROWS}
        self.chosen: dict[str, dict[str, Any] | None] = {}
        self.lines = {line["run"]: line for line in read_lines(self.folder / RUNS_FILE) if "error" not in line}
        self.commit = commit()

    def row(self, name: str, fold: Fold) -> None:
        """Make all runs of a row on a fold, after its trials on the first one."""
        floor = ROWS[name].floor
        columns = fold.posts["train"].column_names
        if self.settings.for_row(name).model.use_modality_heads and "text_label" not in columns:
            logger.warning("%s is skipped: the posts have no labels of text and image alone", name)
            return
        if name not in self.chosen:
            self.chosen[name] = {} if floor else self.choose(name, fold)
        if self.chosen[name] is not None:
            for seed in [None] if floor else self.seeds:  # floors are deterministic
                self.once(name, fold, seed, self.chosen[name])

    def choose(self, name: str, fold: Fold) -> dict[str, Any] | None:
        """Return the values with the best validation accuracy, the first in a tie; None if every trial failed."""
        trials = self.settings.trials()
        lines = [self.once(name, fold, self.seeds[0], values, is_trial=True) for values in trials]
        scores = [-1 if line is None else line["metrics"]["validation"]["accuracy"] for line in lines]
        if not trials:
            return {}
        return None if max(scores) < 0 else trials[int(np.argmax(scores))]

    def once(
        self, name: str, fold: Fold, seed: int | None, values: dict[str, Any], is_trial: bool = False
    ) -> dict[str, Any] | None:
        """Return the line of a run, which is made if it is missing; None if it fails, which writes a line too."""
        line = self.start_of_line(name, fold, seed, values, is_trial)
        if line["run"] in self.lines:
            return self.lines[line["run"]]
        described = [
            f"{name},",
            line["kind"],
            *(f"{key} {line[key]}" for key in ("fold", "seed") if line[key] is not None),
        ]
        what = " ".join([*described, *(f"{key} {value}" for key, value in values.items())])
        try:
            found, posts = run(name, fold, self.settings.for_row(name, values), seed, line["measured"])
        except Exception as error:  # one failed run must not end the others
            logger.exception("%s failed", what)
            self.failed += 1
            append_line(self.folder / RUNS_FILE, line | {"error": f"{type(error).__name__}: {error}"})
            return None
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        if not is_trial:
            append_line(self.folder / PREDICTIONS_FILE, {"run": line["run"], **posts})
        append_line(self.folder / RUNS_FILE, line | found)  # last, because it marks the run as done
        accuracies = ", ".join(f"{split} {scores['accuracy']:.4f}" for split, scores in found["metrics"].items())
        logger.info("%s: accuracy %s in %.1f seconds", what, accuracies, found["seconds"])
        return self.lines.setdefault(line["run"], line | found)

    def start_of_line(
        self, name: str, fold: Fold, seed: int | None, values: dict[str, Any], is_trial: bool
    ) -> dict[str, Any]:
        """Return what is known before a run starts. Its `run` is a hash of everything that identifies it."""
        row, notes, trials = ROWS[name], [], len(self.settings.trials()) or 1
        key = {"kind": "trial" if is_trial else "run", "row": name, "seed": seed, "values": values}
        key |= {"config_hash": self.hashes[name]}
        key |= {part: fold.facts[part] for part in ("protocol", "fold", "data_hash")}
        if name in WORD_VECTORS and self.settings.word_vectors:
            notes.append(f"text encoder: {Path(self.settings.word_vectors).name}")
        if row.floor:
            trials = 0 if row.floor == "majority" else len(CHOICES)
        facts = {"measured": "validation" if is_trial else fold.measured, "trials": trials, "notes": notes}
        config = {"commit": self.commit, "config": self.settings.describe(name)}
        return {"run": short_hash(key), **key, **fold.facts, **facts, **config}


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
    runner, tables = Runner(own, settings), []
    for number in folds_of(own, settings.data):
        fold = load_fold(number, settings)
        logger.info("%s, %s: %s", fold.facts["data"], fold.facts["protocol"], fold.facts["posts"])
        for name in own.row_names():
            runner.row(name, fold)
        tables = write_tables(runner.folder, ROWS, runner.hashes, own.table, own.smoke)
    return tables, runner.failed
