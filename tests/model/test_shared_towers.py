"""A tower that CLIP and an encoder share: it runs once, is saved once, and computes what two towers compute.

The variant "shared" in test_modeling.py goes through all other checks of a model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inputs import learning_lora_weights
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data import load_posts
from clipcacg.scripts.data.collator import PostCollator
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.features import cache_features
from clipcacg.scripts.data.loading import DataArguments
from clipcacg.scripts.reporting.explanation import explain
from clipcacg.scripts.training import onnx_export, run
from clipcacg.scripts.training.arguments import parse_arguments

SMALL: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4}
BOTH = {"share_clip_text": True, "share_clip_vision": True}
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))

Parts = tuple[ClipCaCgForSequenceClassification, ClipCaCgProcessor]


def build(backbones: Path, **fields: Any) -> Parts:
    names = [backbones / "clip"] * 3
    torch.manual_seed(0)
    model = ClipCaCgForSequenceClassification.from_backbones(*names, **SMALL, **fields)
    return model, ClipCaCgProcessor.from_backbones(*names, **fields)


@pytest.mark.parametrize("share", [{"share_clip_text": True}, {"share_clip_vision": True}, BOTH])
def test_one_tower_computes_what_two_equal_towers_compute(
    backbones: Path, share: dict[str, bool], tmp_path: Path
) -> None:
    two, processor = build(backbones, use_modality_heads=True)
    model, _ = build(backbones, use_modality_heads=True, **share)
    ran: list[str] = []
    for name, tower in model.backbones().items():
        tower.get_submodule(f"{tower.modality}_model" if name.startswith("clip.") else "").register_forward_hook(
            lambda *_, name=name: ran.append(name)
        )
    inputs = processor(images=[IMAGE] * 2, text=["a day", "a much longer day"], return_tensors="pt")
    two.load_state_dict(model.state_dict(), strict=False)
    outputs = model(**inputs)
    assert ran.count("clip.text") == ran.count("clip.vision") == 1
    assert set(model.backbones()) == {"text", "vision", "clip.text", "clip.vision"} - set(model.config.shared)
    for name in ("logits", "text_logits", "image_logits"):
        assert_close(outputs[name], two(**inputs)[name], atol=1e-6, rtol=0)

    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    own = {"text": "model.text_branch.backbone.", "vision": "model.image_branch.backbone."}
    assert saved.keys() == model.state_dict().keys()
    assert not [name for name in saved if name.startswith(tuple(own[part] for part in model.config.shared))]
    again = ClipCaCgForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(**inputs).logits, outputs.logits)


@pytest.mark.parametrize("part", ["text", "vision"])
def test_other_sources_are_refused_by_model_and_processor(backbones: Path, part: str) -> None:
    names = {f"{name}_model": backbones / "clip" for name in ("text", "vision", "clip")}
    for other in ({f"{part}_model": backbones / part}, {f"{part}_revision": "other"}):
        for kind in (ClipCaCgForSequenceClassification, ClipCaCgProcessor):
            with pytest.raises(ValueError, match=f"^share_clip_{part}=True needs one source, with .*{part}_model"):
                kind.from_backbones(**{**names, **other, f"share_clip_{part}": True})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"share_clip_text": True, "text_config": {"model_type": "bert"}},
            "needs a text_config that equals clip_config",
        ),
        ({"share_clip_text": True, "clip_mode": "none"}, "with modality='both' and clip_mode='encoder', not"),
        ({"share_clip_vision": True, "modality": "image"}, "with modality='both' and clip_mode='encoder', not"),
        ({"share_clip_text": True, "clip_config": {"model_type": "siglip"}}, "does not work with 'siglip'"),
    ],
)
def test_what_cannot_be_shared_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ClipCaCgConfig(**fields)


def test_a_shared_tower_is_frozen_as_clips(backbones: Path) -> None:
    model, _ = build(backbones, **BOTH)
    for asked in ({"text": True}, {"text_layers": 1}, {"vision": True}, {"vision_blocks": 1}):
        with pytest.raises(ValueError, match="encoder is CLIP's tower: freeze_clip freezes it"):
            model.freeze_backbones(**asked)
    model.freeze_backbones(clip=True)
    towers = model.backbones().values()
    assert not any(weight.requires_grad for tower in towers for weight in tower.parameters())


@pytest.mark.parametrize("share", [{"share_clip_vision": True}, BOTH])
def test_stored_states_replace_a_shared_tower(
    backbones: Path, share: dict[str, bool], posts_folder: Path, tmp_path: Path
) -> None:
    posts = load_posts(DataArguments(data_dir=str(posts_folder), max_train_samples=5, max_eval_samples=2))
    two, processor = build(backbones)
    two.freeze_backbones(clip=True)
    _, two_stores = cache_features(two, processor, posts, folder=tmp_path)
    model, _ = build(backbones, **share)
    model.freeze_backbones(clip=True)
    cached, stores = cache_features(model, processor, posts, folder=tmp_path)
    assert stores["clip.vision"].folder != two_stores["clip.vision"].folder  # states, not projections
    batch = PostCollator(processor, model.config, stores)(list(cached["train"]))
    assert not {"pixel_values", "clip_pixel_values"} & batch.keys()
    direct = PostCollator(processor, model.config)(list(posts["train"]))
    assert_close(model(**batch).logits, model(**direct).logits, atol=1e-5, rtol=0)


def test_an_explanation_of_shared_towers(backbones: Path) -> None:
    model, processor = build(backbones, **BOTH)
    found = explain(model, processor, IMAGE, "I love the beach")
    assert found.attribution.total == pytest.approx(found.attribution.difference, rel=0.05, abs=0.01)
    assert list(found.attribution.regions) == ["CLIP"] and np.abs(found.attribution.words).max() > 0
    assert found.view.shape[-1] == 3 and found.words == ["I", "love", "the", "beach"]
    page = pytest.importorskip("clipcacg.scripts.reporting.page", exc_type=ImportError)
    with page.gr.Blocks():
        assert page.build_panels(model.config).keys() == {"label", *page.panels(found)}


def test_lora_on_a_shared_tower_trains_both_uses(backbones: Path) -> None:
    assert learning_lora_weights(*build(backbones, **BOTH), IMAGE, r".*clip_.*q_proj") == 4


@pytest.mark.slow
def test_an_onnx_file_of_shared_towers(backbones: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model, processor = build(backbones, **BOTH)
    inputs = onnx_export.example(model, processor, ["a day", "a longer day"])
    assert inputs.keys() == {"clip_input_ids", "clip_attention_mask", "clip_pixel_values"}
    onnx_export.export(model, inputs, tmp_path / "m.onnx")
    other = onnx_export.example(model, processor, ["another", "and a much longer one", ""])
    assert onnx_export.largest_difference(model, other, tmp_path / "m.onnx") < 1e-4


@pytest.fixture
def parse(backbones: Path) -> Callable[[str], Any]:
    names = " ".join(f"--{part}_model {backbones / 'clip'}" for part in ("text", "vision", "clip"))
    return lambda flags: parse_arguments(f"{names} --hidden_size 32 --num_attention_heads 4 {flags}".split())[0]


def test_the_flags_of_train(parse: Callable[[str], Any]) -> None:
    flags = "--share_clip_text --share_clip_vision --freeze_clip --max_length 7"
    model, processor = run.build(parse(flags), is_sample=False, labels={"id2label": {0: "no", 1: "yes"}})
    assert model.config.shared == ("text", "vision") and processor.clip_tokenizer.model_max_length == 7
    with pytest.raises(
        InputError, match=r"^The encoders cannot be frozen: With share_clip_text=True the text encoder"
    ):
        run.build(parse("--share_clip_text --freeze_text"), is_sample=False, labels={"id2label": {0: "no", 1: "yes"}})
