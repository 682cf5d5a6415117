"""Score a checkpoint on labelled posts.

    python scripts/evaluate_checkpoint.py outputs/sample                                     # the drawn sample
    python scripts/evaluate_checkpoint.py CHECKPOINT --data_dir MVSA_Single                  # the whole folder
    python scripts/evaluate_checkpoint.py CHECKPOINT --data_dir MVSA_Single --splits clmlf --split test

prints tables, and writes the scores to `--output` and plots to PNG files beside it: the confusion matrix, reliability
and coverage. It measures and fits nothing: the temperature is that of the checkpoint. Only `--wanted_accuracy` also
reads the validation split.
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
from clipcacg.scripts.reporting.plots import plot_confusion_matrix, plot_coverage, plot_reliability
from clipcacg.scripts.reporting.predictions import load_checkpoint
from clipcacg.scripts.reporting.tables import calibration_tables, results_table
from clipcacg.scripts.training.calibration import check_wanted_accuracy, choose_min_confidence
from clipcacg.scripts.training.evaluation import (
    all_scores,
    kinds_of_posts,
    labelled_posts,
    parse_arguments,
    predict_posts,
)


@dataclass
class EvaluationArguments:
    """What to score, and where the scores go."""

    split: str = field(default="test", metadata={"help": "train, validation or test."})
    output: str = field(
        default="results.json", metadata={"help": "JSON file for the scores; PNG files are beside it."}
    )
    withhold: Literal["image", "text"] | None = field(
        default=None, metadata={"help": "Score the posts as if none of them had an image, or a text."}
    )
    wanted_accuracy: float | None = field(
        default=None,
        metadata={
            "help": "Choose on the validation split the min_confidence from which answers have this accuracy, and say "
            "how many posts of --split it answers and how well."
        },
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
        check_wanted_accuracy(arguments.wanted_accuracy, model.config.task)
        if arguments.wanted_accuracy and arguments.split == "validation":
            raise InputError("--wanted_accuracy chooses on the validation split: name another --split to measure on.")
        faults, chosen = Faults(data_arguments.on_error), None
        posts = labelled_posts(model, processor, data_arguments, arguments.split, faults)
        if arguments.withhold:
            posts = without(posts, arguments.withhold, model.config)
        if arguments.wanted_accuracy:
            try:
                validation = labelled_posts(model, processor, data_arguments, "validation")
            except InputError as error:
                raise InputError(f"--wanted_accuracy needs validation posts to choose by: {error}") from error
            found = predict_posts(model, processor, validation, arguments.batch_size)
            chosen = choose_min_confidence(*found, model.config, arguments.wanted_accuracy)
        found, names = predict_posts(model, processor, posts, arguments.batch_size), label_names(posts)
        scores = all_scores(*found, posts, model.config, chosen)
        if state.is_main_process:
            print(results_table(scores, names), calibration_tables({arguments.split: scores}), sep="\n\n")
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
    complete = [row for row, kind in enumerate(kinds_of_posts(posts)) if kind == "complete"]
    posts, feature = posts.select(complete), posts.features[side]
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
    """Write the scores, and the plots that they allow."""
    with as_input_error(f"--output {output} cannot be written", OSError):
        output.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
        if "confusion_matrix" in scores:
            plot_confusion_matrix(scores["confusion_matrix"], names, output.with_suffix(".png"))
        for plot, name in ((plot_reliability, "reliability"), (plot_coverage, "coverage")):
            plot({scores["split"]: scores}, output.with_name(f"{output.stem}_{name}.png"))


if __name__ == "__main__":
    main()
