"""The systems of Table III against values computed here from their equations, in plain torch."""

import math

import pytest
import torch
from test_baselines import LABELS, make, make_post_inputs
from test_equations import MASK, linear, masked_mean, randomize, unit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from clipcacg.scripts.baselines.clmlf import data_contrastive_loss, label_contrastive_loss
from clipcacg.scripts.baselines.dnn_lr import DropConnect
from clipcacg.scripts.baselines.layers import AdditiveAttention, Recurrent, TextCnn, masked_softmax

CACHED = ("text_features", "image_features", "attention_mask")


@pytest.fixture
def features() -> dict[str, Tensor]:
    """States of three texts with 5, 3 and 2 words, and three feature maps of 2 x 2 cells."""
    return {
        "text_features": torch.randn(3, 5, 16),
        "image_features": torch.randn(3, 12, 2, 2),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1]]),
    }


def posts(features: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The real words (words, 16) and the cells (4, 12) of each post."""
    texts, maps, masks = (features[name] for name in CACHED)
    cells = [torch.stack([one[:, i, j] for i in (0, 1) for j in (0, 1)]) for one in maps]
    return [(text[mask.bool()], cell) for text, mask, cell in zip(texts, masks, cells, strict=True)]


def additive(module: AdditiveAttention, states: Tensor, query: Tensor) -> Tensor:
    """One post: states (positions, size), query (query_size,)."""
    scores = [module.score.weight[0] @ torch.tanh(linear(module.of_states, x) + module.of_query.weight @ query)
              for x in states]  # fmt: skip
    weights = torch.stack(scores).exp()
    return (weights / weights.sum()) @ states


def test_additive_attention() -> None:
    module, states, query = randomize(AdditiveAttention(4, 6)), torch.randn(5, 5, 4), torch.randn(5, 6)
    result = module(states, query, MASK)
    for row, keep, q, got in zip(states[:4], MASK[:4], query[:4], result[:4], strict=True):
        assert_close(got, additive(module, row[keep], q))
    assert_close(result[4], torch.zeros(4))
    assert_close(module(states, query)[4], additive(module, states[4], query[4]))


def test_masked_softmax_has_no_value_where_there_is_no_key() -> None:
    weights = masked_softmax(
        torch.tensor([[1.0, 1.0, 5.0], [1.0, 2.0, 3.0]]), torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()
    )
    assert_close(weights, torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("network", [nn.LSTM, nn.GRU])
def test_recurrent_networks_read_the_real_tokens_in_their_order(network: type[nn.RNNBase]) -> None:
    plain = network(6, 4, num_layers=2, bidirectional=True, batch_first=True)
    states = torch.randn(5, 5, 6)
    result = Recurrent(plain)(states, MASK)
    for row, keep, got in zip(states[:4], MASK[:4], result[:4], strict=True):
        assert_close(got[keep], plain(row[keep].unsqueeze(0))[0][0])
    assert_close(result[~MASK], torch.zeros_like(result[~MASK]))


def test_text_cnn() -> None:
    module, words = randomize(TextCnn(6, maps=2)), torch.randn(3, 4, 6)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    expected = []
    for row, keep in zip(words, mask, strict=True):
        for width, convolution in zip((3, 4, 5), module.convolutions, strict=True):
            edge = torch.zeros(width - 1, 6)
            padded = torch.cat([edge, row[keep], edge])
            windows = [padded[i : i + width] for i in range(len(padded) - width + 1)] if keep.any() else []
            values = [torch.einsum("mdw,wd->m", convolution.weight, w) + convolution.bias for w in windows]
            expected.append(torch.stack([*values, torch.zeros(2)]).amax(0))
    assert_close(module(words, mask).flatten(), torch.cat(expected))


@pytest.mark.parametrize("tied", [True, False])
def test_co_memory_of_three_hops(features: dict[str, Tensor], tied: bool) -> None:
    model = make("co_memory", hops=3, tied=tied)
    assert (len(model.hops), len(model.updates)) == ((1, 1) if tied else (3, 2))
    result = model(**features).fused_embeds
    for (text, cells), got in zip(posts(features), result, strict=True):
        words = model.lstm.network(text.unsqueeze(0))[0][0]
        regions = linear(model.projection, cells)
        q_t, q_v = regions.mean(0), words.mean(0)
        for k in range(3):
            hop = model.hops[0 if tied else k]
            o_t, o_v = additive(hop.text, words, q_t), additive(hop.image, regions, q_v)
            if k < 2:
                update = model.updates[0 if tied else k]
                q_t, q_v = o_v + update.text.weight @ q_t, o_t + update.image.weight @ q_v
        assert_close(got, torch.cat([o_t, o_v]))
    hidden = linear(model.classifier[1], result).clamp(min=0)
    assert_close(model(**features).logits, linear(model.classifier[3], hidden))


def test_mvan_memory_and_stacking_pooling(features: dict[str, Tensor]) -> None:
    model = make("mvan", hops=2)
    result, memory = model(**features).fused_embeds, model.memory
    for (text, cells), got in zip(posts(features), result, strict=True):
        words = model.lstm.network(text.unsqueeze(0))[0][0]
        objects, scene = linear(model.object_projection, cells), linear(model.scene_projection, cells)
        m_t, m_o, m_s = words.mean(0), objects.mean(0), scene.mean(0)
        for _ in range(2):
            a_o, a_s = additive(memory.object_attention, objects, m_t), additive(memory.scene_attention, scene, m_t)
            a_t = additive(memory.text_attention, words, torch.cat([m_o, m_s]))
            m_t, m_o, m_s = memory.text_cell(a_t, m_t), memory.object_cell(a_o, m_o), memory.scene_cell(a_s, m_s)
        rows = torch.stack([linear(model.row_mlp[0], m).clamp(min=0) for m in (m_t, m_o, m_s, m_t * m_o, m_t * m_s)])
        assert_close(got, torch.cat([rows.max(0).values, rows.mean(0)]))
    assert_close(model(**features).logits, model.classifier(result))


def test_cnn_multi_joins_two_cnns_under_four_layers(features: dict[str, Tensor]) -> None:
    model = make("cnn_multi", branch_loss_weight=0.5)
    output = model(**features, labels=LABELS)
    text = model.text_cnn(features["text_features"], features["attention_mask"].bool())
    image = linear(model.image_fc[0], features["image_features"].mean((2, 3))).clamp(min=0)
    hidden = torch.cat([text, image], dim=1)
    layers = [module for module in model.joint.modules() if isinstance(module, nn.Linear)]
    assert [layer.out_features for layer in layers] == [24, 12, 6, 3]
    for layer in layers[:3]:
        hidden = linear(layer, hidden).clamp(min=0)
    assert_close(output.logits, linear(layers[3], hidden))
    branches = linear(model.text_head, text), linear(model.image_head, image)
    own = sum(F.cross_entropy(branch, LABELS) for branch in branches)
    assert_close(output.loss, F.cross_entropy(output.logits, LABELS) + 0.5 * own)


def test_dnn_lr_averages_probabilities(features: dict[str, Tensor]) -> None:
    model = make("dnn_lr", text_weight=0.25)
    output = model(**features, labels=LABELS)
    text = model.text_cnn(features["text_features"], features["attention_mask"].bool())
    image = F.linear(features["image_features"].mean((2, 3)), model.image_fc.weight / 2, model.image_fc.bias).clamp(
        min=0
    )
    y_t, y_v = linear(model.text_head, text), linear(model.image_head, image)
    assert_close(output.logits.exp(), 0.25 * y_t.softmax(1) + 0.75 * y_v.softmax(1))
    assert_close(output.loss, F.cross_entropy(y_t, LABELS) + F.cross_entropy(y_v, LABELS))


def test_drop_connect_leaves_out_weights() -> None:
    layer = DropConnect(40, 30, p=0.25)
    nn.init.zeros_(layer.bias)
    assert_close(layer.eval()(torch.eye(40)).T, 0.75 * layer.weight)
    kept = layer.train()(torch.eye(40)).T != 0
    assert_close(layer(torch.eye(40)).T.count_nonzero() / 1200, torch.tensor(0.75), atol=0.05, rtol=0)
    assert not torch.equal(kept, layer(torch.eye(40)).T != 0)


def test_clmlf_losses() -> None:
    f, g, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 0, 0])
    expected = [
        -math.log(math.exp(f[i] @ g[i] / 0.5) / sum(math.exp(f[i] @ other / 0.5) for other in g)) for i in range(4)
    ]
    assert_close(data_contrastive_loss(f, g, 0.5).item(), sum(expected) / 4, rtol=1e-4, atol=1e-5)

    pairs = [(i, j) for i in range(4) for j in range(4) if labels[i] == labels[j]]
    log_p = (f @ f.T).log_softmax(1)
    official = -sum(log_p[i, j] / 0.5 for i, j in pairs) / len(pairs)
    assert_close(label_contrastive_loss(f, labels, 0.5), official)
    others = [(i, j) for i, j in pairs if i != j]
    total = [sum(math.exp(f[i] @ f[k] / 0.5) for k in range(4) if k != i) for i in range(4)]
    usual = -sum((f[i] @ f[j] / 0.5).item() - math.log(total[i]) for i, j in others) / len(others)
    assert_close(label_contrastive_loss(f, labels, 0.5, self_pairs=False).item(), usual, rtol=1e-4, atol=1e-5)
    assert label_contrastive_loss(f, torch.arange(4), 0.5, self_pairs=False) == 0


def test_clmlf_adds_its_losses_in_training(features: dict[str, Tensor]) -> None:
    model = make("clmlf", dropout=0.0, data_loss_weight=0.5, label_loss_weight=2.0)
    task = model(**features, labels=LABELS)
    assert_close(task.loss, F.cross_entropy(task.logits, LABELS))
    second = {"text_features": torch.randn(3, 5, 16), "image_features": torch.randn(3, 12, 2, 2)}
    for augmented in ({}, second, {"text_features": second["text_features"]}):
        f = model.first_view(task.fused_embeds)
        g = model.second_view(model(**features | augmented).fused_embeds)
        expected = task.loss + 0.5 * data_contrastive_loss(f, g, 0.07) + 2 * label_contrastive_loss(f, LABELS, 0.07)
        given = {f"{name}_augmented": value for name, value in augmented.items()}
        assert_close(model.train()(**features, labels=LABELS, **given).loss, expected)
        model.eval()


def test_clmlf_starts_as_the_authors_code_does() -> None:
    """DBCL begins at 5.9 to 6.7 there and LBCL at 53.6; a Xavier start began at 86 to 100 and at 536 to 589."""
    model = make("clmlf", hidden_size=768, num_attention_heads=12, dropout=0.1).train()
    text, feature_map = torch.randn(32, 6, 16), torch.randn(32, 12, 2, 2).relu()
    labels = torch.randint(3, (32,))
    with torch.no_grad():
        first, second = (model(text_features=text, image_features=feature_map).fused_embeds for _ in range(2))
        data_loss = data_contrastive_loss(model.first_view(first), model.second_view(second), 0.07)
        label_loss = label_contrastive_loss(model.first_view(first), labels, 0.07)
    assert 4 < data_loss < 9 and 40 < label_loss < 70
    layer = model.fusion_layers.layer[0]
    assert layer.output.LayerNorm.eps == 1e-12 and layer.attention.output.dropout.p == layer.output.dropout.p == 0.1


def test_clmlf_encodes_an_image_once_unless_its_second_view_differs() -> None:
    inputs, model, passes = make_post_inputs(), make("clmlf").train(), []
    model.image_branch.backbone.register_forward_hook(lambda *_: passes.append(1))
    model(**inputs, labels=LABELS)
    assert len(passes) == 1
    model(**inputs, labels=LABELS, pixel_values_augmented=inputs["pixel_values"].flip(-1))
    assert len(passes) == 3


def test_clmlf_raw_second_views_stand_before_cached_first_ones() -> None:
    post_inputs = make_post_inputs()
    model = make("clmlf", dropout=0.0)
    ids = torch.randint(4, 58, (3, 9))
    cached = {"text_features": model.encode("text", post_inputs["input_ids"], post_inputs["attention_mask"])}
    first = {name: post_inputs[name] for name in ("attention_mask", "pixel_values")}
    views = [model.second_views(first | cached, {"input_ids": i}) for i in (ids, post_inputs["input_ids"])]
    assert_close(views[0], model(**first, input_ids=ids).fused_embeds)
    assert not torch.allclose(views[0], views[1])


def test_clmlf_fusion(features: dict[str, Tensor]) -> None:
    model = make("clmlf", num_attention_heads=4)
    for (text, cells), got in zip(posts(features), model(**features).fused_embeds, strict=True):
        cells_in, pooled = F.gelu(linear(model.cell_projection[0], cells)), cells.mean(0)
        pooled = F.gelu(linear(model.pooled_projection[0], pooled)).unsqueeze(0)
        states = torch.cat([pooled, cells_in]).unsqueeze(0)
        states = model.image_layers(states).last_hidden_state
        states = torch.cat([F.gelu(linear(model.text_projection[0], text)).unsqueeze(0), states], dim=1)
        states = model.fusion_layers(states).last_hidden_state
        scores = F.gelu(linear(model.pooling[0], states[0])) @ model.pooling[2].weight[0]
        assert_close(got, scores.softmax(0) @ states[0], rtol=1e-4, atol=1e-5)
    assert [len(model.image_layers.layer), len(model.fusion_layers.layer)] == [2, 3]


def test_clmlf_official_reshape_mixes_channels_and_positions(features: dict[str, Tensor]) -> None:
    model = make("clmlf", official_reshape=True)
    seen = []
    model.cell_projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**features)
    assert_close(seen[0], features["image_features"].view(3, 4, 12))


def attend(module: nn.Module, states: Tensor, others: Tensor) -> Tensor:
    scores = (states @ module.query.weight.T) @ (others @ module.key.weight.T).T / math.sqrt(states.shape[-1])
    return scores.softmax(-1) @ others


def side(module: nn.Module, states: Tensor, others: Tensor) -> Tensor:
    """One post's z of one side: states (positions, hidden), others (other positions, hidden)."""
    aligned = attend(module.cross_attention, states, others)
    aligned = unit(attend(module.self_attention, aligned, aligned))
    gate = 1 / (1 + torch.exp(-(states * aligned).sum(-1, keepdim=True)))
    fused = (torch.cat([states, aligned], -1) * gate @ module.fusion.weight.T).clamp(min=0) + states
    weights = (linear(module.summary[0], fused).clamp(min=0) @ module.summary[2].weight.T).softmax(0)
    return unit((weights.T @ fused).mean(0))


def test_layers_start_as_in_the_authors_code() -> None:
    bounds = {
        "region_projection.weight": (6 / (12 + 96)) ** 0.5, "region_projection.bias": 0.0,
        "region_side.cross_attention.key.weight": (3 / 96) ** 0.5, "region_side.fusion.weight": (3 / 96) ** 0.5,
        "region_side.cross_attention.query.weight": 96**-0.5, "region_side.self_attention.key.weight": 96**-0.5,
        "region_side.summary.0.bias": 96**-0.5, "text_context.weight": 192**-0.5,
    }  # fmt: skip
    parameters = dict(make("itin", hidden_size=96).named_parameters())
    for name, bound in bounds.items():
        assert parameters[name].abs().max().item() == pytest.approx(bound, rel=0.06), name


@pytest.mark.parametrize("both", [False, True])
def test_itin(features: dict[str, Tensor], both: bool) -> None:
    model = make("itin", use_word_side=both, image_weight=0.2)
    logits = model(**features).logits
    for (text, cells), got in zip(posts(features), logits, strict=True):
        there, back = model.word_gru.gru.network(text.unsqueeze(0))[0][0].chunk(2, dim=-1)
        words, context = (there + back) / 2, model.context_gru.gru.network(text.unsqueeze(0))[0][0]
        context = ((context[:, :24] + context[:, 24:]) / 2).mean(0)
        regions = unit(linear(model.region_projection, cells))
        z = side(model.region_side, regions, words)
        z = (z + side(model.word_side, words, regions)) / 2 if both else z
        h_v = linear(model.image_context, torch.cat([z, cells.mean(0)])).clamp(min=0)
        h_t = linear(model.text_context, torch.cat([z, context])).clamp(min=0)
        assert_close(got, 0.2 * linear(model.classifier, h_v) + 0.8 * linear(model.classifier, h_t))
    assert model.word_gru.gru.network.num_layers == 2


def test_concatenation(features: dict[str, Tensor]) -> None:
    model = make("concatenation")
    pooled = masked_mean(features["text_features"], features["attention_mask"].bool())
    pooled = torch.cat([pooled, features["image_features"].mean((2, 3))], dim=1)
    assert_close(model(**features).logits, linear(model.classifier, pooled))
