"""Co-Memory (Co-MN): two memory networks that query each other in several hops.

Source: Xu, Mao and Chen, "A Co-Memory Network for Multimodal Sentiment Analysis", SIGIR 2018.

- [V] A memory of words guided by the image and a memory of regions guided by the text, in stacked hops. Regions are
  cells of a CNN's last feature map. The row of Table III has six hops.
- [A] Size 128, additive attention and the LSTM are those of MultiSentiNet by the same author. The first queries are
  means. A hop ends with the linear update of end-to-end memory networks. All hops share their weights.

The last hop has no update because nothing reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clipcacg.modeling_clipcacg import masked_mean
from clipcacg.scripts.baselines.layers import AdditiveAttention, Recurrent, regions_of
from clipcacg.scripts.baselines.shared import BaselineConfig, BaselineForSequenceClassification, Scores


class CoMemoryConfig(BaselineConfig):
    """
    Args:
        hops: Number of hops over the memories; the publications mention 1, 3 and 6.
        tied: Whether all hops share their weights.
    """

    model_type = "co-memory"

    def __init__(
        self, hops: int = 6, tied: bool = True, hidden_size: int = 128, dropout: float = 0.3, **kwargs: Any
    ) -> None:
        self.hops = hops
        self.tied = tied
        super().__init__(hidden_size=hidden_size, dropout=dropout, **kwargs)

    def check_values(self) -> None:
        super().check_values()
        self.at_least_one("hops")


class Hop(nn.Module):
    """Read both memories once: o_t = Att(T; q_t), o_v = Att(V; q_v)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.text = AdditiveAttention(size, size)
        self.image = AdditiveAttention(size, size)

    def forward(
        self, words: Tensor, mask: Tensor, regions: Tensor, queries: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        return self.text(words, queries[0], mask), self.image(regions, queries[1])


class Update(nn.Module):
    """Compute the next queries from the other memory's output: q_t = o_v + H_t q_t, q_v = o_t + H_v q_v."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.text = nn.Linear(size, size, bias=False)
        self.image = nn.Linear(size, size, bias=False)

    def forward(self, queries: tuple[Tensor, Tensor], read: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return read[1] + self.text(queries[0]), read[0] + self.image(queries[1])


class CoMemory(BaselineForSequenceClassification):
    """Words T from an LSTM, regions V from a linear layer, K hops, and y = MLP([o_t ; o_v]).

    Settings of the original: six hops [V]. The same author's MultiSentiNet uses RMSprop, batch 32 (MVSA-Multiple:
    128), width 128, trained word vectors and early stopping on the validation loss [V there, A here]. Keras' RMSprop
    defaults are learning rate 0.001, rho 0.9 and epsilon 1e-7.
    """

    config_class = CoMemoryConfig
    label = "Co-Memory (re-impl.)"
    fidelity = "B"
    substitutions = (
        "update rule, sizes and weight tying reconstructed",
        "states of the chosen text encoder, or GloVe-50d, in place of GloVe-200d",
        "feature map of the chosen vision encoder in place of the unnamed CNN",
        "padding masked; dropout before the classifier",
    )
    # Another published table gives 68.92 and 68.83 for MVSA-Multiple; we do not know which one is right.
    published = {"mvsa_single": (70.51, 70.01), "mvsa_multiple": (69.92, 69.83)}

    def __init__(self, config: CoMemoryConfig) -> None:
        super().__init__(config)
        size, sets = config.hidden_size, 1 if config.tied else config.hops
        self.lstm = Recurrent(nn.LSTM(self.text_branch.width, size, batch_first=True))
        self.projection = nn.Linear(self.image_branch.channels, size)
        self.hops = nn.ModuleList(Hop(size) for _ in range(sets))
        self.updates = nn.ModuleList(Update(size) for _ in range(min(sets, config.hops - 1)))
        self.classifier = nn.Sequential(
            nn.Dropout(config.dropout), nn.Linear(2 * size, size), nn.ReLU(), nn.Linear(size, config.num_labels)
        )
        self.post_init()

    def score(self, words: Tensor, mask: Tensor, feature_map: Tensor, **extras: Any) -> Scores:
        words = self.lstm(words, mask)  # T
        regions = self.projection(regions_of(feature_map))  # V
        queries = regions.mean(dim=1), masked_mean(words, mask)  # q_t from the image, q_v from the text
        read = self.hops[0](words, mask, regions, queries)
        for hop in range(1, self.config.hops):
            queries = self.updates[(hop - 1) % len(self.updates)](queries, read)
            read = self.hops[hop % len(self.hops)](words, mask, regions, queries)
        fused = torch.cat(read, dim=-1)
        return Scores(self.classifier(fused), fused)
