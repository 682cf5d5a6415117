"""Load the posts of a fold, train a row of the tables on them, and score it."""

import hashlib
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, set_seed

from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.baselines import SYSTEMS
from clipcacg.scripts.baselines.logistic_regression import fit, majority, pooled_features
from clipcacg.scripts.baselines.sentibank_sentistrength import LexiconCollator, SentiBankSentiStrength
from clipcacg.scripts.data.checks import bad_posts
from clipcacg.scripts.data.collator import PostCollator
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.faults import Faults
from clipcacg.scripts.data.features import add_digests, cache_features, frozen_backbones
from clipcacg.scripts.data.labels import check_classes, label_fields, label_names, task_of
from clipcacg.scripts.data.loading import DataArguments, load_posts
from clipcacg.scripts.data.mvsa import labelled
from clipcacg.scripts.data.splitting import duplicate_keys
from clipcacg.scripts.reporting.model_card import DATA_TITLES
from clipcacg.scripts.reporting.run_facts import hardware_name
from clipcacg.scripts.tables.rows import ROWS, Settings
from clipcacg.scripts.training.averaging import KeepBest, load_average
from clipcacg.scripts.training.metrics import load_metric, score
from clipcacg.scripts.training.record import data_kind, split_name, split_settings
from clipcacg.scripts.training.run import (
    adapt_to_data,
    backbone_names,
    build,
    choose_combination,
    compute_features,
    limit_and_freeze,
    make_trainer,
    set_loss,
)


@dataclass
class Fold:
    """The posts of one fold, which all rows share; `number` is None for a protocol without folds."""

    number: int | None
    posts: datasets.DatasetDict
    settings: Settings
    faults: Faults = field(default_factory=Faults)

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
            "measured": self.measured,
            "published_on": kind.replace("-", "_"),
            **({"skipped_posts": len(self.faults.left_out)} if self.faults.left_out else {}),
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
        model, processor = build_system("concatenation", settings, label_fields(self.posts["train"]))
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
        return pooled, model.text_branch.width, encoders


def load_fold(number: int | None, settings: Settings) -> Fold:
    """Load the posts of a fold.

    Raises:
        InputError: If the posts have no classes, or no training or validation split.
    """
    if number is not None:
        settings = replace(settings, data=replace(settings.data, splits=f"cheema:{number}"))
    if settings.data.streaming:
        raise InputError("--streaming is for train.py and predict.py: leave it out.")
    faults = Faults(settings.data.on_error)
    posts = load_posts(settings.data, faults=faults)
    if not {"train", "validation"} <= posts.keys():
        raise InputError(f"reproduce.py needs the splits train and validation, got {', '.join(posts)}.")
    if task_of(posts["train"]) != "single_label_classification":
        raise InputError("reproduce.py needs posts of one class each, and these labels are numbers or lists.")
    if faults.on_error == "skip":  # every row of the tables then has the same posts
        for split, dataset in posts.items():
            posts[split] = faults.leave_out(dataset, bad_posts(dataset, decode=True), f"the {split} split")
        faults.check_share()
    check_classes(posts)
    for column in ("text", "image"):
        posts = datasets.DatasetDict({split: add_digests(dataset, column) for split, dataset in posts.items()})
    return Fold(number, posts, settings, faults)


def protocol(data: DataArguments, posts: datasets.DatasetDict) -> str:
    """Name the way the posts were split. Runs of one protocol share a section of a table, folds included."""
    split = split_name(data, posts)
    parts = ["folds of cheema" if split.startswith("cheema:") else f"split {Path(split).name}"]
    for name, value in split_settings(data).items():
        parts.append(name.replace("_", " ") + ("" if value is True else f" {value}"))
    return ", ".join(parts)


def build_system(name: str, settings: Settings, labels: dict[str, Any]) -> tuple[PreTrainedModel, ClipCaCgProcessor]:
    """Build one of the other systems and its processor, as `training.run.build` builds ours."""
    backbones = {**backbone_names(settings.model, settings.data.is_sample), **settings.model.loading_options()}
    fields = {**settings.systems.get(name, {}), **labels, **settings.model.head_fields()}
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
        model, processor = build_system(system, settings, label_fields(posts["train"]))
    else:
        model, processor = build(settings.model, settings.data.is_sample, label_fields(posts["train"]))
    set_loss(model, training, settings.model, posts["train"])
    features = None
    if (training.augment_views or not training.augment) and frozen_backbones(model):
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
    """Fit a simple baseline and return what `train_row` returns; the logits are one-hot."""
    posts, floor = fold.posts, ROWS[name].floor
    labels = {split: np.asarray(labelled(dataset)["label"]) for split, dataset in posts.items()}
    others, parameters, start = [split for split in posts if split != "train"], 0, time.perf_counter()
    if floor == "majority":
        answers, encoders = {split: majority(labels["train"], len(posts[split])) for split in others}, 0
    else:
        pooled, width, encoders = fold.pooled
        part = {"text": slice(width), "image": slice(width, None), "both": slice(None)}[floor]
        features, start = {split: states[:, part] for split, states in pooled.items()}, time.perf_counter()
        known = [(features[split], labels[split]) for split in ("train", "validation")]
        pipeline = fit(*known[0], *known[1], choices=fold.settings.choices_of_c())
        answers = {split: pipeline.predict(features[split]) for split in others}
        parameters = pipeline[-1].coef_.size + pipeline[-1].intercept_.size
    return {
        "logits": {split: np.eye(len(label_names(posts["train"])))[answer] for split, answer in answers.items()},
        "parameters": {"trainable": parameters, "total": parameters + encoders},
        "seconds": time.perf_counter() - start,
        "best_epoch": None,
    }


def run(name: str, fold: Fold, settings: Settings, seed: int | None) -> tuple[dict[str, Any], dict[str, list]]:
    """Make one run: train it, and score the validation split and the measured one.

    Returns:
        What its line says about it; and id, label, prediction and keys of the measured posts.
    """
    measured = fold.posts[fold.measured]
    wanted = {"train": fold.posts["train"], "validation": fold.posts["validation"], fold.measured: measured}
    if seed is None:
        found = fit_floor(name, fold)
    else:
        found = train_row(name, settings, seed, datasets.DatasetDict(wanted))
    metric, names, logits = load_metric(), label_names(fold.posts["train"]), found.pop("logits")
    labels = {split: np.asarray(fold.posts[split]["label"]) for split in logits}
    found["metrics"] = {split: score(logits[split], labels[split], metric, names) for split in logits}
    found["hardware"] = hardware_name(settings.training)
    return found, {
        "id": list(measured["id"]),
        "label": labels[fold.measured].tolist(),
        "prediction": logits[fold.measured].argmax(axis=-1).tolist(),
        # Digests, since a text itself must not end in the results; 12 digits tell any two posts apart.
        "keys": [
            [hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()[:12] for key in keys]
            for keys in duplicate_keys(measured)
        ],
    }
