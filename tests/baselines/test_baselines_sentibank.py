"""The stand-ins for SentiBank and SentiStrength."""

from pathlib import Path

import pytest
import torch
from test_baselines import CLIP
from test_equations import unit
from torch.testing import assert_close
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from clipcacg.scripts.baselines.clip_concepts import ClipConcepts, read_phrases
from clipcacg.scripts.baselines.sentibank_sentistrength import SentiBankSentiStrength, Standardise, lexicon_scores


def test_standardise_by_all_that_was_seen() -> None:
    module, data = Standardise(3), torch.randn(20, 3) * torch.tensor([1.0, 50.0, 0.0]) + torch.tensor([0.0, 1e3, 2.0])
    for batch in data.split([7, 1, 12]):
        module.train()(batch)
    assert_close(module.mean, data.mean(0))
    assert_close(module.variance, data.var(0, correction=0))
    expected = (data - data.mean(0)) / data.std(0, correction=0).clamp(min=1e-4)
    assert_close(module.eval()(data), expected, rtol=1e-4, atol=1e-3)
    assert module.count == 20 and not module(data)[:, 2].any()


def test_clip_concepts() -> None:
    module = ClipConcepts(CLIPConfig(**CLIP), [("happy dog", 1.5), ("sad face", -2.0)])
    module.phrase_embeds.copy_(unit(torch.randn(2, 12)))
    image = unit(torch.randn(3, 12))
    concepts = module(image)
    for v, got in zip(image, concepts, strict=True):
        cosine = [v @ phrase for phrase in module.phrase_embeds]
        p = torch.sigmoid(100 * (cosine[0] - cosine[1]))
        assert_close(got, torch.stack([*cosine, 1.5 * p - 2 * (1 - p)]))


def test_phrases_come_from_clips_text_tower(backbones: Path) -> None:
    phrases = [("happy dog", 1.5), ("sad face", -2.0)]
    model = SentiBankSentiStrength.from_backbones(clip_model=backbones / "clip", phrases=phrases)
    clip = CLIPModel.from_pretrained(backbones / "clip").eval()
    tokens = AutoTokenizer.from_pretrained(backbones / "clip")("a photo of a sad face", return_tensors="pt")
    pixels = torch.randn(2, 3, 64, 64)
    output = clip(pixel_values=pixels, **tokens)
    assert_close(model.concepts.phrase_embeds[1:], output.text_embeds)
    assert "CLIP" in model.label and "CLIP" not in SentiBankSentiStrength.label
    fused = model(clip_pixel_values=pixels, lexicon_scores=torch.zeros(2, 4)).fused_embeds
    assert_close(fused[:, 1:2], output.image_embeds @ output.text_embeds.T)


def test_phrases_of_a_list(tmp_path: Path) -> None:
    lines = ["happy_dog [sentiment: 1.5] [#imgs: 10]", "", "grey wall [sentiment: 0.1] [#imgs: 99]",
             "sad face [sentiment: -2.0] [#imgs: 30]", "old house"]  # fmt: skip
    (tmp_path / "list.txt").write_text("\n".join(lines))
    found = [("sad face", -2.0), ("happy dog", 1.5), ("old house", 0.0)]
    assert read_phrases(tmp_path / "list.txt") == found
    assert read_phrases(tmp_path / "list.txt", count=1) == found[:1]


def test_lexicon_scores() -> None:
    pytest.importorskip("vaderSentiment")
    scores = lexicon_scores(["I love this, wonderful!", "I hate this, awful.", ""])
    assert scores.shape == (3, 4) and scores[0, 3] > 0.5 and scores[1, 3] < -0.5
    assert scores[0, 0] > 0 and scores[0, 1] == 0 and scores[1, 1] > 0 and not scores[2].any()
