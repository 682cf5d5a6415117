"""Score a checkpoint on labelled posts.

    python scripts/evaluate_checkpoint.py outputs/sample                                     # the drawn sample
    python scripts/evaluate_checkpoint.py CHECKPOINT --data_dir MVSA_Single                  # the whole folder
    python scripts/evaluate_checkpoint.py CHECKPOINT --data_dir MVSA_Single --splits clmlf --split test

prints a table, and writes the scores to `--output` and the confusion matrix to a PNG beside it.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState

from clipcacg.scripts.data.errors import one_sentence, set_up_logging
from clipcacg.scripts.data.loading import label_names
from clipcacg.scripts.reporting.plots import plot_confusion_matrix
from clipcacg.scripts.reporting.predictions import load_checkpoint
from clipcacg.scripts.reporting.tables import results_table
from clipcacg.scripts.training.evaluation import evaluate_posts, labelled_posts, parse_arguments


@dataclass
class EvaluationArguments:
    """What to score, and where the scores go."""

    split: str = field(default="test", metadata={"help": "train, validation or test."})
    output: str = field(default="results.json", metadata={"help": "JSON file for the scores; the PNG is beside it."})
    batch_size: int = field(default=64, metadata={"help": "Posts in a batch, per device."})


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    # Without an accelerator, processes find one another only if the state asks for the CPU.
    state = PartialState(cpu=not torch.accelerator.is_available())
    set_up_logging(state.is_main_process)
    with one_sentence(argv):
        checkpoint, data_arguments, arguments = parse_arguments(argv, EvaluationArguments, __doc__.partition("\n")[0])
        model, processor = load_checkpoint(checkpoint)
        posts = labelled_posts(model, data_arguments, arguments.split)
        scores, names = evaluate_posts(model, processor, posts, arguments.batch_size), label_names(posts)
    if not state.is_main_process:
        return
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"split": arguments.split, "posts": len(posts), **scores}, indent=2) + "\n")
    if "confusion_matrix" in scores:
        plot_confusion_matrix(scores["confusion_matrix"], names, output.with_suffix(".png"))
    print(results_table(scores, names))


if __name__ == "__main__":
    main()
