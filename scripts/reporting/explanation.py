"""Draw what a model looks at, and what its decision rests on.

    python scripts/explain.py CHECKPOINT --image picture.jpg --text "What a lovely morning!" -o explanation.png

The two are not the same, and the figure keeps them apart. Attention says where the model fetched information from;
attribution, here by integrated gradients, says which regions and words moved the score of the predicted class, and in
which direction. Needs the extra `explain`. A checkpoint's own code is run (`trust_remote_code=True`).
"""

import argparse
import re
import sys
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
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoProcessor, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

N_STEPS = 32  # points on the path of integrated gradients
STEPS_AT_ONCE = 8  # what keeps the memory of base-size models below a few GB
MAX_BARS = 20
ENCODERS = {"pixel_values": "the vision encoder", "clip_pixel_values": "CLIP"}
RED, BLUE, GOLD = (0.84, 0.15, 0.16), (0.12, 0.35, 0.75), (0.72, 0.53, 0.04)
# Where gradients are taken, by input: at the embeddings, of words as of CLIP's patches, but for the vision encoder at
# its last feature map. On the way from a grey picture to a photo the scores of a convolutional network leap up and
# down: gradients at its pixels added up to anything in our trials, at the feature map to within some percent.
PROBES = {
    "input_ids": "text",
    "clip_input_ids": "clip.text",
    "pixel_values": "vision",
    "clip_pixel_values": "clip.vision",
}


@dataclass
class HeatMap:
    """Weights of the regions of a picture.

    Args:
        view: (height, width, 3), values in 0 to 1: the resized and cropped picture as an encoder sees it.
        weights: (rows, columns), from the top left.
    """

    view: np.ndarray
    weights: np.ndarray


@dataclass
class Attention:
    """Where one modality looks in F_IT: the weights of equation 6, averaged over heads and over its real positions.

    Equation 11 takes the same mean, so a position counts as much here as it does in the model.

    Args:
        regions: The weights of the picture's positions.
        words: (words,), the weights of the text's positions, the mean over the pieces of a word: added up they would
            make any rare word look important.
        shares: Who gets how much; adds up to 1. "first token" is CLIP(I) * CLIP(T), "markers" are tokens that stand
            for no word, such as `<s>`.
    """

    regions: HeatMap
    words: np.ndarray
    shares: dict[str, float]


@dataclass
class Attribution:
    """Integrated gradients of one score, from a mid-grey picture and words without meaning to the post.

    Args:
        regions: By encoder, what each region of the picture adds to the score.
        words: (words,), what each word adds to it, through both encoders; None without a text.
        difference: The score of the post less that of the starting point. All of the above should add up to it; how
            far they do tells how much to believe them.
    """

    regions: dict[str, HeatMap]
    words: np.ndarray | None
    difference: float

    @property
    def total(self) -> float:
        """All of the above added up."""
        maps = sum(float(heat_map.weights.sum()) for heat_map in self.regions.values())
        return maps + (0.0 if self.words is None else float(self.words.sum()))


@dataclass
class Explanation:
    """All that the figure shows.

    Args:
        probabilities: By label; a regression has its one "value" here instead.
        predicted: The label that `attribution` is about.
        attribution: What the decision rests on.
        attention: By who looks, "text" and "picture"; empty for a model without cross-attention.
        view: (height, width, 3), the picture as the vision encoder sees it, or None.
        words: The words of the text, or None.
        gate: Mean of g of equation 12, or None without a gate; 1 is the linear path, 0 the tanh path.
        balance: lambda of equation 15, or None; 1 is the picture's side, 0 the text's.
    """

    probabilities: dict[str, float]
    predicted: str
    attribution: Attribution
    attention: dict[str, Attention] = field(default_factory=dict)
    view: np.ndarray | None = None
    words: list[str] | None = None
    gate: float | None = None
    balance: float | None = None


def explain(model: PreTrainedModel, processor: Any, image: Any = None, text: str | None = None) -> Explanation:
    """Explain the prediction for one post.

    Args:
        model: A `ClipCaCgForSequenceClassification` in 32 bits; it is put into evaluation mode.
        processor: Its `ClipCaCgProcessor`.
        image: Anything that the processor takes for one picture. A model that reads no picture ignores it.
        text: The text; likewise.

    Raises:
        ValueError: If the model needs what was not given, or the picture is broken.
        FileNotFoundError: If there is no picture at a path.
    """
    inputs = prepare(model, processor, image, text)
    words, owners = ([], {}) if "input_ids" not in inputs else find_words(processor, text, inputs)
    with torch.inference_mode():
        outputs = model.eval()(**inputs, output_attentions=True)
    probabilities = read_scores(outputs.logits[0], model.config)
    predicted = max(probabilities, key=probabilities.get)
    views = {name: view(inputs[name][0], part) for name, part in image_processors(processor) if name in inputs}
    target = list(probabilities).index(predicted)
    explanation = Explanation(probabilities, predicted, attribute(model, inputs, target, views, owners, len(words)))
    explanation.view = views.get("pixel_values")
    explanation.words = words if "input_ids" in inputs else None
    if outputs.text_attentions is not None:
        explanation.attention = read_attention(outputs, inputs, views, owners, len(words))
    if outputs.gate is not None:
        explanation.gate = outputs.gate.mean().item()
        explanation.balance = model.base_model.fusion.lambda_logit.sigmoid().item()
    return explanation


def prepare(model: PreTrainedModel, processor: Any, image: Any, text: str | None) -> dict[str, Tensor]:
    """The inputs that the model reads, a batch of one post, on its device.

    Raises:
        ValueError: If the picture or the text that it needs is missing.
    """
    needed = model.config.required_inputs
    given = {"picture": ("pixel_values", image), "text": ("input_ids", text)}
    missing = [name for name, (tensor, value) in given.items() if tensor in needed and value is None]
    if missing:
        raise ValueError(f"This model needs a {' and a '.join(missing)}.")
    post = {"images": image if "pixel_values" in needed else None, "text": text if "input_ids" in needed else None}
    batch = processor(**post, return_tensors="pt")
    masks = [name.replace("input_ids", "attention_mask") for name in needed if name.endswith("input_ids")]
    return {name: batch[name].to(model.device) for name in [*needed, *masks]}


def image_processors(processor: Any) -> list[tuple[str, Any]]:
    """Names of the pictures among the inputs, and the parts that make them."""
    return [("pixel_values", processor.image_processor), ("clip_pixel_values", processor.clip_image_processor)]


def view(pixels: Tensor, image_processor: Any) -> np.ndarray:
    """Normalised pixels (channels, height, width) as a picture (height, width, 3) with values in 0 to 1."""
    picture = pixels.cpu().permute(1, 2, 0).numpy()
    if image_processor.do_normalize:
        picture = picture * np.array(image_processor.image_std) + np.array(image_processor.image_mean)
    return picture.clip(0, 1)


def read_scores(logits: Tensor, config: Any) -> dict[str, float]:
    """Logits (labels,) as probabilities by label, or as the one value of a regression."""
    if config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1):
        return {"value": logits.item()}
    several = config.problem_type == "multi_label_classification"
    values = logits.float().sigmoid() if several else logits.float().softmax(dim=-1)
    return {config.id2label[index]: value for index, value in enumerate(values.tolist())}


def find_words(processor: Any, text: str, inputs: dict[str, Tensor]) -> tuple[list[str], dict[str, np.ndarray]]:
    """What stands between spaces, and which of these words each token belongs to.

    Returns:
        The words, and for each input of token ids (text_len,) indices into them; -1 for a token that is no part of a
        word. One list of words for both tokenizers makes their weights comparable, and pieces readable.
    """
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    starts, ends = np.array([span[0] for span in spans], int), np.array([span[1] for span in spans], int)
    owners = {}
    for name, tokenizer in (("input_ids", processor.tokenizer), ("clip_input_ids", processor.clip_tokenizer)):
        if name in inputs:
            # The last character tells the word: some tokenizers give a token the space before it.
            last = np.array([end - 1 for _, end in token_spans(tokenizer, text, inputs[name][0].tolist())])
            index = np.searchsorted(starts, last, side="right") - 1
            inside = (index >= 0) & (last < (ends[index] if spans else 0))
            owners[name] = np.where(inside, index, -1)
    return [text[start:end] for start, end in spans], owners


def token_spans(tokenizer: Any, text: str, ids: list[int]) -> list[tuple[int, int]]:
    """Where each token stands in the text; (0, 0) for one that does not.

    Tokenizers in plain Python do not tell: there each token's letters are looked for after those of the one before.
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
    """Values of tokens (text_len,) added up by word (words,); those of markers are left out."""
    return np.bincount(owners[owners >= 0], weights=values[owners >= 0], minlength=count)


def read_attention(
    outputs: Any, inputs: dict[str, Tensor], views: dict[str, np.ndarray], owners: dict[str, np.ndarray], count: int
) -> dict[str, Attention]:
    """Both directions of the cross-attention, by who looks.

    F_IT is [first token; regions; words] in the modes with CLIP and [regions; words] in the one without. With CLIP's
    towers its regions and words are CLIP's own.
    """
    clip = "clip_input_ids" in inputs
    token_owners = owners["clip_input_ids" if clip else "input_ids"]
    picture = views["clip_pixel_values" if clip else "pixel_values"]
    real = inputs["attention_mask"][0].bool()
    sides = {"text": outputs.text_attentions[0][:, real], "picture": outputs.image_attentions[0]}
    first = 0 if outputs.image_embeds is None else 1
    attention = {}
    for side, weights in sides.items():
        mean = weights.float().mean(dim=(0, 1)).cpu().double().numpy()  # (joint_len,)
        regions, tokens = mean[first : len(mean) - len(token_owners)], mean[len(mean) - len(token_owners) :]
        words = add_up(tokens, token_owners, count) / add_up(np.ones_like(tokens), token_owners, count).clip(1)
        within, markers = tokens[token_owners >= 0].sum(), tokens[token_owners < 0].sum()
        shares = {"picture": regions.sum(), "words": within, "markers": markers}
        shares |= {"first token": mean[0]} if first else {}
        grid = regions.reshape(grid_shape(len(regions), picture))
        attention[side] = Attention(HeatMap(picture, grid), words, {name: float(s) for name, s in shares.items()})
    return attention


def grid_shape(regions: int, picture: np.ndarray) -> tuple[int, int]:
    """Rows and columns of so many regions: of all pairs, the one whose shape is closest to the picture's."""
    pairs = [(rows, regions // rows) for rows in range(1, regions + 1) if regions % rows == 0]
    return min(pairs, key=lambda pair: abs(np.log(pair[0] / pair[1] * picture.shape[1] / picture.shape[0])))


def attribute(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    target: int,
    views: dict[str, np.ndarray],
    owners: dict[str, np.ndarray],
    count: int,
) -> Attribution:
    """Integrated gradients of one logit, over all inputs at once, so that what they add can be compared.

    Args:
        target: Index of the logit.
        views, owners, count: The pictures as the encoders see them, the word of each token, how many words there are.

    Source: Sundararajan et al., "Axiomatic Attribution for Deep Networks", 2017. The starting point is our choice: a
        grey picture, and embeddings of zero; markers stay, so that only words can matter.
    """
    names = [name for name in PROBES if name in inputs]
    modules = [probe(model, name) for name in names]
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
    # cuDNN computes no gradients of a GRU in evaluation mode.
    with torch.backends.cudnn.flags(enabled=False):
        found = IntegratedGradients(score).attribute(
            tuple(points), tuple(starts), n_steps=N_STEPS, internal_batch_size=STEPS_AT_ONCE
        )
    values = {name: value[0].detach().cpu().double() for name, value in zip(names, found, strict=True)}
    regions = {ENCODERS[name]: HeatMap(views[name], values[name].sum(dim=0).numpy()) for name in views}
    words = [add_up(values[name].sum(dim=-1).numpy(), owners[name], count) for name in owners]
    return Attribution(regions, sum(words) if words else None, difference)


def probe(model: PreTrainedModel, name: str) -> nn.Module:
    """The module behind which the gradients with respect to an input are taken; see `PROBES`."""
    encoder = model.backbones()[PROBES[name]]
    return encoder if name == "pixel_values" else encoder.get_input_embeddings()


def as_tensor(output: Any) -> Tensor:
    """Embeddings as they are, of an encoder's output its feature map."""
    return output if isinstance(output, Tensor) else output.last_hidden_state


def score_of(
    model: PreTrainedModel, inputs: dict[str, Tensor], modules: Sequence[nn.Module], target: int, *values: Tensor
) -> Tensor:
    """One logit (batch,) of the post, with the outputs of modules replaced by values (batch, ...)."""
    batch = {name: tensor.expand(len(values[0]), *tensor.shape[1:]) for name, tensor in inputs.items()}
    with ExitStack() as stack:
        for module, value in zip(modules, values, strict=True):
            encoder = isinstance(module, PreTrainedModel)
            output = BaseModelOutput(last_hidden_state=value) if encoder else value
            stack.enter_context(output_replaced(module, output))
        return model(**batch).logits[:, target]


@contextmanager
def output_replaced(module: nn.Module, output: Any) -> Iterator[None]:
    """Let a module return an output without computing anything."""
    before = vars(module).get("forward")
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def upsample(heat_map: HeatMap) -> np.ndarray:
    """The weights (rows, columns) as (height, width, 1) of the picture."""
    weights = torch.from_numpy(heat_map.weights)[None, None]
    return F.interpolate(weights, size=heat_map.view.shape[:2], mode="bilinear")[0, 0, :, :, None].numpy()


def light_up(heat_map: HeatMap) -> np.ndarray:
    """The picture (height, width, 3) lit where the weights are, dark elsewhere.

    Full light is the strongest weight, or twice the average if that is more: even attention gives an even picture.
    """
    weights = heat_map.weights
    strength = upsample(heat_map) / max(weights.max(), 2 * weights.mean())
    return heat_map.view * (0.1 + 0.9 * strength)


def tint(heat_map: HeatMap, limit: float) -> np.ndarray:
    """The picture (height, width, 3) in grey, red where weights are above zero and blue where they are below.

    Args:
        heat_map: What to show.
        limit: The weight of the full colour.
    """
    weights = upsample(heat_map).clip(-limit, limit) / (limit or 1)
    strength = 0.75 * np.abs(weights)  # the picture stays visible
    return heat_map.view.mean(axis=-1, keepdims=True) * (1 - strength) + np.where(weights > 0, RED, BLUE) * strength


def strongest(attribution: Attribution) -> float:
    """The strongest weight of all encoders' maps, so that they can share one scale."""
    return float(max((np.abs(heat_map.weights).max() for heat_map in attribution.regions.values()), default=0))


def draw(explanation: Explanation) -> Figure:
    """Draw the figure: a column for the post, one for each direction of the attention, the last for the attribution.

    Pictures are in the upper row, the words below them; panels that the model does not have are left out.
    """
    columns = [post_column(explanation)]
    columns += [attention_column(explanation, side) for side in explanation.attention]
    columns += attribution_columns(explanation)
    rows = [row for row in (0, 1) if any(column[row] for column in columns)]
    figure = Figure(figsize=(4.2 * len(columns), 4.4 * len(rows)), dpi=110, layout="constrained")
    total, difference = explanation.attribution.total, explanation.attribution.difference
    figure.suptitle(
        "Attention: where the model fetches information. Attribution: what moved the score. The two may differ.\n"
        f"From a grey picture and empty words to this post the score moves by {difference:+.2f}; "
        f"all attributions add up to {total:+.2f}.",
        fontsize=11,
    )
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes_row, row in zip(grid, rows, strict=True):
        for axes, column in zip(axes_row, columns, strict=True):
            axes.set_axis_off() if column[row] is None else column[row](axes)
    return figure


Column = tuple[Callable[[Axes], None] | None, Callable[[Axes], None] | None]


def post_column(explanation: Explanation) -> Column:
    """The picture; the prediction, and what the gate and lambda say."""
    picture = None
    if explanation.view is not None:
        picture = partial(show, image=explanation.view, title="The picture, as the vision encoder sees it")
    return picture, partial(draw_scores, explanation=explanation)


def attention_column(explanation: Explanation, side: str) -> Column:
    """Where the text or the picture looks: regions, and words."""
    attention = explanation.attention[side]
    regions, words = attention.shares["picture"], attention.shares["words"]
    peak = attention.regions.weights.max() / attention.regions.weights.mean()
    heading = f"ATTENTION of the {side}"
    title = f"{heading} to regions\n{regions:.0%} of it; strongest: {peak:.1f} x the average"
    style = {"title": f"{heading} to words\n{words:.0%} of it; other tokens: {1 - regions - words:.0%}"}
    return (
        partial(show, image=light_up(attention.regions), title=title),
        partial(draw_words, words=explanation.words, weights=attention.words, colours=(GOLD, GOLD), **style),
    )


def attribution_columns(explanation: Explanation) -> list[Column]:
    """What moved the score: a map for each encoder that sees the picture, and under the first one the words."""
    found = explanation.attribution
    heading = f"ATTRIBUTION to {readable(explanation.predicted)!r}\nby integrated gradients\n"
    maps = []
    for encoder, regions in found.regions.items():
        title = f"{heading}regions, through {encoder}: {regions.weights.sum():+.2f}"
        maps.append(partial(show, image=tint(regions, strongest(found)), title=title))
    words = None
    if found.words is not None:
        style = {"title": f"{heading}words: {found.words.sum():+.2f}; red for, blue against", "colours": (RED, BLUE)}
        words = partial(draw_words, words=explanation.words, weights=found.words, **style)
    return list(zip_longest(maps, [words]))


def show(axes: Axes, image: np.ndarray, title: str) -> None:
    axes.imshow(image)
    axes.set_axis_off()
    axes.set_title(title, fontsize=10, parse_math=False)


def draw_scores(axes: Axes, explanation: Explanation) -> None:
    """Bars of the probabilities; the gate and lambda below them."""
    names = [readable(name) for name in explanation.probabilities]
    values = list(explanation.probabilities.values())
    bars = axes.barh(range(len(values)), values, height=0.5, color="#555555")
    axes.bar_label(bars, [f"{value:.3f}" for value in values], padding=3, fontsize=9)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.invert_yaxis()
    if "value" not in explanation.probabilities:
        axes.set_xlim(0, 1.2)
    notes = []
    if explanation.gate is not None:
        notes.append(f"gate {explanation.gate:.2f} (mean; 1: linear path, 0: tanh path)")
        notes.append(f"lambda {explanation.balance:.2f} (1: picture's side, 0: text's)")
    axes.set_xlabel("\n".join(notes), fontsize=9)
    axes.set_title("PREDICTION", fontsize=10)


def draw_words(axes: Axes, words: list[str], weights: np.ndarray, title: str, colours: tuple[str, str]) -> None:
    """A bar for each word in reading order, of long texts for the strongest only.

    Args:
        colours: Of weights above zero, and of those below.
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
    """A word as the figure's font can show it: symbols that it lacks by their names, long words cut."""
    font = get_font(findfont("DejaVu Sans"))
    shown = ""
    for letter in word:
        kind = unicodedata.category(letter)
        if font.get_char_index(ord(letter)):
            shown += letter
        elif kind == "So":
            shown += f"[{unicodedata.name(letter, 'symbol').lower()}]"
        elif kind[0] not in "MC":  # accents of what is not shown, and what nobody sees
            shown += "□"
    return shown if len(shown) <= 18 else f"{shown[:17]}…"


def load_checkpoint(checkpoint: str) -> tuple[PreTrainedModel, Any]:
    """A model in 32 bits, ready to be explained, and its processor, from a folder or the Hub."""
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32)
    return model.eval().requires_grad_(False), AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)


def summary(explanation: Explanation) -> str:
    """What the figure says in numbers, in one line."""
    parts = [f"{name} {value:.3f}" for name, value in explanation.probabilities.items()]
    if explanation.gate is not None:
        parts += [f"gate {explanation.gate:.3f}", f"lambda {explanation.balance:.3f}"]
    return ", ".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="Folder or Hub name of a trained model.")
    parser.add_argument("--image", help="Path or URL of the picture.")
    parser.add_argument("--text", help="The text.")
    parser.add_argument("-o", "--output", default="explanation.png", help="Picture file to write.")
    arguments = parser.parse_args(argv)
    try:
        model, processor = load_checkpoint(arguments.checkpoint)
        explanation = explain(model, processor, arguments.image, arguments.text)
    except (OSError, TypeError, ValueError) as error:
        sys.exit(str(error))
    draw(explanation).savefig(arguments.output)
    print(summary(explanation))


if __name__ == "__main__":
    main()
