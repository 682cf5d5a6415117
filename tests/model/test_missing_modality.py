"""Examples without an image or without a text."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification, FeatureInteraction, withhold
from tests.inputs import CLIP_MODES, make_inputs

Config = Callable[..., ClipCaCgConfig]
HEADS = {"use_modality_heads": True, "modality_combination": "average"}


def build(config: ClipCaCgConfig) -> ClipCaCgForSequenceClassification:
    """A model whose learned states are no longer zero."""
    torch.manual_seed(0)
    model = ClipCaCgForSequenceClassification(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "missing" in name:
                parameter.normal_()
    return model


@pytest.fixture
def lacking() -> dict[str, Tensor]:
    """Four examples: complete, no image, no text, complete."""
    inputs = make_inputs([6, 4, 5, 3], [7, 4, 6, 5])
    inputs["attention_mask"][2] = inputs["clip_attention_mask"][2] = 0
    return inputs | {"has_image": torch.tensor([1, 0, 1, 1])}


@pytest.mark.parametrize("fields", [{}, HEADS, {"use_gating": False}, {"use_cross_attention": False}])
@pytest.mark.parametrize("clip_mode", CLIP_MODES)
def test_what_stands_in_for_the_missing_changes_nothing(
    tiny_config: Config, lacking: dict[str, Tensor], clip_mode: str, fields: dict[str, object]
) -> None:
    """Not the pixels of a missing image, not the tokens of a missing text, and not the other examples of the batch."""
    model = build(tiny_config(clip_mode=clip_mode, modality_dropout=0.1, **fields))
    with torch.no_grad():
        logits = model(**lacking).logits
        others = {name: value.clone() for name, value in lacking.items()}
        for name in ("pixel_values", "clip_pixel_values"):
            others[name][1] = 100.0
        for name in ("input_ids", "clip_input_ids"):
            others[name][2] = 7
        changed = model(**others).logits
        alone = torch.cat([model(**{n: v[i : i + 1] for n, v in lacking.items()}).logits for i in range(4)])
    assert logits.isfinite().all()
    torch.testing.assert_close(changed, logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("clip_mode", CLIP_MODES)
def test_a_missing_side_is_not_the_side_it_hides(
    tiny_config: Config, lacking: dict[str, Tensor], clip_mode: str
) -> None:
    """The answer differs from that of the complete example, and complete ones keep theirs."""
    model = build(tiny_config(clip_mode=clip_mode, modality_dropout=0.1))
    complete = make_inputs([6, 4, 5, 3], [7, 4, 6, 5])
    with torch.no_grad():
        outputs, whole = model(**lacking), model(**complete).logits
    torch.testing.assert_close(outputs.logits[[0, 3]], whole[[0, 3]], atol=1e-5, rtol=0)
    assert (outputs.logits[[1, 2]] - whole[[1, 2]]).abs().amax(dim=1).gt(1e-3).all()
    assert outputs.has_image.tolist() == [True, False, True, True]
    assert outputs.has_text.tolist() == [True, True, False, True]


@pytest.mark.parametrize("clip_mode", CLIP_MODES)
def test_training_reaches_the_learned_states(tiny_config: Config, lacking: dict[str, Tensor], clip_mode: str) -> None:
    config = tiny_config(clip_mode=clip_mode, use_modality_heads=True, modality_dropout=1e-9)
    model = build(config).train()
    labels = {name: torch.tensor([0, 1, 2, 1]) for name in ("labels", "text_labels", "image_labels")}
    loss = model(**lacking, **labels).loss
    loss.backward()
    missing = {name: p.grad for name, p in model.named_parameters() if "missing" in name}
    assert loss.isfinite() and len(missing) == (4 if clip_mode == "encoder" else 2)
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in missing.values())


def test_a_head_does_not_learn_from_what_is_missing(tiny_config: Config, lacking: dict[str, Tensor]) -> None:
    model = build(tiny_config(use_modality_heads=True, modality_dropout=1e-9)).train()

    def loss(text_label: int, image_label: int) -> float:
        """With these labels for the example without a text and for the one without an image."""
        torch.manual_seed(0)
        text_labels, image_labels = torch.tensor([0, 1, text_label, 1]), torch.tensor([0, image_label, 2, 1])
        labels = {"labels": torch.tensor([0, 1, 2, 1]), "text_labels": text_labels, "image_labels": image_labels}
        return model(**lacking, **labels).modality_loss.item()

    assert loss(0, 0) == loss(2, 1)
    lacking["has_image"][:] = 1
    assert loss(0, 0) == loss(2, 0) != loss(0, 1)


def test_the_average_leaves_incomplete_examples_to_the_classifier(
    tiny_config: Config, lacking: dict[str, Tensor]
) -> None:
    model = build(tiny_config(modality_dropout=0.1, **HEADS))
    with torch.no_grad():
        average = model(**lacking).logits.softmax(-1)
        model.config.modality_combination = "classifier"
        classifier = model(**lacking).logits.softmax(-1)
    same = torch.isclose(average, classifier, atol=1e-6).all(dim=1)
    assert same.tolist() == [False, True, True, False]


def test_the_contrastive_loss_is_that_of_the_complete_examples(tiny_config: Config) -> None:
    torch.manual_seed(0)
    config = tiny_config(clip_mode="feature")
    interaction = FeatureInteraction(config).train()
    F_I, F_T = torch.randn(4, 5, config.hidden_size), torch.randn(4, 6, config.hidden_size)
    mask, complete = torch.ones(4, 6, dtype=torch.bool), torch.tensor([True, False, True, True])
    masked = interaction(F_I, F_T, mask, complete).contrastive_loss
    alone = interaction(F_I[complete], F_T[complete], mask[complete]).contrastive_loss
    assert masked.item() == pytest.approx(alone.item(), abs=1e-6)
    assert interaction(F_I, F_T, mask, torch.zeros(4, dtype=torch.bool)).contrastive_loss.item() == 0


def test_modality_dropout_withholds_one_side_at_its_rate(tiny_config: Config) -> None:
    torch.manual_seed(0)
    has_image, has_text = torch.ones(20_000, dtype=torch.bool), torch.ones(20_000, dtype=torch.bool)
    has_image[:1000] = False
    image, text = withhold(has_image, has_text, 0.4)
    assert (image | text).all() and not image[:1000].any() and text[:1000].all()
    assert abs((~image[1000:]).float().mean() - 0.2) < 0.01 and abs((~text[1000:]).float().mean() - 0.2) < 0.01

    inputs = make_inputs([5] * 64, [5] * 64)
    model = build(tiny_config(clip_mode="feature", modality_dropout=0.5))
    assert model(**inputs).has_image.all()
    outputs = model.train()(**inputs)
    assert 0 < (~outputs.has_image).sum() < 40 and 0 < (~outputs.has_text).sum() < 40


@pytest.mark.parametrize("fields", [{}, {"modality": "image"}])
def test_a_model_without_modality_dropout_refuses_missing_images(
    tiny_config: Config, lacking: dict[str, Tensor], fields: dict[str, str]
) -> None:
    model = build(tiny_config(**fields))
    assert not [name for name in model.state_dict() if "missing" in name]
    with pytest.raises(ValueError, match="An example has no image .*modality_dropout=0.0 needs one"):
        model(**lacking)
    assert model(**lacking | {"has_image": torch.ones(4)}).logits.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"modality": "text", "modality_dropout": 0.1}, "modality_dropout=0.1 needs modality='both'"),
        ({"modality_dropout": 1.0}, "modality_dropout must be at least 0 and below 1"),
    ],
)
def test_what_cannot_be_built_is_refused(tiny_config: Config, fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_config(**fields)
