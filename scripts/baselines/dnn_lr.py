"""DNN-LR: a logistic regression on the features of each modality's network, and the mean of their probabilities.

Source: Yu, Lin, Meng and Zhao, "Visual and Textual Sentiment Analysis of a Microblog Using Deep Convolutional Neural
Networks", Algorithms 9(2):41, 2016 (reference [36] of the CLIP-CA-CG paper, whose table cites [49] by mistake).

- [V] A text CNN on pretrained word vectors, a deep CNN with generalised dropout for the image, transfer learning, and
  logistic regression for the decision.
- [R] The two probabilities are averaged. Generalised dropout is DropConnect.
- [A] Text CNN as Kim's (300 features), one DropConnect layer of width 512 on the frozen vision encoder, equal weights.

We do not fit the logistic regressions afterwards on fixed features. They are the softmax layers of the two networks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipcacg.scripts.baselines.layers import TextCnn
from clipcacg.scripts.baselines.shared import BaselineConfig, BaselineForSequenceClassification, Scores


class DnnLrConfig(BaselineConfig):
    """
    Args:
        maps: Feature maps per kernel width of the text CNN.
        dropconnect: Probability of dropping a weight of the image layer, in [0, 1).
        text_weight: w of the decision p = w p_text + (1 - w) p_image, in [0, 1].
    """

    model_type = "dnn-lr"

    def __init__(self, maps: int = 100, dropconnect: float = 0.5, text_weight: float = 0.5, **kwargs: Any) -> None:
        self.maps = maps
        self.dropconnect = dropconnect
        self.text_weight = text_weight
        super().__init__(**kwargs)

    def check_values(self) -> None:
        super().check_values()
        self.at_least_one("maps")
        if not 0 <= self.dropconnect < 1:
            raise ValueError(f"dropconnect must be at least 0 and below 1, not {self.dropconnect}.")
        if not 0 <= self.text_weight <= 1:
            raise ValueError(f"text_weight must be from 0 to 1, not {self.text_weight}.")


class DropConnect(nn.Linear):
    """A linear layer that drops each weight with probability p in training and scales the weights by 1 - p otherwise.

    Source: Wan et al., "Regularization of Neural Networks using DropConnect", ICML 2013. One mask per batch, and the
    mean weights instead of sampled ones in evaluation, are our choice.
    """

    def __init__(self, input_size: int, output_size: int, p: float) -> None:
        super().__init__(input_size, output_size)
        self.p = p

    def forward(self, states: Tensor) -> Tensor:
        keep = torch.full_like(self.weight, 1 - self.p)
        return F.linear(states, self.weight * (keep.bernoulli() if self.training else keep), self.bias)


class DnnLr(BaselineForSequenceClassification):
    """p = w softmax(W_t text CNN) + (1 - w) softmax(W_v image network); the logits are log p.

    Settings of the original: word vectors and the image network are pretrained [V]. Not training them further, all
    widths and the optimizer are assumed [A]: Adam at a constant 0.001, weight decay 1e-4, batch 50, up to 50 epochs
    with early stopping. Kim's text CNN uses Adadelta and AlexNet uses SGD.
    """

    config_class = DnnLrConfig
    label = "DNN-LR (re-impl.)"
    fidelity = "B"
    substitutions = (
        "layer sizes reconstructed; DropConnect for the generalised dropout",
        "softmax layers trained with their networks in place of logistic regressions fitted afterwards",
        "pooled features of the chosen vision encoder in place of the original image network",
        "states of the chosen text encoder, or GloVe-50d, in place of the original word vectors",
        "padding masked",
    )
    published = {"mvsa_single": (61.42, 61.03), "mvsa_multiple": (67.86, 66.33)}

    def __init__(self, config: DnnLrConfig) -> None:
        super().__init__(config)
        self.text_cnn = TextCnn(self.text_branch.width, config.maps)
        self.image_fc = DropConnect(self.image_branch.channels, config.hidden_size, config.dropconnect)
        self.dropout = nn.Dropout(config.dropout)
        self.text_head = nn.Linear(self.text_cnn.output_size, config.num_labels)
        self.image_head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def score(self, words: Tensor, mask: Tensor, feature_map: Tensor, **extras: Any) -> Scores:
        text = self.dropout(self.text_cnn(words, mask))
        image = self.image_fc(feature_map.mean(dim=(2, 3))).relu()
        branches = self.text_head(text), self.image_head(image)
        p_text, p_image = (branch.float().softmax(dim=-1) for branch in branches)
        p = self.config.text_weight * p_text + (1 - self.config.text_weight) * p_image
        return Scores(p.clamp(min=torch.finfo(p.dtype).tiny).log(), torch.cat([text, image], dim=-1), branches)

    def training_loss(self, scores: Scores, labels: Tensor) -> Tensor:
        """Sum of the two branches' losses; the averaged probabilities have no loss."""
        return sum(self.task_loss(branch, labels) for branch in scores.branches)
