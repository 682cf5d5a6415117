"""A proxy of SentiBank & SentiStrength: image concepts and lexicon scores of the text under one linear layer.

Source: Borth, Ji, Chen, Breuel and Chang, "Large-scale Visual Sentiment Ontology and Detectors Using Adjective Noun
Pairs", ACM Multimedia 2013; Thelwall, Buckley and Paltoglou, "Sentiment strength detection for the social web", JASIST
2012.

- [V] 1,200 detectors of adjective-noun pairs give the image features, SentiStrength scores the text, and a linear
  model combines them.
- [A] The training of the three-class row in Table III; here it is a multinomial logistic regression.

Neither part is available: the detectors were not published as a package, and SentiStrength is not free software. We
replace SentiStrength by VADER's four scores (positive, negative, neutral, compound), and SentiBank by one of

- the pooled feature map of the vision encoder;
- with `phrases`, the cosine similarity of CLIP's image embedding to "a photo of a ..." for each adjective-noun pair,
  and the pairs' mean sentiment weighted by the softmax over pairs (needs `clip_pixel_values` and a CLIP model).

Both replacements know more than SentiBank did. The encoders are never trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from clipcacg.configuration_clipcacg import split_keywords
from clipcacg.scripts.baselines.clip_concepts import ClipConcepts
from clipcacg.scripts.baselines.shared import BaselineConfig, BaselineForSequenceClassification, Scores

LEXICON_SCORES = ("pos", "neg", "neu", "compound")


class SentiBankSentiStrengthConfig(BaselineConfig):
    """
    Args:
        phrases: (phrase, sentiment) of each adjective-noun pair, as `clip_concepts.read_phrases` returns them. If
            empty, the image features are those of the vision encoder.
    """

    model_type = "sentibank-sentistrength"

    def __init__(self, phrases: Sequence[Sequence[Any]] = (), **kwargs: Any) -> None:
        self.phrases = [[phrase, float(sentiment)] for phrase, sentiment in phrases]
        super().__init__(**kwargs)

    @property
    def encoders(self) -> tuple[str, ...]:
        return ("clip",) if self.phrases else ("vision",)

    def check_values(self) -> None:
        super().check_values()
        if self.phrases and self.clip_config is None:
            raise ValueError("phrases need a CLIP model: give clip_config or clip_model.")


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def lexicon_scores(texts: Sequence[str]) -> Tensor:
    """VADER's scores (batch, 4): three shares in [0, 1] and the compound in [-1, 1]."""
    scored = [_analyzer().polarity_scores(text) for text in texts]
    return torch.tensor([[scores[name] for name in LEXICON_SCORES] for scores in scored])


class LexiconCollator:
    """Add `lexicon_scores` of the texts to the batch of another collator."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return {**self.collator(rows), "lexicon_scores": lexicon_scores([row["text"] or "" for row in rows])}


class Standardise(nn.Module):
    """Scale features to mean 0 and variance 1 by running statistics over all training batches; constants become 0."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.ones(size))

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Add a batch (batch, size) to the running statistics."""
        count, mean = self.count + len(features), features.mean(dim=0)
        share, shift = len(features) / count, mean - self.mean
        variance = features.var(dim=0, correction=0)
        self.variance += share * (variance - self.variance) + share * (1 - share) * shift**2
        self.mean += share * shift
        self.count.copy_(count)

    def forward(self, features: Tensor) -> Tensor:
        if self.training:
            self.update(features)
        return (features - self.mean) / self.variance.clamp(min=1e-8).sqrt()


class SentiBankSentiStrength(BaselineForSequenceClassification):
    """y = W standardised([image concepts ; text scores]) + b.

    Settings of the original: no training on three classes is published. A plausible choice [A] is Adam at a constant
    0.01, weight decay 0.001, batch 512, about 200 steps (25 epochs of MVSA-Single).
    """

    config_class = SentiBankSentiStrengthConfig
    label = "SentiBank&SentiStrength-proxy (image features + VADER, LR)"
    fidelity = "C"
    substitutions = (
        "VADER for SentiStrength",
        "pooled features of the vision encoder, or CLIP's similarity to adjective-noun phrases, for SentiBank",
        "logistic regression by gradient descent; standardised by running means",
    )
    published = {"mvsa_single": (52.05, 50.08), "mvsa_multiple": (65.62, 55.36)}

    def __init__(self, config: SentiBankSentiStrengthConfig) -> None:
        super().__init__(config)
        if config.phrases:
            self.label = "SentiBank&SentiStrength-proxy (CLIP-ANP + VADER, LR)"
            self.concepts = ClipConcepts(config.clip_config, config.phrases)
        width = len(config.phrases) + 1 if config.phrases else self.image_branch.channels
        self.standardise = Standardise(width + len(LEXICON_SCORES))
        self.classifier = nn.Linear(width + len(LEXICON_SCORES), config.num_labels)
        self.post_init()
        self.train(self.training)

    def backbones(self) -> dict[str, PreTrainedModel]:
        concepts = getattr(self, "concepts", None)
        return super().backbones() | ({} if concepts is None else {"clip.vision": concepts.clip_vision})

    def encode(self, backbone: str, inputs: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if backbone == "clip.vision":
            return self.concepts.encode_image(inputs)
        return super().encode(backbone, inputs, attention_mask)

    def train(self, mode: bool = True) -> SentiBankSentiStrength:
        """Switch to training or evaluation mode; the encoders stay frozen in both, also after a reload."""
        for encoder in self.backbones().values():
            encoder.requires_grad_(False)
        return super().train(mode)

    @classmethod
    def from_backbones(cls, *args: Any, **kwargs: Any) -> SentiBankSentiStrength:
        model = super().from_backbones(*args, **kwargs)
        if model.config.phrases:
            clip_model = args[2] if len(args) > 2 else kwargs["clip_model"]
            options = split_keywords(kwargs)[0]
            model.concepts.read_phrases(clip_model, model.config.phrases, options["clip"])
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Standardise):
            init.zeros_(module.count)
            init.zeros_(module.mean)
            init.ones_(module.variance)
        elif isinstance(module, ClipConcepts):
            init.zeros_(module.phrase_embeds)
            init.copy_(module.sentiments, torch.tensor([sentiment for _, sentiment in self.config.phrases]))

    def score(
        self,
        words: None,
        mask: None,
        feature_map: Tensor | None,
        lexicon_scores: Tensor | None = None,
        clip_pixel_values: Tensor | None = None,
        clip_image_features: Tensor | None = None,
        **extras: Any,
    ) -> Scores:
        """Classify the standardised features.

        Args:
            lexicon_scores: (batch, 4), output of the function `lexicon_scores`.
            clip_pixel_values, clip_image_features: With phrases, one of the two; the second is the output of
                `encode("clip.vision", ...)`.
        """
        if lexicon_scores is None:
            raise ValueError("This system needs lexicon_scores, the output of the function of that name.")
        if self.config.phrases:
            concepts = self.concepts(self.clip_image(clip_pixel_values, clip_image_features))
        else:
            concepts = feature_map.mean(dim=(2, 3))
        fused = self.standardise(torch.cat([concepts, lexicon_scores.to(concepts.dtype)], dim=-1))
        return Scores(self.classifier(fused), fused)

    def clip_image(self, clip_pixel_values: Tensor | None, clip_image_features: Tensor | None) -> Tensor:
        if clip_image_features is None and clip_pixel_values is None:
            raise ValueError("With phrases this system needs clip_pixel_values.")
        if clip_image_features is None:
            clip_image_features = self.concepts.encode_image(clip_pixel_values)
        return clip_image_features[:, 0].to(self.classifier.weight.dtype)
