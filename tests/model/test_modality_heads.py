"""The heads for the labels of text and image alone, and the label rule on probabilities."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import make_inputs
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close
from transformers import AutoModel
from transformers.utils.generic import find_labels

from clipcacg.configuration_clipcacg import LABELS, ClipCaCgConfig
from clipcacg.modeling_clipcacg import (
    ClipCaCgForSequenceClassification,
    average_with_rule,
    combine_probabilities,
    known_cross_entropy,
)
from clipcacg.processing_clipcacg import label_scores
from clipcacg.scripts.baselines.concatenation import Concatenation, ConcatenationConfig
from clipcacg.scripts.data.mvsa import combine_labels

Build = Callable[..., Any]
UNKNOWN = torch.full((3,), -100)
LABEL = torch.tensor([0, 1, 2])


@pytest.fixture(params=["ours", "concatenation"])
def build(request: pytest.FixtureRequest, tiny_config: Callable[..., ClipCaCgConfig]) -> Build:
    """A function that makes a tiny model with heads and without dropout; keywords override config fields."""

    def make(**overrides: object) -> ClipCaCgForSequenceClassification | Concatenation:
        config = tiny_config(use_modality_heads=True, dropout=0.0, **overrides)
        if request.param == "ours":
            return ClipCaCgForSequenceClassification(config)
        encoders = {"text_config": config.text_config, "vision_config": config.vision_config}
        return Concatenation(ConcatenationConfig(use_modality_heads=True, dropout=0.0, **encoders, **overrides))

    return make


def gradients(model: torch.nn.Module, inputs: dict[str, Tensor], **labels: Tensor) -> dict[str, Tensor]:
    """Gradients of the heads and the classifier after one training step; the loss must be finite."""
    model.train().zero_grad()
    loss = model(**inputs, **labels).loss
    loss.backward()
    assert loss.isfinite()
    return {n: p.grad for n, p in model.named_parameters() if n.startswith(("classifier", "modality_heads"))}


@pytest.mark.parametrize("order", [LABELS, ("positive", "neutral", "negative"), ("neutral", "positive", "negative")])
def test_the_rule_on_probabilities_is_combine_labels(order: tuple[str, ...]) -> None:
    pairs = [(text, image) for text in order for image in order]
    text, image = (torch.eye(3)[[order.index(pair[side]) for pair in pairs]] for side in (0, 1))
    for pair, row in zip(pairs, combine_probabilities(text, image, order.index("neutral")), strict=True):
        label = combine_labels(*pair)
        expected = torch.zeros(3) if label is None else torch.eye(3)[order.index(label)]
        assert torch.equal(row, expected), pair


def test_the_rule_drops_positive_against_negative_and_scales_the_rest() -> None:
    text, image = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.0, 0.5, 0.5]])
    # negative 0.5 * 0.5, neutral 0.25 * 0.5, positive 0.25 * 0.5 + 0.25 * 0.5 + 0.25 * 0.5; 0.25 is dropped
    assert_close(combine_probabilities(text, image), torch.tensor([[0.25, 0.125, 0.375]]) / 0.75)


def test_the_average_stays_finite_where_the_rule_has_no_answer() -> None:
    certain = torch.tensor([[500.0, 0.0, -500.0]])
    averaged = average_with_rule(torch.tensor([[0.0, 1.0, -300.0]]), certain, certain.flip(1))
    assert averaged.isfinite().all()
    assert_close(averaged.softmax(-1), torch.tensor([[0.0, 1.0, -300.0]]).softmax(-1))


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 0.1])])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_unknown_labels_are_left_out_of_the_mean(weights: Tensor | None, smoothing: float) -> None:
    logits, labels = torch.randn(4, 3, requires_grad=True), torch.tensor([2, -100, 0, -100])
    ours = known_cross_entropy(logits, labels, weights, smoothing)
    assert_close(ours, functional.cross_entropy(logits, labels, weights, label_smoothing=smoothing))
    nothing = known_cross_entropy(logits, torch.full((4,), -100), weights, smoothing)
    nothing.backward()
    assert nothing == 0 and torch.equal(logits.grad, torch.zeros(4, 3))


def test_each_label_trains_its_own_head(build: Build, inputs: dict[str, Tensor]) -> None:
    model = build(modality_loss_weight=0.5)
    names = ("classifier", "modality_heads.text", "modality_heads.image")
    for number, labels in enumerate(["labels", "text_labels", "image_labels"]):
        found = gradients(model, inputs, **{"labels": UNKNOWN, labels: LABEL})
        assert all(grad is not None for grad in found.values())  # distributed training waits for each of them
        trained = {name for name in names if any(grad.any() for key, grad in found.items() if key.startswith(name))}
        assert trained == {names[number]}
    found = model(**inputs, labels=LABEL, text_labels=LABEL, image_labels=UNKNOWN)
    text = functional.cross_entropy(found.text_logits, LABEL)
    assert_close(found.modality_loss, text)
    others = found.loss - 0.5 * text - functional.cross_entropy(found.logits, LABEL)
    assert_close(others, torch.tensor(0.0), atol=1e-5, rtol=0)
    assert not any(grad.any() for grad in gradients(model, inputs, labels=UNKNOWN).values())


def test_the_average_is_the_prediction_in_evaluation_mode_alone(build: Build, inputs: dict[str, Tensor]) -> None:
    model = build(modality_combination="average", id2label={0: "positive", 1: "negative", 2: "neutral"}).eval()
    found = model(**inputs, labels=LABEL, text_labels=LABEL)
    assert found.modality_loss is None  # so an evaluation loss is comparable with that of a model without heads
    assert_close(found.loss, functional.cross_entropy(found.logits, LABEL))
    rule = combine_probabilities(found.text_logits.softmax(-1), found.image_logits.softmax(-1), neutral=2)
    model.config.modality_combination = "classifier"
    classifier = model(**inputs).logits
    assert_close(found.logits.exp(), (classifier.softmax(-1) + rule) / 2)
    # The temperature acts on the average: no part of it changes, nor does any output of the model.
    model.config.modality_combination, model.config.temperature = "average", 2.0
    scaled = model(**inputs)
    assert torch.equal(scaled.logits, found.logits) and torch.equal(scaled.text_logits, found.text_logits)
    roots = ((classifier.softmax(-1) + rule) / 2).sqrt()
    assert_close(label_scores(scaled.logits, model.config), roots / roots.sum(-1, keepdim=True))
    trained = {}
    for combination in ("average", "classifier"):
        model.config.modality_combination = combination
        torch.manual_seed(0)  # the encoders' dropout
        trained[combination] = model.train()(**inputs).logits
        half = copy.deepcopy(model).bfloat16().eval()(**inputs).logits
        assert half.isfinite().all() and half.dtype == torch.bfloat16
    assert torch.equal(trained["average"], trained["classifier"])


def test_the_heads_read_the_means_of_each_modality(tiny_config: Callable[..., ClipCaCgConfig]) -> None:
    model = ClipCaCgForSequenceClassification(tiny_config(use_modality_heads=True)).eval()
    inputs = make_inputs([9, 5, 1], [7, 4, 2])
    found = model(**inputs, output_hidden_states=True)
    F_T, F_I, mask = found.text_hidden_states[0], found.image_hidden_states[0], inputs["attention_mask"].bool()
    means = torch.stack([states[real].mean(dim=0) for states, real in zip(F_T, mask, strict=True)])
    assert_close(found.text_logits, model.modality_heads.text(means))
    assert_close(found.image_logits, model.modality_heads.image(F_I.mean(dim=1)))
    assert model(**inputs).text_hidden_states is None
    plain = ClipCaCgForSequenceClassification(tiny_config()).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(plain(**inputs).logits, found.logits) and plain(**inputs).text_logits is None


def test_a_checkpoint_keeps_heads_and_combination(
    tiny_config: Callable[..., ClipCaCgConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = make_inputs([9, 5, 1], [7, 4, 2])
    config = tiny_config(use_modality_heads=True, modality_combination="average")
    model = ClipCaCgForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    again = ClipCaCgForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.modality_combination == "average"
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    AutoModel.from_pretrained(tmp_path)
    assert "modality_heads" not in caplog.text
    with pytest.raises(ValueError, match="'average' needs the labels negative, neutral, positive, not LABEL_0"):
        ClipCaCgForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)


def test_the_trainer_expects_no_labels_but_the_posts() -> None:
    """It takes every argument with "label" in its name for one that each batch must have to compute a metric."""
    assert find_labels(ClipCaCgForSequenceClassification) == find_labels(Concatenation) == ["labels"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"use_modality_heads": True, "modality": "text"}, "needs modality='both'.*'text'"),
        ({"use_modality_heads": True, "num_labels": 1}, "one of several labels.*1 label"),
        ({"use_modality_heads": True, "problem_type": "multi_label_classification"}, "'multi_label_classification'"),
        ({"modality_combination": "average"}, "needs use_modality_heads=True"),
        ({"modality_combination": "average", "use_modality_heads": True, "num_labels": 2}, "needs the labels neg"),
        ({"modality_combination": "rule"}, "modality_combination must be one of classifier, average, not 'rule'"),
    ],
)
def test_what_cannot_be_built_is_refused(
    fields: dict[str, Any], said: str, tiny_config: Callable[..., ClipCaCgConfig]
) -> None:
    with pytest.raises(ValueError, match=said):
        tiny_config(**fields)
