"""MVAN: two views of the image and the text, in memories that are updated in turn.

Source: Yang, Feng, Wang and Zhang, "Image-Text Multimodal Emotion Classification via Multi-View Attentional Network",
IEEE Transactions on Multimedia, 2020.

- [V] Feature mapping with an object view and a scene view of the image, interactive learning with a memory network
  that is continually updated, and feature fusion.
- [R] GloVe and a BiLSTM for the text; one CNN trained on ImageNet and one on Places365 for the views; an MLP with
  "stacking-pooling" for the fusion.
- [A] Number of hops, widths, order of the queries, GRU cells as updates, and the form of the fusion.

Without `scene_channels`, a second projection of the same feature map replaces the scene view.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clipcacg.modeling_clipcacg import masked_mean
from clipcacg.scripts.baselines.layers import AdditiveAttention, Recurrent, regions_of
from clipcacg.scripts.baselines.shared import BaselineConfig, BaselineForSequenceClassification, Scores


class MvanConfig(BaselineConfig):
    """
    Args:
        hops: Number of turns of the interactive memory, which share their weights.
        hidden_size: Width of the views and memories; even, because each direction of the LSTM has half of it.
        scene_channels: Channels of `scene_features`; None uses the vision encoder's feature map for both views.
    """

    model_type = "mvan"

    def __init__(
        self, hops: int = 3, hidden_size: int = 300, scene_channels: int | None = None, **kwargs: Any
    ) -> None:
        self.hops = hops
        self.scene_channels = scene_channels
        super().__init__(hidden_size=hidden_size, **kwargs)

    def check_values(self) -> None:
        super().check_values()
        self.at_least_one("hops")
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size must be even, not {self.hidden_size}.")


class InteractiveMemory(nn.Module):
    """In each turn the text memory queries both views, the view memories query the text, and GRU cells update them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.object_attention = AdditiveAttention(size, size)
        self.scene_attention = AdditiveAttention(size, size)
        self.text_attention = AdditiveAttention(size, 2 * size)
        self.object_cell = nn.GRUCell(size, size)
        self.scene_cell = nn.GRUCell(size, size)
        self.text_cell = nn.GRUCell(size, size)

    def forward(
        self, words: Tensor, mask: Tensor, objects: Tensor, scene: Tensor, hops: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Map words and two sets of regions (batch, positions, hidden) to m_t, m_o and m_s (batch, hidden)."""
        m_t, m_o, m_s = masked_mean(words, mask), objects.mean(dim=1), scene.mean(dim=1)
        for _ in range(hops):
            a_o = self.object_attention(objects, m_t)
            a_s = self.scene_attention(scene, m_t)
            a_t = self.text_attention(words, torch.cat([m_o, m_s], dim=-1), mask)
            m_t, m_o, m_s = self.text_cell(a_t, m_t), self.object_cell(a_o, m_o), self.scene_cell(a_s, m_s)
        return m_t, m_o, m_s


class Mvan(BaselineForSequenceClassification):
    """BiLSTM words and two image views, interactive memory, stacking-pooling and an MLP.

    Settings of the original: unknown. The defaults of MGNNS by the same author [V there, A here] are learning rate
    5e-5, weight decay 1e-5, batch 16 accumulated 8 times, 10 epochs and dropout 0.5. Width 300 and three hops are
    assumed [A].
    """

    config_class = MvanConfig
    label = "MVAN (re-impl.)"
    fidelity = "B"
    substitutions = (
        "hops, widths and fusion reconstructed",
        "scene view = second projection of the vision encoder's map, not Places365, unless scene_features are given",
        "states of the chosen text encoder, or GloVe-50d, in place of GloVe-300d",
        "padding masked",
    )
    published = {"mvsa_single": (72.98, 72.98), "mvsa_multiple": (72.36, 72.30)}

    def __init__(self, config: MvanConfig) -> None:
        super().__init__(config)
        size, channels = config.hidden_size, self.image_branch.channels
        self.lstm = Recurrent(nn.LSTM(self.text_branch.width, size // 2, batch_first=True, bidirectional=True))
        self.object_projection = nn.Linear(channels, size)
        self.scene_projection = nn.Linear(config.scene_channels or channels, size)
        self.memory = InteractiveMemory(size)
        self.row_mlp = nn.Sequential(nn.Linear(size, size), nn.ReLU())
        self.classifier = nn.Sequential(
            nn.Dropout(config.dropout), nn.Linear(2 * size, size // 2), nn.ReLU(), nn.Dropout(config.dropout),
            nn.Linear(size // 2, config.num_labels),
        )  # fmt: skip
        self.post_init()

    def score(
        self,
        words: Tensor,
        mask: Tensor,
        feature_map: Tensor,
        scene_features: Tensor | None = None,
        **extras: Any,
    ) -> Scores:
        """`scene_features` (batch, scene_channels, height, width) is the feature map of a scene CNN."""
        scene_map = feature_map if self.config.scene_channels is None else scene_features
        if scene_map is None:
            raise ValueError(f"scene_channels={self.config.scene_channels} needs scene_features.")
        words = self.lstm(words, mask)
        objects = self.object_projection(regions_of(feature_map))
        scene = self.scene_projection(regions_of(scene_map.to(feature_map.dtype)))
        m_t, m_o, m_s = self.memory(words, mask, objects, scene, self.config.hops)
        rows = self.row_mlp(torch.stack([m_t, m_o, m_s, m_t * m_o, m_t * m_s], dim=1))  # (batch, 5, hidden)
        fused = torch.cat([rows.amax(dim=1), rows.mean(dim=1)], dim=-1)
        return Scores(self.classifier(fused), fused)
