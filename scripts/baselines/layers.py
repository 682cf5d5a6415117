"""Layers that several systems share: attention, recurrent networks and a CNN over words, all with padding masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


def regions_of(feature_map: Tensor) -> Tensor:
    """(batch, channels, height, width) to (batch, regions, channels)."""
    return feature_map.flatten(2).transpose(1, 2)


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis that is zero where the mask is False, also where the mask is False for all keys."""
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, lowest).softmax(dim=-1) * mask


class AdditiveAttention(nn.Module):
    """o = sum_j a_j x_j with a = softmax_j(w' tanh(W x_j + U q + b)).

    Args:
        size: Width of the states x.
        query_size: Width of the query q.
    """

    def __init__(self, size: int, query_size: int) -> None:
        super().__init__()
        self.of_states = nn.Linear(size, size)
        self.of_query = nn.Linear(query_size, size, bias=False)
        self.score = nn.Linear(size, 1, bias=False)

    def forward(self, states: Tensor, query: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool states (batch, positions, size) by a query (batch, query_size) and a bool mask to (batch, size)."""
        scores = self.score(torch.tanh(self.of_states(states) + self.of_query(query).unsqueeze(1))).squeeze(-1)
        weights = masked_softmax(scores, torch.ones_like(scores, dtype=torch.bool) if mask is None else mask)
        return (weights.unsqueeze(1) @ states).squeeze(1)


class Recurrent(nn.Module):
    """Run a recurrent network of torch over the real tokens of each text; padding gets zeros."""

    def __init__(self, network: nn.RNNBase) -> None:
        super().__init__()
        self.network = network

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Map (batch, text_len, input_size) and a bool mask (batch, text_len) to (batch, text_len, output_size)."""
        order = (~mask).long().argsort(dim=1, stable=True).unsqueeze(-1)  # real tokens first
        moved = states.gather(1, order.expand_as(states))
        lengths = mask.sum(dim=1).clamp(min=1).cpu()
        packed = pack_padded_sequence(moved, lengths, batch_first=True, enforce_sorted=False)
        output, _ = pad_packed_sequence(self.network(packed)[0], batch_first=True, total_length=mask.shape[1])
        back = torch.zeros_like(output).scatter(1, order.expand_as(output), output)
        return back * mask.unsqueeze(-1)


class TextCnn(nn.Module):
    """Kim's sentence CNN (EMNLP 2014): convolutions of several widths, ReLU, maximum over time.

    Windows without a real token are ignored, so padding does not change the output.
    """

    widths = (3, 4, 5)

    def __init__(self, input_size: int, maps: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv1d(input_size, maps, w, padding=w - 1) for w in self.widths)
        self.output_size = maps * len(self.widths)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        """Map (batch, text_len, input_size) and a bool mask (batch, text_len) to (batch, output_size)."""
        words = (words * mask.unsqueeze(-1)).transpose(1, 2)
        pooled = []
        for width, convolution in zip(self.widths, self.convolutions, strict=True):
            padded = F.pad(mask.to(words.dtype).unsqueeze(1), (width - 1, width - 1))
            holds_a_word = F.max_pool1d(padded, width, stride=1)  # (batch, 1, windows)
            pooled.append((convolution(words).relu() * holds_a_word).amax(dim=-1))  # 0 is ReLU's minimum
        return torch.cat(pooled, dim=-1)
