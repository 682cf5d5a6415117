"""Run sections of the benchmark and write what they measured."""

import gc
import json
import os
import platform
import re
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers

from clipcacg.scripts.bench import SECTIONS
from clipcacg.scripts.bench.setting import Figure, Setting
from clipcacg.scripts.data.errors import InputError


def card() -> str:
    """The GPU's name, or "cpu", in a form that suits a file name."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def machine() -> dict[str, str | int | None]:
    """Hardware and versions that the figures depend on."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def run_sections(names: Iterable[str], setting: Setting, output: Path) -> tuple[dict[str, Figure], list[str]]:
    """Run sections one after the other, and write the file after each.

    A section that fails prints its traceback, and the others still run. On a GPU each section also gives the figure
    `NAME_peak_gpu_mib`, the most memory that PyTorch allocated in this process during the section.

    Returns:
        The figures by name, and the names of the sections that failed.
    """
    figures: dict[str, Figure] = {}
    failed = []
    for name in names:
        print(f"{name} ...", flush=True)
        if torch.cuda.is_available():
            gc.collect()  # frees the models of the section before
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            figures |= SECTIONS[name](setting)
        except InputError:
            raise
        except Exception:
            traceback.print_exc()
            failed.append(name)
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**20
            figures[f"{name}_peak_gpu_mib"] = Figure(peak, f"MiB, peak GPU memory of the section {name}")
        write(output, figures)
    return figures, failed


def write(output: Path, figures: dict[str, Figure]) -> None:
    """Write a JSON object: one number per key, the figures in full under `details`, and `machine`."""
    details = {name: vars(figure) for name, figure in figures.items()}
    values = {name: figure.value for name, figure in figures.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**values, "details": details, "machine": machine()}, indent=2) + "\n")


def table(figures: dict[str, Figure]) -> str:
    """One line per figure, for the terminal."""
    lines = []
    for name, figure in figures.items():
        low_high = "" if figure.low is None else f"{figure.low:.4g} to {figure.high:.4g}"
        lines.append(f"{name:40}{figure.value:<12.4g}{low_high:20}{figure.what}")
    return "\n".join([f"{'figure':40}{'value':12}{'spread':20}what", *lines])
