"""Explain a prediction: where the cross-attention looks, what moved the score, and a figure of both.

Attention shows where the model takes information from.
Attribution, here by integrated gradients, shows which regions and words moved the score of the predicted label, and in
which direction.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from captum.attr import IntegratedGradients
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # the class itself: pyplot would set a backend for the whole process
from matplotlib.font_manager import findfont, get_font
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from clipcacg.modeling_clipcacg import as_map
from clipcacg.processing_clipcacg import (
    SOURCES,
    ClipCaCgProcessor,
    is_blank,
    missing_parts,
    modality_scores,
    rgb_array,
)
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.features import FEATURES
from clipcacg.scripts.reporting.overlays import BLUE, GOLD, RED, HeatMap, gild, seen_parts, tint

N_STEPS = 32  # points on the path of integrated gradients
STEPS_AT_ONCE = 8  # keeps the memory of base-size models below a few GB
MAX_BARS = 20
ENCODERS = {"pixel_values": "the vision encoder", "clip_pixel_values": "CLIP"}


@dataclass
class Attention:
    """Cross-attention weights of one modality over F_IT.

    They are those of equation 6, averaged over heads and unpadded queries. Equation 11 takes the same mean over the
    queries.

    Args:
        regions: Weights of the image regions.
        words: (words,), weights of the words, each the mean over its tokens. A sum would favour rare words, which have
            many tokens.
        shares: Share of the attention per target, adding up to 1: "image", "words", "markers" (tokens such as `<s>`
            that belong to no word) and, with CLIP, "first token", which is CLIP(I) * CLIP(T).
    """

    regions: HeatMap
    words: np.ndarray
    shares: dict[str, float]


@dataclass
class Attribution:
    """Integrated gradients of one logit, on the path from a grey image and empty words to the post.

    Args:
        regions: By encoder, what each image region adds to the logit.
        words: (words,), what each word adds to it through both encoders; None without a text.
        difference: The logit of the post minus the logit of the starting point. `total` should be close to it.
            Their difference is the approximation error.
    """

    regions: dict[str, HeatMap]
    words: np.ndarray | None
    difference: float

    @property
    def total(self) -> float:
        """Sum of all attributions."""
        maps = sum(float(heat_map.weights.sum()) for heat_map in self.regions.values())
        return maps + (0.0 if self.words is None else float(self.words.sum()))


@dataclass
class Explanation:
    """Everything that the figure shows.

    Args:
        scores: Probability by label; {"value": prediction} for a regression.
        predicted: The label with the highest score, which `attribution` explains.
        attribution: What moved its score.
        attention: By query modality, "text" and "image"; empty without cross-attention, and for a post that lacks one.
        view: (height, width, 3), the part of the image that the vision encoder (or CLIP's tower in its place) sees, or
            None.
        words: Words of the text, or None.
        gate: Mean of g of equation 12, or None without a gate; 1 is the linear path, 0 the tanh path.
        balance: lambda of equation 15, or None; 1 is the image's side, 0 the text's.
        modalities: The sentiment of the text and of the image alone, and their conflict, as `modality_scores` returns
            them; None without modality heads.
    """

    scores: dict[str, float]
    predicted: str
    attribution: Attribution
    attention: dict[str, Attention] = field(default_factory=dict)
    view: np.ndarray | None = None
    words: list[str] | None = None
    gate: float | None = None
    balance: float | None = None
    modalities: dict[str, Any] | None = None


def explain(model: PreTrainedModel, processor: Any, image: Any = None, text: str | None = None) -> Explanation:
    """Explain the prediction for one post.

    Args:
        model: A `ClipCaCgForSequenceClassification` in float32; it is put into evaluation mode.
        processor: Its `ClipCaCgProcessor`.
        image: One image in any form that the processor takes; ignored by a model that reads no images.
        text: The text; ignored by a model that reads no texts. With `modality_dropout` a post may lack one of the two:
            then the other is explained.

    Raises:
        InputError: If a part that the model needs is missing, or one is broken.
    """
    image = decode(processor, image) if "image" in model.config.modalities else None
    inputs = prepare(model, processor, image, text)
    may_lack = model.config.modality_dropout > 0
    has_image, has_text = "has_image" not in inputs, not (may_lack and is_blank(text))
    words, owners = find_words(processor, text or "", inputs) if "text" in model.config.modalities else ([], {})
    with torch.inference_mode():
        outputs = model.eval()(**inputs, output_attentions=True)
    scores = read_scores(outputs.logits, model.config)
    predicted = max(scores, key=scores.get)
    seen = {} if image is None else seen_parts(processor, rgb_array(image, None, None))
    views = {name: seen[name] for name in ENCODERS if name in inputs and name in seen}
    target = list(scores).index(predicted)
    explanation = Explanation(scores, predicted, attribute(model, inputs, target, views, owners, len(words)))
    explanation.view = next(iter(views.values()), None)
    explanation.words = words if "text" in model.config.modalities and has_text else None
    if explanation.words is None:
        explanation.attribution.words = None
    if outputs.text_attentions is not None and has_image and has_text:
        explanation.attention = read_attention(outputs, inputs, views, owners, len(words))
    if model.config.use_modality_heads:
        (explanation.modalities,) = modality_scores(outputs, model.config)
    if outputs.gate is not None:
        explanation.gate = outputs.gate.mean().item()
        explanation.balance = model.base_model.fusion.lambda_logit.sigmoid().item()
    return explanation


def decode(processor: Any, image: Any) -> Any:
    """Decode an image as the processor would, so that the drawing and the model share one reading of a file or URL.

    What the processor does not decode, arrays and whatever it refuses, is returned as it is.

    Raises:
        InputError: If the image cannot be read.
    """
    if not (isinstance(image, SOURCES) or hasattr(image, "read")):
        return image
    try:
        return rgb_array(image, None, processor.needed_edge({}))
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error


def read_scores(logits: Tensor, config: Any) -> dict[str, float]:
    """Logits (1, labels) as probability by label, or as {"value": prediction} for a regression."""
    answer = ClipCaCgProcessor.post_process(logits, config)[0]
    return answer.get("scores", answer)


def prepare(model: PreTrainedModel, processor: Any, image: Any, text: str | None) -> dict[str, Tensor]:
    """Make the inputs that the model reads, a batch of one post, on its device.

    Raises:
        InputError: If the image or the text that it needs is missing or broken.
    """
    given = {"image": image, "text": None if model.config.modality_dropout and is_blank(text) else text}
    if missing := missing_parts(given, model.config):
        raise InputError(f"This model needs {' and '.join({'image': 'an image'}.get(n, 'a text') for n in missing)}.")
    columns = {name: [given[name]] for name in model.config.modalities}
    try:
        batch = processor(images=columns.get("image"), text=columns.get("text"), return_tensors="pt")
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error
    names = [*model.config.required_inputs, "has_image"]
    names += [name.replace("input_ids", "attention_mask") for name in names if name.endswith("input_ids")]
    return {name: batch[name].to(model.device) for name in names if name in batch}


def find_words(processor: Any, text: str, inputs: dict[str, Tensor]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Split a text at spaces, and find the word of each token.

    Returns:
        The words, and for each input of token IDs (text_len,) indices into them; -1 for a token of no word. Both
        tokenizers share the list of words, which makes their weights comparable.
    """
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    starts, ends = np.array([span[0] for span in spans], int), np.array([span[1] for span in spans], int)
    owners = {}
    for name, tokenizer in (("input_ids", processor.tokenizer), ("clip_input_ids", processor.clip_tokenizer)):
        if name in inputs:
            # The last character tells the word: some tokenizers prepend the space before a token.
            ids = inputs[name][0].tolist()
            last = np.array([end - 1 for _, end in token_spans(tokenizer, text, ids)])
            last = np.pad(last, (0, len(ids) - len(last)), constant_values=-1)  # SigLIP's texts are padded
            index = np.searchsorted(starts, last, side="right") - 1
            inside = (index >= 0) & (last < (ends[index] if spans else 0))
            owners[name] = np.where(inside, index, -1)
    return [text[start:end] for start, end in spans], owners


def token_spans(tokenizer: Any, text: str, ids: list[int]) -> list[tuple[int, int]]:
    """Start and end of each token in the text; (0, 0) for a token that is not in it.

    Tokenizers in pure Python report no offsets: there we search each token's characters after those of the previous
    token.
    """
    if tokenizer.is_fast:
        return tokenizer(text, truncation=True, return_offsets_mapping=True)["offset_mapping"]
    spans, position, lower = [], 0, text.lower()
    for token in ids:
        piece = tokenizer.decode([token]).strip().lower()
        start = lower.find(piece, position) if piece and token not in tokenizer.all_special_ids else -1
        spans.append((start, start + len(piece)) if start >= 0 else (0, 0))
        position = max(position, spans[-1][1])
    return spans


def add_up(values: np.ndarray, owners: np.ndarray, count: int) -> np.ndarray:
    """Sum the values of tokens (text_len,) by word (words,), leaving out tokens of no word."""
    return np.bincount(owners[owners >= 0], weights=values[owners >= 0], minlength=count)


def read_attention(
    outputs: Any, inputs: dict[str, Tensor], views: dict[str, np.ndarray], owners: dict[str, np.ndarray], count: int
) -> dict[str, Attention]:
    """Both directions of the cross-attention, by query modality.

    F_IT is [first token; regions; words] in the modes with CLIP, [regions; words] without. With CLIP's towers its
    regions and words are CLIP's own.
    """
    clip = "clip_input_ids" in inputs
    token_owners = owners["clip_input_ids" if clip else "input_ids"]
    pixels = "clip_pixel_values" if clip else "pixel_values"
    real = inputs["attention_mask" if "attention_mask" in inputs else "clip_attention_mask"][0].bool()
    sides = {"text": outputs.text_attentions[0][:, real], "image": outputs.image_attentions[0]}
    first = 0 if outputs.image_embeds is None else 1
    attention = {}
    for side, weights in sides.items():
        mean = weights.float().mean(dim=(0, 1)).cpu().double().numpy()  # (joint_len,)
        regions, tokens = mean[first : len(mean) - len(token_owners)], mean[len(mean) - len(token_owners) :]
        words = add_up(tokens, token_owners, count) / add_up(np.ones_like(tokens), token_owners, count).clip(1)
        within, markers = tokens[token_owners >= 0].sum(), tokens[token_owners < 0].sum()
        shares = {"image": regions.sum(), "words": within, "markers": markers}
        shares |= {"first token": mean[0]} if first else {}
        grid = regions.reshape(grid_shape(len(regions), *inputs[pixels].shape[-2:]))
        heat_map = HeatMap(views[pixels], grid)
        attention[side] = Attention(heat_map, words, {name: float(s) for name, s in shares.items()})
    return attention


def grid_shape(regions: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a grid of regions: the pair whose shape is closest to that of the encoder's input."""
    pairs = [(rows, regions // rows) for rows in range(1, regions + 1) if regions % rows == 0]
    return min(pairs, key=lambda pair: abs(np.log(pair[0] / pair[1] * width / height)))


def attribute(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    target: int,
    views: dict[str, np.ndarray],
    owners: dict[str, np.ndarray],
    count: int,
) -> Attribution:
    """Integrated gradients of one logit over all inputs together, which makes their attributions comparable.

    Args:
        target: Index of the logit.
        views: The part of the image that each encoder sees, by input.
        owners: (text_len,), the word of each token, by input.
        count: Number of words.

    Source:
        Sundararajan et al., "Axiomatic Attribution for Deep Networks", 2017. The starting point is our choice: a grey
        image, and word embeddings of zero. Markers keep theirs, so that only words can matter.
    """

    def as_tensor(output: Any) -> Tensor:
        return output if isinstance(output, Tensor) else output.last_hidden_state

    # Gradients are taken behind the embeddings of words and of CLIP's patches, but behind the last feature map of the
    # vision encoder. On the path from a grey image to a photo, the score of a convolutional network jumps: in our
    # trials gradients at its pixels did not add up to the score, gradients at its feature map nearly did.
    probed = {FEATURES[name].input: encoder for name, encoder in model.backbones().items()}
    names = [name for name in probed if name in inputs]
    encoders = [probed[name] for name in names]
    modules = [
        encoder if name == "pixel_values" else encoder.get_input_embeddings()
        for name, encoder in zip(names, encoders, strict=True)
    ]
    with torch.no_grad():
        points = [as_tensor(module(inputs[name])) for name, module in zip(names, modules, strict=True)]
        starts = []
        for name, module, point in zip(names, modules, points, strict=True):
            if name in owners:
                starts.append(point * torch.from_numpy(owners[name] < 0).to(point.device)[:, None])
            else:
                starts.append(as_tensor(module(torch.zeros_like(inputs[name]))))
        score = partial(score_of, model, inputs, modules, target)
        difference = (score(*points) - score(*starts)).item()
    found = IntegratedGradients(score).attribute(
        tuple(points), tuple(starts), n_steps=N_STEPS, internal_batch_size=STEPS_AT_ONCE
    )
    values = {name: value[0].detach().cpu().double() for name, value in zip(names, found, strict=True)}
    regions = {}
    for name, view in views.items():  # prefix tokens such as CLS are no regions, and nothing reads them
        placed = as_map(probed[name], values[name].unsqueeze(0), *inputs[name].shape[-2:])
        regions[ENCODERS[name]] = HeatMap(view, placed[0].sum(dim=0).numpy())
    words = [add_up(values[name].sum(dim=-1).numpy(), owners[name], count) for name in owners]
    return Attribution(regions, sum(words) if words else None, difference)


def score_of(
    model: PreTrainedModel, inputs: dict[str, Tensor], modules: Sequence[nn.Module], target: int, *values: Tensor
) -> Tensor:
    """One logit (batch,) of the post, with the modules' outputs replaced by values (batch, ...)."""
    batch = {name: tensor.expand(len(values[0]), *tensor.shape[1:]) for name, tensor in inputs.items()}
    with ExitStack() as stack:
        for module, value in zip(modules, values, strict=True):
            output = BaseModelOutput(last_hidden_state=value) if isinstance(module, PreTrainedModel) else value
            stack.enter_context(output_replaced(module, output))
        return model(**batch).logits[:, target]


@contextmanager
def output_replaced(module: nn.Module, output: Any) -> Iterator[None]:
    """Let a module return an output without computing it; a forward hook would compute it first."""
    before = vars(module).get("forward")
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def strongest(attribution: Attribution) -> float:
    """The largest absolute weight in all encoders' maps, which lets them share one scale."""
    return float(max((np.abs(heat_map.weights).max() for heat_map in attribution.regions.values()), default=0))


Panel = Callable[[Axes], None] | None


def draw(explanation: Explanation) -> Figure:
    """Draw the figure: columns for the post, for each direction of the attention, and for the attribution.

    Images are in the upper row, words in the lower one; panels that the model does not have are left out.
    """
    columns = build_columns(explanation)
    rows = [row for row in (0, 1) if any(column[row] for column in columns)]
    figure = Figure(figsize=(4.2 * len(columns), 4.4 * len(rows)), dpi=110, layout="constrained")
    total, difference = explanation.attribution.total, explanation.attribution.difference
    figure.suptitle(
        "Attention: where the model takes information from. Attribution: what moved the score. The two may differ.\n"
        f"From a grey image and empty words to this post the score moves by {difference:+.2f}; "
        f"the attributions add up to {total:+.2f}.",
        fontsize=11,
    )
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes_row, row in zip(grid, rows, strict=True):
        for axes, column in zip(axes_row, columns, strict=True):
            axes.set_axis_off() if column[row] is None else column[row](axes)
    return figure


def build_columns(explanation: Explanation) -> list[tuple[Panel, Panel]]:
    """The upper and the lower panel of each column of the figure."""
    image: Panel = None
    if explanation.view is not None:
        image = partial(show, image=explanation.view, title="The part of the image that the model sees")
    columns: list[tuple[Panel, Panel]] = [(image, partial(draw_scores, explanation=explanation))]
    bars = partial(draw_words, words=explanation.words)
    for side, attention in explanation.attention.items():
        heading, shares, weights = f"ATTENTION of the {side}", attention.shares, attention.regions.weights
        peak, others = weights.max() / weights.mean(), 1 - shares["image"] - shares["words"]
        title = f"{heading} to image regions\n{shares['image']:.0%} of it; strongest: {peak:.1f} x the average"
        regions = partial(show, image=gild(attention.regions), title=title)
        title = f"{heading} to words\n{shares['words']:.0%} of it; other tokens: {others:.0%}"
        columns.append((regions, partial(bars, weights=attention.words, colours=(GOLD, GOLD), title=title)))
    found = explanation.attribution
    heading = f"ATTRIBUTION to {readable(explanation.predicted)!r}\nby integrated gradients\n"
    maps = []
    for encoder, regions in found.regions.items():
        title = f"{heading}regions, through {encoder}: {regions.weights.sum():+.2f}"
        maps.append(partial(show, image=tint(regions, strongest(found)), title=title))
    words: Panel = None
    if found.words is not None:
        title = f"{heading}words: {found.words.sum():+.2f}; red for, blue against"
        words = partial(bars, weights=found.words, colours=(RED, BLUE), title=title)
    return columns + list(zip_longest(maps, [words]))


def show(axes: Axes, image: np.ndarray, title: str) -> None:
    axes.imshow(image, interpolation="bilinear")
    axes.set_axis_off()
    axes.set_title(title, fontsize=10, parse_math=False)


def draw_scores(axes: Axes, explanation: Explanation) -> None:
    """Bars of the scores; below them each side's own sentiment, the gate and lambda."""
    names = [readable(name) for name in explanation.scores]
    values = list(explanation.scores.values())
    bars = axes.barh(range(len(values)), values, height=0.5, color="#555555")
    axes.bar_label(bars, [f"{value:.3f}" for value in values], padding=3, fontsize=9)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.invert_yaxis()
    if "value" not in explanation.scores:
        axes.set_xlim(0, 1.2)
    notes = [f"{name}: {value}" for name, value in modality_notes(explanation).items()]
    if explanation.gate is not None:
        notes.append(f"gate {explanation.gate:.2f} (mean; 1: linear path, 0: tanh path)")
        notes.append(f"lambda {explanation.balance:.2f} (1: image's side, 0: text's)")
    axes.set_xlabel("\n".join(notes), fontsize=9, parse_math=False)
    axes.set_title("PREDICTION", fontsize=10)


def modality_notes(explanation: Explanation) -> dict[str, str]:
    """What the modality heads say: the likeliest label of each side, and the conflict of the two."""
    found, notes = explanation.modalities or {}, {}
    for side in ("text", "image"):
        if scores := found.get(side):
            label = max(scores, key=scores.get)
            notes[f"{side} alone"] = f"{readable(label)} {scores[label]:.3f}"
    if found.get("conflict") is not None:
        notes["conflict"] = f"{found['conflict']:.3f}"
    return notes


def draw_words(axes: Axes, words: list[str], weights: np.ndarray, title: str, colours: tuple[str, str]) -> None:
    """Draw a bar per word in reading order; only the strongest words of a long text.

    Args:
        axes: Where to draw.
        words: The words.
        weights: (words,).
        title: Title of the panel.
        colours: Colours of positive and negative weights.
    """
    kept = np.sort(np.argsort(-np.abs(weights), kind="stable")[:MAX_BARS])
    axes.barh(range(len(kept)), weights[kept], color=[colours[int(weight < 0)] for weight in weights[kept]])
    axes.set_yticks(range(len(kept)), [readable(words[index]) for index in kept], fontsize=9, parse_math=False)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.locator_params(axis="x", nbins=5)
    if len(kept) < len(words):
        axes.set_xlabel(f"the {len(kept)} strongest of {len(words)} words", fontsize=9)
    axes.set_title(title, fontsize=10, parse_math=False)


def readable(word: str) -> str:
    """A word that the figure's font can show: missing symbols become their names, and long words are cut."""
    font = get_font(findfont("DejaVu Sans"))
    shown = ""
    for letter in word:
        kind = unicodedata.category(letter)
        if font.get_char_index(ord(letter)):
            shown += letter
        elif kind == "So":
            shown += f"[{unicodedata.name(letter, 'symbol').lower()}]"
        elif kind[0] not in "MC":  # combining marks and control characters
            shown += "□"
    return shown if len(shown) <= 18 else f"{shown[:17]}…"


def summary(explanation: Explanation) -> str:
    """The numbers of the figure in one line."""
    parts = [f"{name} {value:.3f}" for name, value in explanation.scores.items()]
    parts += [f"{name} {value}" for name, value in modality_notes(explanation).items()]
    if explanation.gate is not None:
        parts += [f"gate {explanation.gate:.3f}", f"lambda {explanation.balance:.3f}"]
    return ", ".join(parts)
