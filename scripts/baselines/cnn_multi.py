"""CNN-Multi: a CNN over the text, a CNN over the image, and a third network over both.

Source: Cai and Xia, "Convolutional Neural Networks for Multimedia Sentiment Analysis", NLPCC 2015.

- [V] The two CNNs are trained first. The third network reads their concatenated features.
- [R] The joint network has four fully connected layers.
- [A] Everything else: text CNN as Kim's (widths 3, 4, 5 with 100 maps each), image CNN with AlexNet's shape and random
  weights, 512 image features, joint network of widths 512, 256, 128, dropout 0.5.

We train in one stage instead of two. Each CNN has its own classifier, and the classifiers' cross-entropies are added
to that of the joint network, so each CNN is also trained for the task on its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clipcacg.scripts.baselines.layers import TextCnn
from clipcacg.scripts.baselines.shared import BaselineConfig, BaselineForSequenceClassification, Scores

IMAGE_CNNS = ("encoder", "alexnet")


class CnnMultiConfig(BaselineConfig):
    """
    Args:
        maps: Feature maps per kernel width of the text CNN.
        image_cnn: "encoder" for the vision encoder's pooled features, "alexnet" for a CNN with random weights.
        alexnet_width: Width of the first fully connected layer of "alexnet".
        branch_loss_weight: Weight of the losses of the two CNNs; 0 trains the joint network alone.
    """

    model_type = "cnn-multi"

    def __init__(
        self,
        maps: int = 100,
        image_cnn: str = "encoder",
        alexnet_width: int = 4096,
        branch_loss_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.maps = maps
        self.image_cnn = image_cnn
        self.alexnet_width = alexnet_width
        self.branch_loss_weight = branch_loss_weight
        super().__init__(**kwargs)

    @property
    def encoders(self) -> tuple[str, ...]:
        return ("text", "vision") if self.image_cnn == "encoder" else ("text",)

    def check_values(self) -> None:
        super().check_values()
        self.at_least_one("maps", "alexnet_width")
        if self.image_cnn not in IMAGE_CNNS:
            raise ValueError(f"image_cnn must be one of {', '.join(IMAGE_CNNS)}, not {self.image_cnn!r}.")


class AlexNet(nn.Module):
    """AlexNet's five convolutions and three poolings, and one fully connected layer, for images of any size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 96, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2),
            nn.Conv2d(96, 256, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2),
            nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, stride=2),
            nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Linear(256 * 36, width), nn.ReLU(),
        )  # fmt: skip
        self.channels = width

    def forward(self, pixel_values: Tensor | None, image_features: Tensor | None) -> Tensor:
        """Map images (batch, 3, height, width) of at least 63 x 63 pixels to (batch, width, 1, 1)."""
        if pixel_values is None or image_features is not None:
            raise ValueError("image_cnn='alexnet' needs pixel_values and cannot use image_features.")
        return self.layers(pixel_values.to(self.layers[0].weight.dtype))[..., None, None]


class CnnMulti(BaselineForSequenceClassification):
    """y = FC4([text CNN ; image CNN]).

    Settings of the original: none known, except that each CNN is first trained for the task [V]. A plausible choice
    [A] is SGD with momentum 0.9 at a constant 0.01, batch 64, up to 30 epochs with early stopping.
    """

    config_class = CnnMultiConfig
    label = "CNN-Multi (re-impl.)"
    fidelity = "B"
    substitutions = (
        "layer sizes reconstructed",
        "joint training with a loss for each CNN in place of two stages",
        'pooled features of the chosen vision encoder in place of an image CNN, unless image_cnn="alexnet"',
        "states of the chosen text encoder, or GloVe-50d, in place of the unnamed word vectors",
        "padding masked",
    )
    published = {"mvsa_single": (61.20, 58.35), "mvsa_multiple": (66.39, 64.19)}

    def __init__(self, config: CnnMultiConfig) -> None:
        super().__init__(config)
        if config.image_cnn == "alexnet":
            self.image_branch = AlexNet(config.alexnet_width)
        size, labels, dropout = config.hidden_size, config.num_labels, config.dropout
        self.text_cnn = TextCnn(self.text_branch.width, config.maps)
        self.image_fc = nn.Sequential(nn.Linear(self.image_branch.channels, size), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.text_head = nn.Linear(self.text_cnn.output_size, labels)
        self.image_head = nn.Linear(size, labels)
        widths = (self.text_cnn.output_size + size, size, size // 2, size // 4)
        hidden = [
            nn.Sequential(nn.Linear(i, o), nn.ReLU(), nn.Dropout(dropout))
            for i, o in zip(widths, widths[1:], strict=False)
        ]
        self.joint = nn.Sequential(*hidden, nn.Linear(widths[-1], labels))
        self.post_init()

    def score(self, words: Tensor, mask: Tensor, feature_map: Tensor, **extras: Any) -> Scores:
        text = self.dropout(self.text_cnn(words, mask))
        image = self.dropout(self.image_fc(feature_map.mean(dim=(2, 3))))
        fused = torch.cat([text, image], dim=-1)
        return Scores(self.joint(fused), fused, (self.text_head(text), self.image_head(image)))

    def training_loss(self, scores: Scores, labels: Tensor) -> Tensor:
        branches = sum(self.task_loss(branch, labels) for branch in scores.branches)
        return self.task_loss(scores.logits, labels) + self.config.branch_loss_weight * branches
