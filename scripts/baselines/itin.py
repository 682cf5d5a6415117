"""ITIN: alignment of regions and words, a gate, and the individual context of each modality.

Source: Zhu, Li, Yang, Zhao, Liu and Qian, "Multimodal Sentiment Analysis With Image-Text Interaction Network", IEEE
Transactions on Multimedia, 2022; the forward pass follows the authors' public demo.

- [V] Two-layer bidirectional GRUs, whose directions are averaged, for the words and, apart, for the text's context;
  regions of unit length; cross-modal and self-attention without biases and with unprojected values; a gate; four
  summarising attentions; 0.2 of the image branch and 0.8 of the text branch through one shared Linear.
- [V] The demo classifies by the side of the regions alone and leaves that of the words unused.
- [A] Training: cross-entropy. With `use_word_side` the mean of both sides is taken.

Two detected boxes a picture are the demo's regions; without `region_features` the cells of the feature map are ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipcacg.modeling_clipcacg import masked_mean

from .layers import Recurrent, masked_softmax, regions_of
from .shared import BaselineConfig, BaselineForSequenceClassification, Scores

CONTEXT_SIZE = 64  # width of the two branches before the shared Linear
SUMMARIES = 4


class ItinConfig(BaselineConfig):
    """
    Args:
        hidden_size: Width of words, regions and context; 1024 in the demo.
        dropout: Between the two layers of each GRU.
        share_gru: Whether one GRU serves the words and the text's context.
        image_weight: Lambda, the share of the image branch, in [0, 1].
        use_word_side: Whether the side of the words is read as well.
        region_size: Width of `region_features`, or None for the cells of the feature map.
    """

    model_type = "itin"

    def __init__(
        self,
        hidden_size: int = 384,
        dropout: float = 0.25,
        share_gru: bool = False,
        image_weight: float = 0.2,
        use_word_side: bool = False,
        region_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.share_gru = share_gru
        self.image_weight = image_weight
        self.use_word_side = use_word_side
        self.region_size = region_size
        super().__init__(hidden_size=hidden_size, dropout=dropout, **kwargs)

    def check_values(self) -> None:
        super().check_values()
        if not 0 <= self.image_weight <= 1:
            raise ValueError(f"image_weight must be from 0 to 1, not {self.image_weight}.")


class Alignment(nn.Module):
    """softmax(X W_q (Y W_k)' / sqrt(d)) Y."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query = nn.Linear(size, size, bias=False)
        self.key = nn.Linear(size, size, bias=False)

    def forward(self, states: Tensor, others: Tensor, mask: Tensor) -> Tensor:
        """States X (batch, queries, size), others Y (batch, keys, size), mask of Y (batch, keys), to X's shape."""
        scores = self.query(states) @ self.key(others).transpose(1, 2) / states.shape[-1] ** 0.5
        return masked_softmax(scores, mask.unsqueeze(1)) @ others


class Side(nn.Module):
    """One modality aligned with the other, gated, and summarised to one vector of unit length."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.cross_attention = Alignment(size)
        self.self_attention = Alignment(size)
        self.fusion = nn.Linear(2 * size, size, bias=False)
        # A bias of the last Linear would move all positions alike, and the softmax does not see that.
        self.summary = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, SUMMARIES, bias=False))

    def forward(self, states: Tensor, mask: Tensor, others: Tensor, other_mask: Tensor) -> Tensor:
        aligned = self.cross_attention(states, others, other_mask)  # A
        aligned = F.normalize(self.self_attention(aligned, aligned, mask), dim=-1)  # A'
        gate = torch.sigmoid((states * aligned).sum(dim=-1, keepdim=True))
        fused = self.fusion(torch.cat([states, aligned], dim=-1) * gate).relu() + states
        weights = masked_softmax(self.summary(fused).transpose(1, 2), mask.unsqueeze(1))  # (batch, 4, positions)
        return F.normalize((weights @ fused).mean(dim=1), dim=-1)


class ContextGru(nn.Module):
    """Two layers in both directions; a word's state is the mean of its two directions."""

    def __init__(self, input_size: int, config: ItinConfig) -> None:
        super().__init__()
        shape = {"num_layers": 2, "bidirectional": True, "dropout": config.dropout, "batch_first": True}
        self.gru = Recurrent(nn.GRU(input_size, config.hidden_size, **shape))

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        return self.gru(words, mask).unflatten(-1, (2, -1)).mean(dim=-2)


class Itin(BaselineForSequenceClassification):
    """y = W (lambda h_v + (1 - lambda) h_t) + b, where h_v and h_t read the aligned z beside a context each."""

    config_class = ItinConfig
    label = "ITIN (re-impl.)"
    fidelity = "A"
    substitutions = (
        "grid regions of the vision encoder, no detector, unless region_features are given",
        "image context = the same encoder's pooled features, not a second ResNet-18",
        "width 384 instead of 1024 unless hidden_size is set",
        "training not published: cross-entropy",
        "padding masked",
    )
    published = {"mvsa_single": (75.19, 74.97), "mvsa_multiple": (73.52, 73.49)}

    def __init__(self, config: ItinConfig) -> None:
        super().__init__(config)
        size, channels = config.hidden_size, self.image_branch.channels
        self.word_gru = ContextGru(config.text_config.hidden_size, config)
        if not config.share_gru:
            self.context_gru = ContextGru(config.text_config.hidden_size, config)
        self.region_projection = nn.Linear(config.region_size or channels, size)
        self.region_side = Side(size)
        if config.use_word_side:
            self.word_side = Side(size)
        self.image_context = nn.Linear(size + channels, CONTEXT_SIZE)
        self.text_context = nn.Linear(2 * size, CONTEXT_SIZE)
        self.classifier = nn.Linear(CONTEXT_SIZE, config.num_labels)
        self.post_init()

    def score(
        self,
        words: Tensor,
        mask: Tensor,
        feature_map: Tensor,
        region_features: Tensor | None = None,
        **extras: Any,
    ) -> Scores:
        """`region_features` (batch, regions, region_size): the features of detected boxes."""
        regions = regions_of(feature_map) if self.config.region_size is None else region_features
        if regions is None:
            raise ValueError(f"region_size={self.config.region_size} needs region_features.")
        context = masked_mean((self.word_gru if self.config.share_gru else self.context_gru)(words, mask), mask)
        words = self.word_gru(words, mask)  # W
        regions = F.normalize(self.region_projection(regions.to(words.dtype)), dim=-1)  # R
        every_region = torch.ones(regions.shape[:2], dtype=torch.bool, device=regions.device)
        z = self.region_side(regions, every_region, words, mask)
        if self.config.use_word_side:
            z = (z + self.word_side(words, mask, regions, every_region)) / 2
        h_v = self.image_context(torch.cat([z, feature_map.mean(dim=(2, 3))], dim=-1)).relu()
        h_t = self.text_context(torch.cat([z, context], dim=-1)).relu()
        fused = self.config.image_weight * h_v + (1 - self.config.image_weight) * h_t
        return Scores(self.classifier(fused), fused)
