"""Backbones load from every place where people keep them, pinned and authorised, and none of it is stored."""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, Repo
from huggingface_hub import constants, snapshot_download
from safetensors.torch import save_file
from transformers import AutoConfig, CLIPModel, PreTrainedModel

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification, ClipCaCgModel
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.training import run
from clipcacg.scripts.training.arguments import parse_arguments

TOKEN = "hf_" + "Secret7" * 5
SMALL = {"hidden_size": 32, "num_attention_heads": 4}


def publish(hub: HubServer, name: str, folder: Path, branch: str = "main") -> str:
    """Make a revision of a private repository from the files of a folder."""
    repo = hub.repos.setdefault(("models", name), Repo(private=True))
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    large = (".safetensors", ".bin")
    stored = {name: hub.store(path.read_bytes(), path.suffix in large) for name, path in files.items()}
    return repo.commit(branch, stored, "weights")


@pytest.fixture(scope="module")
def pickled(backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny CLIP with its weights in `pytorch_model.bin` alone, like the published CLIP ViT-B/32."""
    folder = shutil.copytree(backbones / "clip", tmp_path_factory.mktemp("pickled") / "clip")
    (folder / "model.safetensors").unlink()
    torch.save(CLIPModel.from_pretrained(backbones / "clip").state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def hub(backbones: Path, pickled: Path, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub without the discussion API, as mirrors are; this process is online, without a token."""
    with HubServer(tmp_path / "hub", {TOKEN: "user"}) as hub, hub.used_here():
        for part in ("text", "vision"):
            publish(hub, f"user/{part}", backbones / part)
        publish(hub, "user/clip", pickled)
        publish(hub, "user/clip", backbones / "clip", "refs/pr/1")
        yield hub


def same_weights(model: PreTrainedModel, clip: CLIPModel) -> bool:
    expected = clip.state_dict()
    towers = [model.backbones()[name].state_dict() for name in ("clip.text", "clip.vision")]
    return all(torch.equal(value, expected[name]) for tower in towers for name, value in tower.items())


@pytest.mark.parametrize("place", ["folder", "mirror", "cache", "cache with a conversion"])
def test_a_clip_whose_weights_are_a_pickle(
    backbones: Path, pickled: Path, hub: HubServer, place: str, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source, where = ("user/clip", {"token": TOKEN, "cache_dir": str(tmp_path / "cache")})
    if place == "folder":
        source, where = str(pickled), {}
    if place.startswith("cache"):
        snapshot_download(source, **where)
        if place == "cache with a conversion":
            snapshot_download(source, revision="refs/pr/1", **where)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        where.pop("token")
    names = (backbones / "text", backbones / "vision", source)
    model = ClipCaCgModel.from_backbones(*names, **{f"clip_{name}": value for name, value in where.items()}, **SMALL)
    assert same_weights(model, CLIPModel.from_pretrained(source, **where))
    assert sum(f"{source} has its weights in pytorch_model.bin" in message for message in caplog.messages) == 1


def test_the_command_of_the_warning_converts_a_pickle(
    backbones: Path, pickled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [backbones / "text", backbones / "vision", shutil.copytree(pickled, tmp_path / "clip")]
    with caplog.at_level(logging.WARNING, "clipcacg.modeling_clipcacg"):
        model = ClipCaCgModel.from_backbones(*names, **SMALL)
        code = re.fullmatch(r'.* To convert it: python -c "(.*)"', caplog.messages.pop())[1]
        exec(code, {})
        (tmp_path / "clip/pytorch_model.bin").unlink()
        assert same_weights(ClipCaCgModel.from_backbones(*names, **SMALL), CLIPModel.from_pretrained(pickled))
    assert same_weights(model, CLIPModel.from_pretrained(pickled)) and len(caplog.messages) == 1


def test_every_place_that_loads_gets_the_options_of_its_own_backbone(
    hub: HubServer, backbones: Path, pickled: Path, tmp_path: Path
) -> None:
    """The repositories are private, the files lie in a folder of an old revision, and main is empty."""
    options = {}
    for part in ("text", "vision", "clip"):
        shutil.copytree(backbones / part, tmp_path / part / f"{part} folder")
        options[f"{part}_revision"] = publish(hub, f"user/{part}", tmp_path / part)
        (tmp_path / "empty").mkdir(exist_ok=True)
        publish(hub, f"user/{part}", tmp_path / "empty")
        options[f"{part}_subfolder"] = f"{part} folder"
        options[f"{part}_cache_dir"] = str(tmp_path / f"cache of {part}")
    options |= {"text_token": TOKEN, "vision_token": TOKEN, "clip_token": TOKEN}
    names = [f"user/{part}" for part in ("text", "vision", "clip")]
    model = ClipCaCgForSequenceClassification.from_backbones(*names, **options, **SMALL)
    processor = ClipCaCgProcessor.from_backbones(*names, **options)
    expected = ClipCaCgForSequenceClassification.from_backbones(*(backbones / n[5:] for n in names), **SMALL)
    for name, encoder in model.backbones().items():
        other = expected.backbones()[name].state_dict()
        assert all(torch.equal(value, other[key]) for key, value in encoder.state_dict().items())
    assert processor(text="a word")["clip_input_ids"]

    words = [f"--{name}={value}" for name, value in options.items()]
    words += [f"--{name}_model=user/{name}" for name in ("text", "vision", "clip")]
    sizes = [f"--{name}={value}" for name, value in SMALL.items()]
    flags = parse_arguments([*words, *sizes, "--output_dir", str(tmp_path / "run")])[0]
    trained, _ = run.build(flags, False, {})
    for name, encoder in trained.backbones().items():
        other = expected.backbones()[name].state_dict()
        assert all(torch.equal(value, other[key]) for key, value in encoder.state_dict().items())


CUSTOM_CONFIG = """
from transformers import PreTrainedConfig

class TinyConfig(PreTrainedConfig):
    model_type = "tiny-custom"

    def __init__(self, vocab_size=60, hidden_size=16, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
"""
CUSTOM_MODEL = """
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from .configuration_tiny import TinyConfig

class TinyModel(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids=None, attention_mask=None):
        return BaseModelOutput(self.words(input_ids))
"""


def test_an_encoder_with_its_own_code(hub: HubServer, backbones: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(backbones / "text", tmp_path / "custom")
    (folder / "configuration_tiny.py").write_text(CUSTOM_CONFIG)
    (folder / "modeling_tiny.py").write_text(CUSTOM_MODEL)
    auto_map = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    fields = {"model_type": "tiny-custom", "vocab_size": vocab_size, "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(fields))
    words = torch.randn(vocab_size, 16)
    save_file({"words.weight": words}, folder / "model.safetensors", {"format": "pt"})
    options = {"text_revision": publish(hub, "user/custom", folder), "text_token": TOKEN}
    (folder / "modeling_tiny.py").write_text("raise RuntimeError('the code of main, not of the pinned revision')")
    publish(hub, "user/custom", folder)
    names = {"text_model": "user/custom", "vision_model": backbones / "vision", "clip_mode": "none"}

    with pytest.raises(ValueError, match="trust_remote_code=True"):
        ClipCaCgModel.from_backbones(**names, **options, **SMALL)
    options["text_trust_remote_code"] = True
    model = ClipCaCgModel.from_backbones(**names, **options, **SMALL)
    encoder = model.backbones()["text"]
    assert torch.equal(encoder.words.weight, words)
    model.save_pretrained(tmp_path / "saved")
    auto_map["AutoModel"] = "modeling_tiny.TinyModel"
    assert json.loads((tmp_path / "saved/config.json").read_text())["text_config"]["auto_map"] == auto_map
    again = ClipCaCgModel.from_pretrained(tmp_path / "saved", text_config=encoder.config)
    assert torch.equal(again.backbones()["text"].words.weight, words)


@pytest.mark.parametrize(
    ("keyword", "nearest"),
    [("hiden_size", "hidden_size"), ("text_revison", "text_revision"), ("tokn", "token"), ("num_label", "num_labels")],
)
def test_an_unknown_keyword_is_refused_with_the_nearest_known_one(backbones: Path, keyword: str, nearest: str) -> None:
    names = [backbones / part for part in ("text", "vision", "clip")]
    for build in (ClipCaCgModel.from_backbones, ClipCaCgProcessor.from_backbones):
        with pytest.raises(TypeError, match=rf"no keyword '{keyword}'\. Did you mean {nearest}\?"):
            build(*names, **{keyword: 5})
    if nearest in ClipCaCgConfig.known_fields():
        with pytest.raises(TypeError, match=rf"ClipCaCgConfig has no keyword '{keyword}'\. Did you mean {nearest}\?"):
            ClipCaCgConfig(**{keyword: 5})


def test_a_field_of_a_newer_release_is_accepted_from_a_file(tmp_path: Path) -> None:
    ClipCaCgConfig().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text()) | {"of_tomorrow": {"deeply": [1, "nested"]}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config, unused = ClipCaCgConfig.from_pretrained(tmp_path, dropout=0.5, other=1, return_unused_kwargs=True)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert (again.of_tomorrow, again.dropout, unused) == (fields["of_tomorrow"], 0.5, {"other": 1})
