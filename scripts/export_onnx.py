"""Write a checkpoint as an ONNX file, and compare the file with the model in ONNX Runtime.

    python scripts/export_onnx.py CHECKPOINT -o model.onnx

Needs the extra `onnx`. The file takes the inputs that the model's mode needs, masks included, with any number of posts
and tokens and pictures of the processor's size, and gives the logits. Weights of more than a gigabyte lie beside it in
`model.onnx.data`.
"""

import argparse
import sys
import warnings
from pathlib import Path
from unittest import mock

import onnxruntime
import torch
from PIL import Image
from torch import Tensor, nn

from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data.collator import PostCollator
from clipcacg.scripts.data.loading import one_sentence

AXES = {
    "input_ids": {0: "batch", 1: "text_len"},
    "attention_mask": {0: "batch", 1: "text_len"},
    "pixel_values": {0: "batch"},
    "clip_input_ids": {0: "batch", 1: "clip_text_len"},
    "clip_attention_mask": {0: "batch", 1: "clip_text_len"},
    "clip_pixel_values": {0: "batch"},
}
TOLERANCE = 1e-4


class Logits(nn.Module):
    """A model whose inputs come in the order of their names, and whose only output is the logits."""

    def __init__(self, model: ClipCaCgForSequenceClassification, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


def onnx_gru(gru: nn.GRU, states: Tensor) -> tuple[Tensor, None]:
    """`nn.GRU.forward` as ONNX's operator of that name; the exporter would fix the number of tokens.

    Args:
        gru: One layer and one direction, with biases, batch first.
        states: (batch, text_len, width).

    Returns:
        (batch, text_len, hidden), and no last state.
    """

    def reordered(weight: Tensor) -> Tensor:  # torch: reset, update, new; ONNX: update, reset, new, for each direction
        return weight.unflatten(0, (3, -1))[[1, 0, 2]].flatten(0, 1).unsqueeze(0)

    weights = reordered(gru.weight_ih_l0), reordered(gru.weight_hh_l0)
    bias = torch.cat([reordered(gru.bias_ih_l0), reordered(gru.bias_hh_l0)], dim=1)
    batch, text_len, _ = states.shape
    outputs = torch.onnx.ops.symbolic(
        "GRU",
        (states.transpose(0, 1), *weights, bias),
        {"hidden_size": gru.hidden_size, "linear_before_reset": 1},
        dtype=states.dtype,
        shape=(text_len, 1, batch, gru.hidden_size),
    )
    return outputs.squeeze(1).transpose(0, 1), None


def example(
    model: ClipCaCgForSequenceClassification, processor: ClipCaCgProcessor, texts: list[str]
) -> dict[str, Tensor]:
    """A batch of these texts, each with a picture of one colour, as the model's mode needs it."""
    rows = [{"text": text, "image": Image.new("RGB", (64, 48), (40 * row, 90, 160))} for row, text in enumerate(texts)]
    batch, required = PostCollator(processor, model.config)(rows), model.config.required_inputs
    return {name: batch[name] for name in AXES if name.replace("attention_mask", "input_ids") in required}


def export(model: ClipCaCgForSequenceClassification, inputs: dict[str, Tensor], output: Path) -> None:
    """Write the model, traced on these inputs of more than one post and token, as an ONNX file."""
    with mock.patch.object(nn.GRU, "forward", onnx_gru), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="# The axis name")  # of those that several inputs share
        torch.onnx.export(
            Logits(model, list(inputs)).eval(),
            tuple(inputs.values()),
            output,
            dynamo=True,
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_shapes=(tuple(AXES[name] for name in inputs),),
            external_data=model.num_parameters() > 2**28,  # one file cannot hold more than 2 GB
            verbose=False,
        )


@torch.inference_mode()
def largest_difference(model: ClipCaCgForSequenceClassification, inputs: dict[str, Tensor], file: Path) -> float:
    """Between the logits of the model and of the file."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
    return (torch.from_numpy(logits) - model(**inputs).logits).abs().max().item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="Folder or Hub name of a trained model.")
    parser.add_argument("-o", "--output", type=Path, default=Path("model.onnx"), help="The file to write.")
    arguments = parser.parse_args(argv)
    with one_sentence():
        model = ClipCaCgForSequenceClassification.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
        processor = ClipCaCgProcessor.from_pretrained(arguments.checkpoint)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    export(model, example(model, processor, ["What a lovely morning!", "no"]), arguments.output)
    others = example(
        model, processor, ["", "The train is late, and it rains again. " * 2, "fine", "so happy today", "a"]
    )
    difference = largest_difference(model, others, arguments.output)
    posts, shapes = len(others[next(iter(others))]), {name: tuple(value.shape) for name, value in others.items()}
    print(f"{arguments.output}: on {posts} other posts the logits differ by {difference:.1e} at most; inputs {shapes}")
    if not difference <= TOLERANCE:  # NaN too
        sys.exit(f"{arguments.output} is not the model: a difference of {TOLERANCE} would be rounding.")


if __name__ == "__main__":
    main()
