"""Score a checkpoint on labelled posts.

    python scripts/evaluate_checkpoint.py outputs/sample                                     # the drawn sample
    python scripts/evaluate_checkpoint.py CHECKPOINT --data_dir MVSA_Single                  # the whole folder
    python scripts/evaluate_checkpoint.py CHECKPOINT --data_dir MVSA_Single --splits clmlf --split test

prints a table, and writes the scores to `--output` and the confusion matrix to a PNG beside it.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from transformers import HfArgumentParser, Trainer, TrainingArguments

from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data.collator import PostCollator
from clipcacg.scripts.data.loading import DataArguments, label_names, load_posts, one_sentence
from clipcacg.scripts.reporting.plots import plot_confusion_matrix
from clipcacg.scripts.reporting.tables import results_table
from clipcacg.scripts.training.metrics import load_metric, score
from clipcacg.scripts.training.run import set_up_logging


@dataclass
class EvaluationArguments:
    """What to score, and where the scores go."""

    split: str = field(default="test", metadata={"help": "train, validation or test."})
    output: str = field(default="results.json", metadata={"help": "JSON file of the scores; its PNG lies beside it."})
    batch_size: int = field(default=64, metadata={"help": "Posts at a time, per device."})


def parse_arguments(argv: list[str]) -> tuple[str, DataArguments, EvaluationArguments]:
    parser = HfArgumentParser((DataArguments, EvaluationArguments), description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="Folder or Hub name of a trained model.")
    if any(word.startswith(("--data_dir", "--dataset_name")) for word in argv):
        parser.set_defaults(splits=None)
    data_arguments, arguments, rest = parser.parse_args_into_dataclasses(argv)
    return rest.checkpoint, data_arguments, arguments


def labelled_posts(
    model: ClipCaCgForSequenceClassification, data_arguments: DataArguments, split: str
) -> datasets.Dataset:
    """The posts to score, with labels numbered as the model numbers them.

    Raises:
        ValueError: If there is no such split, or the model and the data do not have the same labels.
    """
    posts = load_posts(data_arguments, model.config.modality)
    if split not in posts:
        raise ValueError(f"There is no post in the split {split!r}; there are some in {', '.join(posts)}.")
    names, known = label_names(posts), [model.config.id2label[index] for index in range(model.config.num_labels)]
    if (names is None) != (model.config.task == "regression"):
        raise ValueError("The model and the data do not go together: one has classes, the other numbers.")
    if names is not None and not set(names) <= set(known):
        raise ValueError(f"The data has the labels {', '.join(names)}, the model {', '.join(known)}.")
    if names is None or names == known:
        return posts[split]
    return posts[split].align_labels_with_mapping({name: index for index, name in enumerate(known)}, "label")


def evaluate_posts(
    model: ClipCaCgForSequenceClassification,
    processor: ClipCaCgProcessor,
    posts: datasets.Dataset,
    arguments: EvaluationArguments,
) -> dict[str, Any]:
    """All scores of our metric; see `sentiment_metrics`."""
    names = label_names({"": posts})
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_eval_batch_size=arguments.batch_size,
                remove_unused_columns=False,
                dataloader_pin_memory=torch.cuda.is_available(),
                report_to="none",
                use_cpu=not torch.accelerator.is_available(),
            ),
            data_collator=PostCollator(processor, model.config),
        )
        output = trainer.predict(posts)
    return score(output.predictions, output.label_ids, load_metric(names is None), names)


def main(argv: list[str] | None = None) -> None:
    # Without an accelerator processes find one another only if the CPU is asked for.
    state = PartialState(cpu=not torch.accelerator.is_available())
    set_up_logging(state.is_main_process)
    with one_sentence():
        checkpoint, data_arguments, arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        model = ClipCaCgForSequenceClassification.from_pretrained(checkpoint)
        processor = ClipCaCgProcessor.from_pretrained(checkpoint)
        posts = labelled_posts(model, data_arguments, arguments.split)
        scores = evaluate_posts(model, processor, posts, arguments)
    if not state.is_main_process:
        return
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"split": arguments.split, "posts": len(posts), **scores}, indent=2) + "\n")
    if "confusion_matrix" in scores:
        plot_confusion_matrix(scores["confusion_matrix"], label_names({"": posts}), output.with_suffix(".png"))
    print(results_table(scores, label_names({"": posts})))


if __name__ == "__main__":
    main()
