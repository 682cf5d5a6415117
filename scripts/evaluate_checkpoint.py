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
from typing import Any, Literal

import datasets
import torch
from accelerate import PartialState

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.scripts.data.errors import InputError, as_input_error, one_sentence, set_up_logging
from clipcacg.scripts.data.faults import Faults
from clipcacg.scripts.data.labels import label_names
from clipcacg.scripts.reporting.plots import plot_confusion_matrix
from clipcacg.scripts.reporting.predictions import load_checkpoint
from clipcacg.scripts.reporting.tables import results_table
from clipcacg.scripts.training.evaluation import evaluate_posts, labelled_posts, parse_arguments


@dataclass
class EvaluationArguments:
    """What to score, and where the scores go."""

    split: str = field(default="test", metadata={"help": "train, validation or test."})
    output: str = field(default="results.json", metadata={"help": "JSON file for the scores; the PNG is beside it."})
    withhold: Literal["image", "text"] | None = field(
        default=None, metadata={"help": "Score the posts as if none of them had an image, or a text."}
    )
    batch_size: int = field(default=64, metadata={"help": "Posts in a batch, per device."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that the checkpoint holds."})


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    # Without an accelerator, processes find one another only if the state asks for the CPU.
    state = PartialState(cpu=not torch.accelerator.is_available())
    set_up_logging(state.is_main_process)
    with one_sentence(argv):
        checkpoint, data_arguments, arguments = parse_arguments(argv, EvaluationArguments, __doc__.partition("\n")[0])
        check_output(Path(arguments.output))
        model, processor = load_checkpoint(checkpoint, arguments.trust_remote_code)
        faults = Faults(data_arguments.on_error)
        posts = labelled_posts(model, processor, data_arguments, arguments.split, faults)
        if arguments.withhold:
            posts = without(posts, arguments.withhold, model.config)
        scores, names = evaluate_posts(model, processor, posts, arguments.batch_size), label_names(posts)
        if state.is_main_process:
            print(results_table(scores, names))
            facts = {"split": arguments.split, "posts": len(posts), "withheld": arguments.withhold}
            write(Path(arguments.output), {**facts, **scores, **faults.summary()}, names)
            print(f"The scores are in {arguments.output}.")


def without(posts: datasets.Dataset, side: str, config: ClipCaCgConfig) -> datasets.Dataset:
    """Empty the column "image" or "text" of the complete posts.

    Raises:
        InputError: If the model has not learned to do without it.
    """
    if not config.modality_dropout:
        raise InputError(f"--withhold {side} is for models trained with --modality_dropout; this one needs both.")
    texts, images = posts["text"][:], posts["image"][:]
    complete = [bool(t and t.strip()) and i is not None for t, i in zip(texts, images, strict=True)]
    posts, feature = posts.select([row for row, whole in enumerate(complete) if whole]), posts.features[side]
    return posts.remove_columns(side).add_column(side, [None] * len(posts), feature=feature)


def check_output(output: Path) -> None:
    """Make the folder of the output.

    Raises:
        InputError: If no file can be written there. The evaluation, which takes long, has not started then.
    """
    with as_input_error(f"--output {output} cannot be written", OSError):
        output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output.parent).close()
    if output.is_dir():
        raise InputError(f"--output {output} is a folder: name a file.")


def write(output: Path, scores: dict[str, Any], names: list[str] | None) -> None:
    """Write the scores and, for classes, the plot of the confusion matrix."""
    with as_input_error(f"--output {output} cannot be written", OSError):
        output.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
        if "confusion_matrix" in scores:
            plot_confusion_matrix(scores["confusion_matrix"], names, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
