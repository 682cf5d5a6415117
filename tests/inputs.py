"""Plain functions and constants that tests share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

SCRIPTS = Path(__file__).parents[1] / "scripts"
TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CLIP_MODES = ["encoder", "feature", "none"]


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


def flags(posts: Path, backbones: Path, output: Path, *more: str) -> list[str]:
    """Flags of `train.py`: the sample's config on a small data set of the same kind, two epochs."""
    names = [word for part in ("text", "vision", "clip") for word in (f"--{part}_model", str(backbones / part))]
    return [
        str(SCRIPTS / "configs" / "sample.yaml"), "--data_dir", str(posts), "--output_dir", str(output), *names,
        "--num_train_epochs", "2", "--overwrite_output_dir", "False", "--disable_tqdm", "True", "--hidden_size", "32",
        "--num_attention_heads", "4", "--train_sampling_strategy", "group_by_length", *more,
    ]  # fmt: skip


def results(folder: Path) -> dict[str, Any]:
    """The scores that a training run left in its folder."""
    return json.loads((folder / "all_results.json").read_text())


def table_of_images(folder: Path, label: Callable[[int], Any]) -> list[dict[str, Any]]:
    """Forty rows with the columns photo, tweet and mood; the images are red and blue in turn.

    Args:
        folder: Where the images go.
        label: Gives the mood of a red image, 0, and of a blue one, 1.
    """
    rows = []
    for number in range(40):
        colour = ("red", "blue")[number % 2]
        Image.new("RGB", (40, 30), colour).save(folder / f"{number}.png")
        rows.append({"photo": f"{number}.png", "tweet": f"a {colour} day {number}", "mood": label(number % 2)})
    return rows
