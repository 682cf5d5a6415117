"""Fixtures that every test file may use: a tiny model of each mode, its inputs, and the sample."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from make_sample import make_sample, make_tiny_backbones

# Two threads make a tiny model hundreds of times slower than one.
torch.set_num_threads(1)

TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CLIP_MODES = ["encoder", "feature", "none"]


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random numbers, in whatever order they run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def quiet_loggers() -> Iterator[None]:
    """Scripts that a test runs in this process set the levels of their loggers; the next test starts without."""
    yield
    for name in ("train", "posts", "mvsa", "feature_cache", "push_to_hub", "reproduce"):
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


def make_inputs(lengths: list[int], clip_lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)

    def texts(sizes: list[int], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
        mask = (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]).long()
        ids = torch.randint(4, 58, mask.shape, generator=generator)
        return torch.where(mask.bool(), ids, pad), mask

    input_ids, attention_mask = texts(lengths, pad=1)
    clip_input_ids, clip_attention_mask = texts(clip_lengths, pad=59)
    clip_input_ids[torch.arange(batch), torch.tensor(clip_lengths) - 1] = 59  # CLIP pools at the end of the text
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(batch, 3, 32, 32, generator=generator),
        "clip_input_ids": clip_input_ids,
        "clip_attention_mask": clip_attention_mask,
        "clip_pixel_values": torch.randn(batch, 3, 32, 32, generator=generator),
    }


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
