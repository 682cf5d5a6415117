"""Score a checkpoint on labelled posts: what `evaluate_checkpoint.py` and `quantize.py` share."""

import tempfile
from dataclasses import replace
from typing import Any

import datasets
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments

from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data.collator import PostCollator, leave_out_unreadable
from clipcacg.scripts.data.errors import InputError, add_debug_flag, parse_flags
from clipcacg.scripts.data.faults import Faults
from clipcacg.scripts.data.labels import align, label_names, task_of
from clipcacg.scripts.data.loading import DataArguments, load_posts
from clipcacg.scripts.training.arguments import names_data
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


def evaluate_posts(
    model: ClipCaCgForSequenceClassification, processor: ClipCaCgProcessor, posts: datasets.Dataset, batch_size: int
) -> dict[str, Any]:
    """All scores of the metric; see `sentiment_metrics`."""
    names = label_names(posts)
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
    metric = load_metric(model.config.task)
    return score(output.predictions, output.label_ids, metric, names, model.config.label_thresholds)
