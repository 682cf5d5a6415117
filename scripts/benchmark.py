"""Measure what CLIP-CA-CG costs, as ratios of two things that run in turn, and in posts per second.

    python scripts/benchmark.py                                # full-size backbones with random weights
    python scripts/benchmark.py --only fusion fusion_bf16 memory --batch_size 64
    python scripts/benchmark.py --size tiny --only fusion      # a smoke test
    python scripts/benchmark.py --only alternatives --checkpoint CHECKPOINT --data_dir MVSA_Single
    CUDA_VISIBLE_DEVICES= python scripts/benchmark.py          # the CPU of a machine with a GPU

Random weights do, because speed does not depend on their values. The command runs on the GPU if there is one. It
prints a table and writes a JSON file, `benchmark_<card or cpu>.json` by default, with one number per key, its spread
over the rounds, and the machine. The docstrings of the functions in `clipcacg.scripts.bench` say what each section
measures.
"""

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import HfArgumentParser

from clipcacg.scripts.bench import SECTIONS, Setting
from clipcacg.scripts.bench.output import card, run_sections, table
from clipcacg.scripts.data.errors import InputError, add_debug_flag, one_sentence, parse_flags


@dataclass
class BenchmarkArguments:
    """What to measure, and how often."""

    size: Literal["base", "tiny"] = field(
        default="base", metadata={"help": "base: the default backbones; tiny: a smoke test."}
    )
    only: list[str] | None = field(
        default=None, metadata={"help": "Sections to run, all by default.", "choices": list(SECTIONS)}
    )
    repeats: int = field(default=5, metadata={"help": "Rounds, after a warm-up."})
    batch_size: int = field(default=32, metadata={"help": "Posts per forward pass and training step."})
    num_posts: int = field(default=96, metadata={"help": "Posts in the sections that read files."})
    checkpoint: str | None = field(
        default=None, metadata={"help": "prediction, alternatives: this model, not a random one."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "The same: the posts of this MVSA folder."})
    output: str | None = field(
        default=None, metadata={"help": "JSON file, `benchmark_<card or cpu>.json` by default."}
    )


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(BenchmarkArguments, description=__doc__.split("\n")[0])
    add_debug_flag(parser)
    values = vars(parse_flags(parser, argv)[0])
    names, output = values.pop("only") or list(SECTIONS), Path(values.pop("output") or f"benchmark_{card()}.json")
    with one_sentence(argv), tempfile.TemporaryDirectory() as folder:
        for flag in ("repeats", "batch_size", "num_posts"):
            if values[flag] < 1:
                raise InputError(f"--{flag} must be at least 1, got {values[flag]}.")
        if (values["checkpoint"] or values["data_dir"]) and not {*names} <= {"prediction", "alternatives"}:
            raise InputError("--checkpoint and --data_dir need --only prediction or alternatives.")
        if values["data_dir"] and not values["checkpoint"] and "alternatives" in names:
            raise InputError("alternatives reads the posts of --data_dir with a --checkpoint alone: give one.")
        setting = Setting(folder=Path(folder), **values)
        figures, failed = run_sections(names, setting, output)
    print(table(figures))
    print(f"written to {output}")
    if failed:
        sys.exit(f"Sections that failed: {', '.join(failed)}. Their tracebacks are above.")


if __name__ == "__main__":
    main()
