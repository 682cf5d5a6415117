"""Every family of encoders, tiny and with random weights: what works, and the sentence that refuses what does not.

A spread of families runs by default, all with `-m slow`. The table in scripts/results/encoders.md states what these
tests assert.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from inputs import learning_lora_weights
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import (
    ENCODER_FACTS,
    ClipCaCgForSequenceClassification,
    ClipCaCgModel,
    ClipCaCgPreTrainedModel,
    encoder_facts,
    part_of,
)
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data import load_posts
from clipcacg.scripts.data.collator import PostCollator
from clipcacg.scripts.data.features import cache_features
from clipcacg.scripts.data.loading import DataArguments
from clipcacg.scripts.reporting.explanation import explain
from clipcacg.scripts.training import onnx_export
from clipcacg.scripts.training.quantization import quantize

TABLE = Path(__file__).parents[1] / "scripts" / "results" / "encoders.md"
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
Fields = dict[str, Any]

SIZES: Fields = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
WORDS: Fields = {**SIZES, "vocab_size": 60, "max_position_embeddings": 42}
GPT: Fields = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 42, "vocab_size": 60}
XLM: Fields = {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 60, "max_position_embeddings": 42}
T5: Fields = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 60}
BART: Fields = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "vocab_size": 60,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 42,
}  # fmt: skip
DISENTANGLED: Fields = {**WORDS, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}

VIT: Fields = {**SIZES, "image_size": 64, "patch_size": 16}
SWIN: Fields = {
    "image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4
}  # fmt: skip
PYRAMID: Fields = {"image_size": 64, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]}
HEADS: Fields = {"num_attention_heads": [1, 2, 2, 2]}
STAGES: Fields = {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2}
TIMM_VIT: Fields = {"embed_dim": 16, "depth": 2, "num_heads": 2}
TIMM_SWIN: Fields = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}

CLIP_WORDS: Fields = {
    **WORDS,
    "max_position_embeddings": 20,
    "bos_token_id": 58,
    "eos_token_id": 59,
    "pad_token_id": 1,
}
CLIP: Fields = {"projection_dim": 12, "text_config": CLIP_WORDS, "vision_config": VIT}
SIGLIP: Fields = {"text_config": {**CLIP_WORDS, "projection_size": 16}, "vision_config": VIT}


def pair(vision: str, text: str) -> Fields:
    """A vision-text-dual-encoder of these two model types."""
    parts = {"text_config": {"model_type": text, **CLIP_WORDS}, "vision_config": {"model_type": vision, **VIT}}
    return {"model_type": "vision-text-dual-encoder", "projection_dim": 12, **parts}


# A name with a fields entry "model_type" is a variant of that family. timm's names follow "timm ".
TEXT: dict[str, Fields] = {
    "albert": {**WORDS, "embedding_size": 8}, "bart": BART, "bert": WORDS, "bert-generation": WORDS,
    "big_bird": {**WORDS, "attention_type": "original_full"}, "blenderbot-small": BART, "camembert": WORDS,
    "clip, the text tower": {"model_type": "clip", **CLIP}, "clip_text_model": {**WORDS, "eos_token_id": 59},
    "data2vec-text": WORDS, "deberta": DISENTANGLED, "deberta-v2": DISENTANGLED,
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, **WORDS}, "electra": WORDS,
    "ernie": WORDS, "flaubert": XLM, "gpt2": GPT, "ibert": WORDS,
    "led": {**BART, "max_encoder_position_embeddings": 40, "attention_window": 8}, "llama": WORDS,
    "longformer": {**WORDS, "attention_window": 8}, "luke": {**WORDS, "entity_vocab_size": 9, "entity_emb_size": 16},
    "m2m_100": BART, "marian": {**BART, "pad_token_id": 59, "decoder_start_token_id": 59}, "mbart": BART,
    "megatron-bert": WORDS, "metaclip_2, the text tower": {"model_type": "metaclip_2", **CLIP},
    "modernbert": {**WORDS, **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
                   "cls_token_id": 2, "sep_token_id": 3},
    "mpnet": WORDS, "mt5": T5, "mvp": BART, "openai-gpt": GPT, "pegasus": BART,
    "qwen2": {**WORDS, "num_key_value_heads": 2},
    "rembert": {**WORDS, "input_embedding_size": 8, "output_embedding_size": 8}, "roberta": WORDS,
    "roberta-prelayernorm": WORDS, "roc_bert": {**WORDS, "pronunciation_vocab_size": 60, "shape_vocab_size": 60},
    "roformer": {**WORDS, "embedding_size": 16}, "siglip, the text tower": {"model_type": "siglip", **SIGLIP},
    "splinter": WORDS,
    "squeezebert": {**WORDS, "embedding_size": 16, **dict.fromkeys(
        ("q_groups", "k_groups", "v_groups", "intermediate_groups", "output_groups"), 2)},
    "t5": T5, "umt5": T5, "xlm": XLM, "xlm-roberta": WORDS, "xlm-roberta-xl": WORDS,
    "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "vocab_size": 60},
    "xmod": {**WORDS, "languages": ["en_XX"], "default_language": "en_XX"},
}  # fmt: skip
# Each with the size of its image and the grid of regions that it must give.
VISION: dict[str, tuple[Fields, int, int]] = {
    "aimv2_vision_model": (VIT, 64, 4), "beit": (VIT, 64, 4),
    "bit": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_groups": 2}, 64, 8),
    "chinese_clip_vision_model": (VIT, 64, 4), "clip, the vision tower": ({"model_type": "clip", **CLIP}, 64, 4),
    "clip_vision_model": (VIT, 64, 4), "convnext": (STAGES, 64, 8), "convnextv2": (STAGES, 64, 8),
    "cvt": ({"embed_dim": [8, 8, 16], "num_heads": [1, 1, 2], "depth": [1, 2, 3]}, 64, 4),
    "data2vec-vision": (VIT, 64, 4), "deit": (VIT, 64, 4), "dinov2": (VIT, 64, 4),
    "dinov2_with_registers": (VIT, 64, 4),
    "dinov3_convnext": ({"hidden_sizes": [8, 8, 8, 12], "depths": [1, 1, 1, 1]}, 224, 7),
    "dinov3_vit": ({**VIT, "num_register_tokens": 4}, 64, 4), "donut-swin": (SWIN, 64, 8),
    "efficientnet": ({"image_size": 64, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128}, 64, 2),
    "focalnet": ({"image_size": 64, "embed_dim": 8, "depths": [1, 1], "hidden_sizes": [8, 16],
                  "focal_levels": [1, 1], "focal_windows": [3, 3]}, 64, 8),
    "hiera": ({"image_size": [64, 64], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "query_stride": [2, 2],
               "num_query_pool": 1, "masked_unit_size": [4, 4], "masked_unit_attention": [True, False]}, 64, 8),
    "ijepa": (VIT, 64, 4),
    "levit": ({"image_size": 224, "hidden_sizes": [16, 16, 16], "num_attention_heads": [2, 2, 2],
               "depths": [1, 1, 1], "key_dim": [4, 4, 4]}, 224, 4),
    "maskformer-swin": (SWIN, 64, 8), "metaclip_2, the vision tower": ({"model_type": "metaclip_2", **CLIP}, 64, 4),
    "mlcd_vision_model": (VIT, 64, 4), "mobilenet_v1": ({"depth_multiplier": 0.25}, 64, 2),
    "mobilenet_v2": ({"depth_multiplier": 0.25}, 64, 2),
    "mobilevit": ({"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16], "image_size": 64,
                   "num_attention_heads": 2}, 64, 2),
    "poolformer": (PYRAMID, 64, 2), "pvt": (PYRAMID | HEADS, 64, 2), "pvt_v2": (PYRAMID | HEADS, 64, 2),
    "regnet": ({"embedding_size": 8, "groups_width": 4, "hidden_sizes": [8, 12], "depths": [1, 1]}, 64, 8),
    "resnet": ({"embedding_size": 8, "layer_type": "basic", "hidden_sizes": [8, 12], "depths": [1, 1]}, 64, 8),
    "segformer": (PYRAMID | HEADS, 64, 2), "siglip, the vision tower": ({"model_type": "siglip", **SIGLIP}, 64, 4),
    "siglip_vision_model": (VIT, 64, 4),
    "swiftformer": ({"image_size": 64, "embed_dims": [8, 8, 8, 16], "depths": [1, 1, 1, 1]}, 64, 2),
    "swin": (SWIN, 64, 8), "swinv2": (SWIN, 64, 8), "vit": (VIT, 64, 4), "vit_msn": (VIT, 64, 4),
    "vitdet": (VIT, 64, 4),
    "timm efficientnet_lite0": ({}, 64, 2), "timm eva02_tiny_patch14_336": (TIMM_VIT | {"embed_dim": 24}, 336, 24),
    "timm hiera_tiny_224": ({"embed_dim": 8, "stages": [1, 1, 1, 1], "num_heads": 1}, 224, 7),
    "timm mambaout_femto": ({"dims": [8, 8, 8, 16], "depths": [1, 1, 1, 1]}, 224, 7),
    "timm resnet10t": ({}, 64, 2), "timm swin_tiny_patch4_window7_224": (TIMM_SWIN, 224, 28),
    "timm swinv2_tiny_window8_256": (TIMM_SWIN, 256, 32), "timm vit_base_patch16_siglip_256": (TIMM_VIT, 256, 16),
    "timm vit_small_patch14_dinov2": (TIMM_VIT | {"img_size": 98}, 98, 7),
    "timm vit_small_patch14_reg4_dinov2": (TIMM_VIT | {"img_size": 224}, 224, 16),
    "timm vit_small_patch16_dinov3": (TIMM_VIT | {"embed_dim": 32}, 256, 16),
    "timm vit_tiny_patch16_224": (TIMM_VIT, 224, 14),
}  # fmt: skip
DUAL: dict[str, Fields] = {
    "altclip": {**CLIP, "text_config": {**CLIP_WORDS, "project_dim": 16}}, "chinese_clip": CLIP, "clip": CLIP,
    "clipseg": {**CLIP, "extract_layers": [0, 1]}, "metaclip_2": CLIP, "siglip": SIGLIP,
    "vision-text-dual-encoder, beit and bert": pair("beit", "bert"),
    "vision-text-dual-encoder, clip and roberta": pair("clip_vision_model", "roberta"),
    "vision-text-dual-encoder, dinov2 and xlm-roberta": pair("dinov2", "xlm-roberta"),
    "vision-text-dual-encoder, vit and bert": pair("vit", "bert"),
}  # fmt: skip

PADDING = "text_model: the padding of a text changes what the encoder {} returns for its words."
DUALS = "clip_config must be of a dual encoder (altclip, chinese_clip, clip, clipseg, metaclip_2, siglip, "
TEXT_REFUSED: dict[str, tuple[Fields, str]] = {
    "canine": ({**WORDS, "num_hash_buckets": 60, "local_transformer_stride": 8},
               "text_config: 'canine' does not work as a text encoder: it cannot read a text of one token"),
    "convbert": ({**WORDS, "embedding_size": 16}, PADDING.format("'convbert'")),
    "fnet": (WORDS, PADDING.format("'fnet'")),
    "funnel": ({"vocab_size": 60, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 16, "n_head": 2,
                "d_head": 8, "d_inner": 24}, PADDING.format("'funnel'")),
    "nystromformer": ({**WORDS, "num_landmarks": 4, "segment_means_seq_len": 40},
                      "text_config: 'nystromformer' does not work as a text encoder: "),
    "perceiver": ({"num_latents": 4, "d_latents": 32, "d_model": 16, "num_self_attends_per_block": 1, "vocab_size": 60,
                   "max_position_embeddings": 42}, "text_config: 'perceiver' does not work as a text encoder: "),
    "yoso": (WORDS, PADDING.format("'yoso'")),
}  # fmt: skip
DETR: Fields = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "backbone": None, "use_pretrained_backbone": False,
    "use_timm_backbone": False, "backbone_config": {"model_type": "resnet", **VISION["resnet"][0]},
}  # fmt: skip
REGIONS = "vision_config: {!r} does not work as an image encoder with a map of regions: {}"
VISION_REFUSED: dict[str, tuple[Fields, str]] = {
    "detr": (DETR, REGIONS.format("detr", "its tokens are not regions of the image (num_queries)")),
    "pixtral": (VIT, REGIONS.format("pixtral", "its last hidden state has shape (1, 32, 16)")),
    "siglip2_vision_model": ({**VIT, "num_patches": 16},
                             REGIONS.format("siglip2_vision_model", "Siglip2VisionModel.forward() missing")),
    "timm crossvit_tiny_240": ({}, REGIONS.format("crossvit_tiny_240", "")),
    "videomae": (VIT, REGIONS.format("videomae", "")),
    "vit_mae": (VIT, REGIONS.format("vit_mae", "it masks random patches")),
    "yolos": ({**VIT, "num_detection_tokens": 10, "image_size": [64, 64]},
              REGIONS.format("yolos", "its tokens are not regions of the image (num_detection_tokens)")),
}  # fmt: skip
DUAL_REFUSED = {
    name: f"{DUALS}vision-text-dual-encoder), not of {name!r}." for name in ("groupvit", "siglip2", "xclip")
}

BY_DEFAULT = {
    "albert", "bart", "gpt2", "longformer", "roberta", "siglip, the text tower", "t5", "xlnet", "fnet",
    "dinov2_with_registers", "dinov3_convnext", "resnet", "siglip, the vision tower", "swin", "vit", "vit_mae",
    "timm swin_tiny_patch4_window7_224", "timm vit_base_patch16_siglip_256", "pixtral", "siglip", "chinese_clip",
    "vision-text-dual-encoder, vit and bert", "groupvit", "siglip2", "xclip",
}  # fmt: skip


def families(table: dict[str, Any]) -> pytest.MarkDecorator:
    """Run a test for every family of a table; those that are not in the spread are slow."""
    slow = {name: () if name in BY_DEFAULT else pytest.mark.slow for name in table}
    return pytest.mark.parametrize("family", [pytest.param(name, marks=slow[name], id=name) for name in table])


def config_of(family: str, fields: Fields) -> Any:
    """The config of a family; timm's fields are arguments of its architecture."""
    if family.startswith("timm "):
        pytest.importorskip("timm")
        fields = {"model_type": "timm_wrapper", "architecture": family.removeprefix("timm "), "model_args": fields}
    return hf.AutoConfig.for_model(**{"model_type": family, **fields})


def save_with_head(config: Any, folder: Path) -> hf.PreTrainedModel:
    """Save a model with random weights and the head that its family is usually published with."""
    heads = (
        hf.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, hf.MODEL_FOR_MASKED_LM_MAPPING,
        hf.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, hf.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    )  # fmt: skip
    whole = hasattr(config, "vision_config")
    classes = [] if whole else [mapping[type(config)] for mapping in heads if type(config) in mapping]
    head = classes[0] if classes else None
    head = head[0] if isinstance(head, tuple) else head  # DeiT and LeViT have two
    model = hf.AutoModel.from_config(config) if head is None else head(config)
    model.save_pretrained(folder)
    return model


def check_weights(model: ClipCaCgPreTrainedModel, kind: str, source: hf.PreTrainedModel) -> None:
    """Every tensor of the encoder is that of the source."""
    weights = model.backbones()[kind].state_dict()
    bases = [source, getattr(source, source.base_model_prefix, None)]
    candidates = [part_of(base, kind).state_dict() for base in bases if isinstance(base, hf.PreTrainedModel)]
    expected = next(candidate for candidate in candidates if weights.keys() <= candidate.keys())
    for name, value in weights.items():
        assert torch.equal(value, expected[name]), name


def check_gradients_and_reload(model: ClipCaCgPreTrainedModel, inputs: dict[str, Tensor], folder: Path) -> None:
    """Every trainable parameter gets a gradient, and a saved model is bit-equal when it is loaded again."""
    model.train()(**inputs).fused_embeds.sum().backward()
    trained = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert not [name for name, gradient in trained.items() if gradient is None]
    model.eval().save_pretrained(folder)
    loaded, report = ClipCaCgModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert {name for name, weight in loaded.named_parameters() if weight.requires_grad} == trained.keys()
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert torch.equal(loaded(**inputs).fused_embeds, model(**inputs).fused_embeds)


def build(kind: str, folder: Path) -> ClipCaCgModel:
    modality = {"text": "text", "vision": "image"}[kind]
    sizes: Fields = {"hidden_size": 16, "num_attention_heads": 2, "modality": modality}
    return ClipCaCgModel.from_backbones(**{f"{kind}_model": folder}, **sizes)


def padded_texts(length: int = 9, short: int = 5, end: int | None = None) -> tuple[Tensor, Tensor]:
    """Token ids and mask of two texts, the second of which is shorter; `end` closes both."""
    ids, mask = torch.randint(6, 57, (2, length)), torch.ones(2, length, dtype=torch.long)
    mask[1, short:] = 0
    if end is not None:
        ids[0, -1] = ids[1, short - 1] = end
    return ids.where(mask.bool(), 1), mask


@families(TEXT)
def test_a_text_encoder(family: str, tmp_path: Path) -> None:
    source = save_with_head(config_of(family, TEXT[family]), tmp_path / "source")
    model = build("text", tmp_path / "source")
    check_weights(model, "text", source)
    limit = encoder_facts(model.config.text_config, "text").max_tokens or 60
    assert model(input_ids=torch.full((1, limit), 7)).fused_embeds.isfinite().all()
    ids, mask = padded_texts()
    together = model(input_ids=ids, attention_mask=mask).fused_embeds
    assert_close(model(input_ids=ids[1:, :5]).fused_embeds, together[1:], atol=1e-4, rtol=0)
    check_gradients_and_reload(model, {"input_ids": ids, "attention_mask": mask}, tmp_path / "saved")


@families(VISION)
def test_a_vision_encoder(family: str, tmp_path: Path) -> None:
    fields, size, rows = VISION[family]
    source = save_with_head(config_of(family, fields), tmp_path / "source")
    model = build("vision", tmp_path / "source")
    check_weights(model, "vision", source)
    pixels = torch.randn(2, 3, size, size)
    width = model.image_branch.projection.in_features
    regions = model.encode("vision", pixels)
    assert regions.shape == (2, width, rows, rows)
    states = model.backbones()["vision"](pixels).last_hidden_state
    if states.dim() == 4:  # of both layouts, only one gives this shape
        assert torch.equal(regions, states if states.shape == regions.shape else states.permute(0, 3, 1, 2))
    else:  # the last tokens, row by row
        assert torch.equal(regions[:, :, -1, -1], states[:, -1])
        assert torch.equal(regions[:, :, 0, 1], states[:, 1 - rows * rows])
    together = model(pixel_values=pixels).fused_embeds
    assert_close(model(pixel_values=pixels[1:]).fused_embeds, together[1:], atol=1e-4, rtol=0)
    check_gradients_and_reload(model, {"pixel_values": pixels}, tmp_path / "saved")


@families(DUAL)
def test_a_dual_encoder(family: str, tmp_path: Path) -> None:
    """v and t are the family's own, and a token that the family pools gives the same as the pooled one."""
    fields = {"model_type": family, **DUAL[family]}
    clip = save_with_head(config_of(family, fields), tmp_path / "clip").eval()
    save_with_head(config_of("bert", WORDS), tmp_path / "text")
    save_with_head(config_of("vit", VIT), tmp_path / "vision")
    sources = {f"{name}_model": tmp_path / name for name in ("text", "vision", "clip")}
    model = ClipCaCgModel.from_backbones(**sources, hidden_size=16, num_attention_heads=2)
    for name in ("clip.text", "clip.vision"):
        check_weights(model, name, clip)
    ids, mask = padded_texts(18, 7, end=59)
    pixels, padded = torch.randn(2, 3, 64, 64), family == "siglip"
    images, texts = model.encode("clip.vision", pixels), model.encode("clip.text", ids, mask)
    v = clip.get_image_features(pixel_values=pixels).pooler_output
    t = clip.get_text_features(input_ids=ids, attention_mask=None if padded else mask).pooler_output
    assert_close(images[:, 0], torch.nn.functional.normalize(v, dim=-1), atol=1e-6, rtol=0)
    assert_close(texts[:, 0], torch.nn.functional.normalize(t, dim=-1), atol=1e-6, rtol=0)
    assert images.shape == (2, 1 + 16, v.shape[-1]) and texts.shape == (2, 1 + 18, v.shape[-1])
    assert (texts[:, 1:] - texts[:, :1]).abs().amax(dim=-1).amin(dim=1).max() < 1e-6
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    inputs |= {f"clip_{name}": value for name, value in inputs.items()}
    together = model(**inputs).fused_embeds
    alone = {name: value[1:] for name, value in inputs.items()}
    for name in ("input_ids", "attention_mask", *(() if padded else ("clip_input_ids", "clip_attention_mask"))):
        alone[name] = alone[name][:, :7]
    assert_close(model(**alone).fused_embeds, together[1:], atol=1e-4, rtol=0)
    check_gradients_and_reload(model, inputs, tmp_path / "saved")


@families(TEXT_REFUSED)
def test_a_text_encoder_is_refused(family: str, tmp_path: Path) -> None:
    fields, sentence = TEXT_REFUSED[family]
    save_with_head(config_of(family, fields), tmp_path)
    with pytest.raises(ValueError) as told:
        build("text", tmp_path)
    assert str(told.value).startswith(sentence)


@families(VISION_REFUSED)
def test_a_vision_encoder_is_refused(family: str) -> None:
    fields, sentence = VISION_REFUSED[family]
    config = ClipCaCgConfig(vision_config=config_of(family, fields), modality="image", hidden_size=16)
    with pytest.raises(ValueError) as told:
        ClipCaCgModel(config)
    assert str(told.value).startswith(sentence)


@families(DUAL_REFUSED)
def test_a_dual_encoder_is_refused_by_model_and_processor(family: str, tmp_path: Path) -> None:
    config_of(family, {}).save_pretrained(tmp_path)
    for part in (ClipCaCgModel, ClipCaCgProcessor):
        with pytest.raises(ValueError) as told:
            part.from_backbones(text_model=tmp_path, vision_model=tmp_path, clip_model=tmp_path)
        assert str(told.value) == DUAL_REFUSED[family]


@pytest.mark.parametrize(
    ("family", "limit"), [("bert", 42), ("roberta", 40), ("luke", 40), ("bart", 42), ("xlnet", None), ("t5", None)]
)
def test_a_text_has_at_most_as_many_tokens_as_the_encoder_has_positions(family: str, limit: int | None) -> None:
    assert encoder_facts(config_of(family, TEXT[family]), "text").max_tokens == limit


def test_an_encoder_is_tried_once_however_its_config_was_loaded(tmp_path: Path) -> None:
    save_with_head(config_of("bert", WORDS | {"intermediate_size": 20}), tmp_path / "source")
    before = len(ENCODER_FACTS)
    build("text", tmp_path / "source").save_pretrained(tmp_path / "saved")
    ClipCaCgModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert len(ENCODER_FACTS) == before + 1


def test_alberts_layers_count_once_however_often_they_run() -> None:
    albert = config_of("albert", TEXT["albert"] | {"num_hidden_layers": 4, "num_hidden_groups": 2})
    model = ClipCaCgModel(ClipCaCgConfig(text_config=albert, modality="text", hidden_size=16)).eval()
    with pytest.raises(ValueError, match="between 0 and 1 for this 2-layer albert encoder, got 3"):
        model.freeze_backbones(text_layers=3)
    model.freeze_backbones(text_layers=1)
    ids, mask = padded_texts()
    stored = model.encode("text", ids, mask)
    from_ids = model(input_ids=ids, attention_mask=mask).fused_embeds
    assert_close(model(text_features=stored, attention_mask=mask).fused_embeds, from_ids)


@pytest.fixture(scope="module")
def vit_and_siglip(backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a tiny text encoder, a ViT and a SigLIP whose tokenizer makes no masks, as its published one."""
    folder = tmp_path_factory.mktemp("vit_and_siglip")
    tokenizer = hf.AutoTokenizer.from_pretrained(backbones / "text", model_input_names=["input_ids"])
    tokenizer.save_pretrained(folder / "clip")
    words = {**CLIP_WORDS, "vocab_size": len(tokenizer), "projection_size": 16}
    size = {"height": 64, "width": 64}
    for name, fields in (("vision", VIT), ("clip", {"text_config": words, "vision_config": VIT})):
        torch.manual_seed(0)
        hf.AutoModel.from_config(config_of("vit" if name == "vision" else "siglip", fields)).save_pretrained(
            folder / name
        )
        hf.ViTImageProcessor(size=size).save_pretrained(folder / name)
    folders = {"text": backbones / "text", "vision": folder / "vision", "clip": folder / "clip"}
    return {f"{name}_model": str(path) for name, path in folders.items()}


@pytest.fixture
def model_and_processor(
    vit_and_siglip: dict[str, str],
) -> tuple[ClipCaCgForSequenceClassification, ClipCaCgProcessor]:
    torch.manual_seed(0)
    model = ClipCaCgForSequenceClassification.from_backbones(**vit_and_siglip, hidden_size=32, num_attention_heads=4)
    return model, ClipCaCgProcessor.from_backbones(**vit_and_siglip)


def test_siglips_texts_are_padded_as_it_was_trained(model_and_processor: Any, tmp_path: Path) -> None:
    model, processor = model_and_processor
    processor.save_pretrained(tmp_path)
    for made in (processor, ClipCaCgProcessor.from_pretrained(tmp_path)):
        inputs = made(images=IMAGE, text="a day", return_tensors="pt")
        assert inputs["clip_input_ids"].shape == (1, 20) and inputs["clip_attention_mask"].sum() < 20
        assert inputs["input_ids"].shape[1] < 20
        other = made(images=[IMAGE] * 2, text=["a day", "a much longer day " * 9], return_tensors="pt")
        assert_close(model(**other).logits[:1], model(**inputs).logits, atol=1e-5, rtol=0)


def test_stored_outputs_and_blocks(model_and_processor: Any, posts_folder: Path, tmp_path: Path) -> None:
    model, processor = model_and_processor
    posts = load_posts(DataArguments(data_dir=str(posts_folder), max_train_samples=9, max_eval_samples=2))
    direct = model(**PostCollator(processor, model.config)(list(posts["train"]))).logits
    for frozen in ({"text": True, "vision": True, "clip": True}, {"vision_blocks": 1}):
        model.requires_grad_(True)
        model.freeze_backbones(**frozen)
        cached, stores = cache_features(model, processor, posts, folder=tmp_path)
        assert "vision" in stores
        batch = PostCollator(processor, model.config, stores)(list(cached["train"]))
        assert "pixel_values" not in batch
        assert_close(model(**batch).logits, direct, atol=1e-5, rtol=0)


def test_an_explanation(model_and_processor: Any) -> None:
    model, processor = model_and_processor
    torch.nn.init.normal_(model.model.image_branch.projection.bias)
    found = explain(model, processor, IMAGE, "I love the beach")
    assert found.attribution.total == pytest.approx(found.attribution.difference, rel=0.05, abs=0.01)
    assert [heat_map.weights.shape for heat_map in found.attribution.regions.values()] == [(4, 4), (4, 4)]
    assert all(np.abs(heat_map.weights).max() > 0 for heat_map in found.attribution.regions.values())
    assert sum(found.attention["text"].shares.values()) == pytest.approx(1)


@pytest.mark.slow
def test_an_onnx_file(model_and_processor: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model, processor = model_and_processor
    onnx_export.export(model, onnx_export.example(model, processor, ["a day", "a longer day"]), tmp_path / "m.onnx")
    for texts in (["one"], ["another", "and a much longer one", ""]):
        inputs = onnx_export.example(model, processor, texts)
        assert onnx_export.largest_difference(model, inputs, tmp_path / "m.onnx") < 1e-4


@pytest.mark.slow
def test_lora_on_a_vit(model_and_processor: Any) -> None:
    assert learning_lora_weights(*model_and_processor, IMAGE, r".*image_branch.*q_proj|.*clip_.*q_proj") == 6


@pytest.mark.slow
def test_text_towers_in_8_bits(model_and_processor: Any, tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model, processor = model_and_processor
    for part in (model, processor):
        part.save_pretrained(tmp_path / "float32")
    quantize(str(tmp_path / "float32")).save_pretrained(tmp_path / "int8")
    small = ClipCaCgForSequenceClassification.from_pretrained(tmp_path / "int8")
    in_8_bits = {
        name
        for name, encoder in small.backbones().items()
        for module in encoder.modules()
        if isinstance(module, torch.nn.Linear) and isinstance(module.weight, torchao.Int8Tensor)
    }
    assert in_8_bits == {"text", "clip.text"}
    inputs = processor(images=IMAGE, text="a day", return_tensors="pt")
    with torch.inference_mode():
        assert 0 < (small(**inputs).logits - model(**inputs).logits).abs().max() < 0.05


@pytest.mark.slow
def test_the_demo(model_and_processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = pytest.importorskip("clipcacg.scripts.reporting.page", exc_type=ImportError)
    for part in model_and_processor:
        part.save_pretrained(tmp_path / "checkpoint")
    IMAGE.save(tmp_path / "post.png")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))  # the demo reads uploads alone
    demo = page.build_demo(str(tmp_path / "checkpoint"))
    answer = next(function.fn for function in demo.fns.values() if function.api_name == "explain")
    *_, shown = answer({"path": str(tmp_path / "post.png"), "orig_name": "post.png"}, "so happy today")
    values = {getattr(component, "label", None): value for component, value in shown.items()}
    assert set(values["Sentiment"]) == {"negative", "neutral", "positive"}
    for encoder in ("the vision encoder", "CLIP"):
        assert np.ptp(np.asarray(values[f"Image regions that moved the score, through {encoder}"])) > 0
    assert [word for word, _ in values["Words that moved the score"]] == ["so", "happy", "today"]


def table() -> str:
    """What the tests of this file assert, as Markdown."""
    refused: dict[str, dict[str, str]] = {
        "Text encoders": {name: sentence for name, (_, sentence) in TEXT_REFUSED.items()},
        "Vision encoders": {name: sentence for name, (_, sentence) in VISION_REFUSED.items()},
        'Dual encoders, for `clip_mode="encoder"`': DUAL_REFUSED,
    }
    lines = [
        "# Supported encoders",
        "",
        "`tests/test_encoders.py` builds each family with tiny random weights, and writes this page. It checks that",
        "`from_backbones` takes every weight of the published head class, that padding and batching change nothing,",
        "that every trainable parameter gets a gradient, and that a saved model is bit-equal when it is loaded again.",
        "Other families work if a dry run of the encoder succeeds; the model refuses them in one sentence if not.",
    ]
    for (title, sentences), supported in zip(refused.items(), (TEXT, VISION, DUAL), strict=True):
        lines += ["", f"## {title}", "", "| family | result |", "| --- | --- |"]
        lines += [f"| {name} | works |" for name in supported]
        lines += [f"| {name} | refused: {sentence.strip().rstrip(':.')} |" for name, sentence in sentences.items()]
    return "\n".join(lines) + "\n"


def test_the_table_states_what_these_tests_assert() -> None:
    if not TABLE.exists() or TABLE.read_text(encoding="utf-8") != table():
        TABLE.write_text(table(), encoding="utf-8")
        pytest.fail(f"{TABLE.name} was out of date and has been written anew: commit it.")
