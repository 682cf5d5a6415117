"""Predict the sentiment of posts.

    python scripts/predict.py CHECKPOINT --image photo.jpg --text "What a lovely morning!"
    python scripts/predict.py CHECKPOINT --input posts.csv --output predictions.jsonl
    accelerate launch scripts/predict.py CHECKPOINT --input shards/ --output predictions/

The input is what `train.py --dataset_name` takes, a table, a folder or a Hub data set, or a folder in the layout of
MVSA. It needs no labels. Its columns are those that the checkpoint was trained on, and perhaps an id. The output has
one JSON line per post, in the order of the input: id, label and probabilities (labels and probabilities for several
labels per post, value for a regression). A model with modality heads adds the sentiment of the text and of the image
alone, and conflict, the probability that the two are opposite. With `--min_confidence 0.8` the label is "uncertain"
where the highest probability is below 0.8; the probabilities stay. A post that cannot be read gets a line with its id
and an error; more than a tenth of such posts end in an error. An interrupted run continues where it stopped when
called again with the same output.

If the output is a folder, each table or tar file of the input gets a file there, and several processes share the work.
Each file appears only when it is complete. Call the command again after a fault, with any number of processes: it
computes the files that are missing. The last process writes `manifest.json`.

On a CPU `--onnx model.onnx` is the fastest: the same answers, up to rounding, from ONNX Runtime and the file that
`export_onnx.py CHECKPOINT -o model.onnx` makes.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import HfArgumentParser

from clipcacg.processing_clipcacg import check_min_confidence
from clipcacg.scripts.data.collator import PostCollator
from clipcacg.scripts.data.errors import (
    InputError,
    add_debug_flag,
    as_input_error,
    one_sentence,
    parse_flags,
    set_up_logging,
)
from clipcacg.scripts.data.loading import ColumnArguments
from clipcacg.scripts.reporting.predictions import (
    load_checkpoint,
    predict_file,
    predict_rows,
    predict_shards,
    prepare,
    write_line,
)
from clipcacg.scripts.training.checks import warn_of_slow_bf16
from clipcacg.scripts.training.onnx_export import OnnxModel


@dataclass
class PredictionArguments(ColumnArguments):
    """What to predict, and where the predictions go."""

    image: str | None = field(default=None, metadata={"help": "Path or URL of one image."})
    text: str | None = field(default=None, metadata={"help": "One text."})
    input: str | None = field(
        default=None,
        metadata={
            "help": "Or: a table, a folder of tables or images, a Hub data set, or a folder of <ID>.jpg and <ID>.txt."
        },
    )
    split: str = field(default="test", metadata={"help": "train, validation or test, of an input that has several."})
    output: str = field(
        default="predictions.jsonl", metadata={"help": "For --input: file of JSON lines, or folder/ of them."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Start again instead of continuing the output."})
    max_samples: int | None = field(default=None, metadata={"help": "Predict only the first posts."})
    batch_size: int = field(default=32, metadata={"help": "Posts per forward pass."})
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16 where autocast allows: faster on GPUs."})
    min_confidence: float | None = field(
        default=None, metadata={"help": 'Where no label is as likely as this, the label is "uncertain".'}
    )
    onnx: str | None = field(
        default=None,
        metadata={"help": "Compute in ONNX Runtime with the checkpoint's file of export_onnx.py: faster on CPUs."},
    )
    num_workers: int = field(default=1, metadata={"help": "Processes that prepare posts; 0: only this process."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that the checkpoint holds."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, least in (("batch_size", 1), ("num_workers", 0), ("max_samples", 1)):
            value = getattr(self, flag)
            if value is not None and value < least:
                raise InputError(f"--{flag} must be at least {least}, got {value}.")
        if self.onnx and self.bf16:
            raise InputError("--onnx computes in float32: leave out --bf16.")
        if (self.input is None) == (self.image is None and self.text is None):
            raise InputError("Give one post with --image and --text, or many with --input.")

    def folder(self, several: bool) -> Path | None:
        """The folder of predictions, if `output` is one: it exists, ends in a slash, or is not a file's name.

        Args:
            several: Whether several processes predict. They cannot write one file; one process takes any new name for
                that of a file.

        Raises:
            InputError: If several would write a file, or a flag is for files alone.
        """
        path = Path(self.output)
        if not (path.is_dir() or self.output.endswith("/") or (several and not path.suffix and not path.exists())):
            if several:
                raise InputError(f"Several processes cannot write one file, {path}: give --output a folder/.")
            return None
        for flag in ("overwrite", "max_samples"):
            if getattr(self, flag):
                raise InputError(
                    f"--{flag} is for an --output of one file: leave it out, or give {path} another name."
                )
        return path


def main(argv: list[str] | None = None) -> None:
    with one_sentence(argv):
        parser = HfArgumentParser(PredictionArguments, description=__doc__.split("\n")[0])
        parser.add_argument("checkpoint", help="Folder or Hub name of a trained model.")
        parser.set_defaults(on_error="skip")
        add_debug_flag(parser)
        arguments, rest = parse_flags(parser, argv)
        # Without cpu=True every one of several processes on CPUs would take itself for the only one.
        state = PartialState(cpu=not torch.accelerator.is_available())
        set_up_logging(state.is_main_process)
        folder = arguments.folder(state.num_processes > 1) if arguments.input else None
        model, processor = load_checkpoint(rest.checkpoint, arguments.trust_remote_code)
        if arguments.min_confidence is not None:
            with as_input_error("--min_confidence cannot be used", ValueError):
                check_min_confidence(arguments.min_confidence, model.config)
        if arguments.onnx:
            model = OnnxModel(model, Path(arguments.onnx))
        else:
            # Convolutions are faster with the channels last.
            model.to(state.device, memory_format=torch.channels_last)
            if arguments.bf16:
                warn_of_slow_bf16(model.device.type)
        names = ("split", "batch_size", "num_workers", "bf16", "min_confidence")
        options = {name: getattr(arguments, name) for name in names}
        if folder:
            predict_shards(model, processor, arguments.input, folder, columns=arguments, **options)
            return
        if arguments.input:
            options |= {"max_samples": arguments.max_samples, "overwrite": arguments.overwrite}
            predict_file(model, processor, arguments.input, Path(arguments.output), columns=arguments, **options)
            return
        row = {"id": arguments.image or "text", "text": arguments.text, "image": arguments.image}
        rows, inputs = prepare([row], PostCollator(processor, model.config))
        line = predict_rows(model, rows, inputs, arguments.bf16, arguments.min_confidence)[0]
        if "error" in line:
            raise InputError(line["error"])
        write_line(sys.stdout, line)


if __name__ == "__main__":
    main()
