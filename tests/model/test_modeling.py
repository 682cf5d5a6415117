"""What transformers asks of a model, and what ours promises, for every mode and ablation."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from inputs import CLIP_MODES, TRANSFORMER, make_inputs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForSequenceClassification, CLIPModel

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import (
    ClipCaCgForSequenceClassification,
    ClipCaCgModel,
    encoder_mask,
    layers_of_modules,
)

Inputs = dict[str, Tensor]
Build = Callable[..., ClipCaCgForSequenceClassification]

VARIANTS = {
    "encoder": {},
    "feature": {"clip_mode": "feature"},
    "none": {"clip_mode": "none"},
    "no_ca": {"use_cross_attention": False},
    "no_cg": {"use_gating": False},
    "image": {"modality": "image"},
    "text": {"modality": "text"},
    "shared": {"share_clip_text": True, "share_clip_vision": True, "text_config": None, "vision_config": None},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
three_variants = pytest.mark.parametrize("variant", ["encoder", "no_cg", "text"])
every_clip_mode = pytest.mark.parametrize("variant", CLIP_MODES)
both_attentions = pytest.mark.parametrize("attention", ["eager", "sdpa"])
LABELS = torch.tensor([0, 1, 2])
# A softmax does not feel what is added to all its scores: the gradients of these are rounding errors.
KEY_BIASES = ("k_proj.bias", "key.bias")

TEXT_ENCODERS = {
    "bert": {"vocab_size": 60, "max_position_embeddings": 40, **TRANSFORMER},
    "distilbert": {"vocab_size": 60, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24},
    "roberta": {"vocab_size": 60, "max_position_embeddings": 42, **TRANSFORMER},
}
VISION_ENCODERS = {
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"},
    "convnext": {"num_stages": 2, "hidden_sizes": [8, 12], "depths": [1, 1]},
    "mobilenet_v2": {"depth_multiplier": 0.05, "min_depth": 4, "depth_divisible_by": 4, "image_size": 32},
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "groups_width": 4},
    "timm_wrapper": {"architecture": "test_convnext"},
}


@pytest.fixture
def build(tiny_config: Callable[..., ClipCaCgConfig]) -> Build:
    """A function that makes a tiny model of a variant in evaluation mode; keywords override config fields."""

    def make(variant: str, **overrides: object) -> ClipCaCgForSequenceClassification:
        return ClipCaCgForSequenceClassification(tiny_config(**{**VARIANTS[variant], **overrides})).eval()

    return make


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Memory that was asked for but never written reads as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def gradients(model: nn.Module, inputs: Inputs) -> dict[str, Tensor | None]:
    """Gradients of one training step, with the same dropout every time."""
    torch.manual_seed(0)
    model.train().zero_grad()
    model(**inputs, labels=LABELS[: len(inputs["attention_mask"])]).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def reload(model: nn.Module, folder: Path, **kwargs: object) -> ClipCaCgForSequenceClassification:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, **kwargs)


def moved(inputs: Inputs, row: int, left: int = 0, right: int = 0, clip_right: int = 0) -> Inputs:
    """One post, its texts cut to their own length and padded anew."""
    post = {name: value[row : row + 1] for name, value in inputs.items()}
    for prefix, pad, sides in (("", 1, (left, right)), ("clip_", 59, (0, clip_right))):
        real = post[f"{prefix}attention_mask"][0].bool()
        for name, fill in ((f"{prefix}input_ids", pad), (f"{prefix}attention_mask", 0)):
            post[name] = nn.functional.pad(post[name][:, real], sides, value=fill)
    return post


@every_variant
@both_attentions
def test_logits_do_not_depend_on_padding_or_batch(build: Build, inputs: Inputs, variant: str, attention: str) -> None:
    text = {"model_type": "roberta", "vocab_size": 60, "max_position_embeddings": 130, **TRANSFORMER}
    text = {} if variant == "shared" else {"text_config": text}
    model = build(variant, **text, attn_implementation=attention)
    together = model(**inputs).logits
    for row, length in enumerate((9, 5, 1)):
        for sides in ({}, {"right": 128 - length, "clip_right": 12}, {"left": 128 - length}, {"left": 3, "right": 4}):
            assert_close(model(**moved(inputs, row, **sides)).logits[0], together[row], rtol=0, atol=1e-5)


@every_variant
def test_left_out_masks_mean_no_padding(build: Build, variant: str) -> None:
    model, inputs = build(variant), make_inputs([6, 6], [5, 5])
    without = {name: value for name, value in inputs.items() if "mask" not in name}
    assert_close(model(**without).logits, model(**inputs).logits)


@every_variant
@both_attentions
def test_text_that_is_all_padding(build: Build, inputs: Inputs, variant: str, attention: str) -> None:
    inputs["attention_mask"][1] = inputs["clip_attention_mask"][1] = 0
    model = build(variant, attn_implementation=attention)
    assert model(**inputs).logits.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(model, inputs).values())


def test_an_encoder_has_a_token_to_attend_to_in_every_row() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0]]).bool()
    assert encoder_mask(mask).tolist() == [[1, 1, 0], [0, 0, 1], [1, 0, 0]]


@every_variant
@pytest.mark.parametrize(("length", "clip_length"), [(1, 2), (40, 20)], ids=["shortest", "longest"])
def test_a_batch_of_one_of_any_length(build: Build, variant: str, length: int, clip_length: int) -> None:
    model, inputs = build(variant), make_inputs([length], [clip_length])
    assert model(**inputs).logits.shape == (1, 3)
    assert all(gradient.isfinite().all() for gradient in gradients(model, inputs).values())


@every_variant
def test_gradients_reach_every_parameter(build: Build, inputs: Inputs, variant: str) -> None:
    for name, gradient in gradients(build(variant), inputs).items():
        assert gradient is not None and (gradient.abs().sum() > 0 or name.endswith(KEY_BIASES)), name


@pytest.mark.parametrize("family", VISION_ENCODERS)
def test_gradients_reach_every_parameter_of(build: Build, inputs: Inputs, family: str) -> None:
    if family == "timm_wrapper":
        pytest.importorskip("timm")
    model = build("feature", vision_config={"model_type": family, **VISION_ENCODERS[family]})
    assert not [name for name, gradient in gradients(model, inputs).items() if gradient is None]


@every_variant
def test_each_input_reaches_the_logits_or_is_ignored(build: Build, inputs: Inputs, variant: str) -> None:
    model = build(variant)
    logits = model(**inputs).logits
    used = {"image": {"pixel_values"}, "text": {"input_ids", "attention_mask"}}.get(variant, set(inputs))
    if variant in ("feature", "none", "shared"):
        used = {name for name in used if name.startswith("clip_") == (variant == "shared")}
    assert_close(model(**{name: inputs[name] for name in used}).logits, logits)
    for name, value in make_inputs([8, 9, 2], [6, 7, 4], seed=1).items():
        changed = (model(**{**inputs, name: value}).logits - logits).abs().amax(dim=1) > 1e-6
        assert changed.any() == (name in used), name


@pytest.mark.parametrize(
    ("variant", "missing"),
    [
        ("text", "input_ids"), ("image", "pixel_values"), ("none", "pixel_values"), ("feature", "input_ids"),
        ("encoder", "clip_input_ids"), ("encoder", "clip_pixel_values"),
    ],
)  # fmt: skip
def test_missing_inputs_and_unequal_batches_are_named(build: Build, variant: str, missing: str) -> None:
    model, inputs = build(variant), make_inputs([4, 4], [3, 3])
    with pytest.raises(ValueError, match=f"but {missing} is missing"):
        model(**{**inputs, missing: None})
    if variant not in ("text", "image"):
        with pytest.raises(ValueError, match=f"{missing} 1"):
            model(**{**inputs, missing: inputs[missing][:1]})


@pytest.mark.parametrize("part", ["text", "vision", "clip"])
def test_a_frozen_backbone_stays_as_it_is(build: Build, inputs: Inputs, part: str) -> None:
    model = build("encoder")
    model.freeze_backbones(**{part: True})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    gradients(model.eval(), inputs)  # back in training mode
    optimizer.step()
    frozen = [encoder for name, encoder in model.backbones().items() if name.startswith(part)]
    weights = {id(value) for encoder in frozen for value in encoder.state_dict(keep_vars=True).values()}
    assert not any(module.training for encoder in frozen for module in encoder.modules())  # dropout is off too
    assert model.training and len(frozen) == (2 if part == "clip" else 1)
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in weights or not name.endswith(KEY_BIASES):
            assert torch.equal(value, before[name]) == (id(value) in weights), name


@pytest.mark.parametrize("family", TEXT_ENCODERS)
def test_lower_layers_of_the_text_encoder_are_frozen(build: Build, inputs: Inputs, family: str) -> None:
    config = {**TEXT_ENCODERS[family], "model_type": family, "n_layers" if family == "distilbert" else "": 2}
    model = build("feature", text_config={key: value for key, value in config.items() if key})
    model.freeze_backbones(text_layers=1)
    trained = {name for name, gradient in gradients(model, inputs).items() if gradient is not None}
    encoder = {name.split("text_branch.backbone.")[1] for name in trained if "text_branch.backbone." in name}
    assert encoder and all("layer.1." in name for name in encoder)
    assert any(name.startswith("model.image_branch.backbone.") for name in trained)


@pytest.mark.parametrize("family", VISION_ENCODERS)
def test_the_first_blocks_of_the_vision_encoder_are_frozen(build: Build, inputs: Inputs, family: str) -> None:
    if family == "timm_wrapper":
        pytest.importorskip("timm")
    model = build("feature", vision_config={**VISION_ENCODERS[family], "model_type": family})
    model.freeze_backbones(vision_blocks=1)
    encoder = model.backbones()["vision"]
    (first, second) = [
        next(name for name in ("stages.1.", "layer.1.") if any(name in n for n, _ in encoder.named_parameters()))
        .replace("1", str(index)) for index in (0, 1)
    ]  # fmt: skip
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    trained = {name for name, gradient in gradients(model, inputs).items() if gradient is not None}
    trained = {name.split("image_branch.backbone.")[1] for name in trained if "image_branch.backbone." in name}
    names = [name for name, _ in encoder.named_parameters()]
    start = next(index for index, name in enumerate(names) if second in name)
    assert trained == set(names[start:]) and any(first in name for name in names[:start])
    moved = {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(first in name for name in moved)  # BatchNorm statistics stay
    assert all(name.rpartition(".")[0] in {n.rpartition(".")[0] for n in names[start:]} for name in moved)
    for name, module in encoder.named_modules():
        if first in f"{name}." or second in f"{name}.":
            assert module.training == (second in f"{name}."), name  # dropout too


@pytest.mark.parametrize("number", [-1, 2, 9])
def test_an_encoder_has_so_many_blocks_to_freeze(build: Build, number: int) -> None:
    with pytest.raises(ValueError, match=f"vision_blocks must be between 0 and 1 for this 2-layer resnet .*{number}"):
        build("feature").freeze_backbones(vision_blocks=number)


@pytest.mark.parametrize(
    ("architecture", "depth"),
    [
        ("efficientnet_lite0", 7),
        ("resnet50", 4),
        ("resnet50d", 4),
        ("regnety_004", 4),
        ("convnext_atto", 4),
        ("vgg11", 0),
    ],
)
def test_layers_of_timms_families(architecture: str, depth: int) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        assert max(layers_of_modules(timm.create_model(architecture)).values()) == depth


@pytest.mark.parametrize("family", [*TEXT_ENCODERS, "clip_text_model"])
def test_training_continues_from_the_frozen_layers_output(build: Build, inputs: Inputs, family: str) -> None:
    sizes = TEXT_ENCODERS.get(family, TEXT_ENCODERS["bert"])
    depth = {"n_layers" if family == "distilbert" else "num_hidden_layers": 3}
    rates = ("dropout", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob")
    config = {"model_type": family, **sizes, **depth, **dict.fromkeys(rates, 0.0)}
    model = build("feature", text_config=config, dropout=0.0)
    model.freeze_backbones(text_layers=2)
    features = model.encode("text", inputs["input_ids"], inputs["attention_mask"]).detach()
    stored = {**inputs, "input_ids": None, "text_features": features}
    check_continuation(model, inputs, stored)


@pytest.mark.parametrize("family", VISION_ENCODERS)
def test_training_continues_from_the_frozen_blocks_output(build: Build, inputs: Inputs, family: str) -> None:
    model = build("feature", vision_config={**VISION_ENCODERS[family], "model_type": family}, dropout=0.0)
    model.freeze_backbones(vision_blocks=1, text=True)
    features = model.encode("vision", inputs["pixel_values"])
    check_continuation(model, inputs, {**inputs, "pixel_values": None, "image_features": features})


def check_continuation(model: ClipCaCgForSequenceClassification, inputs: Inputs, stored: dict[str, Any]) -> None:
    """Check that features give the inputs' logits and gradients, and leave the model as it was."""
    names = list(model.state_dict())
    assert_close(model(**stored).logits, model(**inputs).logits, atol=1e-5, rtol=0)

    from_ids = gradients(model, inputs)
    model.gradient_checkpointing_enable()
    from_features = gradients(model, stored)
    assert_close(from_features, from_ids, atol=1e-5, rtol=0)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("number", [-1, 2, 9])
def test_an_encoder_has_so_many_layers_to_freeze(build: Build, number: int) -> None:
    with pytest.raises(ValueError, match=f"between 0 and 1 for this 2-layer roberta encoder, got {number}"):
        build("feature").freeze_backbones(text_layers=number)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@three_variants
def test_half_precision(build: Build, inputs: Inputs, variant: str, half: torch.dtype, tmp_path: Path) -> None:
    model = build(variant)
    loaded = reload(model, tmp_path, dtype=half)
    output = loaded(**inputs, labels=LABELS)
    assert {value.dtype for value in loaded.parameters()} == {output.logits.dtype} == {half}
    assert_close(output.logits.float(), model(**inputs).logits, rtol=0, atol=0.05)
    assert output.loss.isfinite()


@every_variant
def test_autocast(build: Build, inputs: Inputs, variant: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = gradients(build(variant), inputs)
    assert all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in values.values())


@every_clip_mode
@pytest.mark.parametrize(
    ("choice", "fusion", "text", "clip"),
    [
        ("sdpa", "sdpa", "sdpa", "sdpa"),
        ("eager", "eager", "eager", "eager"),
        ({"": "eager"}, "eager", "sdpa", "sdpa"),
        ({"text_config": "eager", "clip_config": "eager"}, "sdpa", "eager", "eager"),
        ({"clip_config": {"text_config": "eager"}}, "sdpa", "sdpa", "eager"),
    ],
    ids=["sdpa", "eager", "fusion", "encoders", "nested"],
)
def test_eager_and_sdpa_agree(
    build: Build, inputs: Inputs, variant: str, choice: str | dict, fusion: str, text: str, clip: str, tmp_path: Path
) -> None:
    model = build(variant)
    at_load = reload(model, tmp_path, attn_implementation=choice)
    switched = reload(model, tmp_path)
    switched.set_attn_implementation(choice)
    for changed in (at_load, switched):
        assert_close(changed(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)
        parts = {"fusion": changed.base_model.image_attention, **changed.backbones()}
        used = {name: part.config._attn_implementation for name, part in parts.items()}
        assert used | {"fusion": fusion, "text": text} == used
        assert used.get("clip.text", clip) == clip


def test_cross_attention_goes_through_transformers_interface(build: Build, inputs: Inputs) -> None:
    def blind(module: nn.Module, query: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("blind", blind)
    model = build("encoder")
    model.set_attn_implementation({"": "blind"})
    output, attention = model(**inputs, output_hidden_states=True), model.model.text_attention
    text, attended = output.text_hidden_states
    assert_close(attended, attention.norm(text + attention.out_proj.bias))


@every_variant
def test_tuple_and_dict_outputs_are_equal(build: Build, inputs: Inputs, variant: str) -> None:
    model = build(variant)
    asked = {**inputs, "output_hidden_states": True, "output_attentions": True}
    for module, labels in ((model, {"labels": LABELS}), (model.model, {})):
        output = module(**asked, **labels)
        assert_close(module(**asked, **labels, return_dict=False), output.to_tuple())
        module.config.return_dict = False
        assert isinstance(module(**asked), tuple)
        module.config.return_dict = True


@every_clip_mode
def test_attentions_hidden_states_and_their_gradients(build: Build, inputs: Inputs, variant: str) -> None:
    model = build(variant)
    output = model(**inputs, labels=LABELS, output_attentions=True, output_hidden_states=True)
    masks = {"encoder": inputs["clip_attention_mask"], "feature": inputs["attention_mask"]}
    others = {"encoder": 1 + 4, "feature": 1 + 16, "none": 16}[variant]
    masked = nn.functional.pad(masks.get(variant, inputs["attention_mask"]), (others, 0), value=1) == 0
    for weights, queries in ((output.image_attentions, 16), (output.text_attentions, 9)):
        assert weights.shape == (3, 4, queries, masked.shape[1])
        assert_close(weights.sum(-1), torch.ones(3, 4, queries))
        assert (weights[masked[:, None, None].expand_as(weights)] == 0).all()
    assert [state.shape for state in output.image_hidden_states] == [(3, 16, 16)] * 2
    assert [state.shape for state in output.text_hidden_states] == [(3, 9, 16)] * 2
    tensors = [value for name, value in output.items() if torch.is_tensor(value) and name != "loss"]
    tensors += [*output.image_hidden_states, *output.text_hidden_states]
    for tensor in tensors:
        tensor.retain_grad()
    output.loss.backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in tensors)
    assert model(**inputs).image_attentions is None and model(**inputs).text_hidden_states is None


@pytest.mark.slow
def test_compiled_without_a_break_once_dynamo_admits_grus(build: Build, inputs: Inputs) -> None:
    torch._dynamo.reset()
    heads = {"use_modality_heads": True, "modality_combination": "average"}
    model = build("feature", text_config={"model_type": "distilbert", **TEXT_ENCODERS["distilbert"]}, **heads)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_close(compiled(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow
def test_compiled_with_breaks_at_the_grus(build: Build, inputs: Inputs) -> None:
    torch._dynamo.reset()  # after some recompilations it would silently run the model as it is
    # Dynamo traces what comes before a break again for each function around it: a small encoder, and no second tower.
    model = build("text", text_config={"model_type": "distilbert", **TEXT_ENCODERS["distilbert"]})
    compiled = torch.compile(model, backend="eager")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for batch in (inputs, {name: values[:2, :4] for name, values in inputs.items()}):
        assert_close(compiled(**batch).logits, model(**batch).logits)


def test_the_fusion_starts_at_the_right_scale(build: Build) -> None:
    model = build("feature").model
    grus = (model.text_branch.bi_gru.left_to_right, model.text_branch.bi_gru.right_to_left)
    bounds = {gru.weight_hh_l0: 0.1 * 16**-0.5 for gru in grus}  # a tenth of torch's own
    bounds |= {model.gate.linear.weight: (6 / (48 + 16)) ** 0.5}  # Glorot's
    bounds |= {model.text_attention.out_proj.weight: 0.1 * (6 / (16 + 16)) ** 0.5}
    for parameter, bound in bounds.items():
        assert 0.8 * bound < parameter.abs().max() <= bound
    assert model.fusion.lambda_logit.sigmoid() == 0.5
    assert_close(model.interaction.logit_scale.exp(), torch.tensor([1 / 0.07]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("width", [16, 24, 12])
def test_what_the_text_encoder_says_passes_through_the_gru(build: Build, width: int) -> None:
    text_config = {"model_type": "roberta", **TEXT_ENCODERS["roberta"], "hidden_size": width}
    bi_gru = build("text", text_config=text_config).model.text_branch.bi_gru
    states, mask = torch.randn(3, 9, width), torch.ones(3, 9, dtype=torch.bool)
    kept = min(width, 16)
    said, heard = states[..., :kept].tanh().flatten(), bi_gru(states, mask)[..., :kept].flatten()
    assert torch.corrcoef(torch.stack([said, heard]))[0, 1] > 0.9
    assert 0.7 < (heard @ said) / (said @ said) < 1


@every_variant
def test_two_models_of_one_seed_are_equal(build: Build, variant: str, nan_memory: None) -> None:
    torch.manual_seed(1)
    first = build(variant).state_dict()
    torch.manual_seed(1)
    second = build(variant).state_dict()
    assert all(torch.equal(first[name], value) and value.isfinite().all() for name, value in second.items())


@three_variants
def test_what_a_checkpoint_lacks_starts_as_in_a_new_model(
    build: Build, variant: str, nan_memory: None, tmp_path: Path
) -> None:
    model = build(variant, logit_scale_init_value=1.5)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {"classifier.bias": torch.tensor([1.0, 2.0, 3.0])}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set(weights) - set(kept)
    assert_close(loaded.classifier.bias.data, kept["classifier.bias"])
    torch.manual_seed(2)
    once = type(model).from_pretrained(tmp_path).state_dict()
    torch.manual_seed(2)
    assert all(
        torch.equal(once[key], value) for key, value in type(model).from_pretrained(tmp_path).state_dict().items()
    )
    for name, value in model.named_parameters():
        got, factor = loaded.get_parameter(name), 1.4 if value.numel() >= 100 else 4
        if name in kept:
            continue
        if value.std(correction=0) == 0:  # biases, norms, lambda and the temperature start from a constant
            assert torch.equal(got, value), name
        else:
            assert 1 / factor < got.std() / value.std() < factor, name
    for (name, value), (_, got) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert torch.equal(got, value), name


@every_variant
def test_parts_share_the_models_config(build: Build, variant: str) -> None:
    model = build(variant)
    config = model.config
    assert model.model.config is config
    expected = {"text": config.text_config, "vision": config.vision_config}
    expected |= {f"clip.{side}": getattr(config.clip_config, f"{side}_config") for side in ("text", "vision")}
    assert all(part.config is expected[name] for name, part in model.backbones().items())


@three_variants
@pytest.mark.parametrize("saved", ["base", "classifier"])
def test_each_class_loads_what_the_other_saved(
    build: Build, inputs: Inputs, variant: str, saved: str, tmp_path: Path
) -> None:
    model = build(variant)
    part = model.model if saved == "base" else model
    part.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(part.state_dict()) and not list(tmp_path.glob("*.bin"))
    fused, head = model(**inputs).fused_embeds, {"classifier.weight", "classifier.bias"}
    classes = {ClipCaCgModel: AutoModel, ClipCaCgForSequenceClassification: AutoModelForSequenceClassification}
    for cls, auto_class in classes.items():
        loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is cls and not loaded.training
        lacking = head if saved == "base" and cls is ClipCaCgForSequenceClassification else set()
        assert info["missing_keys"] == lacking and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert_close(loaded(**inputs).fused_embeds, fused)


def test_a_base_model_loads_a_classifiers_checkpoint_in_silence(build: Build, tmp_path: Path) -> None:
    build("none").save_pretrained(tmp_path)
    code = "import sys; from clipcacg import ClipCaCgModel; ClipCaCgModel.from_pretrained(sys.argv[1])"
    done = commands.run(["-c", code, tmp_path], tmp_path)
    assert "classifier" not in done.stdout + done.stderr


class InPlaceInit(ClipCaCgForSequenceClassification):
    """Initialises as many models outside of transformers do: in place, whatever was loaded before."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.GRU)):
            for parameter in module.parameters(recurse=False):
                parameter.data.normal_()


@every_variant
def test_a_subclass_that_initialises_in_place_reloads_every_weight(
    tiny_config: Callable[..., ClipCaCgConfig], variant: str, tmp_path: Path
) -> None:
    model = InPlaceInit(tiny_config(**VARIANTS[variant]))
    loaded = reload(model, tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


@every_clip_mode
def test_the_evaluation_loss_does_not_depend_on_the_batch_size(build: Build, inputs: Inputs, variant: str) -> None:
    model = build(variant)
    together = model(**inputs, labels=LABELS)
    rows = [{name: value[row : row + 1] for name, value in inputs.items()} for row in range(3)]
    alone = [model(**post, labels=LABELS[row : row + 1]).loss for row, post in enumerate(rows)]
    assert_close(together.loss, torch.stack(alone).mean())
    assert together.contrastive_loss is None
    trained = model.train()(**inputs, labels=LABELS)
    assert (trained.contrastive_loss is not None) == (variant == "feature")


@three_variants
def test_device_maps(build: Build, inputs: Inputs, variant: str, tmp_path: Path) -> None:
    model = build(variant)
    logits, size = model(**inputs).logits, sum(4 * value.numel() for value in model.parameters())
    assert_close(reload(model, tmp_path, device_map={"": "cpu"})(**inputs).logits, logits)
    for part in (0.3, 0.6):
        limits = {"device_map": "auto", "max_memory": {"cpu": int(part * size)}, "offload_folder": tmp_path / "off"}
        loaded = type(model).from_pretrained(tmp_path, **limits)
        assert "disk" in loaded.hf_device_map.values()
        assert_close(loaded(**inputs).logits, logits)


@every_variant
def test_token_embeddings(build: Build, inputs: Inputs, variant: str, tmp_path: Path) -> None:
    model = build(variant)
    if variant == "image":
        assert model.get_input_embeddings() is None
        return
    if variant == "shared":
        assert model.get_input_embeddings().weight.shape == (60, 16)
        with pytest.raises(ValueError, match="no text encoder of its own"):
            model.resize_token_embeddings(70, mean_resizing=False)
        return
    assert model.get_input_embeddings() is model.model.text_branch.backbone.embeddings.word_embeddings
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.config.text_config.vocab_size == 70 and model.config.clip_config.text_config.vocab_size == 60
    inputs["input_ids"][0, 0] = 69
    loaded = reload(model, tmp_path)
    assert loaded.get_input_embeddings().weight.shape == (70, 16)
    assert_close(loaded(**inputs).logits, model(**inputs).logits)
    loaded.set_input_embeddings(nn.Embedding(70, 16, _weight=torch.zeros(70, 16)))
    assert (loaded(**inputs).logits - model(**inputs).logits).abs().max() > 1e-4


@pytest.mark.parametrize(("variant", "task_type"), [("encoder", "SEQ_CLS"), ("feature", None), ("text", "SEQ_CLS")])
def test_lora(build: Build, inputs: Inputs, variant: str, task_type: str | None, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    reload(build(variant), tmp_path / "base")
    head = None if task_type else ["classifier"]
    lora = peft.LoraConfig(task_type=task_type, r=2, target_modules=["query", "value"], modules_to_save=head)
    model = peft.get_peft_model(ClipCaCgForSequenceClassification.from_pretrained(tmp_path / "base"), lora)
    start = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.5)
    for _ in range(2):
        gradients(model, inputs)
        optimizer.step()
    assert all(torch.equal(buffer, start[name]) for name, buffer in model.named_buffers())  # BatchNorm's statistics
    logits = model.eval()(**inputs).logits
    base = ClipCaCgForSequenceClassification.from_pretrained(tmp_path / "base")
    assert (logits - base(**inputs).logits).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_close(adapted(**inputs).logits, logits)
    merged = reload(adapted.merge_and_unload(), tmp_path / "merged")
    assert_close(merged(**inputs).logits, logits, rtol=0, atol=1e-5)


def save_backbone(family: str, fields: dict[str, object], folder: Path) -> Path:
    config = AutoConfig.for_model(**{"model_type": family, **fields})
    (CLIPModel(config) if family == "clip" else AutoModel.from_config(config)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("text", "vision"),
    [("bert", "resnet"), ("roberta", "resnet"), *(("distilbert", family) for family in VISION_ENCODERS)],
)
def test_from_backbones(
    tiny_config: Callable[..., ClipCaCgConfig], inputs: Inputs, text: str, vision: str, tmp_path: Path
) -> None:
    if vision == "timm_wrapper":
        pytest.importorskip("timm")
    sources = {
        "text": save_backbone(text, TEXT_ENCODERS[text], tmp_path / "text"),
        "vision": save_backbone(vision, VISION_ENCODERS[vision], tmp_path / "vision"),
        "clip": save_backbone("clip", tiny_config().clip_config.to_dict(), tmp_path / "clip"),
    }
    named = {f"{part}_model": folder for part, folder in sources.items()}
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "dtype": "bfloat16" if vision == "regnet" else None}
    model = ClipCaCgForSequenceClassification.from_backbones(**named, **sizes)
    assert not model.training and model(**inputs).logits.shape == (3, 3)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16 if sizes["dtype"] else torch.float32}
    for name, encoder in model.backbones().items():
        source = AutoModel.from_pretrained(sources[name.partition(".")[0]]).state_dict()
        for key, value in encoder.state_dict().items():
            assert torch.equal(value, source[key].to(value.dtype)), (name, key)
    loaded = reload(model, tmp_path / "saved", dtype="auto")
    assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_backbones_load_in_silence_unless_weights_are_missing(
    tiny_config: Callable[..., ClipCaCgConfig], tmp_path: Path
) -> None:
    clip = save_backbone("clip", tiny_config().clip_config.to_dict(), tmp_path / "clip")
    named = {
        "text_model": save_backbone("bert", TEXT_ENCODERS["bert"], tmp_path / "text"),
        "vision_model": save_backbone("resnet", VISION_ENCODERS["resnet"], tmp_path / "vision"),
        "clip_model": clip,
    }
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    for name in ("transformers", "clipcacg"):
        logging.getLogger(name).addHandler(handler)
    try:
        ClipCaCgModel.from_backbones(**named, hidden_size=16)
        assert not [record for record in records if record.levelno >= logging.WARNING]
        weights = load_file(clip / "model.safetensors")
        del weights["visual_projection.weight"]
        save_file(weights, clip / "model.safetensors", metadata={"format": "pt"})
        ClipCaCgModel.from_backbones(**named, hidden_size=16)
    finally:
        for name in ("transformers", "clipcacg"):
            logging.getLogger(name).removeHandler(handler)
    (told,) = [record.getMessage() for record in records if record.levelno >= logging.WARNING]
    assert "lacks visual_projection.weight" in told


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({"modality": "text"}, "text_model"), ({"modality": "image"}, "vision_model"),
        ({"clip_mode": "none"}, "text_model, vision_model"),
        ({"clip_config": {}}, "text_model, vision_model, clip_model"), ({}, "clip_model"),
    ],
)  # fmt: skip
def test_backbones_that_are_not_named(fields: dict[str, object], missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        ClipCaCgModel.from_backbones(**fields)


def test_a_backbone_that_the_model_has_not_is_told(tiny_config: Callable[..., ClipCaCgConfig]) -> None:
    model = ClipCaCgForSequenceClassification(tiny_config(clip_mode="feature"))
    for name in ("image", "clip.text"):
        with pytest.raises(ValueError, match=f"no backbone '{name}'. It has: text, vision"):
            model.encode(name, torch.zeros(1, 3, 32, 32))


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Inputs) -> Tensor:
    return model(**inputs).logits


@three_variants
def test_another_size_is_refused_unless_it_was_asked_for(build: Build, variant: str, tmp_path: Path) -> None:
    """test_load_with_mismatched_shapes: what does not fit is told, and drawn anew if the caller says so."""
    model = build(variant)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path, num_labels=5)
    loaded, info = type(model).from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key for key, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert loaded.classifier.weight.shape == (5, 16) and 0 < loaded.classifier.weight.std() < 1
    assert loaded.config.id2label == {index: f"LABEL_{index}" for index in range(5)}
    assert_close(loaded.model.state_dict(), model.model.state_dict())
    narrow = {"text_config": {**model.config.text_config.to_dict(), "vocab_size": 70}}
    if variant != "image":
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            ClipCaCgModel.from_pretrained(tmp_path, **narrow)


@every_variant
def test_a_type_is_kept_on_disk_and_back(build: Build, inputs: Inputs, variant: str, tmp_path: Path) -> None:
    """test_load_save_without_changing_dtype: `dtype="auto"` is what was saved."""
    half = torch.bfloat16
    model = build(variant).to(half)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors").values()
    assert {value.dtype for value in stored if value.is_floating_point()} == {half}
    loaded = type(model).from_pretrained(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {half} == {loaded.dtype}
    assert logits_of(loaded, inputs).dtype == half and torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))
    assert type(model).from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


@every_clip_mode
def test_an_unknown_attention_is_refused_and_changes_nothing(build: Build, variant: str) -> None:
    model = build(variant)
    model.set_attn_implementation("eager")
    with pytest.raises((ImportError, ValueError)):
        model.set_attn_implementation("no_such_attention")
    used = [model.config, *(part.config for name, part in model.backbones().items() if name != "vision")]
    assert {config._attn_implementation for config in used} == {"eager"} and "vision" in model.backbones()


@pytest.mark.filterwarnings("ignore:.*_checkpointing:FutureWarning")  # the names that every release has
@three_variants
def test_checkpointing_goes_on_and_off(build: Build, inputs: Inputs, variant: str) -> None:
    """test_training_gradient_checkpointing, reentrant or not, for the base class as well; then off again."""
    model = build(variant)
    plain = {name: None if grad is None else grad.clone() for name, grad in gradients(model, inputs).items()}
    for reentrant in (False, True):
        # Reentrant checkpoints need an input with a gradient, as the Trainer and PEFT arrange it.
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant and variant != "image":
            model.enable_input_require_grads()
        assert model.is_gradient_checkpointing
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        assert_close(gradients(model, inputs), plain)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert_close(gradients(model, inputs), plain)


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "clip_attention_mask", "clip_pixel_values"])
def test_an_extra_axis_is_refused_in_a_sentence(
    tiny_config: Callable[..., ClipCaCgConfig], inputs: dict[str, Tensor], name: str
) -> None:
    """As the stacked outputs of a processor that was called on one example at a time."""
    model = ClipCaCgForSequenceClassification(tiny_config())
    with pytest.raises(ValueError, match=rf"^{name} must have the axes \(batch, .* but its shape is \(3, 1, "):
        model(**inputs | {name: inputs[name].unsqueeze(1)})
