"""Plain functions and constants that tests share."""

import json
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
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


def flags(posts: Path, backbones: Path | None, output: Path, *more: str) -> list[str]:
    """Flags of `train.py`: the sample's config on a small data set of the same kind, two epochs.

    Without `backbones` the encoders are those of `--model_name_or_path`.
    """
    parts = ("text", "vision", "clip") if backbones else ()
    names = [word for part in parts for word in (f"--{part}_model", str(backbones / part))]
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


def learning_lora_weights(model: Any, processor: Any, image: Any, modules: str) -> int:
    """Add LoRA to the modules, and count its matrices B that get a gradient from one post."""
    peft = pytest.importorskip("peft")
    inputs = processor(images=image, text="a day", return_tensors="pt")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=modules))
    adapted(**inputs, labels=torch.tensor([0])).loss.backward()
    lora = [weight for name, weight in adapted.named_parameters() if "lora_B" in name]
    return sum(bool(weight.grad.abs().sum() > 0) for weight in lora)


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


def ask_page(url: str, image: Any, text: Any, client: httpx.Client | None = None) -> list[Any] | str:
    """What the demo answers: the values of its panels, or the sentence of its error."""
    client = client or httpx.Client(timeout=120)
    response = client.post(f"{url}/gradio_api/call/explain", json={"data": [image, text]})
    if response.status_code != 200:
        return f"HTTP {response.status_code}"
    stream = client.get(f"{url}/gradio_api/call/explain/{response.json()['event_id']}").text
    *_, last = [part for part in stream.strip().split("\n\n") if "heartbeat" not in part]
    event, data = (line.partition(": ")[2] for line in last.split("\n"))
    return json.loads(data) if event == "complete" else (json.loads(data) or {}).get("error") or "no sentence"
