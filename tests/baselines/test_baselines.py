"""What every system of Table III has to do, in each of its variants."""

from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import TRANSFORMER, make_inputs
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.baselines import SYSTEMS
from clipcacg.scripts.baselines.sentibank_sentistrength import LexiconCollator
from clipcacg.scripts.baselines.shared import BaselineForSequenceClassification
from clipcacg.scripts.data.collator import PostCollator
from clipcacg.scripts.data.loading import DataArguments, load_posts
from clipcacg.scripts.training.arguments import RecipeArguments
from clipcacg.scripts.training.trainer import SentimentTrainer

Inputs = dict[str, Tensor]

LABELS = torch.tensor([0, 2, 0])
SIZES = {"hidden_size": 24, "dropout": 0.1}
TRAINED_SIZES = {
    "clmlf": {"hidden_size": 48, "image_layers": 1, "fusion_layers": 1},
    "cnn_multi": {"hidden_size": 64},
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in SYSTEMS}
VARIANTS |= {
    "clip phrases": ("sentibank_sentistrength", {"phrases": [("happy dog", 1.5), ("sad face", -2)]}),
    "alexnet": ("cnn_multi", {"image_cnn": "alexnet", "alexnet_width": 8}),
    "one hop": ("co_memory", {"hops": 1}),
    "untied hops": ("co_memory", {"hops": 3, "tied": False}),
    "scene features": ("mvan", {"scene_channels": 5}),
    "supervised contrast": ("clmlf", {"official_reshape": True, "self_pairs": False}),
    "no contrast": ("clmlf", {"data_loss_weight": 0, "label_loss_weight": 0}),
    "one GRU, both sides": ("itin", {"share_gru": True, "use_word_side": True}),
    "detected regions": ("itin", {"region_size": 7}),
}
TEXT_SYSTEMS = [name for name, (system, _) in VARIANTS.items() if system != "sentibank_sentistrength"]


TEXT = {"model_type": "roberta", "vocab_size": 60, "max_position_embeddings": 42, **TRANSFORMER}
VISION = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 12],
    "depths": [1, 1],
    "layer_type": "basic",
}
CLIP_TOWER = {**TRANSFORMER, "projection_dim": 12}
CLIP = {
    "projection_dim": 12,
    "text_config": {**CLIP_TOWER, "vocab_size": 60, "max_position_embeddings": 20, "eos_token_id": 59},
    "vision_config": {**CLIP_TOWER, "image_size": 32, "patch_size": 16},
}


def make(variant: str, **overrides: Any) -> BaselineForSequenceClassification:
    """A tiny system of a variant, in evaluation mode."""
    system, fields = VARIANTS[variant]
    fields = {"text_config": TEXT, "vision_config": VISION, **SIZES, **fields, **overrides}
    if "phrases" in fields:
        fields["clip_config"] = CLIP
    model = SYSTEMS[system](SYSTEMS[system].config_class(**fields)).eval()
    for buffer in (buffer for name, buffer in model.named_buffers() if name.endswith("phrase_embeds")):
        buffer.copy_(F.normalize(torch.randn_like(buffer), dim=-1))
    return model


def make_post_inputs() -> Inputs:
    """Three posts, with everything that any system takes."""
    extras = {"lexicon_scores": torch.rand(3, 4), "scene_features": torch.randn(3, 5, 2, 2)}
    images = {"pixel_values": torch.randn(3, 3, 64, 64)}  # AlexNet's smallest is 63
    return make_inputs([9, 5, 1], [7, 4, 2]) | images | extras | {"region_features": torch.randn(3, 2, 7)}


@pytest.fixture
def post_inputs() -> Inputs:
    return make_post_inputs()


def variant_ids(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("variant", names)


@variant_ids(list(VARIANTS))
def test_shapes_and_a_reload(post_inputs: Inputs, tmp_path: Path, variant: str) -> None:
    model = make(variant)
    output = model(**post_inputs, labels=LABELS)
    assert output.logits.shape == (3, 3) and output.fused_embeds.shape[0] == 3 and output.loss.isfinite()
    assert_close(model(**post_inputs, labels=LABELS, return_dict=False)[1], output.logits)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is type(model) and not again.training
    assert_close(again(**post_inputs).logits, output.logits)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name for name, parameter in again.named_parameters() if parameter.requires_grad] == trainable


@variant_ids(list(VARIANTS))
def test_gradients_reach_every_trainable_parameter(post_inputs: Inputs, variant: str) -> None:
    model = make(variant).train()
    model(**post_inputs, labels=LABELS).loss.backward()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name for name, p in trainable.items() if p.grad is None or not p.grad.any()] == []
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert bool(frozen) == (VARIANTS[variant][0] == "sentibank_sentistrength") and all(p.grad is None for p in frozen)


@variant_ids(list(SYSTEMS))
def test_training_lowers_the_loss(post_inputs: Inputs, variant: str) -> None:
    model = make(variant, dropout=0.0)
    model.freeze_backbones(text=True, vision=True, clip=True)
    post_inputs |= {"text_features": torch.randn(3, 9, 16), "image_features": torch.randn(3, 12, 2, 2)}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.005)
    before = F.cross_entropy(model(**post_inputs).logits, LABELS)
    for _ in range(40):
        optimizer.zero_grad()
        model.train()(**post_inputs, labels=LABELS).loss.backward()
        optimizer.step()
    assert F.cross_entropy(model.eval()(**post_inputs).logits, LABELS) < 0.5 * before


@variant_ids(list(VARIANTS))
def test_cached_features_stand_for_raw_inputs(post_inputs: Inputs, variant: str) -> None:
    model = make(variant)
    expected, cached = model(**post_inputs).logits, dict(post_inputs)
    raw = {"text": "input_ids", "vision": "pixel_values", "clip.vision": "clip_pixel_values"}
    names = {"text": "text_features", "vision": "image_features", "clip.vision": "clip_image_features"}
    for backbone, encoder in model.backbones().items():
        mask = post_inputs["attention_mask"] if backbone == "text" else None
        cached[names[backbone]] = model.encode(backbone, cached.pop(raw[backbone]), mask)
        encoder.forward = None  # not run from here on
    assert_close(model(**cached).logits, expected)
    for backbone in model.backbones():
        with pytest.raises(ValueError, match=raw[backbone]):
            model(**{name: value for name, value in cached.items() if name != names[backbone]})


@variant_ids(TEXT_SYSTEMS)
def test_padding_changes_nothing(post_inputs: Inputs, variant: str) -> None:
    """On the right or on the left, whatever it holds; and a text of nothing but padding has finite logits."""
    model = make(variant)
    rest = {name: value for name, value in post_inputs.items() if name not in ("input_ids", "attention_mask")}
    states, lengths = torch.randn(3, 9, 16), [9, 4, 0]
    right = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    left = right.flip(1)
    moved = torch.stack([row.roll(9 - length, 0) for row, length in zip(states, lengths, strict=True)])
    noise = torch.randn(3, 9, 16) * 1e3
    expected = model(**rest, text_features=torch.where(right[..., None].bool(), states, 0), attention_mask=right)
    assert expected.logits.isfinite().all()
    for features, mask in ((states, right), (moved, left)):
        features = torch.where(mask[..., None].bool(), features, noise)
        assert_close(model(**rest, text_features=features, attention_mask=mask).logits, expected.logits)
    second = {name: value[1:2] for name, value in rest.items()}
    assert_close(model(**second, text_features=states[1:2, :4]).logits, expected.logits[1:2])
    tokens = post_inputs["input_ids"][1:2, :5]  # the encoder's own attention is masked as well
    assert_close(model(**second, input_ids=tokens).logits, model(**post_inputs).logits[1:2])


def test_the_loss_is_our_models(post_inputs: Inputs) -> None:
    model = make("concatenation", class_weights=[1.0, 2.0, 4.0], label_smoothing=0.2)
    output = model(**post_inputs, labels=LABELS)
    weights = torch.tensor([1.0, 2.0, 4.0])
    assert_close(output.loss, F.cross_entropy(output.logits, LABELS, weights, label_smoothing=0.2))


@pytest.mark.parametrize("system", SYSTEMS)
def test_pretrained_backbones_come_in_and_can_be_frozen(backbones: Path, system: str) -> None:
    names = {f"{part}_model": backbones / part for part in ("text", "vision", "clip")}
    model = SYSTEMS[system].from_backbones(**names, **SIZES)
    for part, encoder in model.backbones().items():
        saved = type(encoder).from_pretrained(backbones / part).state_dict()
        assert all(torch.equal(value, saved[key]) for key, value in encoder.state_dict().items())
        assert not encoder.training
    model.freeze_backbones(text=True, vision=True)
    assert not any(p.requires_grad for encoder in model.backbones().values() for p in encoder.parameters())
    assert any(p.requires_grad for p in model.parameters()) and not model.train().backbones()["vision"].training
    with pytest.raises(ValueError, match="vision_model"):
        SYSTEMS[system].from_backbones(text_model=backbones / "text")


def test_what_a_table_prints() -> None:
    *systems, floor = SYSTEMS.values()
    assert len(systems) == 7 and not floor.published
    for system in systems:
        assert system.published.keys() == {"mvsa_single", "mvsa_multiple"} and system.substitutions
        assert all(50 < f1 <= accuracy < 76 for accuracy, f1 in system.published.values())
    grades = "".join(system.fidelity for system in systems)
    assert grades == "CBBBBAA"


@pytest.mark.parametrize(
    ("system", "fields"),
    [
        ("co_memory", {"hops": 0}), ("mvan", {"hops": 0}), ("mvan", {"hidden_size": 7}), ("cnn_multi", {"maps": 0}),
        ("cnn_multi", {"image_cnn": "vgg"}), ("dnn_lr", {"dropconnect": 1.0}), ("dnn_lr", {"text_weight": 1.5}),
        ("clmlf", {"fusion_layers": 0}), ("clmlf", {"contrastive_temperature": 0.0}),
        ("clmlf", {"hidden_size": 50}), ("itin", {"image_weight": -0.1}),
        ("sentibank_sentistrength", {"phrases": [("happy dog", 1.0)]}), ("concatenation", {"dropout": 1.0}),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused(system: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        SYSTEMS[system].config_class(**fields)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["sentibank_sentistrength", "cnn_multi", "clmlf", "itin"])
def test_the_trainer_beats_the_largest_class_of_its_posts(
    backbones: Path, posts_folder: Path, tmp_path: Path, system: str
) -> None:
    names = {f"{part}_model": backbones / part for part in ("text", "vision")}
    model = SYSTEMS[system].from_backbones(**names, **SIZES | TRAINED_SIZES.get(system, {}))
    posts = load_posts(DataArguments(data_dir=str(posts_folder)))
    collator = PostCollator(ClipCaCgProcessor.from_backbones(**names), model.config)
    if system == "sentibank_sentistrength":
        pytest.importorskip("vaderSentiment")
        collator = LexiconCollator(collator)
    arguments = RecipeArguments(
        output_dir=str(tmp_path), num_train_epochs=12, backbone_learning_rate=0.0005,
        learning_rate=0.0005 if system == "clmlf" else 0.003,  # norms after the residual want a small one
        per_device_train_batch_size=16, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, label_names=["labels"], dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = SentimentTrainer(model=model, args=arguments, data_collator=collator, train_dataset=posts["train"])
    trainer.train()
    output = trainer.predict(posts["train"])
    labels = torch.tensor(output.label_ids)
    largest = labels.bincount().max() / len(labels)
    accuracy = (torch.tensor(output.predictions).argmax(-1) == labels).float().mean()
    assert accuracy > largest + 0.1
