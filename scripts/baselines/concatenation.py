"""Concatenation: the baseline that a fusion method has to beat.

One linear layer reads the masked mean of the text encoder's states and the mean of the vision encoder's feature map.
It is not a row of Table III. With frozen encoders it is a linear probe, with trained encoders the simplest late
fusion. With `use_modality_heads` it has the same two heads as CLIP-CA-CG, on the same two means.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clipcacg.modeling_clipcacg import ModalityHeads, masked_mean
from clipcacg.scripts.baselines.layers import regions_of
from clipcacg.scripts.baselines.shared import BaselineConfig, BaselineForSequenceClassification, Scores


class ConcatenationConfig(BaselineConfig):
    """No additional fields; `hidden_size` is not used."""

    model_type = "concatenation"

    def __init__(self, dropout: float = 0.1, **kwargs: Any) -> None:
        super().__init__(dropout=dropout, **kwargs)


class Concatenation(BaselineForSequenceClassification):
    """y = W [mean of the words ; mean of the regions] + b.

    A plausible recipe [A]: bert-base-uncased with up to 100 tokens and ResNet-50, both trained at 2e-5, the classifier
    at 1e-3; linear decay after 10% warm-up, weight decay 0.01, batch 32, 5 epochs, dropout 0.1.
    """

    config_class = ConcatenationConfig
    label = "Concatenation (simple baseline)"
    fidelity = "A"

    def __init__(self, config: ConcatenationConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.dropout)
        widths = self.text_branch.width, self.image_branch.channels
        self.classifier = nn.Linear(sum(widths), config.num_labels)
        self.modality_heads = ModalityHeads(*widths, config) if config.use_modality_heads else None
        self.post_init()

    def score(self, words: Tensor, mask: Tensor, feature_map: Tensor, **extras: Any) -> Scores:
        fused = torch.cat([masked_mean(words, mask), feature_map.mean(dim=(2, 3))], dim=-1)
        logits = self.classifier(self.dropout(fused))
        if self.modality_heads is None:
            return Scores(logits, fused)
        return Scores(logits, fused, modalities=self.modality_heads(words, mask, regions_of(feature_map)))
