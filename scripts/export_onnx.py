"""Write a checkpoint as an ONNX file, and compare the file with the model in ONNX Runtime.

    python scripts/export_onnx.py CHECKPOINT -o model.onnx

Needs the extra `onnx`. The file takes the inputs that the model's mode needs, masks included, with any number of posts
and tokens and images of the processor's size. That of a model trained with `modality_dropout` also takes `has_image`.
It returns the logits: `processor.post_process` makes probabilities of them, with the `temperature` of the config.
Weights of more than a gigabyte are beside it in `model.onnx.data`.
"""

import argparse
import sys
from pathlib import Path

import torch

from clipcacg.scripts.data.errors import add_debug_flag, one_sentence, set_up_logging
from clipcacg.scripts.reporting.predictions import load_checkpoint
from clipcacg.scripts.training.onnx_export import example, export, largest_difference

TOLERANCE = 1e-4


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", help="Folder or Hub name of a trained model.")
    parser.add_argument("-o", "--output", type=Path, default=Path("model.onnx"), help="The file to write.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run the code that the checkpoint holds.")
    add_debug_flag(parser)
    arguments = parser.parse_args(argv)
    set_up_logging()
    with one_sentence(argv):
        model, processor = load_checkpoint(arguments.checkpoint, arguments.trust_remote_code, dtype=torch.float32)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        export(model, example(model, processor, ["What a lovely morning!", "no"]), arguments.output)
        texts = ["", "The train is late, and it rains again. " * 2, "fine", "so happy today", "a"]
        others = example(model, processor, texts)
        difference = largest_difference(model, others, arguments.output)
    shapes = {name: tuple(value.shape) for name, value in others.items()}
    print(
        f"{arguments.output}: on {len(texts)} other posts the logits differ by at most {difference:.1e}; "
        f"inputs {shapes}"
    )
    if not difference <= TOLERANCE:  # NaN too
        sys.exit(f"{arguments.output} is not the model: the difference exceeds the tolerance of {TOLERANCE}.")


if __name__ == "__main__":
    main()
