"""The config: defaults, what it refuses, and that nothing is lost between memory, dicts and folders."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, CLIPConfig, DistilBertConfig, ResNetConfig, RobertaConfig

from clipcacg import configuration_clipcacg
from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification, ClipCaCgModel

MakeConfig = Callable[..., ClipCaCgConfig]

LABELS = {0: "negative", 1: "neutral", 2: "positive"}
AUTO_MAP = {
    "AutoConfig": "configuration_clipcacg.ClipCaCgConfig",
    "AutoModel": "modeling_clipcacg.ClipCaCgModel",
    "AutoModelForSequenceClassification": "modeling_clipcacg.ClipCaCgForSequenceClassification",
    "AutoProcessor": "processing_clipcacg.ClipCaCgProcessor",
}
CODE_FILES = {f"{part}_clipcacg.py" for part in ("configuration", "modeling", "pipeline", "processing")}
TIMM = {"model_type": "timm_wrapper", "architecture": "test_convnext", "num_channels": 3}


def values(config: ClipCaCgConfig) -> dict[str, object]:
    """Every value, without what saving and loading add."""
    return {key: value for key, value in config.to_dict().items() if key not in ("auto_map", "_name_or_path")}


def test_the_defaults_fit_the_published_weights() -> None:
    with torch.device("meta"):
        model = ClipCaCgModel(ClipCaCgConfig())
    text, vision, clip_text, clip_vision = (dict(part.named_parameters()) for part in model.backbones().values())
    published = (
        (text, 5 + 12 * 16, {  # FacebookAI/roberta-base
            "embeddings.word_embeddings.weight": (50265, 768), "embeddings.position_embeddings.weight": (514, 768),
            "embeddings.token_type_embeddings.weight": (1, 768),
            "encoder.layer.11.intermediate.dense.weight": (3072, 768),
        }),
        (vision, 53 * 3, {  # microsoft/resnet-50
            "embedder.embedder.convolution.weight": (64, 3, 7, 7),
            "encoder.stages.2.layers.5.layer.1.convolution.weight": (256, 256, 3, 3),
            "encoder.stages.3.layers.2.layer.2.convolution.weight": (2048, 512, 1, 1),
        }),
        (clip_text, 2 + 12 * 16 + 3, {  # openai/clip-vit-base-patch32
            "text_model.embeddings.token_embedding.weight": (49408, 512), "text_projection.weight": (512, 512),
            "text_model.embeddings.position_embedding.weight": (77, 512),
            "text_model.encoder.layers.11.mlp.fc1.weight": (2048, 512),
        }),
        (clip_vision, 3 + 2 + 12 * 16 + 3, {
            "vision_model.embeddings.patch_embedding.weight": (768, 3, 32, 32),
            "vision_model.embeddings.position_embedding.weight": (50, 768),
            "vision_model.encoder.layers.11.mlp.fc1.weight": (3072, 768), "visual_projection.weight": (512, 768),
        }),
    )  # fmt: skip
    for weights, count, shapes in published:
        assert {name: tuple(weights[name].shape) for name in shapes} == shapes
        assert len(weights) == count


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"clip_config": None, "clip_mode": "none"},
        {"num_labels": 1, "problem_type": "regression"},
        {"num_labels": 2, "class_weights": [0.5, 2.0], "label_smoothing": 0.1, "dtype": "bfloat16"},
        {"temperature": 1.75},
        {"text_config": RobertaConfig(), "vision_config": TIMM},  # 512 positions where our default has 514
        {"modality": "text"},
    ],
    ids=lambda overrides: "-".join(overrides) or "tiny",
)
def test_round_trips(tiny_config: MakeConfig, overrides: dict[str, object], tmp_path: Path) -> None:
    if overrides.get("vision_config") is TIMM:
        pytest.importorskip("timm")
    config = tiny_config(**overrides)
    config.save_pretrained(tmp_path)
    through_json = ClipCaCgConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    for other in (ClipCaCgConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path), through_json):
        assert values(other) == values(config)
        for name in ("text_config", "vision_config", "clip_config"):
            assert type(getattr(other, name)) is type(getattr(config, name))


def test_nested_changes_survive(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config()
    config.text_config.vocab_size = 61
    config.vision_config.depths = [1, 2]
    config.clip_config.text_config.vocab_size = 62
    config.num_labels = 4
    config.save_pretrained(tmp_path)
    loaded = ClipCaCgConfig.from_pretrained(tmp_path, dropout=0.5)
    assert (loaded.text_config.vocab_size, loaded.clip_config.text_config.vocab_size) == (61, 62)
    assert (loaded.vision_config.depths, loaded.num_labels, loaded.dropout) == ([1, 2], 4, 0.5)


def test_sub_configs_may_be_dicts_or_objects_and_stay_the_callers(tiny_config: MakeConfig) -> None:
    objects = {
        "text_config": DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=60),
        "vision_config": ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"),
        "clip_config": CLIPConfig(**tiny_config().clip_config.to_dict()),
    }
    dicts = {name: part.to_dict() for name, part in objects.items()}
    before = copy.deepcopy((objects, dicts))
    configs = [tiny_config(**parts, projection_dim=20, attn_implementation="eager") for parts in (objects, dicts)]
    assert values(configs[0]) == values(configs[1])
    for config in configs:
        assert config.text_config is not objects["text_config"] and config.text_config.hidden_size == 16
        model = ClipCaCgForSequenceClassification(config)
        model.set_attn_implementation("sdpa")
        model.resize_token_embeddings(70, mean_resizing=False)
    assert dicts == before[1] and config.text_config.vocab_size == 70
    for name, part in objects.items():
        assert part.to_dict() == before[0][name].to_dict()
        assert part._attn_implementation == before[0][name]._attn_implementation


@pytest.mark.parametrize("family", ["groupvit", "siglip2", "xclip"])
def test_a_dual_encoder_that_does_not_fit_is_refused(tiny_config: MakeConfig, family: str) -> None:
    with pytest.raises(ValueError, match=f"clip_config must be of a dual encoder .*not of '{family}'"):
        tiny_config(clip_config={"model_type": family})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"clip_mode": "both"}, "clip_mode must be one of encoder, feature, none, not 'both'"),
        ({"clip_mode": None}, "clip_mode .* not None"),
        ({"modality": "audio"}, "modality must be one of both, image, text, not 'audio'"),
        ({"clip_config": None}, "clip_mode='encoder' .* clip_config is None"),
        ({"hidden_size": 18}, "18 is not a multiple of 4"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, not 0"),
        ({"hidden_size": -8}, "hidden_size must be at least 1, not -8"),
        ({"projection_dim": 0}, "projection_dim must be at least 1, not 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, not 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0 and below 1, not -0.1"),
        ({"class_weights": [1.0, 2.0]}, "3 numbers, not 2"),
        ({"label_thresholds": [0.5]}, "label_thresholds needs .* 3 numbers, not 1"),
        ({"problem_type": "regression"}, "num_labels must be 1, not 3"),
        ({"temperature": 0.0}, "temperature must be above 0 and finite, not 0.0"),
        ({"temperature": float("nan")}, "temperature must be above 0 and finite, not nan"),
    ],
    ids=str,
)
def test_impossible_combinations_print_their_values(
    tiny_config: MakeConfig, overrides: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**overrides)
    changed_later = tiny_config()
    for name, value in overrides.items():
        setattr(changed_later, name, value)
    with pytest.raises(ValueError, match=message):
        ClipCaCgModel(changed_later)


@pytest.mark.parametrize("overrides", [{"clip_mode": "none"}, {"clip_mode": "feature"}, {"modality": "text"}], ids=str)
def test_clip_config_may_be_none_where_nothing_reads_it(tiny_config: MakeConfig, overrides: dict[str, str]) -> None:
    config = tiny_config(clip_config=None, **overrides)
    assert config.clip_config is None
    assert not any(name.startswith("clip") for name in ClipCaCgModel(config).backbones())


@pytest.mark.parametrize(
    ("overrides", "id2label"),
    [
        ({}, LABELS),
        ({"num_labels": 3}, LABELS),
        ({"num_labels": 2}, {0: "LABEL_0", 1: "LABEL_1"}),
        ({"num_labels": 1, "problem_type": "regression"}, {0: "LABEL_0"}),
        ({"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}, {0: "no", 1: "yes"}),
        ({"label2id": {"no": 0, "yes": 1}}, {0: "no", 1: "yes"}),
    ],
    ids=str,
)
def test_label_names(
    tiny_config: MakeConfig, overrides: dict[str, object], id2label: dict[int, str], tmp_path: Path
) -> None:
    config = tiny_config(**overrides)
    config.save_pretrained(tmp_path)
    for each in (config, ClipCaCgConfig.from_pretrained(tmp_path)):
        assert each.id2label == id2label and each.num_labels == len(id2label)
        assert each.label2id == {label: index for index, label in id2label.items()}


def test_a_saved_folder_is_complete_whatever_it_was_loaded_from(tiny_config: MakeConfig, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    tiny_config().save_pretrained(first)
    saved = json.loads((first / "config.json").read_text())
    assert saved["auto_map"] == AUTO_MAP
    saved["auto_map"] = {"AutoConfig": f"user/repo--{AUTO_MAP['AutoConfig']}"}  # as after loading from the Hub
    (first / "config.json").write_text(json.dumps(saved))
    ClipCaCgConfig.from_pretrained(first).save_pretrained(second)
    assert json.loads((second / "config.json").read_text())["auto_map"] == AUTO_MAP
    code = Path(configuration_clipcacg.__file__).parent
    for folder in (first, second):
        assert {path.name for path in folder.glob("*.py")} == CODE_FILES
        assert all((folder / name).read_text() == (code / name).read_text() for name in CODE_FILES)


def test_saving_where_the_code_lives(tiny_config: MakeConfig, tmp_path: Path) -> None:
    code = Path(configuration_clipcacg.__file__).parent
    for name in CODE_FILES:  # links lead to the same files, and leave the repository clean
        (tmp_path / name).symlink_to(code / name)
    tiny_config().save_pretrained(tmp_path)
    assert all((tmp_path / name).samefile(code / name) for name in CODE_FILES)
    assert (tmp_path / "config.json").exists()


def test_asking_for_a_dict_changes_no_config(tiny_config: Callable[..., ClipCaCgConfig]) -> None:
    config = tiny_config()
    config.text_config._name_or_path = "/somewhere/here"
    before = config.to_dict()
    config.to_diff_dict(), config.to_json_string(), repr(config)
    assert config.to_dict() == before and config.text_config._name_or_path == "/somewhere/here"
