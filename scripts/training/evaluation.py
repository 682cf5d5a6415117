"""Score a model on labelled posts: what `train.py`, `evaluate_checkpoint.py` and `quantize.py` share."""

import tempfile
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor, is_blank
from clipcacg.scripts.data.collator import PostCollator, leave_out_unreadable
from clipcacg.scripts.data.errors import InputError, add_debug_flag, parse_flags
from clipcacg.scripts.data.faults import Faults
from clipcacg.scripts.data.labels import align, label_names, task_of
from clipcacg.scripts.data.loading import DataArguments, load_posts
from clipcacg.scripts.training.arguments import names_data
from clipcacg.scripts.training.calibration import accuracy_by_coverage, answers, calibration, confidences
from clipcacg.scripts.training.metrics import load_metric, score
from clipcacg.scripts.training.trainer import show_posts


def parse_arguments(argv: list[str], own: type, description: str) -> tuple[str, DataArguments, Any]:
    """Read the command line `CHECKPOINT [flags]`; data that the flags name is one test split by default.

    Args:
        argv: Words of the command line.
        own: Dataclass of the command's own flags.
        description: First line of its help.

    Returns:
        The checkpoint, the data's flags, and the command's own as an instance of `own`.

    Raises:
        InputError: If a flag is unknown or cannot be used.
    """
    parser = HfArgumentParser((DataArguments, own), description=description)
    parser.add_argument("checkpoint", help="Folder or Hub name of a trained model.")
    add_debug_flag(parser)
    if names_data(argv):
        parser.set_defaults(splits=None)
    data_arguments, arguments, rest = parse_flags(parser, argv)
    return rest.checkpoint, data_arguments, arguments


def labelled_posts(
    model: ClipCaCgForSequenceClassification,
    processor: ClipCaCgProcessor,
    data_arguments: DataArguments,
    split: str,
    faults: Faults | None = None,
) -> datasets.Dataset:
    """Load the posts of one split, with the model's own label indices; `faults` takes the posts that are left out.

    Raises:
        InputError: If there is no such split, the labels of the model and of the data differ, or a row is bad.
    """
    if data_arguments.streaming:
        raise InputError("--streaming is for train.py and predict.py: leave it out.")
    task = "regression" if model.config.task == "regression" else "classification"
    if data_arguments.task not in ("auto", task):
        raise InputError(f"--task {data_arguments.task}: the checkpoint was trained for {task}; leave the flag out.")
    if data_arguments.dataset_name:
        data_arguments = replace(data_arguments, task=task)
    data_arguments = replace(data_arguments, use_conflicting_posts=False)
    faults = Faults(data_arguments.on_error) if faults is None else faults
    may_lack = model.config.modality_dropout > 0
    posts = load_posts(data_arguments, model.config.modality, model.config, faults, may_lack)
    if split not in posts:
        raise InputError(f"There is no post in the split {split!r}. Allowed: {', '.join(posts)}.")
    found = task_of(posts[split])
    if found != model.config.task:
        described = {
            "regression": "values",
            "single_label_classification": "one class per post",
            "multi_label_classification": "lists of labels",
        }
        raise InputError(f"The data has {described[found]}, the model predicts {described[model.config.task]}.")
    readable = leave_out_unreadable(posts[split], PostCollator(processor, model.config), faults, f"the {split} split")
    return align(readable, model.config.label_names)


def predict_posts(
    model: ClipCaCgForSequenceClassification, processor: ClipCaCgProcessor, posts: datasets.Dataset, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits (posts, labels) and the true labels."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_eval_batch_size=batch_size,
                remove_unused_columns=False,
                dataloader_pin_memory=torch.cuda.is_available(),
                report_to="none",
                use_cpu=not torch.accelerator.is_available(),
            ),
            data_collator=PostCollator(processor, model.config),
        )
        show_posts(trainer)
        output = trainer.predict(posts)
    return output.predictions, output.label_ids


def all_scores(
    logits: np.ndarray,
    labels: np.ndarray,
    posts: datasets.Dataset,
    config: ClipCaCgConfig,
    chosen: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return everything that an evaluation says of a split.

    Args:
        logits: (posts, labels).
        labels: (posts,) class indices or values; (posts, labels) of 0 and 1 for several labels per post.
        posts: The posts.
        config: Config of the model.
        chosen: What `choose_min_confidence` chose on the validation split, if it was asked to.

    Returns:
        The metric's scores, see `sentiment_metrics`; for classes `calibration`; for one label per post
        `accuracy_by_coverage`; with `chosen` also `selective`, see `answers`; and where posts lack a side, `by_kind`:
        number and main scores of each kind of posts.
    """
    metric, names = load_metric(config.task), label_names(posts)
    scores = score(logits, labels, metric, names, config)
    if config.task != "regression":
        scores["calibration"] = calibration(logits, labels, config)
    if config.task == "single_label_classification":
        scores["accuracy_by_coverage"] = accuracy_by_coverage(*confidences(logits, labels, config))
    if chosen is not None:
        scores["selective"] = answers(logits, labels, config, chosen)
    kinds = np.array(kinds_of_posts(posts) if config.modality_dropout else [])
    if (kinds != "complete").any():
        scores["by_kind"] = {}
        for kind in sorted(set(kinds)):
            rows = np.flatnonzero(kinds == kind)
            of_kind = score(logits[rows], labels[rows], metric, names, config)
            main = {name: value for name, value in of_kind.items() if isinstance(value, float)}
            scores["by_kind"][str(kind)] = {"posts": len(rows), **main}
    return scores


def kinds_of_posts(posts: datasets.Dataset) -> list[str]:
    """Return "complete", "image only" or "text only" for each post."""
    return [
        "text only" if row["image"] is None else "image only" if is_blank(row["text"]) else "complete"
        for row in posts.select_columns(["image", "text"])
    ]
