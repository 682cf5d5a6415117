"""8-bit text towers: their weights, their logits, and that they reload."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor

torchao = pytest.importorskip("torchao.quantization")
from clipcacg.scripts import quantize  # noqa: E402


def test_text_towers_and_nothing_else_in_8_bits(
    checkpoint: Path, posts_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "int8"
    quantize.main([str(checkpoint), "-o", str(output), "--data_dir", str(posts_folder), "--batch_size", "8"])
    shown = capsys.readouterr().out
    assert re.findall(r"(float32|int8): accuracy [01]\.\d+, f1 [01]\.\d+, \d+\.\d+ ms per post", shown)
    assert re.search(r"\d\.\d\d times as fast on 1 CPU", shown)

    original = ClipCaCgForSequenceClassification.from_pretrained(checkpoint)
    loaded = ClipCaCgForSequenceClassification.from_pretrained(output)
    towers = [loaded.backbones()[name] for name in ("text", "clip.text")]
    in_towers = {module for tower in towers for module in tower.modules()}
    for name, module in loaded.named_modules():
        if isinstance(module, nn.Linear):
            assert isinstance(module.weight, torchao.Int8Tensor) == (module in in_towers), name
    inputs = ClipCaCgProcessor.from_pretrained(output)(
        images=posts_folder / "data/1.jpg", text="so happy today", return_tensors="pt"
    )
    with torch.inference_mode():
        difference = (loaded(**inputs).logits - original(**inputs).logits).abs().max()
        assert 0 < difference < 0.05
        assert torch.equal(loaded(**inputs).logits, quantize.quantize(str(checkpoint))(**inputs).logits)


def test_a_model_without_texts_is_refused(backbones: Path, tmp_path: Path) -> None:
    small = {"vision_model": backbones / "vision", "hidden_size": 16, "num_attention_heads": 4}
    ClipCaCgForSequenceClassification.from_backbones(**small, modality="image").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="reads no text"):
        quantize.quantize(str(tmp_path))
