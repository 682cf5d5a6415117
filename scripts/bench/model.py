"""What the model costs beyond its backbones, and what texts of like lengths save."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, CLIPModel
from transformers.trainer_pt_utils import LengthGroupedSampler

from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.scripts.bench.setting import (
    LONGEST,
    Figure,
    Setting,
    in_new_process,
    in_turn,
    make_config,
    make_inputs,
    make_model,
    make_texts,
    precision,
    rate,
    ratio,
    resident_peak,
    spread,
    text_lengths,
)


class Backbones(nn.Module):
    """The three backbones as transformers runs them, without a model around them."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        config = make_config(setting)
        self.text = AutoModel.from_config(config.text_config)
        self.vision = AutoModel.from_config(config.vision_config)
        self.clip = CLIPModel(config.clip_config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        clip_input_ids: Tensor,
        clip_attention_mask: Tensor,
        clip_pixel_values: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        """A sum that every output goes into, as a loss would."""
        text = self.text(input_ids, attention_mask=attention_mask)
        vision = self.vision(pixel_values)
        clip = self.clip(clip_input_ids, clip_pixel_values, attention_mask=clip_attention_mask)
        ends = [text.last_hidden_state, text.pooler_output, vision.pooler_output, clip.text_embeds, clip.image_embeds]
        return sum(end.float().mean() for end in ends)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor]) -> None:
    """Forward, backward, and a step of AdamW."""
    output = model(**inputs)
    loss = output if isinstance(output, Tensor) else output.loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def fusion(setting: Setting, numbers: str = "float32", compiled: bool = False) -> dict[str, Figure]:
    """The whole model against its three backbones alone, on the same posts: a forward pass and a training step.

    Args:
        numbers: "float32", or "bf16" for autocast to bfloat16.
        compiled: Whether `torch.compile` compiles both, for texts of one length.
    """
    size, suffix = setting.batch_size, "" if numbers == "float32" else f"_{numbers}"
    how = f"batches of {size}, {numbers}"
    if compiled:
        suffix, how = f"{suffix}_compiled", f"{how}, compiled"
    parts = {"model": make_model(setting), "backbones": Backbones(setting).to(setting.device).eval()}
    inputs, bi_gru = make_inputs(setting, text_lengths(size)), parts["model"].model.text_branch.bi_gru
    cases: dict[str, Callable[[], Any]] = {name: partial(part, **inputs) for name, part in parts.items()}
    with torch.inference_mode(), precision(setting, numbers):
        if compiled:
            for part in parts.values():
                part.compile(dynamic=False)
        else:  # a compiled model has its Bi-GRU inside
            read, own = inputs_of(bi_gru, cases["model"]), bi_gru.left_to_right
            one = nn.GRU(own.input_size, own.hidden_size, batch_first=True, bidirectional=True).to(setting.device)
            cases |= {"bi_gru": partial(bi_gru, *read), "one_gru": partial(one, read[0])}
        times = in_turn(setting.repeats, **cases)
    figures = {
        f"fusion_overhead_forward{suffix}": ratio(
            times["model"], times["backbones"], f"forward pass, model / backbones alone, {how}"
        ),
        f"forward_posts_per_second{suffix}": rate(times["model"], size, f"posts per second, forward pass, {how}"),
    }
    if not compiled:
        what = f"Bi-GRU / nn.GRU(bidirectional=True), which reads padding, {how}"
        figures[f"bi_gru_share{suffix}"] = ratio(times["bi_gru"], times["model"], f"Bi-GRU / forward pass, {how}")
        figures[f"bi_gru_over_one_gru{suffix}"] = ratio(times["bi_gru"], times["one_gru"], what)

    inputs["labels"] = torch.zeros(size, dtype=torch.long, device=setting.device)
    optimizers = {name: torch.optim.AdamW(part.train().parameters(), lr=1e-6) for name, part in parts.items()}

    def step(name: str) -> None:
        with precision(setting, numbers):
            train_step(parts[name], optimizers[name], inputs)

    times = in_turn(setting.repeats, **{name: partial(step, name) for name in parts})
    how = f"all parameters trained, {how}"
    return figures | {
        f"fusion_overhead_train{suffix}": ratio(
            times["model"], times["backbones"], f"training step, model / backbones alone, {how}"
        ),
        f"train_posts_per_second{suffix}": rate(times["model"], size, f"posts per second, training, {how}"),
    }


def sharing(setting: Setting) -> dict[str, Figure]:
    """The share of a forward pass that a shared tower saves, where CLIP's tower is also another encoder."""
    figures, clip_inputs = {}, make_inputs(setting, text_lengths(setting.batch_size))
    for parts in (("vision",), ("text", "vision")):
        models = {}
        for shared in (False, True):
            config = make_config(setting)
            for part in parts:
                setattr(config, f"{part}_config", config.clip_config)
                setattr(config, f"share_clip_{part}", shared)
            models[shared] = ClipCaCgForSequenceClassification(config).eval().to(setting.device)
        inputs = dict(clip_inputs)
        if "text" in parts:
            inputs |= {name: inputs[f"clip_{name}"] for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            times = in_turn(
                setting.repeats, own=partial(models[False], **inputs), shared=partial(models[True], **inputs)
            )
        saved = [1 - shared / own for shared, own in zip(times["shared"], times["own"], strict=True)]
        what = f"saved share of a forward pass, CLIP's {' and '.join(parts)} tower shared / run twice, batches of "
        figures[f"shared_{'_'.join(parts)}_saving"] = spread(saved, f"{what}{setting.batch_size}")
    return figures


def inputs_of(module: nn.Module, run: Callable[[], Any]) -> tuple[Any, ...]:
    """The positional inputs that a module gets while `run` runs."""
    seen: list[tuple[Any, ...]] = []
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given))
    run()
    handle.remove()
    return seen[-1]


def memory(setting: Setting) -> dict[str, Figure]:
    """The peak memory of a training step, each model in a process of its own; on a GPU in bf16 too."""
    figures = {}
    for numbers in ("float32", "bf16") if setting.device == "cuda" else ("float32",):
        peaks = [in_new_process(peak_memory, which, setting, numbers) for which in ("model", "backbones")]
        suffix, what = "" if numbers == "float32" else f"_{numbers}", f"batches of {setting.batch_size}, {numbers}"
        what = f"peak memory of a training step, model {peaks[0]:.0f} MiB / backbones {peaks[1]:.0f} MiB, {what}"
        figures[f"peak_memory_ratio{suffix}"] = Figure(peaks[0] / peaks[1], what)
        figures[f"peak_memory_mib{suffix}"] = Figure(peaks[0], f"MiB, {what}")
        double = replace(setting, batch_size=2 * setting.batch_size)
        growth = (in_new_process(peak_memory, "model", double, numbers) - peaks[0]) / setting.batch_size
        what = f"batches of {double.batch_size} against {setting.batch_size}, {numbers}"
        figures[f"memory_mib_per_post{suffix}"] = Figure(growth, f"MiB per post of a training step, {what}")
    return figures


def peak_memory(which: str, setting: Setting, numbers: str) -> float:
    """Peak memory of two training steps in MiB: what PyTorch allocated on the GPU, or else the process's own."""
    torch.manual_seed(0)
    before = resident_peak()
    model = make_model(setting) if which == "model" else Backbones(setting).to(setting.device)
    inputs = make_inputs(setting, text_lengths(setting.batch_size))
    inputs["labels"] = torch.zeros(setting.batch_size, dtype=torch.long, device=setting.device)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-6)
    for _ in range(2):
        with precision(setting, numbers):
            train_step(model, optimizer, inputs)
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else resident_peak() - before


def padding(setting: Setting) -> dict[str, Figure]:
    """Text encoder and Bi-GRU on eight batches grouped by length, on the same texts in random batches, and padded."""
    branch, config = make_model(setting).model.text_branch, make_config(setting).text_config
    limit, size = config.max_position_embeddings - 2, setting.batch_size
    lengths = [min(length, limit) for length in text_lengths(64 * size)]
    order = list(LengthGroupedSampler(size, lengths=lengths, generator=torch.Generator().manual_seed(0)))
    starts = [size * number for number in range(0, 16, 2)]  # every other one of a sorted group
    grouped = [[lengths[row] for row in order[start : start + size]] for start in starts]
    texts = sum(grouped, [])
    random = [texts[start::8] for start in range(8)]

    def batches(groups: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
        made = [make_texts(group, max(group), config) for group in groups]
        return [(ids.to(setting.device), mask.bool().to(setting.device)) for ids, mask in made]

    def widened(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        more = (0, min(limit, LONGEST) - ids.shape[1])
        return nn.functional.pad(ids, more, value=config.pad_token_id), nn.functional.pad(mask, more)

    cases = {"grouped": batches(grouped), "ungrouped": batches(random)}
    cases["longest"] = [widened(ids, mask) for ids, mask in cases["grouped"]]

    def run(which: str) -> list[Tensor]:
        return [branch(ids, mask) for ids, mask in cases[which]]

    with torch.inference_mode():
        times = in_turn(min(setting.repeats, 3), **{name: partial(run, name) for name in cases})
        difference = max(
            (short - long[:, : short.shape[1]])[mask].abs().max().item()
            for short, long, (_, mask) in zip(run("grouped"), run("longest"), cases["grouped"], strict=True)
        )
    what = "text encoder and Bi-GRU: padded to {} / to the longest of batches grouped by length"
    return {
        "padding_speedup": ratio(times["longest"], times["grouped"], what.format(f"MVSA's longest text ({LONGEST})")),
        "grouping_speedup": ratio(times["ungrouped"], times["grouped"], what.format("the longest of random batches")),
        "padding_difference": Figure(difference, "largest difference of F_T with and without that padding"),
    }
