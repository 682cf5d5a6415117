"""ITIN: alignment of regions and words, a gate, and the individual context of each modality.

Source: Zhu, Li, Yang, Zhao, Liu and Qian, "Multimodal Sentiment Analysis With Image-Text Interaction Network", IEEE
Transactions on Multimedia, 2022. The forward pass follows the authors' public demo.

- [V] Two-layer bidirectional GRUs with averaged directions, one for the words and one for the text context; regions of
  unit length; cross-modal attention and self-attention without biases and with unprojected values; a gate; four
  summarising attentions; a shared linear layer on 0.2 of the image branch and 0.8 of the text branch.
- [V] Initial weights: the Xavier bound for the projection of the regions, for the keys of the cross-modal attention
  and, with the bound of a square matrix, for the Linear after the gate. All other layers start as PyTorch does.
- [V] The demo classifies from the region side alone and does not use the word side.
- [A] Training with cross-entropy. `use_word_side` averages both sides.

The demo's regions are two detected boxes per image. Without `region_features` we use the cells of the feature map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipcacg.modeling_clipcacg import masked_mean
from clipcacg.scripts.baselines.layers import Recurrent, masked_softmax, regions_of
from clipcacg.scripts.baselines.shared import (
    BaselineConfig,
    BaselineForSequenceClassification,
    Scores,
    XavierLinear,
)

CONTEXT_SIZE = 64  # width of the two branches before the shared linear layer
SUMMARIES = 4


class ItinConfig(BaselineConfig):
    """
    Args:
        hidden_size: Width of words, regions and context; 1024 in the demo.
        dropout: Dropout between the two layers of each GRU.
        share_gru: Whether words and text context share one GRU.
        image_weight: Weight lambda of the image branch, in [0, 1].
        use_word_side: Whether the classifier also reads the word side.
        region_size: Width of `region_features`; None uses the cells of the feature map.
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
    """softmax(X W_q (Y W_k)' / sqrt(d)) Y.

    Args:
        size: Width d.
        key_class: Class of W_k, which says how it starts.
    """

    def __init__(self, size: int, key_class: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.query = nn.Linear(size, size, bias=False)
        self.key = key_class(size, size, bias=False)

    def forward(self, states: Tensor, others: Tensor, mask: Tensor) -> Tensor:
        """Attend from X (batch, queries, size) to Y (batch, keys, size) with mask (batch, keys); return X's shape."""
        scores = self.query(states) @ self.key(others).transpose(1, 2) / states.shape[-1] ** 0.5
        return masked_softmax(scores, mask.unsqueeze(1)) @ others


class Side(nn.Module):
    """Align one modality with the other, gate it, and summarise it as one vector of unit length."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.cross_attention = Alignment(size, XavierLinear)
        self.self_attention = Alignment(size)
        self.fusion = XavierLinear(2 * size, size, bias=False, fans=2 * size)
        # No bias in the last layer: softmax is invariant to it.
        self.summary = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, SUMMARIES, bias=False))

    def forward(self, states: Tensor, mask: Tensor, others: Tensor, other_mask: Tensor) -> Tensor:
        aligned = self.cross_attention(states, others, other_mask)  # A
        aligned = F.normalize(self.self_attention(aligned, aligned, mask), dim=-1)  # A'
        gate = torch.sigmoid((states * aligned).sum(dim=-1, keepdim=True))
        fused = self.fusion(torch.cat([states, aligned], dim=-1) * gate).relu() + states
        weights = masked_softmax(self.summary(fused).transpose(1, 2), mask.unsqueeze(1))  # (batch, 4, positions)
        return F.normalize((weights @ fused).mean(dim=1), dim=-1)


class ContextGru(nn.Module):
    """A two-layer bidirectional GRU whose output is the mean of the two directions."""

    def __init__(self, input_size: int, config: ItinConfig) -> None:
        super().__init__()
        shape = {"num_layers": 2, "bidirectional": True, "dropout": config.dropout, "batch_first": True}
        self.gru = Recurrent(nn.GRU(input_size, config.hidden_size, **shape))

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        return self.gru(words, mask).unflatten(-1, (2, -1)).mean(dim=-2)


class Itin(BaselineForSequenceClassification):
    """y = W (lambda h_v + (1 - lambda) h_t) + b, where h_v and h_t each read the aligned z and one context.

    Settings of the original: frozen BERT, 100 tokens, width 1024, dropout 0.25, lambda 0.2 [V]; learning rate 0.001,
    weight decay 1e-5 and gradient norm 2 are constants in the demo, which does not use them [V]; Adam, batch 64
    (MVSA-Multiple: 128), learning rate divided by 10 every 10 epochs, 200 epochs [R].
    """

    config_class = ItinConfig
    label = "ITIN (re-impl.)"
    fidelity = "A"
    substitutions = (
        "grid regions of the vision encoder, no detector, unless region_features are given",
        "image context = the same encoder's pooled features, not a second ResNet-18",
        "width 384 instead of 1024 unless hidden_size is set",
        "training not published: cross-entropy",
        "the original's text encoder is frozen; here its upper layers train unless the recipe freezes all of it",
        "padding masked",
    )
    published = {"mvsa_single": (75.19, 74.97), "mvsa_multiple": (73.52, 73.49)}

    def __init__(self, config: ItinConfig) -> None:
        super().__init__(config)
        size, channels = config.hidden_size, self.image_branch.channels
        self.word_gru = ContextGru(self.text_branch.width, config)
        if not config.share_gru:
            self.context_gru = ContextGru(self.text_branch.width, config)
        self.region_projection = XavierLinear(config.region_size or channels, size)
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
        """`region_features` (batch, regions, region_size) are features of detected boxes."""
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
