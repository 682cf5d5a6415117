"""Score a checkpoint on labelled posts: what `evaluate_checkpoint.py` and `quantize.py` share."""

import tempfile
from dataclasses import replace
from typing import Any

import datasets
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments

from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data.collator import PostCollator
from clipcacg.scripts.data.errors import InputError, add_debug_flag, parse_flags
from clipcacg.scripts.data.labels import label_names
from clipcacg.scripts.data.loading import DataArguments, load_posts
from clipcacg.scripts.training.arguments import names_data
from clipcacg.scripts.training.metrics import load_metric, score


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
    model: ClipCaCgForSequenceClassification, data_arguments: DataArguments, split: str
) -> datasets.Dataset:
    """Load the posts of one split, with the model's own label indices.

    Raises:
        InputError: If there is no such split, or the labels of the model and of the data differ.
    """
    posts = load_posts(replace(data_arguments, use_conflicting_posts=False), model.config.modality)
    if split not in posts:
        raise InputError(f"There is no post in the split {split!r}. Allowed: {', '.join(posts)}.")
    names = label_names(posts[split])
    known = model.config.label_names
    if (names is None) != (model.config.task == "regression"):
        raise InputError("The model and the data do not fit: one has classes, the other numbers.")
    if names is not None and not set(names) <= set(known):
        raise InputError(f"The data has the labels {', '.join(names)}, the model {', '.join(known)}.")
    if names is None or names == known:
        return posts[split]
    return posts[split].align_labels_with_mapping({name: index for index, name in enumerate(known)}, "label")


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
        output = trainer.predict(posts)
    return score(output.predictions, output.label_ids, load_metric(names is None), names)
