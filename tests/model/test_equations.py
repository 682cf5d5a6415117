"""Each module of the paper against a value computed here from its equation, in plain torch."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import CLIPModel

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import (
    BiGru,
    ClipCaCgForSequenceClassification,
    ClipEncoderInteraction,
    ConcatFusion,
    CrossAttention,
    CrossModalGate,
    FeatureInteraction,
    GatedFusion,
    NoClipInteraction,
)

Inputs = dict[str, Tensor]
MakeConfig = Callable[..., ClipCaCgConfig]

# Padding on the right, on the left, holes, nothing but padding.
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]]).bool()
LABELS = torch.tensor([0, 2, 1])


def unit(vector: Tensor) -> Tensor:
    return vector / vector.pow(2).sum(-1, keepdim=True).sqrt()


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Each text's mean over its own tokens; zeros where there are none."""
    zero = torch.zeros(states.shape[-1])
    return torch.stack(
        [row[keep].sum(0) / keep.sum() if keep.any() else zero for row, keep in zip(states, mask, strict=True)]
    )


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def mlp(layers: nn.Sequential, x: Tensor) -> Tensor:
    hidden = linear(layers[0], x)
    return linear(layers[-1], hidden * (1 + torch.erf(hidden / 2**0.5)) / 2)


def layer_norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def randomize(module: nn.Module) -> nn.Module:
    """Every parameter away from the zeros and ones of its start, so that none can be left out unseen."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


def interaction_sequence(image: Tensor, patches: Tensor, text: Tensor, words: Tensor) -> Tensor:
    """Equation 5 row by row: v * t, then v_patch * t, then v * t_word, times c."""
    rows = []
    for v, v_patches, t, t_words in zip(image, patches, text, words, strict=True):
        rows.append(torch.stack([v * t, *(patch * t for patch in v_patches), *(v * word for word in t_words)]))
    return image.shape[-1] * torch.stack(rows)


def test_equations_2_and_3_mean_of_two_grus_over_the_real_tokens() -> None:
    module, states = BiGru(6, 4), torch.randn(5, 5, 6)
    there, back = nn.GRU(6, 4, batch_first=True), nn.GRU(6, 4, batch_first=True)
    there.load_state_dict(module.left_to_right.state_dict())
    back.load_state_dict(module.right_to_left.state_dict())
    result = module(states, MASK)
    assert result.shape == (5, 5, 4) and result.isfinite().all()
    for row, keep, got in zip(states[:4], MASK[:4], result[:4], strict=True):
        tokens = row[keep].unsqueeze(0)
        expected = (there(tokens)[0] + back(tokens.flip(1))[0].flip(1)) / 2
        assert_close(got[keep], expected[0])


def test_equation_5_of_the_models_own_features(tiny_config: MakeConfig) -> None:
    module = randomize(FeatureInteraction(tiny_config(clip_mode="feature")))
    image_states, text_states = torch.randn(4, 3, 16), torch.randn(4, 5, 16)
    joint = module(image_states, text_states, MASK[:4])
    patches, words = linear(module.image_projection, image_states), linear(module.text_projection, text_states)
    v, t = unit(patches.mean(1)), unit(masked_mean(words, MASK[:4]))
    assert_close(joint.image_embeds, v)
    assert_close(joint.text_embeds, t)
    sequence = interaction_sequence(v, unit(patches), t, unit(words))
    assert_close(sequence[:, 0], 12 * v * t)
    assert_close(joint.states, linear(module.output_projection, sequence))
    assert_close(joint.token, joint.states[:, 0])
    assert_close(joint.mask, torch.cat([torch.ones(4, 4).bool(), MASK[:4]], dim=1))


@pytest.mark.parametrize(("start", "temperature"), [(2.6592, 1 / 0.07), (9.0, 100.0)])
def test_contrastive_loss_is_clips(tiny_config: MakeConfig, start: float, temperature: float) -> None:
    module = FeatureInteraction(tiny_config(clip_mode="feature", logit_scale_init_value=start))
    joint = module.train()(torch.randn(4, 3, 16), torch.randn(4, 5, 16), MASK[:4])
    scores = temperature * joint.image_embeds @ joint.text_embeds.T  # CLIP's bound on the temperature is 100
    loss = -(scores.log_softmax(0).diag().mean() + scores.log_softmax(1).diag().mean()) / 2
    assert_close(joint.contrastive_loss, loss, rtol=1e-4, atol=1e-4)
    assert module.eval()(torch.randn(4, 3, 16), torch.randn(4, 5, 16), MASK[:4]).contrastive_loss is None


def test_equation_5_with_clips_own_towers(tiny_config: MakeConfig, inputs: Inputs) -> None:
    config = tiny_config()
    config.clip_config.projection_dim = 10  # the towers' own configs still say 12
    clip = randomize(CLIPModel(config.clip_config))
    module = ClipEncoderInteraction(config).eval()
    weights = clip.state_dict()
    module.clip_text.load_state_dict({key: weights[key] for key in module.clip_text.state_dict()})
    module.clip_vision.load_state_dict({key: weights[key] for key in module.clip_vision.state_dict()})
    ids, mask, pixels = (inputs[f"clip_{name}"] for name in ("input_ids", "attention_mask", "pixel_values"))
    joint = module(ids, mask, pixels)

    reference = clip(input_ids=ids, attention_mask=mask, pixel_values=pixels)
    v, t = reference.image_embeds, reference.text_embeds
    assert_close(joint.image_embeds, v)
    assert_close(joint.text_embeds, t)
    assert_close(joint.image_embeds.norm(dim=-1), torch.ones(3))
    patches = clip.vision_model.post_layernorm(reference.vision_model_output.last_hidden_state[:, 1:])
    patches = unit(clip.visual_projection(patches))
    words = unit(clip.text_projection(reference.text_model_output.last_hidden_state))
    expected = linear(module.output_projection, interaction_sequence(v, patches, t, words))
    assert expected.shape == (3, 1 + 4 + 7, 16)
    real = torch.cat([torch.ones(3, 5), mask], dim=1).bool()
    assert_close(joint.mask, real)
    assert_close(joint.states[real], expected[real])
    assert_close(joint.token, joint.states[:, 0])


def test_without_clip_keys_are_both_features(tiny_config: MakeConfig) -> None:
    image_states, text_states = torch.randn(5, 3, 16), torch.randn(5, 5, 16)
    joint = NoClipInteraction(tiny_config())(image_states, text_states, MASK)
    assert_close(joint.states, torch.cat([image_states, text_states], dim=1))
    assert_close(joint.mask, torch.cat([torch.ones(5, 3).bool(), MASK], dim=1))
    assert joint.token is None and joint.image_embeds is None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_equations_6_to_10_are_torchs_multi_head_attention(tiny_config: MakeConfig, attention: str) -> None:
    module = randomize(CrossAttention(tiny_config(attn_implementation=attention)))
    reference = nn.MultiheadAttention(16, 4, batch_first=True)
    three = (module.q_proj, module.k_proj, module.v_proj)
    reference.in_proj_weight.data = torch.cat([layer.weight for layer in three])
    reference.in_proj_bias.data = torch.cat([layer.bias for layer in three])
    reference.out_proj.load_state_dict(module.out_proj.state_dict())
    queries, keys, mask = torch.randn(4, 3, 16), torch.randn(4, 5, 16), MASK[:4]
    attended, weights = reference(queries, keys, keys, key_padding_mask=~mask, average_attn_weights=False)
    expected = layer_norm(module.norm, queries + attended)
    states, nothing = module(queries, keys, mask)
    assert_close(states, expected)
    assert nothing is None
    states, returned = module(queries, keys, mask, output_attentions=True)
    assert_close(states, expected)
    assert_close(returned, weights)


@pytest.mark.parametrize("mode", ["feature", "none"])
def test_equations_11_and_12_gate(tiny_config: MakeConfig, mode: str) -> None:
    module = randomize(CrossModalGate(tiny_config(clip_mode=mode)))
    image_it, text_it, token = torch.randn(5, 3, 16), torch.randn(5, 5, 16), torch.randn(5, 16)
    mixed, gate = module(None if mode == "none" else token, image_it, text_it, MASK)
    x = torch.cat([*([] if mode == "none" else [token]), image_it.mean(1), masked_mean(text_it, MASK)], dim=1)
    g = 1 / (1 + torch.exp(-linear(module.sigmoid_linear, x)))
    nonlinear = torch.tanh(linear(module.tanh_linear, layer_norm(module.norm, x)))
    assert_close(gate, g)
    assert_close(mixed, g * linear(module.linear, x) + (1 - g) * nonlinear)


def test_equations_13_to_15_balance_of_image_and_text(tiny_config: MakeConfig) -> None:
    module = GatedFusion(tiny_config()).eval()
    f_i, f_t, mixed = torch.randn(5, 3, 16), torch.randn(5, 5, 16), torch.randn(5, 16)
    image_side = mlp(module.image_mlp, torch.cat([f_i.mean(1), mixed], dim=1))
    text_side = mlp(module.text_mlp, torch.cat([masked_mean(f_t, MASK), mixed], dim=1))
    assert_close(module(f_i, f_t, MASK, mixed), 0.5 * image_side + 0.5 * text_side)
    module.lambda_logit.data.fill_(math.log(3))  # sigmoid(ln 3) = 3/4
    assert_close(module(f_i, f_t, MASK, mixed), 0.75 * image_side + 0.25 * text_side)


def test_without_the_gate_one_mlp_reads_all(tiny_config: MakeConfig) -> None:
    module = ConcatFusion(tiny_config()).eval()
    f_i, f_t, token = torch.randn(5, 3, 16), torch.randn(5, 5, 16), torch.randn(5, 16)
    image_it, text_it = torch.randn(5, 3, 16), torch.randn(5, 5, 16)
    everything = (token, image_it.mean(1), masked_mean(text_it, MASK), f_i.mean(1), masked_mean(f_t, MASK))
    assert_close(module(f_i, f_t, MASK, token, image_it, text_it), mlp(module.mlp, torch.cat(everything, dim=1)))


@pytest.mark.parametrize("overrides", [{}, {"clip_mode": "feature"}, {"clip_mode": "none"}], ids=str)
@pytest.mark.parametrize("attend", [True, False], ids=["CA", "no CA"])
def test_equations_11_to_16_in_the_whole_model(
    tiny_config: MakeConfig, inputs: Inputs, overrides: dict[str, str], attend: bool
) -> None:
    model = ClipCaCgForSequenceClassification(tiny_config(**overrides, use_cross_attention=attend)).eval()
    output = model(**inputs, output_hidden_states=True)
    (f_i, image_it), (f_t, text_it) = output.image_hidden_states, output.text_hidden_states
    mask, base = inputs["attention_mask"].bool(), model.model
    if attend:
        clip_inputs = (inputs[f"clip_{name}"] for name in ("input_ids", "attention_mask", "pixel_values"))
        joint = base.interaction(*((f_i, f_t, mask) if overrides else clip_inputs))  # eq. 5
        assert_close(image_it, base.image_attention(f_i, joint.states, joint.mask)[0])  # eq. 6-10
        assert_close(text_it, base.text_attention(f_t, joint.states, joint.mask)[0])
    else:
        assert_close((image_it, text_it), (f_i, f_t))
    token = None
    if output.image_embeds is not None:
        token = linear(base.interaction.output_projection, 12 * output.image_embeds * output.text_embeds)
    mixed, gate = base.gate(token, image_it, text_it, mask)  # eq. 11, 12
    assert_close(output.gate, gate)
    image_side = mlp(base.fusion.image_mlp, torch.cat([f_i.mean(1), mixed], dim=1))  # eq. 13
    text_side = mlp(base.fusion.text_mlp, torch.cat([masked_mean(f_t, mask), mixed], dim=1))  # eq. 14
    assert_close(output.fused_embeds, (image_side + text_side) / 2)  # eq. 15
    assert_close(output.logits, linear(model.classifier, output.fused_embeds))  # eq. 16


@pytest.mark.parametrize("modality", ["image", "text"])
def test_one_modality_alone(tiny_config: MakeConfig, inputs: Inputs, modality: str) -> None:
    model = ClipCaCgForSequenceClassification(tiny_config(modality=modality)).eval()
    output, base = model(**inputs, output_hidden_states=True), model.model
    if modality == "image":
        feature_map = base.image_branch.backbone(inputs["pixel_values"]).last_hidden_state
        regions = torch.stack([feature_map[:, :, i, j] for i in range(4) for j in range(4)], dim=1)
        states = layer_norm(base.image_branch.norm, linear(base.image_branch.projection, regions))  # eq. 4
        assert_close(output.image_hidden_states, (states,))
        pooled = states.mean(1)
    else:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        tokens = base.text_branch.backbone(input_ids=ids, attention_mask=mask).last_hidden_state  # eq. 1
        states = layer_norm(base.text_branch.norm, base.text_branch.bi_gru(tokens, mask.bool()))  # eq. 2, 3
        assert_close(output.text_hidden_states, (states,))
        pooled = masked_mean(states, mask.bool())
    assert_close(output.fused_embeds, mlp(base.fusion, pooled))
    assert output.gate is None and len([name for name in ("text", "vision") if name in model.backbones()]) == 1


def cross_entropy(logits: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """Weighted mean of the smoothed targets' cross-entropy, written out."""
    target = torch.eye(3)[LABELS] * (1 - smoothing) + smoothing / 3
    return -(target * weights * logits.log_softmax(1)).sum() / weights[LABELS].sum()


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 4.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_loss_of_classes(
    tiny_config: MakeConfig, inputs: Inputs, weights: list[float] | None, smoothing: float
) -> None:
    config = tiny_config(clip_mode="feature", class_weights=weights, label_smoothing=smoothing)
    model = ClipCaCgForSequenceClassification(config)
    output = model.train()(**inputs, labels=LABELS)
    expected = cross_entropy(output.logits, torch.tensor(weights or [1.0, 1.0, 1.0]), smoothing)
    assert_close(output.loss, expected + 0.1 * output.contrastive_loss)
    output = model.eval()(**inputs, labels=LABELS)
    expected = cross_entropy(output.logits, torch.tensor(weights or [1.0, 1.0, 1.0]), smoothing)
    assert_close(output.loss, expected)
    assert output.contrastive_loss is None


@pytest.mark.parametrize(
    "labels", [torch.tensor([0.5, -1.0, 2.0]), torch.tensor([[0.5], [-1.0], [2.0]])], ids=["flat", "column"]
)
def test_loss_of_a_regression(tiny_config: MakeConfig, inputs: Inputs, labels: Tensor) -> None:
    model = ClipCaCgForSequenceClassification(tiny_config(num_labels=1, problem_type="regression")).eval()
    output = model(**inputs, labels=labels)
    assert_close(output.loss, (output.logits[:, 0] - labels.flatten()).pow(2).mean())


def test_loss_of_several_classes_at_once(tiny_config: MakeConfig, inputs: Inputs) -> None:
    model = ClipCaCgForSequenceClassification(tiny_config(problem_type="multi_label_classification")).eval()
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    output = model(**inputs, labels=labels)
    p = torch.sigmoid(output.logits)
    assert_close(output.loss, -(labels * p.log() + (1 - labels) * (1 - p).log()).mean())
