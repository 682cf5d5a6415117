"""Plain functions and constants that tests share."""

import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import torch

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


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    """Wait until a server that was just started answers."""
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            httpx.get(url).raise_for_status()
            return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def upload(url: str, path: Path) -> dict[str, Any]:
    """Upload a file to the demo, and return what the page sends of it."""
    with path.open("rb") as file:
        response = httpx.post(f"{url}/gradio_api/upload", files={"files": (path.name, file)}, timeout=60)
    stored = response.raise_for_status().json()[0]
    return {"path": stored, "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}
