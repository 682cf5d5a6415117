"""Fixtures that every test file may use: a tiny model of each mode, its inputs, and the sample."""

import os
import tempfile

os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_home_")  # caches of this process alone
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from inputs import TRANSFORMER, make_inputs

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data.sample import make_sample, make_tiny_backbones

# Two threads make a tiny model hundreds of times slower than one.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the tests in two processes where pytest-xdist is installed, unless -n or --pdb says otherwise.

    The tests of a file share a process, and so its fixtures. The worker processes call this hook too, and must not
    start workers of their own.
    """
    is_worker = hasattr(config, "workerinput")
    if getattr(config.option, "numprocesses", 0) is None and not is_worker and not config.option.usepdb:
        config.option.numprocesses = 2
    if getattr(config.option, "dist", "") == "no":
        config.option.dist = "loadfile"


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random numbers, in whatever order they run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def quiet_loggers() -> Iterator[None]:
    """Scripts that a test runs in this process set the levels of their loggers; the next test starts without."""
    yield
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] == "clipcacg":
            logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture
def tiny_config() -> Callable[..., ClipCaCgConfig]:
    """A function that makes a tiny config of the real families; keywords override its fields."""

    def make(**overrides: object) -> ClipCaCgConfig:
        clip_tower = {**TRANSFORMER, "projection_dim": 12}
        fields = {
            "text_config": {"model_type": "roberta", "vocab_size": 60, "max_position_embeddings": 42, **TRANSFORMER},
            "vision_config": {
                "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1],
                "layer_type": "basic",
            },
            "clip_config": {
                "projection_dim": 12,
                "text_config": {**clip_tower, "vocab_size": 60, "max_position_embeddings": 20, "eos_token_id": 59},
                "vision_config": {**clip_tower, "image_size": 32, "patch_size": 16},
            },
            "hidden_size": 16,
            "num_attention_heads": 4,
            "projection_dim": 12,
        }  # fmt: skip
        return ClipCaCgConfig(**{**fields, **overrides})

    return make


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """Three posts whose texts have 9, 5 and 1 tokens (CLIP: 7, 4 and 2), padded on the right."""
    return make_inputs([9, 5, 1], [7, 4, 2])


@pytest.fixture(scope="session")
def posts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small drawn sample in the layout of MVSA-Single."""
    return make_sample(tmp_path_factory.mktemp("sample") / "posts", num_posts=120)


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random backbones of the real families: text, vision and clip."""
    return make_tiny_backbones(tmp_path_factory.mktemp("tiny") / "backbones")


@pytest.fixture(scope="session")
def checkpoint(backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model and its processor, saved; for tests that do not care what it predicts."""
    torch.manual_seed(0)
    names = [backbones / part for part in ("text", "vision", "clip")]
    folder = tmp_path_factory.mktemp("checkpoint")
    small = {"hidden_size": 32, "num_attention_heads": 4}
    ClipCaCgForSequenceClassification.from_backbones(*names, **small).save_pretrained(folder)
    ClipCaCgProcessor.from_backbones(*names).save_pretrained(folder)
    return folder
