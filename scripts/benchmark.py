"""Measure what CLIP-CA-CG costs, always as a ratio of two things that are run in turn.

    python scripts/benchmark.py                              # base size, random weights: cost does not depend on them
    python scripts/benchmark.py --size tiny --output bench.json
    python scripts/benchmark.py --only fusion padding --repeats 7

Prints a table, and writes a JSON file with one number a key, the spread of each, the machine, and, with the section
`growth`, a plot beside it. Runs on the GPU if there is one. What is measured, and how, stands in the functions of
`benchmarks/`. On a busy machine single times mean little; the ratios are of runs side by side, and the column
"spread" tells the smallest and the largest of them.
"""

import json
import os
import platform
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
import transformers
from transformers import HfArgumentParser

from clipcacg.scripts.bench import SECTIONS, Figure, Setting
from clipcacg.scripts.data.loading import one_sentence

matplotlib.use("Agg")


@dataclass
class BenchmarkArguments:
    """What to measure, and how often."""

    size: str = field(default="base", metadata={"help": "base: the default backbones; tiny: a smoke run."})
    only: list[str] | None = field(default=None, metadata={"help": f"Some of: {', '.join(SECTIONS)}."})
    repeats: int = field(default=5, metadata={"help": "Rounds, after one to warm up."})
    batch_size: int = field(default=32, metadata={"help": "Posts in a forward pass or a training step."})
    num_posts: int = field(default=96, metadata={"help": "Posts of the sections that read posts."})
    checkpoint: str | None = field(default=None, metadata={"help": "predict: this model instead of a random one."})
    data_dir: str | None = field(default=None, metadata={"help": "predict: the posts of this MVSA folder."})
    output: str = field(default="bench.json", metadata={"help": "JSON file; a plot gets the same name."})

    def __post_init__(self) -> None:
        if self.size not in ("base", "tiny"):
            raise ValueError(f"--size must be base or tiny, not {self.size!r}.")
        unknown = sorted(set(self.only or []) - SECTIONS.keys())
        if unknown:
            raise ValueError(f"--only: there is no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}.")


def machine() -> dict[str, str | int]:
    """What it was measured on."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def table(figures: dict[str, Figure]) -> str:
    """One line a figure."""
    lines = []
    for name, figure in figures.items():
        spread = "" if figure.low is None else f"{figure.low:.4g} to {figure.high:.4g}"
        lines.append(f"{name:26}{figure.value:<12.4g}{spread:20}{figure.what}")
    return "\n".join([f"{'figure':26}{'value':12}{'spread':20}what", *lines])


def write(output: Path, figures: dict[str, Figure]) -> None:
    """One number a key, and the details under `details`."""
    details = {name: vars(figure) for name, figure in figures.items()}
    values = {name: figure.value for name, figure in figures.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**values, "details": details, "machine": machine()}, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(BenchmarkArguments, description=__doc__.split("\n")[0])
    with one_sentence():
        (arguments,) = parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv)
    output = Path(arguments.output)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            folder=Path(folder),
            plot=output.with_suffix(".png"),
            **{name: value for name, value in vars(arguments).items() if name not in ("only", "output")},
        )
        figures: dict[str, Figure] = {}
        for name in arguments.only or SECTIONS:
            print(f"{name} ...", flush=True)
            figures |= SECTIONS[name](setting)
            write(output, figures)  # nothing that was measured is lost if a later section fails
    print(table(figures))


if __name__ == "__main__":
    main()
