"""Adjective-noun pairs as image concepts: CLIP's similarity of an image to each phrase, without training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, CLIPConfig

from clipcacg.modeling_clipcacg import build_encoder, load_backbone

NUMBERS = re.compile(r"\[(sentiment|#imgs):\s*([-+]?[\d.]+)\]")
LOGIT_SCALE = 100.0  # as in the published CLIP models


def read_phrases(path: str | Path, count: int = 1200, least_sentiment: float = 0.5) -> list[tuple[str, float]]:
    """Read adjective-noun pairs, for example those of the Visual Sentiment Ontology, by decreasing number of images.

    Args:
        path: Text file with one pair per line: `happy dog [sentiment: 1.4] [#imgs: 812]`. A line without brackets is
            a neutral pair and is always kept.
        count: Number of pairs to keep.
        least_sentiment: Leave out pairs whose absolute sentiment is smaller.

    Returns:
        (phrase, sentiment) of each pair.
    """
    found = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        phrase = line.partition("[")[0].replace("_", " ").strip()
        numbers = {name: float(value) for name, value in NUMBERS.findall(line)}
        if phrase and abs(numbers.get("sentiment", least_sentiment)) >= least_sentiment:
            found.append((numbers.get("#imgs", 0.0), phrase, numbers.get("sentiment", 0.0)))
    found.sort(key=lambda entry: -entry[0])
    return [(phrase, sentiment) for _, phrase, sentiment in found[:count]]


class ClipConcepts(nn.Module):
    """Similarity of an image to each phrase, and the phrases' mean sentiment weighted by the softmax over phrases.

    Args:
        clip: Config of the CLIP model.
        phrases: (phrase, sentiment) of each adjective-noun pair.
    """

    def __init__(self, clip: CLIPConfig, phrases: Sequence[Sequence[Any]]) -> None:
        super().__init__()
        self.clip_vision, width = build_encoder(clip, "clip.vision")
        self.register_buffer("phrase_embeds", torch.zeros(len(phrases), width))
        self.register_buffer("sentiments", torch.tensor([sentiment for _, sentiment in phrases]))

    def encode_image(self, clip_pixel_values: Tensor) -> Tensor:
        """Return CLIP's embeddings of the image and its patches, (batch, 1 + patches, projection), unit length."""
        return self.clip_vision(clip_pixel_values)

    def forward(self, image: Tensor) -> Tensor:
        """Map CLIP's image embedding (batch, projection) of unit length to (batch, phrases + 1)."""
        cosine = image @ self.phrase_embeds.T
        sentiment = (LOGIT_SCALE * cosine).softmax(dim=-1) @ self.sentiments.to(cosine.dtype)
        return torch.cat([cosine, sentiment.unsqueeze(-1)], dim=-1)

    @torch.no_grad()
    def read_phrases(self, clip_model: str | Path, phrases: Sequence[Sequence[Any]], options: dict[str, Any]) -> None:
        """Store the phrases' embeddings; CLIP's text tower is not kept. The options are those of `from_pretrained`."""
        tokenizer = AutoTokenizer.from_pretrained(clip_model, **options)
        config = AutoConfig.from_pretrained(clip_model, **options)
        tower = build_encoder(config, "clip.text")[0].float().eval()
        load_backbone(tower, clip_model, config, "clip.text", **options)
        for row, (phrase, _) in enumerate(phrases):
            tokens = tokenizer(f"a photo of a {phrase}", return_tensors="pt", truncation=True)
            self.phrase_embeds[row] = tower(tokens["input_ids"], tokens["attention_mask"])[0, 0]
