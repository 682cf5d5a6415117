"""CLIP-CA-CG: image-text sentiment analysis with CLIP interaction, cross-attention and a cross-modal gate.

Source: Lu, Ni and Ding, "Cross-Modal Sentiment Analysis Based on CLIP Image-Text Attention Interaction", IJACSA 15(2),
2024. Called "the paper" below.

    equation      what it computes                       class
    --------      ----------------------------------     ------------------------------------------------------------
    1             token states of the text encoder       TextBranch
    2, 3          bidirectional GRU, F_T                 BiGru
    4             image regions, F_I                     ImageBranch
    5             image-text interaction, F_IT           ClipEncoderInteraction, FeatureInteraction
    6-10          cross-attention, image-IT and text-IT  CrossAttention
    11, 12        pooled states F_VT and gate, F_mix     CrossModalGate
    13-15         fusion of the two modalities, F        GatedFusion
    16            classifier                             ClipCaCgForSequenceClassification
    Table IV      w/o Clip, w/o CG                       NoClipInteraction, ConcatFusion
                  V only, T only                         ClipCaCgModel, `config.modality`
    ours          labels of text and image alone         ModalityHeads
    ours          posts without an image or a text       MissingModality

Axis names: batch, text_len (tokens of the text encoder), regions (of the image), joint_len (positions of F_IT),
hidden (d), projection (c), heads, labels. A mask is 1 or True for a real token and 0 or False for padding.

Departures from the paper:
- F_IT is a sequence (image-text, patches-text, image-words) where the paper has one vector. Over a single key the
  softmax of equation 6 is always 1, and the attention would do nothing. The first position is the paper's
  CLIP(I) * CLIP(T).
- Equation 4 takes the vision encoder's last feature map before its pooling: the paper aligns image regions with words,
  and a pooled vector has no regions.
- With `clip_mode="encoder"`, CLIP's towers read the raw image and text. The paper writes CLIP(F_I) and CLIP(F_T), but
  CLIP cannot read another encoder's states. `clip_mode="feature"` is the literal reading, without CLIP's weights.
- `share_clip_text` and `share_clip_vision` let CLIP's tower be an encoder of equation 1 or 4 too. The paper's encoders
  are separate; so are ours by default.
- RoBERTa's tokenizer adds `<s>` and `</s>`, and both stay. The paper says that it adds no special tokens.
- `use_modality_heads` is our addition: two heads learn the labels that annotators gave to the text alone and to the
  image alone. `modality_combination="average"` lets them take part in the prediction. Both are off by default.
- A learned state stands in for an image or a text that an example lacks. The paper's examples have both.
  `modality_dropout` trains it; it is off by default.

Where the paper is silent, our reading:
- Equation 12 as a formula. The paper prints only sigma(Concat, Norm).
- Equation 11 and the first argument of equations 13 and 14 are means over regions and over real tokens.
- The products of equation 5 are multiplied by c. The entries of a product of two unit vectors are of the order 1 / c,
  too small for the Linear that follows. A LayerNorm would subtract their mean, which is the cosine similarity.
- F_I and F_T each end in a LayerNorm: encoder outputs differ in scale, and the larger one dominates early training.
- Dropout: on the attention's output before the residual, inside every MLP, and on F before equation 16.
- "MLP" is Linear, GELU, dropout, Linear. lambda of equation 15 is a learned scalar that starts at 0.5.
- The Bi-GRU starts near the identity and each cross-attention near its residual, so that the pretrained encoders'
  features reach the classifier from the first step.
- The contrastive loss of `clip_mode="feature"`, its weight of 0.1, and that it is added in training only.
- w/o Clip has no joint token, so equation 12 sees F_VT alone. w/o CG has one MLP that reads everything that equations
  12-15 read, so that only the gate is missing.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    ModelOutput,
    can_return_tuple,
    logging,
)

from .configuration_clipcacg import (
    LOADING_KEYWORDS,
    LOADING_OPTIONS,
    MODEL_CLASS,
    PADDED_DUAL_ENCODERS,
    ClipCaCgConfig,
    check_keywords,
    check_sources,
    split_keywords,
)

logger = logging.get_logger(__name__)


@dataclass
class ClipCaCgModelOutput(ModelOutput):
    """Output of `ClipCaCgModel`. A field that the chosen mode does not compute is None.

    Args:
        fused_embeds: (batch, hidden), F of equation 15.
        image_embeds: (batch, projection), unit length; v of equation 5. A learned vector where the image is missing.
        text_embeds: (batch, projection), unit length; t of equation 5. A learned vector where the text is missing.
        gate: (batch, hidden), values in (0, 1); g of equation 12. 1 passes the linear path, 0 the tanh path.
        contrastive_loss: Scalar, the symmetric contrastive loss over the batch; with `clip_mode="feature"` in training
            mode.
        has_image, has_text: (batch,), bool: what the model read of each example; with `modality_dropout`.
        image_attentions: (batch, heads, regions, joint_len), weights of equation 6 with the image as query; with
            `output_attentions=True`.
        text_attentions: (batch, heads, text_len, joint_len), the same with the text as query.
        image_hidden_states: With `output_hidden_states=True`: F_I and image-IT, each (batch, regions, hidden).
        text_hidden_states: With `output_hidden_states=True`: F_T and text-IT, each (batch, text_len, hidden).
    """

    fused_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    gate: Tensor | None = None
    contrastive_loss: Tensor | None = None
    has_image: Tensor | None = None
    has_text: Tensor | None = None
    image_attentions: Tensor | None = None
    text_attentions: Tensor | None = None
    image_hidden_states: tuple[Tensor, ...] | None = None
    text_hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class ClipCaCgClassifierOutput(ModelOutput):
    """Output of `ClipCaCgForSequenceClassification`.

    Args:
        loss: Scalar, if `labels` were given: the task loss and, in training mode, the weighted contrastive loss and
            `modality_loss`.
        logits: (batch, labels), scores before the softmax of equation 16, or the predicted values of a regression.
            With `modality_combination="average"` in evaluation mode: the logarithms of the averaged probabilities.
        text_logits: (batch, labels), scores of the text's own label, with `use_modality_heads`.
        image_logits: (batch, labels), scores of the image's own label, with `use_modality_heads`.
        modality_loss: Scalar, the sum of the two heads' cross-entropies; in training mode, if `labels` were given.
        fused_embeds, image_embeds, text_embeds, gate, contrastive_loss, has_image, has_text, image_attentions,
            text_attentions, image_hidden_states, text_hidden_states: As in `ClipCaCgModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    fused_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    gate: Tensor | None = None
    contrastive_loss: Tensor | None = None
    has_image: Tensor | None = None
    has_text: Tensor | None = None
    text_logits: Tensor | None = None
    image_logits: Tensor | None = None
    modality_loss: Tensor | None = None
    image_attentions: Tensor | None = None
    text_attentions: Tensor | None = None
    image_hidden_states: tuple[Tensor, ...] | None = None
    text_hidden_states: tuple[Tensor, ...] | None = None


def as_mask(attention_mask: Tensor | None, tokens: Tensor) -> Tensor:
    """Return a bool mask (batch, text_len).

    Args:
        attention_mask: (batch, text_len), or None for texts without padding.
        tokens: (batch, text_len) token ids, or (batch, text_len, width) states.
    """
    if attention_mask is None:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return attention_mask.bool()


def check_axes(axes: str, **inputs: Tensor | None) -> None:
    """Raise a ValueError if an input does not have these axes, such as "(batch, text_len)"."""
    for name, value in inputs.items():
        if value is not None and value.dim() != axes.count(",") + 1:
            raise ValueError(
                f"{name} must have the axes {axes}, but its shape is {tuple(value.shape)}. The processor returns a "
                "batch even for one example: concatenate such batches, or call the processor on all examples at once."
            )


def encoder_mask(mask: Tensor) -> Tensor:
    """Return an encoder's attention mask (batch, text_len), in which every row has a token to attend to.

    The softmax over no key at all is undefined, so a text that is all padding shows its first token to the encoder.
    Everywhere after the encoder that token counts as padding again.

    Args:
        mask: (batch, text_len), bool.
    """
    return (mask | (first_token(mask) & ~mask.any(dim=1, keepdim=True))).long()


def first_token(mask: Tensor) -> Tensor:
    """Return a mask (text_len,) of the first token alone, for texts with this mask (batch, text_len)."""
    return torch.arange(mask.shape[1], device=mask.device) == 0


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Average the states of the real tokens; a text that is all padding gets zeros.

    Args:
        states: (batch, text_len, width).
        mask: (batch, text_len), bool.

    Returns:
        (batch, width).
    """
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


class NearIdentityGRU(nn.GRU):
    """A GRU that starts near h_t = 0.88 tanh(x_t).

    With PyTorch's own start, the classifier sees the text encoder's features only after the GRU has learned to pass
    them on. Source: our choice.
    """

    def train(self, mode: bool = True) -> NearIdentityGRU:
        """Stay in training mode: cuDNN has no gradients in evaluation mode, which explanations need.

        A GRU of one layer has no dropout, so both modes compute the same.
        """
        return super().train(True)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the start: a tenth of PyTorch's random weights around the identity."""
        bound = 0.1 * self.hidden_size**-0.5
        _, update, new = (slice(part * self.hidden_size, (part + 1) * self.hidden_size) for part in range(3))
        weight_ih, weight_hh, bias_ih, bias_hh = self.all_weights[0]
        weight, bias = torch.empty_like(weight_ih).uniform_(-bound, bound), torch.zeros_like(bias_ih)
        weight[new].fill_diagonal_(1)
        bias[update] = -2  # the update gate keeps sigmoid(-2) = 0.12 of the previous state
        init.copy_(weight_ih, weight)
        init.copy_(bias_ih, bias)
        init.uniform_(weight_hh, -bound, bound)
        init.zeros_(bias_hh)


class BiGru(nn.Module):
    """Equations 2 and 3: one GRU in each direction; F_T is the average of the two.

    Padding must not reach either direction. The real tokens of each row move to the front, in reading order for one
    GRU and reversed for the other, and the outputs move back. Unlike packed sequences, this can be exported and
    compiled.

    Args:
        input_size: Width of the text encoder.
        hidden_size: d, for each direction.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.left_to_right = NearIdentityGRU(input_size, hidden_size, batch_first=True)
        self.right_to_left = NearIdentityGRU(input_size, hidden_size, batch_first=True)

    def forward(self, token_states: Tensor, mask: Tensor) -> Tensor:
        """Average both directions.

        Args:
            token_states: (batch, text_len, input_size).
            mask: (batch, text_len), bool.

        Returns:
            (batch, text_len, hidden).
        """
        rank = mask.cumsum(dim=1)  # (batch, text_len), 1 for the first real token
        length = rank[:, -1:]
        padding_slot = length + (~mask).cumsum(dim=1) - 1
        forwards = self._run(self.left_to_right, token_states, torch.where(mask, rank - 1, padding_slot))
        backwards = self._run(self.right_to_left, token_states, torch.where(mask, length - rank, padding_slot))
        return (forwards + backwards) / 2

    @staticmethod
    def _run(gru: nn.GRU, token_states: Tensor, slots: Tensor) -> Tensor:
        """Run over the tokens moved to `slots` (batch, text_len), and return the states in the original order."""
        slots = slots.unsqueeze(-1)
        moved = torch.zeros_like(token_states).scatter(1, slots.expand_as(token_states), token_states)
        states, _ = gru(moved)
        return states.gather(1, slots.expand_as(states))


class TextBranch(nn.Module):
    """Equations 1-3: the text encoder's last hidden state, the bidirectional GRU, and a LayerNorm (our choice)."""

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__()
        self.backbone, width = build_own_encoder(config, "text")
        self.bi_gru = BiGru(width, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, input_ids: Tensor, mask: Tensor, text_features: Tensor | None = None) -> Tensor:
        """Compute F_T.

        Args:
            input_ids: (batch, text_len), token ids; not read with `text_features`.
            mask: (batch, text_len), bool.
            text_features: (batch, text_len, width), an earlier result of `frozen_output`, or a shared tower's states.

        Returns:
            (batch, text_len, hidden).
        """
        states: Any = text_features
        if self.backbone is not None:
            states = token_states(self.backbone, input_ids, mask, text_features)
        return self.norm(self.bi_gru(states.to(self.norm.weight.dtype), mask))


class ImageBranch(nn.Module):
    """Equation 4: the vision encoder's last feature map as regions, a Linear, and a LayerNorm (our choice)."""

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__()
        self.backbone, width = build_own_encoder(config, "vision")
        self.projection = nn.Linear(width, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, pixel_values: Tensor, image_features: Tensor | None = None) -> Tensor:
        """Compute F_I.

        Args:
            pixel_values: (batch, channels, height, width), normalised; not read with `image_features`.
            image_features: (batch, width, rows, columns), an earlier result of `frozen_output`; or (batch, regions,
                width), a shared tower's states.

        Returns:
            (batch, regions, hidden).
        """
        regions: Any = image_features
        if self.backbone is not None:
            states = feature_map(self.backbone, pixel_values, image_features)
            regions = states.flatten(2).transpose(1, 2)  # (batch, regions, width)
        return self.norm(self.projection(regions.to(self.projection.weight.dtype)))


def token_states(encoder: PreTrainedModel, input_ids: Tensor, mask: Tensor, features: Tensor | None = None) -> Tensor:
    """Equation 1: the last hidden state of a text encoder, (batch, text_len, width).

    Args:
        encoder: The text encoder.
        input_ids: (batch, text_len), token ids; not read with `features`.
        mask: (batch, text_len), bool.
        features: (batch, text_len, width), an earlier result of `frozen_output`.
    """
    if features is not None:
        any_ids = torch.zeros_like(mask, dtype=torch.long)
        return continue_from(encoder, features, input_ids=any_ids, attention_mask=encoder_mask(mask))
    return encoder(input_ids=input_ids, attention_mask=encoder_mask(mask)).last_hidden_state


def feature_map(encoder: PreTrainedModel, pixel_values: Tensor, features: Tensor | None = None) -> Tensor:
    """The last feature map of a vision encoder, (batch, width, rows, columns).

    Args:
        encoder: The vision encoder.
        pixel_values: (batch, channels, height, width); not read with `features`.
        features: (batch, width, rows, columns), an earlier result of `frozen_output`.
    """
    if features is None:
        states = encoder(pixel_values.to(encoder.dtype)).last_hidden_state
        return as_map(encoder, states, *pixel_values.shape[-2:])
    if not frozen_layers(encoder):
        return features.to(encoder.dtype)
    any_image = example_image(encoder).to(features.device, encoder.dtype).expand(len(features), -1, -1, -1)
    states = continue_from(encoder, features, pixel_values=any_image)
    return as_map(encoder, states, *any_image.shape[-2:])


def as_map(encoder: PreTrainedModel, states: Tensor, height: int, width: int) -> Tensor:
    """Arrange the last hidden state of a vision encoder as a feature map (batch, width, rows, columns).

    Tokens are a grid of the image's shape behind any number of prefix tokens, such as CLS. In a 4-D state, the two
    axes of the image's shape are rows and columns; some encoders put the channels last.

    Args:
        encoder: The vision encoder; the `patch_size` in its config limits the number of rows and columns.
        states: (batch, prefix + rows * columns, width), or 4-D.
        height, width: Size of the image in pixels.
    """
    if states.dim() == 4:
        _, first, second, third = states.shape
        channels_last = abs(first * width - second * height) < abs(second * width - third * height)
        return states.permute(0, 3, 1, 2) if channels_last else states
    tokens, patch = states.shape[1], getattr(encoder.config, "patch_size", None) or 1
    patch = patch if isinstance(patch, int) else max(patch)
    rows = min(math.isqrt(tokens * height // width), height // patch)
    columns = min(math.isqrt(tokens * width // height), width // patch)
    return states[:, tokens - rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))


def example_image(encoder: Any) -> Tensor:
    """Return an image of zeros (1, channels, height, width) of the size that a vision encoder was made for."""
    encoder = encoder.encoder if isinstance(encoder, ClipTower) else encoder
    config, timm_model = encoder.config, getattr(encoder, "timm_model", None)
    size: Any = getattr(config, "image_size", None)
    if timm_model is not None:
        settings = getattr(config, "pretrained_cfg", None) or timm_model.pretrained_cfg
        size = (getattr(config, "model_args", None) or {}).get("img_size") or settings["input_size"][-2:]
    size = size or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.zeros(1, getattr(config, "num_channels", 3), height, width, dtype=torch.float32)


def frozen_layers(encoder: PreTrainedModel) -> list[str]:
    """Return the names of an encoder's frozen first layers, in order; see `layers_of_modules`.

    Returns:
        An empty list if the embeddings or stem or the first layer train, and also if nothing trains.
    """
    trained = [name.rpartition(".")[0] for name, weight in encoder.named_parameters() if weight.requires_grad]
    if not trained:
        return []
    layers = layers_of_modules(encoder)
    names: dict[int, str] = {}
    for name, layer in layers.items():
        names.setdefault(layer, name)  # a layer's own name comes before those of its parts
    return [names[layer] for layer in range(1, min(layers.get(name, 0) for name in trained))]


def frozen_output(encoder: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """Return the output of the last frozen layer, or the last hidden state where `frozen_layers` is empty."""
    layers = frozen_layers(encoder)
    if not layers:
        return encoder(**inputs).last_hidden_state
    outputs: list[Tensor] = []
    hook = encoder.get_submodule(layers[-1]).register_forward_hook(lambda layer, args, output: outputs.append(output))
    try:
        encoder(**inputs)
    finally:
        hook.remove()
    return outputs[-1]  # ALBERT runs the same layer many times


def continue_from(encoder: PreTrainedModel, features: Tensor, **inputs: Tensor) -> Tensor:
    """Compute the last hidden state from a result of `frozen_output`.

    The encoder's own `forward` runs the layers above the frozen ones, because it alone knows which masks and positions
    they need. During this call, a module that returns the features replaces each frozen layer.

    Args:
        encoder: The encoder.
        features: Result of `frozen_output`.
        **inputs: Arguments of the encoder. Only their sizes matter.
    """
    layers = {name: encoder.get_submodule(name) for name in frozen_layers(encoder)}
    features = features.to(encoder.dtype)
    if not layers:
        return features
    for name, layer in layers.items():
        stand_in: Any = copy.copy(layer)  # an encoder may read attributes of its layers
        stand_in.forward = lambda *args, **kwargs: features
        encoder.set_submodule(name, stand_in)
    try:
        return encoder(**inputs).last_hidden_state
    finally:
        for name, layer in layers.items():
            encoder.set_submodule(name, layer)


class EncoderFacts(NamedTuple):
    """What no field of a config tells for every family of encoders, timm included.

    Args:
        width: Width of the output.
        unused: Names of the outermost modules that the output does not depend on, such as poolers and ConvNeXt's last
            norm, and that the encoder can run without.
        frozen: Names of the other parameters that the output does not depend on, such as DINOv2's mask token.
            Distributed training would wait for their gradients for ever.
        max_tokens: Length of the longest text that the encoder has positions for, or None without a limit.
    """

    width: int
    unused: list[str]
    frozen: list[str]
    max_tokens: int | None


ENCODER_FACTS: dict[tuple[str, type, str], EncoderFacts] = {}  # by part and config: a ResNet-50 takes half a second
# What differs between the config of a backbone and that of a checkpoint, and does not matter to a dry run.
ORIGIN_FIELDS = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
# Fields of vision encoders that return more tokens than regions, or tokens without a place in the image.
NOT_REGIONS = ("num_queries", "num_detection_tokens", "num_output_groups")
MOST_PREFIX_TOKENS = 16


def encoder_facts(config: Any, part: str) -> EncoderFacts:
    """Learn about an encoder from a dry run on the meta device or, where its code reads values, on the CPU.

    Args:
        config: Config of the encoder or, for an encoder that is part of a model, of that model.
        part: "text", "vision", "clip.text" or "clip.vision".

    Raises:
        ValueError: If the encoder does not turn token ids into token states, or an image into a map of regions, or has
            code that may not run.
    """
    if hasattr(config, "custom_code_fields"):
        raise ValueError(
            f"The encoder {config.model_type!r} has code of its own, which the checkpoint holds: to run it, load the "
            "checkpoint with trust_remote_code=True (commands: --trust_remote_code)."
        )
    fields = json.loads(
        config.to_json_string(use_diff=False),
        object_hook=lambda part: {name: part[name] for name in part.keys() - ORIGIN_FIELDS},
    )
    key = part, type(config), json.dumps(fields, sort_keys=True)
    if key not in ENCODER_FACTS:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            try:
                ENCODER_FACTS[key] = dry_run(config, part, "meta")
            except Exception:  # whatever such a family's own code raises
                try:
                    ENCODER_FACTS[key] = dry_run(config, part, "cpu")
                except Exception as error:
                    what = "a text encoder" if part.endswith("text") else "an image encoder with a map of regions"
                    reason = str(error).strip().partition("\n")[0] or type(error).__name__
                    raise ValueError(
                        f"{part.partition('.')[0]}_config: {architecture(config)!r} does not work as {what}: {reason}"
                    ) from error
    return ENCODER_FACTS[key]


def architecture(config: Any) -> str:
    """Return the name of an architecture: timm's, or the model type."""
    return getattr(config, "architecture", None) or config.model_type


def dry_run(config: Any, part: str, device: str) -> EncoderFacts:
    """Build an encoder, run it on a small input, and see which parameters get a gradient; see `encoder_facts`."""
    with torch.device(device):
        encoder = part_of(AutoModel.from_config(config, dtype=torch.float32), part).eval()

        def run(length: int = 8) -> Tensor:
            if part.endswith("text"):
                ids = torch.full((2, length), 5)
                # Of a mask on the meta device, many encoders ask whether it masks anything.
                mask = {} if device == "meta" else {"attention_mask": torch.ones_like(ids)}
                if part == "text":
                    return encoder(input_ids=ids, **mask).last_hidden_state
                return encoder(ids, **mask)
            images = example_image(encoder).repeat(2, 1, 1, 1)
            return feature_map(encoder, images) if part == "vision" else encoder(images)

        if part.endswith("vision"):
            check_regions(encoder, example_image(encoder).repeat(2, 1, 1, 1))
        output = run()
        if part == "text" and output.shape[:2] != (2, 8):
            raise ValueError(f"its last hidden state has shape {tuple(output.shape)} for two texts of 8 tokens")
        if part == "text":
            try:
                run(length=1)
            except Exception as error:  # whatever such a family's own code raises
                raise ValueError("it cannot read a text of one token") from error
        output.sum().backward()
        unused: dict[str, nn.Module] = {}
        for name, module in encoder.named_modules():
            weights = list(module.parameters())
            is_part = any(name.startswith(f"{outer}.") for outer in unused)
            if weights and not is_part and all(weight.grad is None for weight in weights):
                unused[name] = module
        try:
            for name in unused:
                encoder.set_submodule(name, nn.Identity())
            if unused:
                run()
        except Exception:  # it calls such a module with more than one argument, or reads an attribute
            for name, module in unused.items():
                encoder.set_submodule(name, module)
            unused = {}
    frozen = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
    return EncoderFacts(output.shape[1 if part == "vision" else -1], list(unused), frozen, max_tokens(encoder))


def check_regions(encoder: Any, images: Tensor) -> None:
    """Raise a ValueError if the last hidden state of a vision encoder holds no map of regions.

    Args:
        encoder: A vision encoder, or a `ClipTower` with one.
        images: (batch, channels, height, width).
    """
    encoder = encoder.encoder if isinstance(encoder, ClipTower) else encoder
    outputs = encoder(images)
    states = outputs.last_hidden_state
    if getattr(outputs, "ids_restore", None) is not None:
        raise ValueError("it masks random patches")
    found = [name for name in NOT_REGIONS if getattr(encoder.config, name, None)]
    if found:
        raise ValueError(f"its tokens are not regions of the image ({found[0]})")
    shape = tuple(states.shape)
    if states.dim() not in (3, 4) or len(states) != len(images):
        raise ValueError(f"its last hidden state has shape {shape}")
    if states.dim() == 3:
        prefix = states.shape[1] - as_map(encoder, states, *images.shape[-2:]).flatten(2).shape[-1]
        if prefix > MOST_PREFIX_TOKENS:
            raise ValueError(f"its last hidden state has shape {shape}, which is no grid of regions")


def max_tokens(encoder: nn.Module) -> int | None:
    """Return the length of the longest text that a text encoder has positions for, or None without a limit."""
    encoder = encoder.encoder if isinstance(encoder, ClipTower) else encoder
    limits = [getattr(encoder.config, f"max_{name}position_embeddings", None) for name in ("", "encoder_")]
    if not (limits := [limit for limit in limits if isinstance(limit, int) and limit > 0]):
        return None
    # RoBERTa and models like it count positions from the one after that of padding.
    tables = [module for name, module in encoder.named_modules() if "position" in name.rpartition(".")[2]]
    padding = [index for table in tables if (index := getattr(table, "padding_idx", None)) is not None]
    return min(limits) - max((index + 1 for index in padding), default=0)


def part_of(model: PreTrainedModel, part: str) -> Any:
    """Return the encoder of texts or images in a model that AutoModel builds.

    Args:
        model: An encoder, a dual encoder such as CLIP, or an encoder with a decoder such as T5.
        part: "text" or "vision"; "clip.text" or "clip.vision" for that side of a dual encoder.
    """
    modality = part.rpartition(".")[2]
    if part.startswith("clip."):
        return ClipTower(model, modality)
    tower = getattr(model, f"{modality}_model", None)
    if isinstance(tower, PreTrainedModel):
        return tower
    has_decoder = "decoder_input_ids" in inspect.signature(model.forward).parameters
    return model.get_encoder() if modality == "text" and has_decoder else model


def build_encoder(config: Any, part: str) -> tuple[Any, int]:
    """Build an encoder without the modules that its output does not depend on.

    Args:
        config, part: As in `encoder_facts`.

    Returns:
        The encoder and the width of its output.

    Raises:
        ValueError: If it does not work as such an encoder.
    """
    facts = encoder_facts(config, part)
    encoder = part_of(AutoModel.from_config(config, dtype=torch.get_default_dtype()), part)
    for name in facts.unused:
        encoder.set_submodule(name, nn.Identity())
    for name in facts.frozen:
        encoder.get_parameter(name).requires_grad_(False)
    return encoder, facts.width


def build_own_encoder(config: ClipCaCgConfig, part: str) -> tuple[Any, int]:
    """Build the encoder of a branch, or none if it shares CLIP's tower.

    Args:
        config: Config of the model.
        part: "text" or "vision".

    Returns:
        The encoder or None, and the width of its output.
    """
    encoder_config = getattr(config, f"{part}_config")
    if part in config.shared:
        return None, encoder_facts(encoder_config, part).width
    return build_encoder(encoder_config, part)


class ClipTower(nn.Module):
    """One side of a dual encoder: the encoder of texts or images, and its projection into the shared space.

    The output begins with what the dual encoder's own `get_text_features` or `get_image_features` returns. The tokens
    after it go through the same pooler or norm and the same projection, each as a sequence of its own.

    Args:
        model: A dual encoder, which AutoModel builds.
        modality: "text" or "vision".
    """

    def __init__(self, model: PreTrainedModel, modality: str) -> None:
        super().__init__()
        self.modality, self.model_type = modality, model.config.model_type
        for name in (f"{modality}_model", self._projection_name):  # the names in the dual encoder's weights
            if hasattr(model, name):
                self.add_module(name, getattr(model, name))

    @property
    def _projection_name(self) -> str:
        return "text_projection" if self.modality == "text" else "visual_projection"

    @property
    def encoder(self) -> PreTrainedModel:
        """The encoder without the projection."""
        return self.get_submodule(f"{self.modality}_model")  # type: ignore[return-value]

    @property
    def config(self) -> Any:
        """Config of the encoder."""
        return self.encoder.config

    @property
    def dtype(self) -> torch.dtype:
        """Type of the encoder's weights."""
        return self.encoder.dtype

    @property
    def _no_split_modules(self) -> Any:
        return self.encoder._no_split_modules

    def get_input_embeddings(self) -> nn.Module:
        """Return the embeddings of tokens or patches."""
        return self.encoder.get_input_embeddings()

    def initialize_weights(self) -> None:
        """Initialise what a checkpoint lacks; the projection as CLIP does."""
        self.encoder.initialize_weights()
        projection: Any = getattr(self, self._projection_name, None)
        if projection is not None:
            init.normal_(projection.weight, std=projection.in_features**-0.5)
            projection._is_hf_initialized = True

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode texts or images; arguments as in `states`, result as in `project`."""
        return self.project(self.states(inputs, attention_mask))

    def states(self, inputs: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the encoder.

        Args:
            inputs: (batch, text_len) token ids, or (batch, channels, height, width).
            attention_mask: (batch, text_len), for texts.

        Returns:
            (batch, 1 + tokens, width): the pooled state, and the last hidden state of every word or patch.
        """
        if self.modality == "text":
            # SigLIP was trained on texts that are padded to the full length, with attention to the padding.
            mask = None if self.model_type in PADDED_DUAL_ENCODERS else attention_mask
            outputs = self.encoder(input_ids=inputs, attention_mask=mask)
            tokens = outputs.last_hidden_state
        else:
            outputs = self.encoder(pixel_values=inputs.to(self.dtype))
            regions = as_map(self.encoder, outputs.last_hidden_state, *inputs.shape[-2:])
            tokens = regions.flatten(2).transpose(1, 2)
        pooled = outputs.pooler_output
        pooled = outputs.last_hidden_state[:, 0] if pooled is None else pooled
        return torch.cat([pooled.unsqueeze(1), tokens], dim=1)

    def project(self, states: Tensor) -> Tensor:
        """Pool every token, and project everything into the shared space.

        Args:
            states: (batch, 1 + tokens, width), a result of `states`.

        Returns:
            (batch, 1 + tokens, projection), unit length: t and t_word, or v and v_patch.
        """
        states = states.to(self.dtype)
        pooled = torch.cat([states[:, :1], self._pool(states[:, 1:])], dim=1)
        return functional.normalize(self._project(pooled), dim=-1)

    def _pool(self, tokens: Tensor) -> Tensor:
        """Do to each token (batch, tokens, width) what the encoder does to its last hidden state to pool it."""
        modules = [getattr(self.encoder, name, None) for name in ("head", "pooler", "post_layernorm")]
        module: Any = next((module for module in modules if module is not None), nn.Identity())
        # Each token twice: some poolers take the first, some leave it out and average the others.
        pooled = module(tokens.flatten(0, 1).unsqueeze(1).expand(-1, 2, -1))
        return (pooled[:, 0] if pooled.dim() == 3 else pooled).unflatten(0, tokens.shape[:2])

    def _project(self, pooled: Tensor) -> Tensor:
        projection: Any = getattr(self, self._projection_name, nn.Identity())
        return projection(pooled)


class MissingModality(nn.Module):
    """Learned states in the place of the image or the text that an example lacks. Source: our choice.

    Args:
        width: Width of the states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.zeros(width))
        self.text = nn.Parameter(torch.zeros(width))

    def forward(self, image: Tensor, text: Tensor, has_image: Tensor, has_text: Tensor) -> tuple[Tensor, Tensor]:
        """Replace the states of what is missing.

        Args:
            image: (batch, regions, width).
            text: (batch, text_len, width).
            has_image, has_text: (batch,), bool.
        """
        return (
            torch.where(has_image[:, None, None].to(image.device), image, self.image),
            torch.where(has_text[:, None, None].to(text.device), text, self.text),
        )


def both_of(has_image: Tensor | None, has_text: Tensor | None) -> Tensor | None:
    """Return which examples are complete, (batch,), bool; None where nothing can be missing."""
    return None if has_image is None or has_text is None else has_image & has_text


def withhold(has_image: Tensor, has_text: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Hide one side of complete examples at random, the image or the text equally often.

    Args:
        has_image, has_text: (batch,), bool.
        probability: Of hiding one side of an example.
    """
    drawn = torch.rand(len(has_image), device=has_image.device)
    complete = has_image & has_text
    image, text = drawn < probability / 2, (drawn >= probability / 2) & (drawn < probability)
    return has_image & ~(complete & image), has_text & ~(complete & text)


class Interaction(NamedTuple):
    """Equation 5's result.

    Args:
        states: (batch, joint_len, hidden), F_IT: keys and values of the cross-attention.
        mask: (batch, joint_len), bool.
        token: (batch, hidden), the first position of F_IT, or None w/o Clip.
        image_embeds, text_embeds: v and t, (batch, projection), unit length, or None w/o Clip.
        contrastive_loss: Scalar, or None.
        image_states, text_states: (batch, patches, width) and (batch, clip_text_len, width), last hidden states of
            CLIP's towers where the model shares them, or None.
    """

    states: Tensor
    mask: Tensor
    token: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    contrastive_loss: Tensor | None = None
    image_states: Tensor | None = None
    text_states: Tensor | None = None


def joint_sequence(image: Tensor, patches: Tensor, text: Tensor, words: Tensor) -> Tensor:
    """Equation 5: v * t, then v_patch * t for each patch, then v * t_word for each word, all times c.

    Args:
        image, text: (batch, projection), unit length.
        patches, words: (batch, regions, projection) and (batch, text_len, projection), unit length.

    Returns:
        (batch, 1 + regions + text_len, projection). The entries of a position sum to c times its cosine similarity.
    """
    image, text = image.unsqueeze(1), text.unsqueeze(1)
    return torch.cat([image * text, patches * text, image * words], dim=1) * image.shape[-1]


def joint_mask(num_other_positions: int, text_mask: Tensor) -> Tensor:
    """Return the mask of F_IT (batch, joint_len): only positions of words can be padding."""
    return functional.pad(text_mask, (num_other_positions, 0), value=True)


class ClipEncoderInteraction(nn.Module):
    """Equation 5 with the pretrained towers of CLIP or another dual encoder, which read the raw image and text.

    The last hidden states of a tower that the model shares (`config.shared`) are also the input of equation 2 or 4.
    """

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__()
        self.shared = config.shared
        self.clip_text, width = build_encoder(config.clip_config, "clip.text")
        self.clip_vision, _ = build_encoder(config.clip_config, "clip.vision")
        self.missing = MissingModality(width) if config.modality_dropout else None
        self.output_projection = nn.Linear(width, config.hidden_size)

    def forward(
        self,
        clip_input_ids: Tensor,
        clip_attention_mask: Tensor | None,
        clip_pixel_values: Tensor,
        clip_text_features: Tensor | None = None,
        clip_image_features: Tensor | None = None,
        has_image: Tensor | None = None,
        has_text: Tensor | None = None,
    ) -> Interaction:
        """Compute F_IT; shapes as in `ClipCaCgModel.forward`.

        Earlier results of `encode_text` and `encode_image` replace the ids and the pixels. With `modality_dropout`,
        `has_image` and `has_text`, (batch,), are False where a learned state replaces the image or the text.
        """
        if clip_image_features is None:
            clip_image_features = self.encode_image(clip_pixel_values)
        if clip_text_features is None:
            clip_text_features = self.encode_text(clip_input_ids, as_mask(clip_attention_mask, clip_input_ids))
        image_states: Any = None
        text_states: Any = None
        if "vision" in self.shared:
            image_states = clip_image_features[:, 1:]
            clip_image_features = self.clip_vision.project(clip_image_features)
        if "text" in self.shared:
            text_states = clip_text_features[:, 1:]
            clip_text_features = self.clip_text.project(clip_text_features)
        dtype = self.output_projection.weight.dtype
        images, texts = clip_image_features.to(dtype), clip_text_features.to(dtype)
        words_mask = as_mask(clip_attention_mask, texts[:, 1:])
        if self.missing is not None:
            images, texts = self.missing(images, texts, has_image, has_text)
            words_mask = words_mask & has_text[:, None]  # type: ignore[index]
        image, patches = images[:, 0], images[:, 1:]
        text, words = texts[:, 0], texts[:, 1:]

        states = self.output_projection(joint_sequence(image, patches, text, words))
        mask = joint_mask(1 + patches.shape[1], words_mask)
        return Interaction(states, mask, states[:, 0], image, text, None, image_states, text_states)

    def encode_image(self, clip_pixel_values: Tensor) -> Tensor:
        """Return v and v_patch, (batch, 1 + patches, projection), unit length; before projection if shared."""
        return self._run(self.clip_vision, clip_pixel_values)

    def encode_text(self, clip_input_ids: Tensor, mask: Tensor) -> Tensor:
        """Return t and t_word, (batch, 1 + clip_text_len, projection), unit length; before projection if shared."""
        return self._run(self.clip_text, clip_input_ids, encoder_mask(mask))

    def _run(self, tower: Any, *inputs: Tensor) -> Tensor:
        return tower.states(*inputs) if tower.modality in self.shared else tower(*inputs)


class FeatureInteraction(nn.Module):
    """Equation 5 read literally, CLIP(F_I) * CLIP(F_T): projections of F_I and F_T into a shared space.

    CLIP's symmetric contrastive loss (Radford et al., 2021) trains them, each example against the others of its batch
    on its device.
    """

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__()
        self.image_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        # A vector of one number: sharded training refuses parameters without an axis.
        self.logit_scale = nn.Parameter(torch.full((1,), float(config.logit_scale_init_value)))
        self.output_projection = nn.Linear(config.projection_dim, config.hidden_size)

    def forward(self, F_I: Tensor, F_T: Tensor, text_mask: Tensor, complete: Tensor | None = None) -> Interaction:
        """Compute F_IT and, in training mode, the contrastive loss.

        Args:
            F_I: (batch, regions, hidden).
            F_T: (batch, text_len, hidden).
            text_mask: (batch, text_len), bool.
            complete: (batch,), bool: the examples with an image and a text, which alone take part in the loss.
                Default: all.
        """
        patches, words = self.image_projection(F_I), self.text_projection(F_T)
        image = functional.normalize(patches.mean(dim=1), dim=-1)  # (batch, projection)
        text = functional.normalize(masked_mean(words, text_mask), dim=-1)
        patches, words = functional.normalize(patches, dim=-1), functional.normalize(words, dim=-1)

        states = self.output_projection(joint_sequence(image, patches, text, words))
        mask = joint_mask(1 + patches.shape[1], text_mask)
        loss = self._contrastive_loss(image, text, complete) if self.training else None
        return Interaction(states, mask, states[:, 0], image, text, loss)

    def _contrastive_loss(self, image: Tensor, text: Tensor, complete: Tensor | None) -> Tensor:
        scale = self.logit_scale.float().exp().clamp(max=100)  # CLIP's own bound
        logits = scale * (text.float() @ image.float().T)  # (batch, batch)
        target = torch.arange(len(logits), device=logits.device)
        if complete is not None:
            complete = complete.to(logits.device)
            logits = logits.masked_fill(~(complete[:, None] & complete), torch.finfo(logits.dtype).min)
            target = target.masked_fill(~complete, -100)
        return (known_cross_entropy(logits, target) + known_cross_entropy(logits.T, target)) / 2


class NoClipInteraction(nn.Module):
    """The ablation w/o Clip: keys and values are F_I and F_T, one after the other."""

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__()

    def forward(self, F_I: Tensor, F_T: Tensor, text_mask: Tensor, complete: Tensor | None = None) -> Interaction:
        """Concatenate F_I (batch, regions, hidden) and F_T (batch, text_len, hidden)."""
        return Interaction(torch.cat([F_I, F_T], dim=1), joint_mask(F_I.shape[1], text_mask))


INTERACTIONS = {"encoder": ClipEncoderInteraction, "feature": FeatureInteraction, "none": NoClipInteraction}


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, with the signature of transformers' attention interface.

    Args:
        query, key, value: (batch, heads, positions, head_width).
        attention_mask: Added to the scores; broadcasts to (batch, heads, queries, keys).

    Returns:
        The attended values (batch, queries, heads, head_width) and the weights (batch, heads, queries, keys).
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    attended = functional.dropout(weights, p=dropout, training=module.training) @ value
    return attended.transpose(1, 2), weights


class ResidualLinear(nn.Linear):
    """The last Linear before a residual connection, which starts with a tenth of the usual weights."""


class CrossAttention(nn.Module):
    """Equations 6-10: multi-head attention from one modality to F_IT, then residual connection and LayerNorm."""

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__()
        self.config = config
        self.is_causal = False
        self.head_width = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = ResidualLinear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(
        self, queries: Tensor, F_IT: Tensor, joint_mask: Tensor, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from F_I or F_T to F_IT.

        Args:
            queries: (batch, positions, hidden).
            F_IT: (batch, joint_len, hidden).
            joint_mask: (batch, joint_len), bool.
            output_attentions: Also return the weights.

        Returns:
            (batch, positions, hidden), and the weights (batch, heads, positions, joint_len) or None.
        """
        query = self._split_heads(self.q_proj(queries))
        key, value = self._split_heads(self.k_proj(F_IT)), self._split_heads(self.v_proj(F_IT))
        # (batch, 1, 1, joint_len); transformers' `create_bidirectional_mask` would expand it to every query.
        mask = torch.zeros_like(joint_mask, dtype=query.dtype)
        mask = mask.masked_fill(~joint_mask, torch.finfo(query.dtype).min)[:, None, None, :]
        # Only the eager implementation computes weights that it can return.
        implementation = "eager" if output_attentions else self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attended, weights = attend(self, query, key, value, mask, scaling=self.head_width**-0.5)
        attended = self.out_proj(attended.flatten(2))
        return self.norm(queries + self.dropout(attended)), weights if output_attentions else None

    def _split_heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # (batch, heads, positions, head_width)


def gate_input(token: Tensor | None, image_IT: Tensor, text_IT: Tensor, text_mask: Tensor) -> Tensor:
    """Equation 11 and the input x of equation 12.

    Args:
        token: (batch, hidden), the first position of F_IT, or None w/o Clip.
        image_IT: (batch, regions, hidden).
        text_IT: (batch, text_len, hidden).
        text_mask: (batch, text_len), bool.

    Returns:
        (batch, 3 hidden), or (batch, 2 hidden) w/o Clip.
    """
    F_VT = torch.cat([image_IT.mean(dim=1), masked_mean(text_IT, text_mask)], dim=-1)  # eq. 11
    return F_VT if token is None else torch.cat([token, F_VT], dim=-1)


def gate_input_size(config: ClipCaCgConfig) -> int:
    """Width of `gate_input`."""
    return (2 if config.clip_mode == "none" else 3) * config.hidden_size


class CrossModalGate(nn.Module):
    """Equations 11 and 12: F_mix = g * W_c x + (1 - g) * tanh(W_n LayerNorm(x)) with g = sigmoid(W_g x).

    The formula is our reading: the paper prints only sigma(Concat, Norm).
    """

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__()
        size = gate_input_size(config)
        self.sigmoid_linear = nn.Linear(size, config.hidden_size)  # W_g
        self.linear = nn.Linear(size, config.hidden_size)  # W_c
        self.norm = nn.LayerNorm(size)
        self.tanh_linear = nn.Linear(size, config.hidden_size)  # W_n

    def forward(
        self, token: Tensor | None, image_IT: Tensor, text_IT: Tensor, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute F_mix and g, both (batch, hidden); arguments as in `gate_input`."""
        x = gate_input(token, image_IT, text_IT, text_mask)
        g = torch.sigmoid(self.sigmoid_linear(x))
        F_mix = g * self.linear(x) + (1 - g) * torch.tanh(self.tanh_linear(self.norm(x)))
        return F_mix, g


def mlp(input_size: int, config: ClipCaCgConfig) -> nn.Sequential:
    """The paper's "MLP", whose layers are our choice: Linear, GELU, dropout, Linear."""
    return nn.Sequential(
        nn.Linear(input_size, config.hidden_size),
        nn.GELU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.hidden_size, config.hidden_size),
    )


class GatedFusion(nn.Module):
    """Equations 13-15: F = lambda F_1 + (1 - lambda) F_2, from the image's side and from the text's side."""

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__()
        self.image_mlp = mlp(2 * config.hidden_size, config)
        self.text_mlp = mlp(2 * config.hidden_size, config)
        self.lambda_logit = nn.Parameter(torch.zeros(1))  # sigmoid(0) = 0.5

    def forward(self, F_I: Tensor, F_T: Tensor, text_mask: Tensor, F_mix: Tensor) -> Tensor:
        """Compute F.

        Args:
            F_I: (batch, regions, hidden).
            F_T: (batch, text_len, hidden).
            text_mask: (batch, text_len), bool.
            F_mix: (batch, hidden).

        Returns:
            (batch, hidden).
        """
        F_1 = self.image_mlp(torch.cat([F_I.mean(dim=1), F_mix], dim=-1))  # eq. 13
        F_2 = self.text_mlp(torch.cat([masked_mean(F_T, text_mask), F_mix], dim=-1))  # eq. 14
        balance = torch.sigmoid(self.lambda_logit)
        return balance * F_1 + (1 - balance) * F_2  # eq. 15


class ConcatFusion(nn.Module):
    """The ablation w/o CG: concatenation and one MLP replace equations 12-15."""

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__()
        self.mlp = mlp(gate_input_size(config) + 2 * config.hidden_size, config)

    def forward(
        self, F_I: Tensor, F_T: Tensor, text_mask: Tensor, token: Tensor | None, image_IT: Tensor, text_IT: Tensor
    ) -> Tensor:
        """Compute F (batch, hidden); arguments as in `gate_input` and `GatedFusion.forward`."""
        x = gate_input(token, image_IT, text_IT, text_mask)
        return self.mlp(torch.cat([x, F_I.mean(dim=1), masked_mean(F_T, text_mask)], dim=-1))


class ModalityHeads(nn.Module):
    """Two Linear heads: the text's own label from the mean of F_T, the image's own label from the mean of F_I.

    Source: our choice. MVSA labels text and image separately, and the post's label follows from the two.

    Args:
        text_size: Width of the text states.
        image_size: Width of the image regions.
        config: Its `dropout` and number of labels.
    """

    def __init__(self, text_size: int, image_size: int, config: ClipCaCgConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.text = nn.Linear(text_size, len(config.label_names))
        self.image = nn.Linear(image_size, len(config.label_names))

    def forward(self, F_T: Tensor, text_mask: Tensor, F_I: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits of both modalities.

        Args:
            F_T: (batch, text_len, text_size).
            text_mask: (batch, text_len), bool.
            F_I: (batch, regions, image_size).

        Returns:
            The text's and the image's logits, each (batch, labels).
        """
        text, image = masked_mean(F_T, text_mask), F_I.mean(dim=1)
        return self.text(self.dropout(text)), self.image(self.dropout(image))


def combine_probabilities(text: Tensor, image: Tensor, neutral: int = 1) -> Tensor:
    """Apply MVSA's label rule to the probabilities of the text's and the image's own labels.

    Equal labels stand, and a neutral label gives way to the other one. Positive against negative has no label, so this
    part of the probability is dropped and the rest is scaled to a sum of 1.

    Args:
        text, image: (batch, 3), probabilities of negative, neutral and positive, in any order.
        neutral: Index of neutral in that order.

    Returns:
        (batch, 3), probabilities in the same order; zeros where positive against negative is certain.

    Source: the paper's labelling rule; on probabilities, as if the two labels were independent, it is our choice.
    """
    text_neutral, image_neutral = text[:, neutral, None], image[:, neutral, None]  # (batch, 1)
    is_polar = torch.arange(text.shape[-1], device=text.device) != neutral
    joint = text * image + is_polar * (text * image_neutral + text_neutral * image)
    return joint / joint.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(joint.dtype).tiny)


def average_with_rule(
    logits: Tensor, text_logits: Tensor, image_logits: Tensor, neutral: int = 1, complete: Tensor | None = None
) -> Tensor:
    """Average the classifier's probabilities with those that the label rule makes of the two heads.

    Args:
        logits, text_logits, image_logits: (batch, 3), of the classifier and of the two heads.
        neutral: Index of the label neutral.
        complete: (batch,), bool: examples with an image and a text. The others keep the classifier's probabilities.
            Default: all.

    Returns:
        (batch, 3), logarithms of the mean: their softmax is the mean.
    """
    # A device map may have put the heads elsewhere than the classifier.
    device, together = logits.device, (logits, text_logits, image_logits)
    classifier, text, image = (scores.to(device, torch.float32).softmax(dim=-1) for scores in together)
    mean = (classifier + combine_probabilities(text, image, neutral)) / 2
    if complete is not None:
        mean = torch.where(complete.to(device)[:, None], mean, classifier)
    return mean.clamp(min=torch.finfo(mean.dtype).tiny).log().to(logits.dtype)


def known_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Compute the mean cross-entropy over the examples whose label is known.

    Args:
        logits: (batch, labels).
        labels: (batch,) class indices; -100 where unknown.
        weights: (labels,), weight of each class, or None for equal weights.
        label_smoothing: In [0, 1).

    Returns:
        Scalar, float32. Without any known label it is 0, and so are its gradients; PyTorch's own mean is NaN.
    """
    total = functional.cross_entropy(logits.float(), labels, weights, reduction="sum", label_smoothing=label_smoothing)
    known = (labels != -100).float()
    count = (known if weights is None else known * weights[labels.clamp(min=0)]).sum()
    return total / torch.where(count > 0, count, 1.0)


def load_config(source: str | Path, options: dict[str, Any]) -> Any:
    """Load the config of a backbone.

    Args:
        source: Hub name or folder.
        options: Loading options of `from_backbones`. With `trust_remote_code`, `AutoModel.from_config` will know the
            custom class, which is registered for this config.

    Raises:
        ValueError: If the custom class takes a config of transformers' own, to which other models belong.
    """
    config = AutoConfig.from_pretrained(source, **options)
    if options.get("trust_remote_code") and "AutoModel" in getattr(config, "auto_map", {}):
        if type(config).__module__.startswith("transformers."):
            raise ValueError(
                f"{source} has its own model class but no config class: an encoder with its own code needs both."
            )
        register_custom_class(config, source, options)
    return config


def register_custom_class(config: Any, source: str | Path, options: dict[str, Any]) -> None:
    """Let `AutoModel.from_config` know the custom class of this config, and a saved config name it."""
    custom_class = get_class_from_dynamic_module(config.auto_map["AutoModel"], source, **options)
    AutoModel.register(type(config), custom_class, exist_ok=True)
    setattr(type(config), MODEL_CLASS, custom_class)


def custom_configs(config: ClipCaCgConfig, source: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """Run the code of the encoders that a checkpoint holds code for.

    Args:
        config: Config of the checkpoint.
        source: Hub name or folder of the checkpoint.
        options: Loading options of `from_pretrained`.

    Returns:
        Name of each field of `config` with such an encoder to the encoder's own config.
    """
    configs = {}
    for name in ("text_config", "vision_config", "clip_config"):
        fields = getattr(getattr(config, name), "custom_code_fields", None)
        if fields is not None:
            config_class: Any = get_class_from_dynamic_module(fields["auto_map"]["AutoConfig"], source, **options)
            configs[name] = config_class.from_dict(fields)
            register_custom_class(configs[name], source, options)
    return configs


def load_backbone(encoder: Any, source: str | Path, config: Any, part: str, **options: Any) -> None:
    """Copy pretrained weights into an encoder, and warn about weights that the source lacks.

    transformers would also report every head, pooler and tower that this model does not use.

    Args:
        encoder: The encoder to fill.
        source: Hub name or folder.
        config, part: What it was built from, as in `build_encoder`.
        **options: Loading options of `from_backbones`.

    Raises:
        OSError: If the source has no weights, or none that can be read without executing code.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        loaded: Any = AutoModel.from_pretrained(
            source, config=config, dtype=encoder.dtype, output_loading_info=True, **options
        )
    except UnpicklingError as error:
        raise OSError(
            f"{source} holds more than weights in its .bin file; convert it to model.safetensors."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    model, report = loaded
    pretrained = part_of(model, part)
    prefix = next((f"{name}." for name, module in model.named_modules() if name and module is pretrained), "")
    used = encoder.state_dict().keys()
    missing = sorted(used & {name.removeprefix(prefix) for name in report["missing_keys"]})
    if len(missing) == len(used):
        raise OSError(f"{source} has no weight of this {architecture(encoder.config)} encoder.")
    if missing:
        logger.warning(f"{source} lacks {', '.join(missing)}. These weights start at random.")
    encoder.load_state_dict({key: value for key, value in pretrained.state_dict().items() if key in used})


def weights_file(source: str | Path, options: dict[str, Any]) -> str | None:
    """Return the name of the file that a loaded backbone's weights came from, or None if it has an unusual name.

    Args:
        source: Hub name or folder.
        options: Loading options of `from_backbones`.
    """
    where = {name: options[name] for name in ("cache_dir", "revision") if name in options}
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        path = Path(options.get("subfolder", ""), name)
        if Path(source).is_dir():
            found: Any = Path(source, path).is_file()
        else:  # loading has put it into the cache
            found = isinstance(try_to_load_from_cache(str(source), path.as_posix(), **where), str)
        if found:
            return name
    return None


def warn_of_pickle(source: str | Path, options: dict[str, Any]) -> None:
    """Warn if a backbone's weights are in a pickle, and say how to convert them."""
    name = weights_file(source, options)
    if name not in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        return
    folder, download = Path(source), ""
    if not folder.is_dir():
        folder = Path(folder.name)
        revision = f" --revision {options['revision']}" if "revision" in options else ""
        download = f"hf download {source}{revision} --local-dir {folder} && "
    folder = folder / options.get("subfolder", "")
    logger.warning(
        f"{source} has its weights in {name}, a pickle, which is slower to load than safetensors. To convert it: "
        f'{download}python -c "from transformers import AutoModel; '
        f"AutoModel.from_pretrained('{folder}').save_pretrained('{folder}')\""
    )


def check_padding(encoder: PreTrainedModel) -> None:
    """Raise a ValueError if the padding of a text changes the states of its tokens, as where convolutions see it.

    Args:
        encoder: A text encoder with its pretrained weights, in evaluation mode.
    """
    ids = torch.tensor([[6, 7, 8, *[getattr(encoder.config, "pad_token_id", None) or 0] * 5]], device=encoder.device)
    with torch.no_grad():
        padded = token_states(encoder, ids, torch.arange(8, device=ids.device)[None] < 3)[:, :3].float()
        alone = token_states(encoder, ids[:, :3], torch.ones_like(ids[:, :3], dtype=torch.bool)).float()
    tolerance = 1e-3 if encoder.dtype == torch.float32 else 0.1
    if not torch.allclose(padded, alone, rtol=0, atol=tolerance * alone.abs().max().item()):
        raise ValueError(
            f"text_model: the padding of a text changes what the encoder {architecture(encoder.config)!r} returns for "
            "its words. Choose another text encoder."
        )


def layers_of_modules(encoder: nn.Module) -> dict[str, int]:
    """Number the layers of any encoder: 0 for its embeddings or stem, then 1, 2, ... up to its top.

    A layer is an outermost module of several modules whose name ends in a number: a Transformer layer (`layer.0`), or
    a stage or block of a convolutional encoder (`stages.0`, `blocks.0`, `layer1`). A word with a number is a layer
    only if a sibling has the same word, unlike ResNet-D's `conv1`. What follows a layer, such as the final norm,
    belongs to it. Source: our choice. AutoGluon takes the first number in a parameter's name.

    Returns:
        Name of each module to its layer. Modules that hold layers are left out; a parameter of theirs counts as 0.
    """
    composite = [
        name
        for name, module in encoder.named_modules()
        if name and any(next(c.parameters(), None) is not None for c in module.children())
    ]
    words = [name.rstrip("0123456789") for name in composite]
    holders, numbered, found, layer = {""}, "", {}, 0
    for name, word in zip(composite, words, strict=True):
        is_layer = word != name and (word.endswith(".") or not word or words.count(word) > 1)
        if is_layer and not (numbered and name.startswith(numbered)):
            numbered = f"{name}."
            holders |= {name[:end] for end, sign in enumerate(name) if sign == "."}
            found[name] = 0
    for name, _ in encoder.named_modules():
        layer += name in found
        if name not in holders:
            found[name] = layer
    return found


def freeze_layers(encoder: PreTrainedModel, number: int, argument: str) -> None:
    """Freeze an encoder's embeddings or stem, and its first layers.

    Args:
        encoder: The encoder.
        number: How many layers to freeze; at least 1, and at least one layer stays trainable.
        argument: Name of the number, for the message.

    Raises:
        ValueError: If the number is out of range.
    """
    layers = layers_of_modules(encoder)
    depth = max(layers.values(), default=0)
    if not 0 < number < depth:
        raise ValueError(
            f"{argument} must be between 0 and {max(depth - 1, 0)} for this {depth}-layer "
            f"{encoder.config.model_type} encoder, got {number}. To freeze all of it, freeze the whole encoder."
        )
    for name, parameter in encoder.named_parameters():
        if layers.get(name.rpartition(".")[0], 0) <= number:
            parameter.requires_grad_(False)


class ClipCaCgPreTrainedModel(PreTrainedModel):
    """Initialisation, loading of pretrained backbones, and freezing, for both models below."""

    config: ClipCaCgConfig
    config_class = ClipCaCgConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # Modules that combine the outputs of several children, which must therefore be on one device.
    _no_split_modules = [
        "BiGru",
        "MissingModality",
        "ClipEncoderInteraction",
        "FeatureInteraction",
        "CrossAttention",
        "CrossModalGate",
        "GatedFusion",
        "ConcatFusion",
        "ModalityHeads",
    ]

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__(config)
        if "input_ids" not in config.required_inputs:
            self.main_input_name = config.required_inputs[0]  # the Trainer counts examples by it

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module of the fusion. Each rule is for a module with parameters of its own.

        transformers skips a module whose own parameters were all loaded, so a subclass may set weights in place.
        """
        if isinstance(module, nn.Linear):
            # Keeps the variance at any width; the usual standard deviation of 0.02 is too small for narrow models.
            init.xavier_uniform_(module.weight, gain=0.1 if isinstance(module, ResidualLinear) else 1)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, NearIdentityGRU):
            module.init_weights()
        elif isinstance(module, FeatureInteraction):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
        elif isinstance(module, GatedFusion):
            init.zeros_(module.lambda_logit)
        elif isinstance(module, MissingModality):
            init.zeros_(module.image)
            init.zeros_(module.text)

    def initialize_weights(self) -> None:
        """Initialise what a checkpoint lacks, the backbones first, by their own classes.

        CLIP initialises some weights in parent modules without parameters of their own, and transformers skips such
        modules in custom code. Calling the backbones' own method avoids that.
        """
        for backbone in self.backbones().values():
            backbone.initialize_weights()
        super().initialize_weights()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        config: Any = None,
        use_safetensors: bool | None = True,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint as `PreTrainedModel.from_pretrained` does, from safetensors alone by default.

        transformers has no class attribute that excludes pickles. With `trust_remote_code=True` encoders run the code
        that they brought, which the checkpoint holds.
        """
        source = pretrained_model_name_or_path
        if kwargs.get("trust_remote_code"):
            options = {
                name: kwargs[name] for name in LOADING_OPTIONS if name in kwargs and name != "trust_remote_code"
            }
            if isinstance(config, PreTrainedConfig):
                config = copy.copy(config)
                for name, custom in custom_configs(config, source, options).items():
                    setattr(config, name, custom)
            else:
                read = cls.config_class.from_pretrained(config or source, **options)
                kwargs |= custom_configs(read, source, options)
        loaded: Any = super().from_pretrained(source, *args, config=config, use_safetensors=use_safetensors, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze_unused()
        return loaded

    def freeze_unused(self) -> None:
        """Freeze the parameters of the backbones that nothing depends on; loading makes all parameters trainable."""
        for name, encoder in self.backbones().items():
            facts = encoder_facts(getattr(self.config, f"{name.partition('.')[0]}_config"), name)
            for parameter in facts.frozen:
                encoder.get_parameter(parameter).requires_grad_(False)

    @classmethod
    def from_backbones(
        cls,
        text_model: str | Path | None = None,
        vision_model: str | Path | None = None,
        clip_model: str | Path | None = None,
        **keywords: Any,
    ) -> ClipCaCgPreTrainedModel:
        """Build a model on pretrained backbones; the fusion starts from random weights.

        Weights are read from safetensors or, if a source has none, from a `.bin` file without executing code.

        Args:
            text_model: Hub name or folder of a text encoder, such as "FacebookAI/roberta-base".
            vision_model: Hub name or folder of a vision encoder, such as "microsoft/resnet-50".
            clip_model: Hub name or folder of a CLIP model; needed by `clip_mode="encoder"`, which is the default.
            **keywords: Fields of `ClipCaCgConfig`, and options of `from_pretrained` for all backbones (`token`) or for
                one (`text_token`, `vision_revision`, `clip_subfolder`): cache_dir, force_download, local_files_only,
                proxies, revision, subfolder, token and trust_remote_code. Options are not saved.

        Returns:
            The model, in evaluation mode like every loaded model.

        Raises:
            TypeError: For an unknown keyword.
            ValueError: If a backbone that the modality or the clip mode needs is not named, or two that share a tower
                differ.
            OSError: If a backbone cannot be loaded.
        """
        options, fields = split_keywords(keywords)
        check_keywords("from_backbones", fields, cls.config_class.known_fields() | LOADING_KEYWORDS)
        sources: dict[str, Any] = {"text": text_model, "vision": vision_model, "clip": clip_model}
        check_sources(sources, options, fields)
        for name, source in sources.items():
            if source is not None:
                fields[f"{name}_config"] = load_config(source, options[name])
        if clip_model is None:
            fields.setdefault("clip_config", None)
        built = cls.config_class(**fields)
        built.code_files()  # refuses code that no checkpoint could hold
        missing = [f"{name}_model" for name in built.encoders if sources[name] is None]
        if missing:
            raise ValueError(
                f"from_backbones: {cls.__name__} with modality={built.modality!r} and clip_mode={built.clip_mode!r} "
                f"needs {', '.join(missing)}, a Hub name or a folder."
            )
        model = cls._from_config(built)
        for name, encoder in model.backbones().items():
            kind = name.partition(".")[0]
            load_backbone(encoder, sources[kind], getattr(built, f"{kind}_config"), name, **options[kind])
            if name == "text":
                check_padding(encoder.eval())
        for name in built.encoders:
            warn_of_pickle(sources[name], options[name])
        return model.eval()

    def backbones(self) -> dict[str, PreTrainedModel]:
        """Return the pretrained encoders of this model: some of "text", "vision", "clip.text" and "clip.vision".

        A tower that the model shares is one of CLIP's.
        """
        base: Any = self.base_model
        encoders: dict[str, PreTrainedModel] = {}
        if "text" in self.config.encoders:
            encoders["text"] = base.text_branch.backbone
        if "vision" in self.config.encoders:
            encoders["vision"] = base.image_branch.backbone
        if isinstance(base.interaction, ClipEncoderInteraction):
            encoders |= {"clip.text": base.interaction.clip_text, "clip.vision": base.interaction.clip_vision}
        return encoders

    def encode(self, backbone: str, inputs: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Compute the output of one backbone, which `forward` accepts in place of the raw input.

        A frozen backbone returns the same for the same input, so training can compute it once and store it. If only
        first layers are frozen (`freeze_backbones(text_layers=..., vision_blocks=...)`), this is the output of the
        last of these, and `forward` runs the layers above it. So encode after freezing, not before.

        Args:
            backbone: One of the names of `backbones()`.
            inputs: (batch, text_len) token ids, or (batch, channels, height, width), as in `forward`.
            attention_mask: (batch, text_len), for a text.

        Returns:
            `text_features`, `image_features`, `clip_text_features` or `clip_image_features`; see `forward`.

        Raises:
            ValueError: If the model has no such backbone.
        """
        if backbone not in self.backbones():
            raise ValueError(f"This model has no backbone {backbone!r}. It has: {', '.join(self.backbones())}.")
        base: Any = self.base_model
        if backbone == "text":
            mask = encoder_mask(as_mask(attention_mask, inputs))
            return frozen_output(base.text_branch.backbone, input_ids=inputs, attention_mask=mask)
        if backbone == "vision":
            encoder = base.image_branch.backbone
            pixels = inputs.to(encoder.dtype)
            if frozen_layers(encoder):
                return frozen_output(encoder, pixel_values=pixels)
            return feature_map(encoder, pixels)
        if backbone == "clip.text":
            return base.interaction.encode_text(inputs, as_mask(attention_mask, inputs))
        return base.interaction.encode_image(inputs)

    def freeze_backbones(
        self,
        text: bool = False,
        vision: bool = False,
        clip: bool = False,
        text_layers: int = 0,
        vision_blocks: int = 0,
    ) -> None:
        """Exclude backbones from training: their weights, their dropout and their BatchNorm statistics.

        Args:
            text, vision, clip: Which backbones to freeze. A name that the model does not have is ignored. A tower that
                the model shares is one of CLIP's: `clip` alone decides.
            text_layers: How many of the text encoder's first layers to freeze, together with its embeddings; 0 freezes
                neither. Their dropout stays active.
            vision_blocks: How many of the vision encoder's first blocks to freeze, together with its stem; 0 freezes
                neither. `layers_of_modules` says what a block is. Their dropout and BatchNorm statistics are frozen
                too.

        Raises:
            ValueError: If an encoder does not have that many layers, or CLIP's tower in its place would train.
        """
        asked = {"text": text or text_layers, "vision": vision or vision_blocks}
        for name in self.config.shared:
            if asked[name] and not clip:
                raise ValueError(
                    f"With share_clip_{name}=True the {name} encoder is CLIP's tower: freeze_clip freezes it, nothing "
                    "else does."
                )
        frozen = {name for name, freeze in (("text", text), ("vision", vision), ("clip", clip)) if freeze}
        for name, encoder in self.backbones().items():
            if name.partition(".")[0] in frozen:
                encoder.requires_grad_(False)
            elif name == "text" and text_layers:
                freeze_layers(encoder, text_layers, "text_layers")
            elif name == "vision" and vision_blocks:
                freeze_layers(encoder, vision_blocks, "vision_blocks")
        self.train(self.training)

    def train(self, mode: bool = True) -> ClipCaCgPreTrainedModel:
        """Switch to training or evaluation mode; frozen parts of the backbones stay in evaluation mode.

        Training mode would change a frozen ResNet's BatchNorm statistics, and adapters (LoRA) do not save them.
        """
        super().train(mode)
        for encoder_name, encoder in self.backbones().items():
            trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
            if not trained:
                encoder.eval()
                continue
            layers = layers_of_modules(encoder) if encoder_name == "vision" else {}
            first_trained = min(layers.get(name.rpartition(".")[0], 0) for name in trained)
            for name, module in encoder.named_modules():
                weight = getattr(module, "weight", None)
                is_frozen_norm = isinstance(module, _BatchNorm) and weight is not None and not weight.requires_grad
                if is_frozen_norm or layers.get(name, first_trained) < first_trained:
                    module.eval()
        return self

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """Switch the attention of the fusion and of the text and CLIP encoders, as transformers does.

        transformers passes the choice to every submodel, and convolutional encoders raise an error. There is no
        other way to exclude the vision encoder, so it is detached during the call.
        """
        branch: Any = self.base_model.image_branch
        if branch is None:
            return super().set_attn_implementation(attn_implementation, allow_all_kernels)
        backbone, branch.backbone = branch.backbone, None
        try:
            super().set_attn_implementation(attn_implementation, allow_all_kernels)
        finally:
            branch.backbone = backbone

    def get_input_embeddings(self) -> Any:
        """Return the text encoder's token embeddings, or None for a model that reads no text."""
        encoders = self.backbones()
        text_encoder = encoders.get("text", encoders.get("clip.text"))
        return None if text_encoder is None else text_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the text encoder's token embeddings; those of a shared CLIP tower cannot be replaced."""
        if "text" not in self.backbones():
            raise ValueError("This model has no text encoder of its own whose token embeddings could be replaced.")
        self.backbones()["text"].set_input_embeddings(value)


class ClipCaCgModel(ClipCaCgPreTrainedModel):
    """Section III of the paper up to equation 15: an image and its text to one fused vector.

    Args:
        config: Its `modality`, `clip_mode`, `use_cross_attention` and `use_gating` choose the modules.

    Raises:
        ValueError: If the config contradicts itself; see `ClipCaCgConfig`.
    """

    # Do not report the heads of a classifier's checkpoint as unexpected.
    _keys_to_ignore_on_load_unexpected = {r"^classifier\.", r"^modality_heads\."}

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__(config)
        config.check_values()
        self.text_branch = TextBranch(config) if "text" in config.modalities else None
        self.image_branch = ImageBranch(config) if "image" in config.modalities else None
        self.missing = self.interaction = self.image_attention = self.text_attention = self.gate = None
        if config.modality == "both":
            self.missing = MissingModality(config.hidden_size) if config.modality_dropout else None
            self.interaction = INTERACTIONS[config.clip_mode](config)
            if config.use_cross_attention:
                self.image_attention, self.text_attention = CrossAttention(config), CrossAttention(config)
            if config.use_gating:
                self.gate = CrossModalGate(config)
            self.fusion: nn.Module = GatedFusion(config) if config.use_gating else ConcatFusion(config)
        else:
            self.fusion = mlp(config.hidden_size, config)
        of_backbones = (name for backbone in self.backbones().values() for name in backbone._no_split_modules or [])
        self._no_split_modules = [*self._no_split_modules, *of_backbones]
        self.gradient_checkpointing = False  # declares support; each backbone does its own checkpointing
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        clip_input_ids: Tensor | None = None,
        clip_attention_mask: Tensor | None = None,
        clip_pixel_values: Tensor | None = None,
        text_features: Tensor | None = None,
        image_features: Tensor | None = None,
        clip_text_features: Tensor | None = None,
        clip_image_features: Tensor | None = None,
        has_image: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> ClipCaCgModelOutput:
        """Fuse images and texts.

        Args:
            input_ids: (batch, text_len), token ids of the text encoder.
            attention_mask: (batch, text_len), 1 for a real token, 0 for padding. Default: no padding. With
                `modality_dropout`, a learned state replaces a text that is all padding.
            pixel_values: (batch, channels, height, width), the image as the vision encoder expects it.
            clip_input_ids: (batch, clip_text_len), CLIP's token ids, padded on the right as CLIP needs it.
            clip_attention_mask: (batch, clip_text_len), as `attention_mask`.
            clip_pixel_values: (batch, channels, height, width), the image as CLIP expects it.
            text_features: (batch, text_len, width), result of `encode("text", ...)`, in place of `input_ids`.
            image_features: (batch, width, rows, columns), of `encode("vision", ...)`, in place of `pixel_values`.
            clip_text_features: (batch, 1 + clip_text_len, projection), of `encode("clip.text", ...)`, in place of
                `clip_input_ids`.
            clip_image_features: (batch, 1 + patches, projection), of `encode("clip.vision", ...)`, in place of
                `clip_pixel_values`. The last axis is a shared tower's own width.
            has_image: (batch,), 0 or False where the image is missing. With `modality_dropout`, a learned state
                replaces it, whatever the pixels are. Default: no image is missing.
            output_attentions: Return the cross-attention weights.
            output_hidden_states: Return F_I, F_T and their attended forms.
            **kwargs: `return_dict=False` returns a tuple of the fields that are not None. Anything else is ignored:
                wrappers such as PEFT pass more than a model knows.

        Returns:
            `ClipCaCgModelOutput`.

        Raises:
            ValueError: If an input that this model's mode needs is missing, batch sizes differ, or an image is missing
                without `modality_dropout`.
        """
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        check_axes("(batch, text_len)", input_ids=input_ids, clip_input_ids=clip_input_ids)
        check_axes("(batch, text_len)", attention_mask=attention_mask, clip_attention_mask=clip_attention_mask)
        check_axes("(batch, channels, height, width)", pixel_values=pixel_values, clip_pixel_values=clip_pixel_values)
        self._check_inputs(
            has_image=has_image,
            input_ids=input_ids if text_features is None else text_features,
            pixel_values=pixel_values if image_features is None else image_features,
            clip_input_ids=clip_input_ids if clip_text_features is None else clip_text_features,
            clip_pixel_values=clip_pixel_values if clip_image_features is None else clip_image_features,
        )
        F_I: Any = None
        F_T: Any = None
        joint: Any = None
        text_mask: Any = None
        if self.interaction is not None:
            clip_tokens: Any = clip_input_ids if clip_text_features is None else clip_text_features
            own_tokens: Any = input_ids if text_features is None else text_features
            texts = (clip_tokens, clip_attention_mask) if self.config.share_clip_text else (own_tokens, attention_mask)
            has_image, has_text = self._find_missing(has_image, *texts)
        if self.interaction is not None and self.config.clip_mode == "encoder":
            joint = self.interaction(  # eq. 5, the first to run, for towers that the model shares
                clip_input_ids=clip_input_ids,
                clip_attention_mask=clip_attention_mask,
                clip_pixel_values=clip_pixel_values,
                clip_text_features=clip_text_features,
                clip_image_features=clip_image_features,
                has_image=has_image,
                has_text=has_text,
            )
            if self.config.share_clip_text:
                text_features, attention_mask = joint.text_states, clip_attention_mask
            if self.config.share_clip_vision:
                image_features = joint.image_states
        if self.text_branch is not None:
            tokens: Any = input_ids if text_features is None else text_features
            text_mask = as_mask(attention_mask, tokens)  # (batch, text_len)
            F_T = self.text_branch(input_ids, text_mask, text_features)  # (batch, text_len, hidden), eq. 1-3
        if self.image_branch is not None:
            F_I = self.image_branch(pixel_values, image_features)  # (batch, regions, hidden), eq. 4
        if self.interaction is None:  # V only, T only
            pooled = F_I.mean(dim=1) if F_T is None else masked_mean(F_T, text_mask)
            return ClipCaCgModelOutput(
                fused_embeds=self.fusion(pooled),
                image_hidden_states=(F_I,) if output_hidden_states and F_I is not None else None,
                text_hidden_states=(F_T,) if output_hidden_states and F_T is not None else None,
            )

        if self.missing is not None:
            F_I, F_T = self.missing(F_I, F_T, has_image, has_text)
            # No torch.where: ONNX Runtime has none for truth values.
            text_mask = (text_mask & has_text[:, None]) | (first_token(text_mask) & ~has_text[:, None])
        if joint is None:
            joint = self.interaction(F_I, F_T, text_mask, both_of(has_image, has_text))  # eq. 5
        F_IT = joint.states  # (batch, joint_len, hidden)

        image_IT, text_IT, image_attentions, text_attentions = F_I, F_T, None, None
        if self.image_attention is not None and self.text_attention is not None:
            image_IT, image_attentions = self.image_attention(F_I, F_IT, joint.mask, output_attentions)  # eq. 6-10
            text_IT, text_attentions = self.text_attention(F_T, F_IT, joint.mask, output_attentions)

        if self.gate is None:  # w/o CG
            F, gate = self.fusion(F_I, F_T, text_mask, joint.token, image_IT, text_IT), None
        else:
            F_mix, gate = self.gate(joint.token, image_IT, text_IT, text_mask)  # (batch, hidden), eq. 11, 12
            F = self.fusion(F_I, F_T, text_mask, F_mix)  # (batch, hidden), eq. 13-15

        return ClipCaCgModelOutput(
            fused_embeds=F,
            image_embeds=joint.image_embeds,
            text_embeds=joint.text_embeds,
            gate=gate,
            contrastive_loss=joint.contrastive_loss,
            has_image=has_image,
            has_text=has_text,
            image_attentions=image_attentions,
            text_attentions=text_attentions,
            image_hidden_states=(F_I, image_IT) if output_hidden_states else None,
            text_hidden_states=(F_T, text_IT) if output_hidden_states else None,
        )

    def _find_missing(
        self, has_image: Tensor | None, tokens: Tensor, attention_mask: Tensor | None
    ) -> tuple[Any, Any]:
        """Return which examples have an image and which a text, (batch,) each, or None without `modality_dropout`.

        In training mode it withholds some.
        """
        if self.missing is None:
            return None, None
        has_text = as_mask(attention_mask, tokens).any(dim=1)
        has_image = torch.ones_like(has_text) if has_image is None else has_image.bool()
        return withhold(has_image, has_text, self.config.modality_dropout) if self.training else (has_image, has_text)

    def _check_inputs(self, has_image: Tensor | None, **inputs: Tensor | None) -> None:
        reads_image = "image" in self.config.modalities and not self.config.modality_dropout
        if has_image is not None and reads_image and not torch.compiler.is_compiling() and not has_image.all():
            raise ValueError(
                f"An example has no image (has_image). A model with modality={self.config.modality!r} and "
                f"modality_dropout={self.config.modality_dropout} needs one."
            )
        required = self.config.required_inputs
        given = {name: value for name, value in inputs.items() if value is not None}
        missing = [name for name in required if name not in given]
        if missing:
            raise ValueError(
                f"A model with modality={self.config.modality!r} and clip_mode={self.config.clip_mode!r} needs "
                f"{', '.join(required)}, but {', '.join(missing)} is missing; the processor makes them all."
            )
        if any(given[name].shape[0] != given[required[0]].shape[0] for name in required):
            sizes = ", ".join(f"{name} {given[name].shape[0]}" for name in required)
            raise ValueError(f"All inputs must have the same batch size, got: {sizes}.")


class ClipCaCgForSequenceClassification(ClipCaCgPreTrainedModel):
    """All of section III: `ClipCaCgModel` and the classifier of equation 16.

    Args:
        config: Its `num_labels` and `problem_type` choose the head and the loss; its `use_modality_heads` adds
            `ModalityHeads`.

    Raises:
        ValueError: If the config contradicts itself; see `ClipCaCgConfig`.

    Example:
        ```python
        from transformers import AutoModelForSequenceClassification, AutoProcessor

        processor = AutoProcessor.from_pretrained("outputs/sample", trust_remote_code=True)
        model = AutoModelForSequenceClassification.from_pretrained("outputs/sample", trust_remote_code=True)
        inputs = processor(images="post.jpg", text="What a lovely morning!", return_tensors="pt")
        processor.post_process(model(**inputs).logits, model.config)
        # [{'label': 'positive', 'scores': {'negative': 0.01, 'neutral': 0.02, 'positive': 0.97}}]
        ```
    """

    # The loss is a mean over the batch. Because `forward` accepts `**kwargs`, the Trainer would otherwise assume that
    # it is already normalised over the accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ClipCaCgModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden_size, len(config.label_names))
        self.modality_heads: ModalityHeads | None = None
        if config.use_modality_heads:
            self.modality_heads = ModalityHeads(config.hidden_size, config.hidden_size, config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        clip_input_ids: Tensor | None = None,
        clip_attention_mask: Tensor | None = None,
        clip_pixel_values: Tensor | None = None,
        text_features: Tensor | None = None,
        image_features: Tensor | None = None,
        clip_text_features: Tensor | None = None,
        clip_image_features: Tensor | None = None,
        has_image: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> ClipCaCgClassifierOutput:
        """Classify examples, or predict a value for each.

        Args:
            labels: (batch,) class indices, -100 where unknown; (batch, labels) of 0.0 and 1.0 for several labels per
                example; or (batch,) values of a regression.
            **kwargs: With `use_modality_heads`, `text_labels` and `image_labels`: (batch,) class indices of the text
                alone and of the image alone, -100 where unknown. Only a training step with `labels` reads them.
            **kwargs and all others: As in `ClipCaCgModel.forward`.

        Returns:
            `ClipCaCgClassifierOutput`.

        Raises:
            ValueError: As in `ClipCaCgModel.forward`.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            clip_input_ids=clip_input_ids,
            clip_attention_mask=clip_attention_mask,
            clip_pixel_values=clip_pixel_values,
            text_features=text_features,
            image_features=image_features,
            clip_text_features=clip_text_features,
            clip_image_features=clip_image_features,
            has_image=has_image,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states or self.modality_heads is not None,
            return_dict=True,
        )
        logits = self.classifier(self.dropout(outputs.fused_embeds))  # (batch, labels), eq. 16
        text_logits: Any = None
        image_logits: Any = None
        modality_loss, loss = None, None
        if self.modality_heads is not None:
            F_T, F_I = outputs.text_hidden_states[0], outputs.image_hidden_states[0]
            mask = clip_attention_mask if self.config.share_clip_text else attention_mask
            text_logits, image_logits = self.modality_heads(F_T, as_mask(mask, F_T), F_I)
            complete = both_of(outputs.has_image, outputs.has_text)
            logits = self.answer(logits, text_logits, image_logits, complete)
        if labels is not None:
            loss = self.task_loss(logits, labels)
            if outputs.contrastive_loss is not None:
                loss = loss + self.config.contrastive_loss_weight * outputs.contrastive_loss
            if self.modality_heads is not None and self.training:
                read = {"has_text": outputs.has_text, "has_image": outputs.has_image}
                modality_loss = self.modality_loss(text_logits, image_logits, **read, **kwargs)
                loss = loss + self.config.modality_loss_weight * modality_loss
        asked = {name: value for name, value in outputs.items() if output_hidden_states or "hidden_states" not in name}
        return ClipCaCgClassifierOutput(
            loss=loss,
            logits=logits,
            text_logits=text_logits,
            image_logits=image_logits,
            modality_loss=modality_loss,
            **asked,
        )

    def answer(
        self, logits: Tensor, text_logits: Tensor, image_logits: Tensor, complete: Tensor | None = None
    ) -> Tensor:
        """Return the logits that `modality_combination` asks for; in training mode always the classifier's.

        Args:
            logits, text_logits, image_logits: (batch, labels), of the classifier and of the two heads.
            complete: (batch,), bool: examples with an image and a text; the classifier alone answers the others.
                Default: all.
        """
        if self.training or self.config.modality_combination == "classifier":
            return logits
        neutral = self.config.label_names.index("neutral")
        return average_with_rule(logits, text_logits, image_logits, neutral, complete)

    def modality_loss(
        self,
        text_logits: Tensor,
        image_logits: Tensor,
        text_labels: Tensor | None = None,
        image_labels: Tensor | None = None,
        has_text: Tensor | None = None,
        has_image: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Sum the cross-entropies of the two heads.

        Args:
            text_logits, image_logits: (batch, labels).
            text_labels, image_labels: (batch,) class indices, -100 where unknown; None if all are unknown. They are
                not in `forward`'s signature: the Trainer expects every argument with "label" in its name in every
                batch, and computes no metric without it.
            has_text, has_image: (batch,), bool; a head does not learn from what is missing. Default: nothing is.
            **kwargs: Ignored.

        Returns:
            Scalar, float32. Both heads always take part in it, since distributed training waits for their gradients.
        """
        unknown = torch.full_like(text_logits[:, 0], -100, dtype=torch.long)
        losses = []
        for logits, labels, read in ((text_logits, text_labels, has_text), (image_logits, image_labels, has_image)):
            labels = unknown if labels is None else labels
            losses.append(known_cross_entropy(logits, labels if read is None else labels.where(read.bool(), unknown)))
        return losses[0] + losses[1]

    def task_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss that the paper names below equation 16: cross-entropy, or mean squared error.

        As in transformers' own models, float labels set an open `problem_type` to several labels per example.

        Args:
            logits: (batch, labels).
            labels: As in `forward`.

        Returns:
            Scalar, float32.
        """
        config, logits = self.config, logits.float()
        if config.problem_type is None and logits.shape[-1] > 1 and labels.is_floating_point():
            config.problem_type = "multi_label_classification"
        if config.task == "regression":
            return functional.mse_loss(logits.view_as(labels), labels.float())
        if config.task == "multi_label_classification":
            return functional.binary_cross_entropy_with_logits(logits, labels.float())
        weights = None if config.class_weights is None else torch.tensor(config.class_weights, device=logits.device)
        return known_cross_entropy(logits, labels, weights, config.label_smoothing)


__all__ = ["ClipCaCgForSequenceClassification", "ClipCaCgModel", "ClipCaCgPreTrainedModel"]
