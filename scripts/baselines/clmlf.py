"""CLMLF: a Transformer over words and image cells, and two contrastive losses.

Source: Li, Xu, Zhu and Zhao, "CLMLF: A Contrastive Learning and Multi-Layer Fusion Method for Multimodal Sentiment
Detection", Findings of NAACL 2022. Architecture, losses and initial weights follow the authors' public code [V].

The text encoder is trained and the ResNet-50 frozen. The image cells and the pooled image vector go through their own
Transformer layers, then words and image go through the fusion layers, and attention pools the result. Training adds
two losses to the cross-entropy:

- DBCL, on the data: contrasts each post with the second views of the posts in its batch.
- LBCL, on the labels: contrasts posts by their label. The authors' code divides by the temperature after the
  log-softmax and counts each post as its own partner, which is our default. `self_pairs=False` is the usual supervised
  contrastive loss, with the temperature inside the softmax and without self pairs.

The second view of a post comes from `input_ids_augmented`, `attention_mask_augmented` and `pixel_values_augmented`, or
from `text_features_augmented` and `image_features_augmented`. Without them it is the same post with other dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEncoder

from clipcacg.modeling_clipcacg import ClipCaCgClassifierOutput
from clipcacg.scripts.baselines.layers import masked_softmax, regions_of
from clipcacg.scripts.baselines.shared import BaselineConfig, BaselineForSequenceClassification, Scores

SUFFIX = "_augmented"


class ClmlfConfig(BaselineConfig):
    """
    Args:
        image_layers: Transformer layers over the image alone.
        fusion_layers: Transformer layers over words and image; 3 for MVSA-Single, 4 for MVSA-Multiple.
        data_loss_weight, label_loss_weight: Weights of DBCL and LBCL; 0 leaves the loss out.
        contrastive_temperature: Temperature of both losses. (transformers reserves `temperature` for generation.)
        self_pairs: Whether LBCL counts each post as its own partner, as the authors' code does.
        official_reshape: Whether to reshape the feature map into cells without transposing it, as the authors' code
            does. This mixes channels and positions.
    """

    model_type = "clmlf"

    def __init__(
        self,
        hidden_size: int = 768,
        num_attention_heads: int = 12,
        dropout: float = 0.1,
        image_layers: int = 2,
        fusion_layers: int = 3,
        data_loss_weight: float = 1.0,
        label_loss_weight: float = 1.0,
        contrastive_temperature: float = 0.07,
        self_pairs: bool = True,
        official_reshape: bool = False,
        **kwargs: Any,
    ) -> None:
        self.image_layers = image_layers
        self.fusion_layers = fusion_layers
        self.data_loss_weight = data_loss_weight
        self.label_loss_weight = label_loss_weight
        self.contrastive_temperature = contrastive_temperature
        self.self_pairs = self_pairs
        self.official_reshape = official_reshape
        sizes = {"hidden_size": hidden_size, "num_attention_heads": num_attention_heads, "dropout": dropout}
        super().__init__(**sizes, **kwargs)

    def check_values(self) -> None:
        super().check_values()
        self.at_least_one("image_layers", "fusion_layers")
        if self.contrastive_temperature <= 0:
            raise ValueError(f"contrastive_temperature must be above 0, not {self.contrastive_temperature}.")


def data_contrastive_loss(views: Tensor, second_views: Tensor, temperature: float) -> Tensor:
    """DBCL: cross-entropy of the (batch, batch) scores with the diagonal as target; both inputs are (batch, width)."""
    scores = views.float() @ second_views.float().T / temperature
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def label_contrastive_loss(views: Tensor, labels: Tensor, temperature: float, self_pairs: bool = True) -> Tensor:
    """LBCL: mean over all pairs with equal labels; views are (batch, width), labels (batch,)."""
    scores = views.float() @ views.float().T
    pairs = labels.unsqueeze(0) == labels.unsqueeze(1)  # (batch, batch)
    if self_pairs:
        log_p = scores.log_softmax(dim=-1) / temperature
    else:
        itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        pairs = pairs & ~itself
        log_p = (scores / temperature).masked_fill(itself, torch.finfo(scores.dtype).min).log_softmax(dim=-1)
    return -log_p.masked_fill(~pairs, 0).sum() / pairs.sum().clamp(min=1)


def projection(size: int) -> nn.Sequential:
    """Projection head of a contrastive loss."""
    return nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, size))


def bert_layers(config: ClmlfConfig, count: int) -> BertEncoder:
    """BERT's layers, as in the authors' code: post-norm, three dropouts each, and a LayerNorm epsilon of 1e-12."""
    return BertEncoder(
        BertConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=4 * config.hidden_size,
            num_hidden_layers=count,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            attn_implementation="sdpa",
        )
    )


class Clmlf(BaselineForSequenceClassification):
    """Multi-layer fusion, attention pooling and an MLP.

    Settings of the original, from the authors' code [V]: bert-base-uncased, up to 200 tokens, ResNet-50 frozen; AdamW
    at 2e-5 without a schedule, weight decay 0.01, 50 epochs; batch 32 and three fusion layers for MVSA-Single, 64 and
    four for MVSA-Multiple; dropout 0.1, temperature 0.07, both loss weights 1. The text encoder is frozen for the
    first 20 epochs. The authors choose the epoch by validation accuracy and, separately, by weighted F1.
    """

    config_class = ClmlfConfig
    label = "CLMLF (re-impl., no back-translation)"
    fidelity = "A"
    substitutions = (
        "no back-translation: the second view is another draw of dropout, unless augmented inputs are given",
        "no RandAugment, crop or flip of the two views: cached images are not augmented",
        "one stage: the text encoder is trained from the start, not from epoch 20 on",
        "the recipe says which text layers train; the original trains all of them, and no weight of the ResNet",
        "the frozen vision encoder's BatchNorm stays in evaluation mode; in the original its statistics move",
        "cells of the feature map cut with their axes turned, unless official_reshape is set",
        "loss not divided by the batch size once more, which Adam does not feel",
    )
    published = {"mvsa_single": (75.33, 73.46), "mvsa_multiple": (72.00, 69.83)}

    def __init__(self, config: ClmlfConfig) -> None:
        super().__init__(config)
        size, channels = config.hidden_size, self.image_branch.channels
        self.text_projection = nn.Sequential(nn.Linear(self.text_branch.width, size), nn.GELU())
        self.cell_projection = nn.Sequential(nn.Linear(channels, size), nn.GELU())
        self.pooled_projection = nn.Sequential(nn.Linear(channels, size), nn.GELU())
        self.image_layers = bert_layers(config, config.image_layers)
        self.fusion_layers = bert_layers(config, config.fusion_layers)
        # No bias in the last layer: softmax is invariant to it.
        self.pooling = nn.Sequential(nn.Linear(size, size // 2), nn.GELU(), nn.Linear(size // 2, 1, bias=False))
        self.classifier = nn.Sequential(
            nn.Dropout(config.dropout), nn.Linear(size, size // 2), nn.GELU(), nn.Linear(size // 2, config.num_labels)
        )
        if config.data_loss_weight or config.label_loss_weight:
            self.first_view = projection(size)
        if config.data_loss_weight:
            self.second_view = projection(size)
        self.post_init()

    def score(self, words: Tensor, mask: Tensor, feature_map: Tensor, **extras: Any) -> Scores:
        cells = regions_of(feature_map)
        if self.config.official_reshape:
            cells = feature_map.reshape(cells.shape)
        pooled = self.pooled_projection(feature_map.mean(dim=(2, 3))).unsqueeze(1)
        image = self.image_layers(torch.cat([pooled, self.cell_projection(cells)], dim=1)).last_hidden_state
        mask = F.pad(mask, (0, image.shape[1]), value=True)
        joint = torch.cat([self.text_projection(words), image], dim=1)  # (batch, text_len + 1 + cells, hidden)
        bias = torch.zeros_like(mask, dtype=joint.dtype).masked_fill(~mask, torch.finfo(joint.dtype).min)
        joint = self.fusion_layers(joint, bias[:, None, None, :]).last_hidden_state
        weights = masked_softmax(self.pooling(joint).squeeze(-1), mask)  # (batch, text_len + 1 + cells)
        fused = (weights.unsqueeze(1) @ joint).squeeze(1)
        return Scores(self.classifier(fused), fused)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        text_features: Tensor | None = None,
        image_features: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> ClipCaCgClassifierOutput | tuple[Any, ...]:
        """Classify posts as the base class does. In training mode the loss includes the contrastive losses."""
        second = {name.removesuffix(SUFFIX): value for name, value in inputs.items() if name.endswith(SUFFIX)}
        first = {name: value for name, value in inputs.items() if not name.endswith(SUFFIX)}
        first |= {"input_ids": input_ids, "attention_mask": attention_mask, "text_features": text_features}
        contrasts = labels is not None and self.training
        if contrasts and not {"pixel_values", "image_features"} & second.keys():
            # Both views have the same image, so its encoder runs once.
            first["image_features"] = self.image_branch(pixel_values, image_features)
        else:
            first |= {"pixel_values": pixel_values, "image_features": image_features}
        output = super().forward(**first, labels=labels, return_dict=True)
        if contrasts:
            views = self.second_views(first, second) if self.config.data_loss_weight else None
            output.loss = output.loss + self.contrastive_losses(output.fused_embeds, views, labels)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def second_views(self, first: dict[str, Any], second: dict[str, Any]) -> Tensor:
        """Fused vectors of the second views; inputs that `second` lacks are taken from `first`."""
        for raw, cached in (("input_ids", "text_features"), ("pixel_values", "image_features")):
            if raw in second or cached in second:
                first = {name: value for name, value in first.items() if name not in (raw, cached)}
        return super().forward(**{**first, **second}, return_dict=True).fused_embeds

    def contrastive_losses(self, fused: Tensor, second_fused: Tensor | None, labels: Tensor) -> Tensor:
        """Weighted sum of DBCL and LBCL."""
        config, loss = self.config, fused.new_zeros(())
        temperature = config.contrastive_temperature
        if config.data_loss_weight:
            pair = self.first_view(fused), self.second_view(second_fused)
            loss = loss + config.data_loss_weight * data_contrastive_loss(*pair, temperature)
        if config.label_loss_weight:
            pulled = label_contrastive_loss(self.first_view(fused), labels, temperature, config.self_pairs)
            loss = loss + config.label_loss_weight * pulled
        return loss
