"""Concatenation: the floor that a fusion has to beat.

The masked mean of the text encoder's states beside the mean of the vision encoder's feature map, under one Linear. Not
a row of Table III: with the encoders frozen it is a linear probe, with them trained it is late fusion at its plainest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clipcacg.modeling_clipcacg import masked_mean

from .shared import BaselineConfig, BaselineForSequenceClassification, Scores


class ConcatenationConfig(BaselineConfig):
    """No field of its own; `hidden_size` is not used."""

    model_type = "concatenation"

    def __init__(self, dropout: float = 0.1, **kwargs: Any) -> None:
        super().__init__(dropout=dropout, **kwargs)


class Concatenation(BaselineForSequenceClassification):
    """y = W [mean of the words ; mean of the regions] + b."""

    config_class = ConcatenationConfig
    label = "Concatenation (our floor)"
    fidelity = "A"

    def __init__(self, config: ConcatenationConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.dropout)
        width = config.text_config.hidden_size + self.image_branch.channels
        self.classifier = nn.Linear(width, config.num_labels)
        self.post_init()

    def score(self, words: Tensor, mask: Tensor, feature_map: Tensor, **extras: Any) -> Scores:
        fused = torch.cat([masked_mean(words, mask), feature_map.mean(dim=(2, 3))], dim=-1)
        return Scores(self.classifier(self.dropout(fused)), fused)
