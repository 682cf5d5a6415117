"""CLIP-CA-CG: image-text sentiment with CLIP interaction, cross-attention and a cross-modal gate.

Source: Lu, Ni and Ding, "Cross-Modal Sentiment Analysis Based on CLIP Image-Text Attention Interaction".

    equation      what it is                             class
    --------      ----------------------------------     ------------------------------------------------------------
    1             text encoder                           TextBranch
    2, 3          bidirectional GRU                      BiGru
    4             picture regions                        ImageBranch
    5             image-text interaction                 ClipEncoderInteraction, FeatureInteraction, NoInteraction
    6-10          cross-attention, both directions       CrossAttention
    11            pooled cross-attention                 CrossModalFusion
    12            cross-modal gate                       CrossModalGate
    13-15         fusion of the two modalities           GatedFusion (w/o CG: ConcatFusion)
    16            classifier                             ClipCaCgForSequenceClassification
    Table IV      V only, T only                         SingleModality

Axis names: batch, text_len (tokens of the text encoder), regions (of the picture), joint_len (positions of F_IT),
hidden (d), projection (c), heads, labels. A mask is 1 or True for a real token and 0 or False for padding.

Where we depart from the paper, or fill its silence:
- F_IT is a sequence (image-text, patches-text, image-words), not one vector: over one key the softmax of equation 6 is
  always 1, and the attention would do nothing. Its first token is the paper's CLIP(I) * CLIP(T).
- The products of unit vectors are multiplied by c before the map to d. Their entries are of the order 1 / c, next to
  nothing for the Linear that follows. A LayerNorm would also scale them, but subtract their mean, which is the very
  cosine similarity of the two sides.
- F_I and F_T each end in a LayerNorm. Encoders speak at scales of their own, and the loud is learned first: without it
  a picture's features came out three times as large as those of the text, which tells more of a post's sentiment.
- The Bi-GRU starts near the identity and each cross-attention near its residual: what pretrained encoders know reaches
  the classifier from the first step. This and the LayerNorm are our choices; what they brought, and in how many runs,
  stands in scripts/configs/mvsa_single_offline.yaml.
- Without CLIP there is no joint token, and the gate sees the two attended modalities alone.
- lambda (equation 15) is a learned scalar that starts at 0.5; "MLP" is Linear, GELU, dropout, Linear.
- Without the gate one MLP reads all that equations 12-15 read, so that only the gate is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection, CLIPVisionModelWithProjection
from transformers.utils import ModelOutput, logging

from .configuration_clipcacg import ClipCaCgConfig

logger = logging.get_logger(__name__)


@dataclass
class ClipCaCgModelOutput(ModelOutput):
    """What `ClipCaCgModel` returns. A field that the chosen mode does not have is None.

    Args:
        fused_embeds: (batch, hidden), F of equation 15.
        image_embeds: (batch, projection), unit length; v of equation 5.
        text_embeds: (batch, projection), unit length; t of equation 5.
        gate: (batch, hidden), values in (0, 1); g of equation 12. 1 lets the linear path through, 0 the tanh path.
        contrastive_loss: Scalar, the symmetric contrastive loss over the batch; only with `clip_mode="feature"`.
        image_attentions: (batch, heads, regions, joint_len), weights of equation 6 with the picture as query; with
            `output_attentions=True`.
        text_attentions: (batch, heads, text_len, joint_len), likewise with the text as query.
        image_hidden_states: With `output_hidden_states=True`: F_I and image-IT, each (batch, regions, hidden).
        text_hidden_states: With `output_hidden_states=True`: F_T and text-IT, each (batch, text_len, hidden).
    """

    fused_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    gate: Tensor | None = None
    contrastive_loss: Tensor | None = None
    image_attentions: Tensor | None = None
    text_attentions: Tensor | None = None
    image_hidden_states: tuple[Tensor, ...] | None = None
    text_hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class ClipCaCgClassifierOutput(ModelOutput):
    """What `ClipCaCgForSequenceClassification` returns.

    Args:
        loss: Scalar, if `labels` were given: the task's loss plus the weighted contrastive loss.
        logits: (batch, labels), scores before the softmax of equation 16, or the predicted values of a regression.
        fused_embeds, image_embeds, text_embeds, gate, image_attentions, text_attentions, image_hidden_states,
            text_hidden_states: As in `ClipCaCgModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    fused_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    gate: Tensor | None = None
    image_attentions: Tensor | None = None
    text_attentions: Tensor | None = None
    image_hidden_states: tuple[Tensor, ...] | None = None
    text_hidden_states: tuple[Tensor, ...] | None = None


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens of each text; zeros for a text that is all padding.

    Args:
        states: (batch, text_len, width).
        mask: (batch, text_len), bool.

    Returns:
        (batch, width).
    """
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def as_mask(attention_mask: Tensor | None, tokens: Tensor) -> Tensor:
    """The bool mask (batch, text_len) of token ids or features (batch, text_len, ...); left out: no padding."""
    if attention_mask is None:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return attention_mask.bool()


def encoder_mask(mask: Tensor) -> Tensor:
    """The mask for an encoder's own attention, which has no value where there is no key at all.

    A text that is all padding lets its first token through here; everywhere after the encoder it stays padding.
    """
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    return (mask | (first & ~mask.any(dim=1, keepdim=True))).long()


class BiGru(nn.Module):
    """Equations 2 and 3: a GRU in each direction; h is the average of the two.

    Padding must not reach either direction. Each row's real tokens are moved to the front, in reading order for one
    GRU and reversed for the other, and its outputs are moved back. Unlike packing this can be exported and compiled.

    Args:
        input_size: Width of the text encoder.
        hidden_size: d, per direction.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.forward_gru = nn.GRU(input_size, hidden_size, batch_first=True)
        self.backward_gru = nn.GRU(input_size, hidden_size, batch_first=True)

    def forward(self, token_states: Tensor, mask: Tensor) -> Tensor:
        """(batch, text_len, input_size) and a bool mask (batch, text_len) to F_T (batch, text_len, hidden)."""
        rank = mask.cumsum(dim=1)  # (batch, text_len), 1 for the first real token
        length = rank[:, -1:]
        padding_slot = length + (~mask).cumsum(dim=1) - 1
        forward_states = self._run(self.forward_gru, token_states, torch.where(mask, rank - 1, padding_slot))
        backward_states = self._run(self.backward_gru, token_states, torch.where(mask, length - rank, padding_slot))
        return (forward_states + backward_states) / 2

    @staticmethod
    def _run(gru: nn.GRU, token_states: Tensor, slots: Tensor) -> Tensor:
        """Run over tokens moved to `slots` (batch, text_len) and return the states in the order they came in."""
        slots = slots.unsqueeze(-1)
        moved = torch.zeros_like(token_states).scatter(1, slots.expand_as(token_states), token_states)
        states, _ = gru(moved)
        return states.gather(1, slots.expand_as(states))


class TextBranch(nn.Module):
    """Equations 1-3: the text encoder's last hidden state through the bidirectional GRU, and LayerNorm (ours)."""

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__()
        self.encoder = AutoModel.from_config(config.text_config, dtype=torch.get_default_dtype())
        drop_unused_pooler(self.encoder)
        self.bi_gru = BiGru(config.text_config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, input_ids: Tensor | None, mask: Tensor, features: Tensor | None = None) -> Tensor:
        """Token ids and a bool mask, both (batch, text_len), to F_T (batch, text_len, hidden).

        `features`, what `encode` has returned before, spare the encoder.
        """
        features = self.encode(input_ids, mask) if features is None else features
        return self.norm(self.bi_gru(features.to(self.bi_gru.forward_gru.weight_ih_l0.dtype), mask))

    def encode(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Equation 1: (batch, text_len) to the encoder's last hidden state (batch, text_len, width)."""
        return self.encoder(input_ids=input_ids, attention_mask=encoder_mask(mask)).last_hidden_state


class ImageBranch(nn.Module):
    """Equation 4: the vision encoder's last feature map as a sequence of regions, one Linear, LayerNorm (ours)."""

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__()
        self.encoder = AutoModel.from_config(config.vision_config, dtype=torch.get_default_dtype())
        channels, unused = dry_run(config.vision_config)
        for name in unused:
            self.encoder.set_submodule(name, nn.Identity())
        self.projection = nn.Linear(channels, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, pixel_values: Tensor | None, features: Tensor | None = None) -> Tensor:
        """Picture (batch, channels, height, width), normalised, to F_I (batch, regions, hidden).

        `features`, what `encode` has returned before, spare the encoder.
        """
        features = self.encode(pixel_values) if features is None else features
        return self.norm(self.projection(features.flatten(2).transpose(1, 2).to(self.projection.weight.dtype)))

    def encode(self, pixel_values: Tensor) -> Tensor:
        """The encoder's last feature map (batch, width, rows, columns)."""
        return self.encoder(pixel_values.to(self.encoder.dtype)).last_hidden_state


def drop_unused_pooler(encoder: PreTrainedModel) -> None:
    """Remove a text encoder's pooler, which nothing reads: no gradient reaches it, and many checkpoints lack it."""
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = NoBranch()  # not None: some encoders call it without asking


def dry_run(vision_config: Any) -> tuple[int, list[str]]:
    """What no config tells for every family, timm's included, by a run on the meta device: no memory, no arithmetic.

    Returns:
        Channels of the last feature map, and the names of the modules whose weights it does not depend on, such as
        ConvNeXt's last norm, innermost first. Distributed training would wait for their gradients in vain.

    Raises:
        ValueError: If the encoder's last hidden state is not a feature map (batch, channels, height, width).
    """
    size = getattr(vision_config, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    with torch.inference_mode(False), torch.device("meta"):  # wherever the model is built, gradients are on here
        encoder = AutoModel.from_config(vision_config, dtype=torch.float32).eval()
        picture = torch.zeros(1, getattr(vision_config, "num_channels", 3), height, width, dtype=torch.float32)
        feature_map = encoder(picture).last_hidden_state
        if feature_map.dim() != 4:
            raise ValueError(
                f"vision_config: the last hidden state of {vision_config.model_type!r} has shape "
                f"{tuple(feature_map.shape)}, not (batch, channels, height, width); take a convolutional encoder."
            )
        feature_map.sum().backward()
    weights = {name: list(module.parameters()) for name, module in encoder.named_modules()}
    unused = [name for name, parameters in weights.items() if parameters and all(p.grad is None for p in parameters)]
    return feature_map.shape[1], unused[::-1]


class NoBranch(nn.Module):
    """Stands where something has been left out: the other branch of V only and T only, a pooler."""

    def forward(self, *inputs: Any) -> None:
        return None


class Joint(NamedTuple):
    """F_IT and what came up on the way.

    Args:
        states: (batch, joint_len, hidden), keys and values of the cross-attention.
        mask: (batch, joint_len), bool.
        pooled: (batch, hidden), the first token of F_IT, or (batch, 0) without CLIP.
        image_embeds, text_embeds: v and t, (batch, projection), unit length.
        contrastive_loss: Scalar.
    """

    states: Tensor
    mask: Tensor
    pooled: Tensor
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    contrastive_loss: Tensor | None = None


def joint_sequence(image: Tensor, patches: Tensor, text: Tensor, words: Tensor) -> Tensor:
    """Equation 5: v * t, then v_patch * t for every patch, then v * t_word for every word, all times c.

    Args:
        image, text: (batch, projection), unit length.
        patches, words: (batch, regions, projection) and (batch, text_len, projection), unit length.

    Returns:
        (batch, 1 + regions + text_len, projection). The entries of each row add up to c times its cosine similarity.
    """
    image, text = image.unsqueeze(1), text.unsqueeze(1)
    return torch.cat([image * text, patches * text, image * words], dim=1) * image.shape[-1]


def joint_mask(other_positions: int, text_mask: Tensor) -> Tensor:
    """The mask of F_IT: positions that do not stand for a word are always real."""
    return F.pad(text_mask, (other_positions, 0), value=True)


class ClipEncoderInteraction(nn.Module):
    """Equation 5 with CLIP's pretrained towers, which read the raw picture and text.

    Every patch and word token goes through CLIP's own final norm and projection into the shared space.
    """

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__()
        clip, dtype = config.clip_config, torch.get_default_dtype()
        # A CLIP model's projections have the width that its own config names, whatever its towers' configs say.
        clip.text_config.projection_dim = clip.vision_config.projection_dim = clip.projection_dim
        self.text_model = CLIPTextModelWithProjection._from_config(clip.text_config, dtype=dtype)
        self.vision_model = CLIPVisionModelWithProjection._from_config(clip.vision_config, dtype=dtype)
        self.projection = nn.Linear(clip.projection_dim, config.hidden_size)
        self.pooled_size = config.hidden_size

    def forward(
        self,
        image_states: Tensor,
        text_states: Tensor,
        text_mask: Tensor,
        clip_input_ids: Tensor | None,
        clip_attention_mask: Tensor | None,
        clip_pixel_values: Tensor | None,
        clip_text_features: Tensor | None = None,
        clip_image_features: Tensor | None = None,
    ) -> Joint:
        """The CLIP inputs to F_IT; the features of the other encoders are not used in this mode.

        `clip_text_features` and `clip_image_features`, what the two methods below have returned before, spare CLIP.
        """
        dtype = self.projection.weight.dtype
        if clip_image_features is None:
            clip_image_features = self.encode_image(clip_pixel_values)
        image, patches = clip_image_features[:, 0].to(dtype), clip_image_features[:, 1:].to(dtype)
        if clip_text_features is None:
            clip_text_features = self.encode_text(clip_input_ids, as_mask(clip_attention_mask, clip_input_ids))
        text, words = clip_text_features[:, 0].to(dtype), clip_text_features[:, 1:].to(dtype)

        states = self.projection(joint_sequence(image, patches, text, words))
        mask = joint_mask(1 + patches.shape[1], as_mask(clip_attention_mask, words))
        return Joint(states, mask, states[:, 0], image, text)

    def encode_image(self, clip_pixel_values: Tensor) -> Tensor:
        """v and v_patch, (batch, 1 + patches, projection), unit length."""
        vision = self.vision_model(clip_pixel_values)
        patches = self.vision_model.vision_model.post_layernorm(vision.last_hidden_state[:, 1:])
        patches = self.vision_model.visual_projection(patches)
        return F.normalize(torch.cat([vision.image_embeds.unsqueeze(1), patches], dim=1), dim=-1)

    def encode_text(self, clip_input_ids: Tensor, mask: Tensor) -> Tensor:
        """t and t_word, (batch, 1 + clip_text_len, projection), unit length."""
        language = self.text_model(clip_input_ids, attention_mask=encoder_mask(mask))
        words = self.text_model.text_projection(language.last_hidden_state)
        return F.normalize(torch.cat([language.text_embeds.unsqueeze(1), words], dim=1), dim=-1)


class FeatureInteraction(nn.Module):
    """Equation 5 read literally, CLIP(F_I) * CLIP(F_T): projection heads and a temperature on F_I and F_T themselves.

    Trained by the symmetric contrastive loss of CLIP (Radford et al., 2021), each post against the others of its batch
    on its device.
    """

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__()
        self.image_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        # One number in a vector: sharded training refuses parameters without an axis.
        self.logit_scale = nn.Parameter(torch.full((1,), float(config.logit_scale_init_value)))
        self.projection = nn.Linear(config.projection_dim, config.hidden_size)
        self.pooled_size = config.hidden_size

    def forward(self, image_states: Tensor, text_states: Tensor, text_mask: Tensor, *clip_inputs: Any) -> Joint:
        """F_I, F_T and the text's mask to F_IT; CLIP's own inputs are not used in this mode."""
        patches = self.image_projection(image_states)
        words = self.text_projection(text_states)
        image = F.normalize(patches.mean(dim=1), dim=-1)
        text = F.normalize(masked_mean(words, text_mask), dim=-1)

        joint = joint_sequence(image, F.normalize(patches, dim=-1), text, F.normalize(words, dim=-1))
        states = self.projection(joint)
        mask = joint_mask(1 + patches.shape[1], text_mask)
        return Joint(states, mask, states[:, 0], image, text, self._contrastive_loss(image, text))

    def _contrastive_loss(self, image: Tensor, text: Tensor) -> Tensor:
        # The bound of 100 is CLIP's own.
        logits = self.logit_scale.float().exp().clamp(max=100) * (text.float() @ image.float().T)  # (batch, batch)
        target = torch.arange(logits.shape[0], device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class NoInteraction(nn.Module):
    """The ablation w/o Clip: keys and values are F_I and F_T, one after the other."""

    pooled_size = 0

    def forward(self, image_states: Tensor, text_states: Tensor, text_mask: Tensor, *clip_inputs: Any) -> Joint:
        states = torch.cat([image_states, text_states], dim=1)
        return Joint(states, joint_mask(image_states.shape[1], text_mask), pooled=states[:, 0, :0])


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
    """Attention written out, in the form of transformers' attention interface.

    Args:
        query, key, value: (batch, heads, positions, head_width).
        attention_mask: Added to the scores; broadcasts to (batch, heads, queries, keys).

    Returns:
        The attended values (batch, queries, heads, head_width) and the weights (batch, heads, queries, keys).
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    attended = F.dropout(weights, p=dropout, training=module.training) @ value
    return attended.transpose(1, 2), weights


class CrossAttention(nn.Module):
    """Equations 6-10: multi-head attention from one modality to F_IT, then residual and LayerNorm."""

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__()
        self.config = config
        self.is_causal = False
        self.head_width = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, states: Tensor, joint: Joint, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        """Queries (batch, positions, hidden) to states of the same shape and, on request, the weights."""
        query = self._heads(self.q_proj(states))
        key, value = self._heads(self.k_proj(joint.states)), self._heads(self.v_proj(joint.states))
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros_like(joint.mask, dtype=query.dtype).masked_fill(~joint.mask, lowest)[:, None, None, :]
        # Only the written-out attention has weights to return.
        implementation = "eager" if output_attentions else self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attended, weights = attend(self, query, key, value, mask, scaling=self.head_width**-0.5)
        attended = self.out_proj(attended.flatten(2))
        return self.norm(states + self.dropout(attended)), weights if output_attentions else None

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # (batch, heads, positions, head_width)


class NoCrossAttention(nn.Module):
    """The ablation w/o CA: a modality passes through as it is."""

    def forward(self, states: Tensor, joint: Joint, output_attentions: bool = False) -> tuple[Tensor, None]:
        return states, None


def mlp(input_size: int, config: ClipCaCgConfig) -> nn.Sequential:
    """The paper's "MLP", of which it says no more: two Linear layers with GELU and dropout between them."""
    return nn.Sequential(
        nn.Linear(input_size, config.hidden_size),
        nn.GELU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.hidden_size, config.hidden_size),
    )


class CrossModalGate(nn.Module):
    """Equation 12: F_mix = g * W_c x + (1 - g) * tanh(W_n LayerNorm(x)), g = sigmoid(W_g x)."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(input_size, hidden_size)
        self.linear = nn.Linear(input_size, hidden_size)
        self.norm = nn.LayerNorm(input_size)
        self.nonlinear = nn.Linear(input_size, hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (batch, input_size) to F_mix and g, both (batch, hidden)."""
        gate = torch.sigmoid(self.gate(x))
        return gate * self.linear(x) + (1 - gate) * torch.tanh(self.nonlinear(self.norm(x))), gate


class GatedFusion(nn.Module):
    """Equations 12-15: the gate, then F = lambda F_1 + (1 - lambda) F_2 of the picture and the text."""

    def __init__(self, pooled_size: int, config: ClipCaCgConfig) -> None:
        super().__init__()
        self.gate = CrossModalGate(pooled_size + 2 * config.hidden_size, config.hidden_size)
        self.image_mlp = mlp(2 * config.hidden_size, config)
        self.text_mlp = mlp(2 * config.hidden_size, config)
        self.lambda_logit = nn.Parameter(torch.zeros(1))  # sigmoid(0) = 0.5

    def forward(self, x: Tensor, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """x (batch, pooled + 2 hidden), mean F_I and mean F_T (batch, hidden) to F and g, both (batch, hidden)."""
        mixed, gate = self.gate(x)
        image_side = self.image_mlp(torch.cat([image, mixed], dim=-1))
        text_side = self.text_mlp(torch.cat([text, mixed], dim=-1))
        balance = torch.sigmoid(self.lambda_logit)
        return balance * image_side + (1 - balance) * text_side, gate


class ConcatFusion(nn.Module):
    """The ablation w/o CG: concatenation and an MLP replace equations 12-15."""

    def __init__(self, pooled_size: int, config: ClipCaCgConfig) -> None:
        super().__init__()
        self.mlp = mlp(pooled_size + 4 * config.hidden_size, config)

    def forward(self, x: Tensor, image: Tensor, text: Tensor) -> tuple[Tensor, None]:
        return self.mlp(torch.cat([x, image, text], dim=-1)), None


class CrossModalFusion(nn.Module):
    """Equations 5-15, from the features of both modalities to F."""

    interactions = {"encoder": ClipEncoderInteraction, "feature": FeatureInteraction}

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__()
        self.interaction = (
            NoInteraction() if config.clip_mode == "none" else self.interactions[config.clip_mode](config)
        )
        self.image_attention = CrossAttention(config) if config.use_cross_attention else NoCrossAttention()
        self.text_attention = CrossAttention(config) if config.use_cross_attention else NoCrossAttention()
        fusion = GatedFusion if config.use_gating else ConcatFusion
        self.fusion = fusion(self.interaction.pooled_size, config)

    def forward(
        self,
        image_states: Tensor,
        text_states: Tensor,
        text_mask: Tensor,
        clip_inputs: tuple[Tensor | None, ...],
        output_attentions: bool,
        output_hidden_states: bool,
    ) -> ClipCaCgModelOutput:
        joint = self.interaction(image_states, text_states, text_mask, *clip_inputs)  # eq. 5
        image_it, image_attentions = self.image_attention(image_states, joint, output_attentions)  # eq. 6-10
        text_it, text_attentions = self.text_attention(text_states, joint, output_attentions)
        attended = torch.cat([image_it.mean(dim=1), masked_mean(text_it, text_mask)], dim=-1)  # eq. 11
        x = torch.cat([joint.pooled, attended], dim=-1)
        image, text = image_states.mean(dim=1), masked_mean(text_states, text_mask)
        fused, gate = self.fusion(x, image, text)  # eq. 12-15
        return ClipCaCgModelOutput(
            fused_embeds=fused,
            image_embeds=joint.image_embeds,
            text_embeds=joint.text_embeds,
            gate=gate,
            contrastive_loss=joint.contrastive_loss,
            image_attentions=image_attentions,
            text_attentions=text_attentions,
            image_hidden_states=(image_states, image_it) if output_hidden_states else None,
            text_hidden_states=(text_states, text_it) if output_hidden_states else None,
        )


class SingleModality(nn.Module):
    """The ablations V only and T only: the pooled feature of the one encoder there is, and an MLP."""

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__()
        self.mlp = mlp(config.hidden_size, config)

    def forward(
        self,
        image_states: Tensor | None,
        text_states: Tensor | None,
        text_mask: Tensor | None,
        clip_inputs: tuple[Tensor | None, ...],
        output_attentions: bool,
        output_hidden_states: bool,
    ) -> ClipCaCgModelOutput:
        pooled = image_states.mean(dim=1) if text_states is None else masked_mean(text_states, text_mask)
        return ClipCaCgModelOutput(
            fused_embeds=self.mlp(pooled),
            image_hidden_states=(image_states,) if output_hidden_states and image_states is not None else None,
            text_hidden_states=(text_states,) if output_hidden_states and text_states is not None else None,
        )


def load_backbone(encoder: PreTrainedModel, source: str | Path) -> None:
    """Copy pretrained weights into an encoder, and warn of those that the source lacks.

    transformers would report every head, pooler and other tower that this model has no use for.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        pretrained, report = type(encoder).from_pretrained(
            source, config=encoder.config, dtype=encoder.dtype, output_loading_info=True, use_safetensors=True
        )
    finally:
        logging.set_verbosity(verbosity)
    used = encoder.state_dict().keys()
    missing = sorted(used & set(report["missing_keys"]))
    if missing:
        logger.warning(f"{source} lacks {', '.join(missing)}: these weights start at random.")
    encoder.load_state_dict({key: value for key, value in pretrained.state_dict().items() if key in used})


def freeze_below(encoder: PreTrainedModel, number: int) -> None:
    """Freeze an encoder's embeddings and its first layers: all that it holds before its layer `number`.

    Raises:
        ValueError: If it has not so many layers.
    """
    depth = getattr(encoder.config, "num_hidden_layers", 0)
    stacks = (module for module in encoder.modules() if isinstance(module, nn.ModuleList) and len(module) == depth)
    layers = next(stacks, [])
    if not 0 < number < len(layers):
        raise ValueError(
            f"Of the {len(layers)} layers of this {encoder.config.model_type!r} text encoder {number} cannot be "
            "frozen; some must be left to train, or freeze the whole encoder."
        )
    first_trained = next(layers[number].parameters())
    for parameter in encoder.parameters():
        if parameter is first_trained:
            break
        parameter.requires_grad_(False)


class ClipCaCgPreTrainedModel(PreTrainedModel):
    """Initialisation, loading of pretrained backbones, and freezing, for both models below."""

    config: ClipCaCgConfig
    config_class = ClipCaCgConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # Modules that put the outputs of several children together, which must therefore lie on one device.
    _no_split_modules = ["BiGru", "CrossModalFusion"]

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__(config)
        if config.modality == "image":
            self.main_input_name = "pixel_values"  # the Trainer counts by it, and there is no text to count

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module of the fusion; the backbones are transformers models and initialise themselves."""
        if isinstance(module, nn.Linear):
            # Keeps the variance at any width; the usual 0.02 leaves narrow models all but silent.
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, BiGru):
            self._let_through(module.forward_gru)
            self._let_through(module.backward_gru)
        elif isinstance(module, CrossAttention):
            init.xavier_uniform_(module.out_proj.weight, gain=0.1)
        elif isinstance(module, FeatureInteraction):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
        elif isinstance(module, GatedFusion):
            init.zeros_(module.lambda_logit)

    @staticmethod
    def _let_through(gru: nn.GRU) -> None:
        """Start a GRU near h_t = 0.88 tanh(x_t), with a tenth of PyTorch's own random weights upon it.

        At PyTorch's start what the text encoder knows reaches the classifier only when the GRU has learned to let it.
        """
        bound = 0.1 * gru.hidden_size**-0.5
        _, update, new = (slice(gate * gru.hidden_size, (gate + 1) * gru.hidden_size) for gate in range(3))
        weight, bias = torch.empty_like(gru.weight_ih_l0).uniform_(-bound, bound), torch.zeros_like(gru.bias_ih_l0)
        weight[new].fill_diagonal_(1)
        bias[update] = -2  # sigmoid(-2) = 0.12 of the state before is kept
        init.copy_(gru.weight_ih_l0, weight)
        init.copy_(gru.bias_ih_l0, bias)
        init.uniform_(gru.weight_hh_l0, -bound, bound)
        init.zeros_(gru.bias_hh_l0)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, for the sake of keys that a checkpoint lacks.

        In custom code transformers skips the rules of modules without a parameter of their own, such as the attention
        of CLIP, lest they overwrite loaded weights; the rules here and in the backbones leave those alone themselves.
        """
        return False

    @classmethod
    def from_pretrained(cls, *args: Any, use_safetensors: bool | None = True, **kwargs: Any) -> Any:
        """As in `PreTrainedModel`, but weights are read as safetensors alone, never as a pickle, unless told so."""
        return super().from_pretrained(*args, use_safetensors=use_safetensors, **kwargs)

    @classmethod
    def from_backbones(
        cls,
        text_model: str | Path | None = None,
        vision_model: str | Path | None = None,
        clip_model: str | Path | None = None,
        **config: Any,
    ) -> ClipCaCgPreTrainedModel:
        """Build a model on pretrained backbones; the fusion starts from random weights.

        Args:
            text_model: Hub name or folder of a text encoder, such as "FacebookAI/roberta-base".
            vision_model: Hub name or folder of a vision encoder, such as "microsoft/resnet-50".
            clip_model: Hub name or folder of a CLIP model; needed by `clip_mode="encoder"`, which is the default.
            **config: Fields of `ClipCaCgConfig`.

        Returns:
            The model, in evaluation mode like every loaded model.

        Raises:
            ValueError: If a backbone that the modality or the clip mode needs is not named.
            OSError: If a backbone has no weights as safetensors.
        """
        names = {"text_model": text_model, "vision_model": vision_model, "clip_model": clip_model}
        for name, value in names.items():
            if value is not None:
                config[name.replace("model", "config")] = AutoConfig.from_pretrained(value)
        if clip_model is None:
            config.setdefault("clip_config", None)
        built = cls.config_class(**config)
        needed = [f"{part}_model" for part in cls.needed_backbones(built)]
        missing = [name for name in needed if names[name] is None]
        if missing:
            raise ValueError(
                f"from_backbones: {cls.__name__} with modality={built.modality!r} and clip_mode={built.clip_mode!r} "
                f"needs {', '.join(missing)}, a Hub name or a folder."
            )
        model = cls._from_config(built)
        for name, encoder in model.backbones().items():
            source = names[f"{name.partition('.')[0]}_model"]
            load_backbone(encoder, source)
        return model.eval()

    @staticmethod
    def needed_backbones(config: ClipCaCgConfig) -> tuple[str, ...]:
        """What a model with this config is built on: some of "text", "vision" and "clip"."""
        encoders = {"text": ("text",), "image": ("vision",), "both": ("text", "vision")}[config.modality]
        return (*encoders, "clip") if config.modality == "both" and config.clip_mode == "encoder" else encoders

    def backbones(self) -> dict[str, PreTrainedModel]:
        """The pretrained encoders this model has: some of "text", "vision", "clip.text" and "clip.vision"."""
        base = self.base_model
        encoders = {
            "text": getattr(base.text_branch, "encoder", None),
            "vision": getattr(base.image_branch, "encoder", None),
        }
        interaction = getattr(base.fusion, "interaction", None)
        if isinstance(interaction, ClipEncoderInteraction):
            encoders |= {"clip.text": interaction.text_model, "clip.vision": interaction.vision_model}
        return {name: encoder for name, encoder in encoders.items() if encoder is not None}

    def encode(self, backbone: str, inputs: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The output of one backbone alone, which `forward` takes in place of the raw input.

        Frozen backbones return the same for the same post, so that training can do with computing it once.

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
            raise ValueError(f"This model has no backbone {backbone!r}; it has {', '.join(self.backbones())}.")
        base = self.base_model
        if backbone == "text":
            return base.text_branch.encode(inputs, as_mask(attention_mask, inputs))
        if backbone == "vision":
            return base.image_branch.encode(inputs)
        if backbone == "clip.text":
            return base.fusion.interaction.encode_text(inputs, as_mask(attention_mask, inputs))
        return base.fusion.interaction.encode_image(inputs)

    def freeze_backbones(
        self, text: bool = False, vision: bool = False, clip: bool = False, text_layers: int = 0
    ) -> None:
        """Exclude backbones from training: their weights, their dropout and their BatchNorm statistics.

        Args:
            text, vision, clip: Which ones to freeze. One that the model does not have is passed over.
            text_layers: How many layers of the text encoder to freeze with its embeddings; 0 freezes neither. Their
                dropout goes on.

        Raises:
            ValueError: If the text encoder has not so many layers.
        """
        frozen = {name for name, freeze in (("text", text), ("vision", vision), ("clip", clip)) if freeze}
        for name, encoder in self.backbones().items():
            if name.partition(".")[0] in frozen:
                encoder.requires_grad_(False)
            elif name == "text" and text_layers:
                freeze_below(encoder, text_layers)
        self.train(self.training)

    def train(self, mode: bool = True) -> ClipCaCgPreTrainedModel:
        """Switch to training or evaluation mode; what is frozen in a backbone stays in evaluation mode.

        Training mode would move a frozen ResNet's BatchNorm statistics, and adapters (LoRA) are saved without them.
        """
        super().train(mode)
        for encoder in self.backbones().values():
            if not any(parameter.requires_grad for parameter in encoder.parameters()):
                encoder.eval()
                continue
            for module in encoder.modules():
                weight = getattr(module, "weight", None)
                if isinstance(module, _BatchNorm) and weight is not None and not weight.requires_grad:
                    module.eval()
        return self

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """Switch the attention of the fusion and of the text and CLIP encoders, as transformers does.

        The vision encoder is out of sight meanwhile: a convolutional network refuses what it has no use for.
        """
        branch, encoder = self.base_model.image_branch, self.backbones().get("vision")
        branch.encoder = None
        try:
            super().set_attn_implementation(attn_implementation, allow_all_kernels)
        finally:
            branch.encoder = encoder

    def get_input_embeddings(self) -> nn.Module | None:
        """The text encoder's token embeddings, or None for a model that reads no text."""
        text_encoder = self.backbones().get("text")
        return None if text_encoder is None else text_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbones()["text"].set_input_embeddings(value)


class ClipCaCgModel(ClipCaCgPreTrainedModel):
    """Section III of the paper up to equation 15: a picture and its text to one fused vector.

    Args:
        config: Its `modality`, `clip_mode`, `use_cross_attention` and `use_gating` choose the modules.
    """

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__(config)
        config.check_values()
        self.text_branch = NoBranch() if config.modality == "image" else TextBranch(config)
        self.image_branch = NoBranch() if config.modality == "text" else ImageBranch(config)
        self.fusion = CrossModalFusion(config) if config.modality == "both" else SingleModality(config)
        backbones = self.backbones().values()
        self._no_split_modules = [
            *self._no_split_modules,
            *(name for b in backbones for name in b._no_split_modules or []),
        ]
        self.gradient_checkpointing = False  # says that checkpointing may be asked for; each backbone does its own
        self.post_init()

    def required_inputs(self) -> list[str]:
        """Names of the inputs that `forward` cannot do without in this model's mode."""
        names = {"text": ["input_ids"], "image": ["pixel_values"], "both": ["input_ids", "pixel_values"]}
        clip = self.config.modality == "both" and self.config.clip_mode == "encoder"
        return names[self.config.modality] + (["clip_input_ids", "clip_pixel_values"] if clip else [])

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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ClipCaCgModelOutput | tuple[Any, ...]:
        """Fuse pictures and texts.

        Args:
            input_ids: (batch, text_len), token ids of the text encoder.
            attention_mask: (batch, text_len), 1 for a real token, 0 for padding; left out: no padding.
            pixel_values: (batch, channels, height, width), the picture as the vision encoder wants it.
            clip_input_ids: (batch, clip_text_len), CLIP's token ids, padded on the right as CLIP needs it.
            clip_attention_mask: (batch, clip_text_len), likewise.
            clip_pixel_values: (batch, channels, height, width), the picture as CLIP wants it.
            text_features: (batch, text_len, width), what `encode("text", ...)` returned, in place of `input_ids`.
            image_features: (batch, width, rows, columns), of `encode("vision", ...)`, in place of `pixel_values`.
            clip_text_features: (batch, 1 + clip_text_len, projection), of `encode("clip.text", ...)`, in place of
                `clip_input_ids`.
            clip_image_features: (batch, 1 + patches, projection), of `encode("clip.vision", ...)`, in place of
                `clip_pixel_values`.
            output_attentions: Return the cross-attention weights.
            output_hidden_states: Return F_I, F_T and their attended forms.
            return_dict: False returns a tuple of the fields that are not None.
            **kwargs: Ignored; wrappers such as PEFT pass more than a model knows.

        Returns:
            `ClipCaCgModelOutput`.

        Raises:
            ValueError: If an input that this model's mode needs is missing, or batch sizes differ.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        tokens = input_ids if text_features is None else text_features
        given = {"input_ids": tokens, "pixel_values": pixel_values if image_features is None else image_features}
        given["clip_input_ids"] = clip_input_ids if clip_text_features is None else clip_text_features
        given["clip_pixel_values"] = clip_pixel_values if clip_image_features is None else clip_image_features
        self._check_inputs(given)

        text_mask = None if tokens is None else as_mask(attention_mask, tokens)
        text_states = self.text_branch(input_ids, text_mask, text_features)  # eq. 1-3
        image_states = self.image_branch(pixel_values, image_features)  # eq. 4
        clip_inputs = (clip_input_ids, clip_attention_mask, clip_pixel_values, clip_text_features, clip_image_features)
        output = self.fusion(
            image_states, text_states, text_mask, clip_inputs, output_attentions, output_hidden_states
        )  # eq. 5-15
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _check_inputs(self, given: dict[str, Tensor | None]) -> None:
        required = self.required_inputs()
        missing = [name for name in required if given[name] is None]
        if missing:
            raise ValueError(
                f"A model with modality={self.config.modality!r} and clip_mode={self.config.clip_mode!r} needs "
                f"{', '.join(required)}, but {', '.join(missing)} is missing; the processor makes them all."
            )
        if any(given[name].shape[0] != given[required[0]].shape[0] for name in required):
            sizes = ", ".join(f"{name} {given[name].shape[0]}" for name in required)
            raise ValueError(f"Every input needs the same number of posts, but they have: {sizes}.")


class ClipCaCgForSequenceClassification(ClipCaCgPreTrainedModel):
    """The whole of section III: `ClipCaCgModel` and the classifier of equation 16.

    Args:
        config: Its `num_labels` and `problem_type` choose the head and the loss.
    """

    # The loss is a mean over the batch. Without this the Trainer takes `**kwargs` for a promise to divide by the
    # number of labels of all accumulated batches, and gradient accumulation would multiply the loss.
    accepts_loss_kwargs = False

    def __init__(self, config: ClipCaCgConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ClipCaCgModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

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
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ClipCaCgClassifierOutput | tuple[Any, ...]:
        """Classify posts, or predict a value for each.

        Args:
            labels: (batch,) class indices, or floats when `problem_type="regression"`.
            **kwargs and the rest: As in `ClipCaCgModel.forward`.

        Returns:
            `ClipCaCgClassifierOutput`.

        Raises:
            ValueError: As in `ClipCaCgModel.forward`.
        """
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
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(self.dropout(outputs.fused_embeds))  # eq. 16
        loss = None
        if labels is not None:
            loss = self.task_loss(logits, labels)
            if outputs.contrastive_loss is not None:
                loss = loss + self.config.contrastive_loss_weight * outputs.contrastive_loss
        extras = {name: value for name, value in outputs.items() if name != "contrastive_loss"}
        output = ClipCaCgClassifierOutput(loss=loss, logits=logits, **extras)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def task_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean squared error for a regression, cross-entropy for classes (below equation 16 of the paper).

        Without a `problem_type` one label means a regression, float labels mean several classes at once, as in
        transformers' own models.
        """
        problem_type = self.config.problem_type
        if problem_type == "regression" or (problem_type is None and self.num_labels == 1):
            return F.mse_loss(logits.float().view_as(labels), labels.float())
        if problem_type == "multi_label_classification" or (problem_type is None and labels.is_floating_point()):
            return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
        weights = self.config.class_weights and torch.tensor(self.config.class_weights, device=logits.device)
        return F.cross_entropy(logits.float(), labels, weights, label_smoothing=self.config.label_smoothing)


__all__ = ["ClipCaCgForSequenceClassification", "ClipCaCgModel", "ClipCaCgPreTrainedModel"]
