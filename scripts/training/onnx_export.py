"""A model as an ONNX file, its forward pass in ONNX Runtime, and the largest difference between the two.

transformers' own `OnnxExporter` (5.24) does not replace this module. It unrolls `nn.GRU`, so its file takes texts of
the traced length only. It names dynamic axes s41 and the like, offers every output beside the logits, and tracing a
tiny model with `dynamic=True` took minutes.
"""

import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import Tensor, nn

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import ClipCaCgClassifierOutput, ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data.collator import PostCollator
from clipcacg.scripts.data.errors import InputError, as_input_error
from clipcacg.scripts.reporting.predictions import fingerprint

AXES = {
    "input_ids": {0: "batch", 1: "text_len"},
    "attention_mask": {0: "batch", 1: "text_len"},
    "pixel_values": {0: "batch"},
    "has_image": {0: "batch"},
    "clip_input_ids": {0: "batch", 1: "clip_text_len"},
    "clip_attention_mask": {0: "batch", 1: "clip_text_len"},
    "clip_pixel_values": {0: "batch"},
}
INSTALL = "Install the extra: pip install 'clipcacg[onnx]'"
MADE_OF = "clipcacg_model"  # key of the file's metadata


def output_names(config: ClipCaCgConfig) -> list[str]:
    """The outputs of a model's file: its logits, and those of its modality heads."""
    return ["logits", "text_logits", "image_logits"] if config.use_modality_heads else ["logits"]


class Scores(nn.Module):
    """A model that takes its inputs in the order of their names, and returns the outputs of its file."""

    def __init__(self, model: ClipCaCgForSequenceClassification, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(**dict(zip(self.names, inputs, strict=True)))
        return tuple(outputs[name] for name in output_names(self.model.config))


def onnx_gru(gru: nn.GRU, states: Tensor) -> tuple[Tensor, None]:
    """`nn.GRU.forward` as ONNX's operator of that name; the exporter would fix the number of tokens.

    Args:
        gru: One layer and one direction, with biases, batch first.
        states: (batch, text_len, width).

    Returns:
        (batch, text_len, hidden), and no last state.
    """

    def reordered(weight: Tensor) -> Tensor:  # torch: reset, update, new; ONNX: update, reset, new, per direction
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
    """A batch of these texts, each with an image of one colour: the inputs that the model needs, and their masks.

    `has_image` is an input of models that have learned to do without one; the last image is missing for them.
    """
    colours = [(40 * row, 90, 160) for row in range(len(texts))]
    rows = [{"text": text, "image": Image.new("RGB", (64, 48), c)} for text, c in zip(texts, colours, strict=True)]
    if model.config.modality_dropout:
        rows[-1]["image"] = None
    batch, names = PostCollator(processor, model.config)(rows), {*model.config.required_inputs, "has_image"}
    return {name: batch[name] for name in AXES if name.replace("attention_mask", "input_ids") in names & batch.keys()}


def export(model: ClipCaCgForSequenceClassification, inputs: dict[str, Tensor], output: Path) -> None:
    """Write the model as an ONNX file.

    Args:
        model: The model, in evaluation mode.
        inputs: What to trace it on: more than one post and more than one token.
        output: The file. Weights of more than a gigabyte go into a second file beside it.

    Raises:
        InputError: If the extra `onnx` is not installed.
    """
    with (
        as_input_error(INSTALL, ImportError),
        mock.patch.object(nn.GRU, "forward", onnx_gru),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="# The axis name")  # several inputs share one
        program: Any = torch.onnx.export(
            Scores(model, list(inputs)).eval(),
            tuple(inputs.values()),
            dynamo=True,
            input_names=list(inputs),
            output_names=output_names(model.config),
            dynamic_shapes=(tuple(AXES[name] for name in inputs),),
            verbose=False,
        )
        program.model.metadata_props[MADE_OF] = fingerprint(model)
        program.save(output, external_data=model.num_parameters() > 2**28)  # one file cannot hold more than 2 GB


class OnnxModel:
    """The forward pass of a model in ONNX Runtime, on the CPU, with the model's inputs and outputs.

    Args:
        model: The model that the file was made of.
        file: What `export` wrote.

    Raises:
        InputError: If the extra `onnx` is not installed, or the file is none of this model.
    """

    device = torch.device("cpu")

    def __init__(self, model: ClipCaCgForSequenceClassification, file: Path) -> None:
        with as_input_error(INSTALL, ImportError):
            import onnxruntime
        remake = "make one with export_onnx.py"
        if not file.is_file():
            raise InputError(f"There is no file {file}: {remake}.")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        with as_input_error(f"{file} is no ONNX file that can be read: {remake}", Exception):  # it has no base class
            self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.config, self.fingerprint = model.config, fingerprint(model)
        if self.session.get_modelmeta().custom_metadata_map.get(MADE_OF) != self.fingerprint:
            raise InputError(f"{file} was not made of this checkpoint: {remake}.")
        self.reads = [given.name for given in self.session.get_inputs()]

    def __call__(self, **inputs: Tensor) -> ClipCaCgClassifierOutput:
        """Return the scores of a batch, and with `modality_dropout` which posts have an image and a text."""
        names = output_names(self.config)
        found = self.session.run(names, {name: inputs[name].numpy() for name in self.reads})
        outputs = dict(zip(names, map(torch.from_numpy, found), strict=True))
        if self.config.modality_dropout:
            outputs |= {"has_image": inputs["has_image"].bool(), "has_text": inputs["attention_mask"].any(dim=1)}
        return ClipCaCgClassifierOutput(**outputs)


@torch.inference_mode()
def largest_difference(model: ClipCaCgForSequenceClassification, inputs: dict[str, Tensor], file: Path) -> float:
    """The largest absolute difference between the scores of the model and of its file.

    Raises:
        InputError: As `OnnxModel`.
    """
    theirs, ours = OnnxModel(model, file)(**inputs), model(**inputs)
    return max((theirs[name] - ours[name]).abs().max().item() for name in output_names(model.config))
