"""Quantize a checkpoint's text towers to 8 bits for CPUs, and compare the two on labelled posts.

    python scripts/quantize.py CHECKPOINT -o FOLDER                     # compared on the drawn sample's test split
    python scripts/quantize.py CHECKPOINT -o FOLDER --data_dir MVSA_Single --splits clmlf

Needs the extra `quantize`. torchao rounds the weights of each Linear once and its inputs at each call. The GRU and the
convolutions keep their weights. transformers reads the checkpoint wherever torchao is installed, for `predict.py` and
pipelines; the Trainer, and so `evaluate_checkpoint.py`, refuses quantized models.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from clipcacg.scripts.data.collator import PostCollator
from clipcacg.scripts.data.errors import InputError, one_sentence, set_up_logging
from clipcacg.scripts.reporting.predictions import load_checkpoint
from clipcacg.scripts.training.evaluation import labelled_posts, parse_arguments
from clipcacg.scripts.training.quantization import compare, quantize, summary


@dataclass
class QuantizationArguments:
    """Where the quantized checkpoint goes, and what to compare it on."""

    output: str = field(metadata={"aliases": ["-o"], "help": "Folder of the quantized checkpoint."})
    split: str = field(default="test", metadata={"help": "train, validation or test."})
    batch_size: int = field(default=32, metadata={"help": "Posts in a batch."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that the checkpoint holds."})


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    set_up_logging()
    with one_sentence(argv):
        checkpoint, data, arguments = parse_arguments(argv, QuantizationArguments, __doc__.partition("\n")[0])
        if Path(arguments.output).resolve() == Path(checkpoint).resolve():
            raise InputError(f"{arguments.output} is the checkpoint itself: name another --output.")
        quantized = quantize(checkpoint, arguments.trust_remote_code)
        original, processor = load_checkpoint(checkpoint, arguments.trust_remote_code, dtype=torch.float32)
        posts = labelled_posts(original, processor, data, arguments.split)
        quantized.save_pretrained(arguments.output)
        processor.save_pretrained(arguments.output)
        collator = PostCollator(processor, original.config)
        batches = DataLoader(posts, arguments.batch_size, collate_fn=collator)
        results = compare({"float32": original, "int8": quantized}, batches)
    print(summary(results, collator.as_tensor(posts["label"][:]).numpy(), original.config))
    print(f"The checkpoint is in {arguments.output}.")


if __name__ == "__main__":
    main()
