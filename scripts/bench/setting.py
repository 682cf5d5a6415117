"""What every section of the benchmark shares: figures, timing, the model, and random posts."""

import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from transformers import AutoConfig, CLIPImageProcessor, ConvNextImageProcessor

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.data.sample import make_tiny_backbones
from clipcacg.scripts.reporting.predictions import checkpoint_config, load_checkpoint

# Quantiles of the text length in MVSA-Single, in BERT tokens.
TEXT_LENGTHS = {
    0: 3, 0.05: 14, 0.1: 16, 0.2: 20, 0.3: 24, 0.4: 26, 0.5: 30, 0.6: 33, 0.7: 37, 0.8: 42, 0.9: 49, 0.95: 53,
    0.97: 58, 0.98: 61, 0.99: 67, 0.993: 73, 0.995: 89, 0.999: 111, 1: 130,
}  # fmt: skip
LONGEST = TEXT_LENGTHS[1]
CLIP_LIMIT = 77
NAMES = ["negative", "neutral", "positive"]


@dataclass
class Figure:
    """One number of the result.

    Args:
        value: Median over the rounds.
        what: What was measured, in words.
        low, high: Smallest and largest value of the rounds; None for a number that was measured once.
    """

    value: float
    what: str
    low: float | None = None
    high: float | None = None


@dataclass
class Setting:
    """What every section is given.

    Args:
        folder: Temporary folder for posts and models.
        size, repeats, batch_size, num_posts, checkpoint, data_dir: The flags of `benchmark.py`.
    """

    folder: Path
    size: str
    repeats: int
    batch_size: int
    num_posts: int
    checkpoint: str | None = None
    data_dir: str | None = None

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"


def seconds(run: Callable[[], Any], calls: int = 1) -> float:
    """Seconds per call. CUDA kernels run asynchronously, so the clock starts and stops at a synchronised device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(calls):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (perf_counter() - start) / calls


def in_turn(repeats: int, **cases: Callable[[], Any]) -> dict[str, list[float]]:
    """Time the cases alternately, so that a change of the machine's speed meets all of them.

    The first call of each case is a warm-up and is not counted. On a GPU a second call tells how many calls make a
    fifth of a second, and every round makes that many.

    Returns:
        Case name to seconds per call in each round.
    """
    for run in cases.values():
        run()
    calls = dict.fromkeys(cases, 1)
    if torch.cuda.is_available():
        calls = {name: ceil(0.2 / seconds(run)) for name, run in cases.items()}
    rounds = [{name: seconds(run, calls[name]) for name, run in cases.items()} for _ in range(repeats)]
    return {name: [times[name] for times in rounds] for name in cases}


def ratio(above: list[float], below: list[float], what: str) -> Figure:
    """The ratio of two cases, taken round by round."""
    return spread([a / b for a, b in zip(above, below, strict=True)], what)


def rate(times: list[float], count: int, what: str) -> Figure:
    """Posts per second, for `count` posts in each of these times."""
    return spread([count / time for time in times], what)


def spread(values: list[float], what: str) -> Figure:
    return Figure(median(values), what, min(values), max(values))


def in_new_process(run: Callable[..., float], *arguments: Any) -> float:
    """Call a function in a new process, whose peak memory is that of the call alone. A killed process is an error."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, *arguments).result()


def resident_peak() -> float:
    """Peak resident memory of this process in MiB."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    # On Linux, `getrusage` of a new process starts from its parent's peak.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


def precision(setting: Setting, name: str) -> AbstractContextManager[Any]:
    """A context in which the model computes in "float32" (nothing changes) or "bf16" (autocast)."""
    return torch.autocast(setting.device, torch.bfloat16) if name == "bf16" else nullcontext()


def text_lengths(count: int) -> list[int]:
    """`count` lengths at even quantiles of MVSA-Single's distribution, shuffled with a fixed seed."""
    shares = (np.arange(count) + 0.5) / count
    lengths = np.interp(shares, list(TEXT_LENGTHS), list(TEXT_LENGTHS.values())).astype(int)
    return np.random.default_rng(0).permutation(lengths).tolist()


def tiny_backbones(setting: Setting) -> Path:
    return make_tiny_backbones(setting.folder / "backbones")


def make_config(setting: Setting) -> ClipCaCgConfig:
    """The config of the checkpoint, of the default model, or of one on the sample's tiny backbones."""
    if setting.checkpoint:
        return checkpoint_config(setting.checkpoint)
    parts = {part: AutoConfig.from_pretrained(tiny_backbones(setting) / part) for part in ("text", "vision", "clip")}
    if setting.size == "tiny":
        parts = {f"{name}_config": part for name, part in parts.items()}
        return ClipCaCgConfig(hidden_size=64, num_attention_heads=4, projection_dim=32, **parts)
    config = ClipCaCgConfig()
    config.clip_config.text_config.eos_token_id = parts["clip"].text_config.eos_token_id  # the tiny tokenizer's
    return config


def make_model(setting: Setting) -> ClipCaCgForSequenceClassification:
    """The checkpoint's model or one with random weights, in evaluation mode."""
    if setting.checkpoint:
        return load_checkpoint(setting.checkpoint)[0].to(setting.device)
    torch.manual_seed(0)
    return ClipCaCgForSequenceClassification(make_config(setting)).eval().to(setting.device)


def make_processor(setting: Setting) -> ClipCaCgProcessor:
    """The checkpoint's processor; or the sample's tokenizers, and for the base size the default image processors."""
    if setting.checkpoint:
        return load_checkpoint(setting.checkpoint)[1]
    names = [tiny_backbones(setting) / part for part in ("text", "vision", "clip")]
    processor = ClipCaCgProcessor.from_backbones(*names)
    if setting.size == "base":
        processor.image_processor = ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875)
        processor.clip_image_processor = CLIPImageProcessor()
    return processor


def make_texts(lengths: list[int], pad_to: int, text_config: Any) -> tuple[Tensor, Tensor]:
    """Random token ids and their mask, each (batch, pad_to)."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(pad_to) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(4, text_config.vocab_size - 2, mask.shape, generator=generator)
    return torch.where(mask.bool(), ids, text_config.pad_token_id), mask


def make_inputs(setting: Setting, lengths: list[int]) -> dict[str, Tensor]:
    """Model inputs of random posts with these text lengths, padded to the longest."""
    config = make_config(setting)
    input_ids, attention_mask = make_texts(lengths, max(lengths), config.text_config)
    clip_lengths = [min(length, CLIP_LIMIT) for length in lengths]
    clip_text = config.clip_config.text_config
    clip_input_ids, clip_attention_mask = make_texts(clip_lengths, max(clip_lengths), clip_text)
    clip_input_ids[torch.arange(len(lengths)), torch.tensor(clip_lengths) - 1] = clip_text.eos_token_id
    edge = config.clip_config.vision_config.image_size
    images = torch.randn(len(lengths), 3, edge, edge, generator=torch.Generator().manual_seed(0))
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": images,
        "clip_input_ids": clip_input_ids,
        "clip_attention_mask": clip_attention_mask,
        "clip_pixel_values": images,
    }
    return {name: value.to(setting.device) for name, value in inputs.items()}


def make_posts(setting: Setting, count: int) -> datasets.Dataset:
    """Posts with 600 x 400 crops of two photographs, and texts of MVSA's lengths that repeat "the", one token each."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    folder = setting.folder / "images"
    folder.mkdir(exist_ok=True)
    paths = [str(folder / f"{number}.jpg") for number in range(count)]
    for number, path in enumerate(paths):
        if not Path(path).exists():
            left, top = number % 40, number % 27
            photographs[number % 2].crop((left, top, left + 600, top + 400)).save(path, quality=85)
    posts = {
        "id": [str(number) for number in range(count)],
        "text": [" ".join(["the"] * (length - 2)) for length in text_lengths(count)],
        "image": paths,
        "label": [number % 3 for number in range(count)],
    }
    features = datasets.Features(
        id=datasets.Value("string"),
        text=datasets.Value("string"),
        image=datasets.Image(decode=False),
        label=datasets.ClassLabel(names=NAMES),
    )
    return datasets.Dataset.from_dict(posts, features=features)
