"""How cost grows with the batch size, the text length, the number of posts and the number of processes."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from clipcacg.scripts.bench.data import write_posts
from clipcacg.scripts.bench.model import in_new_process, resident_peak
from clipcacg.scripts.bench.setting import (
    Figure,
    Setting,
    in_turn,
    make_inputs,
    make_model,
    make_posts,
    make_processor,
    seconds,
    tiny_backbones,
)
from clipcacg.scripts.reporting.predictions import predict_file

TRAIN = "clipcacg.scripts.train"  # launched, not imported
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128]
LENGTHS = [8, 16, 32, 64, 128]
POSTS = [1000, 2000, 5000, 10000, 20000]


def growth(setting: Setting) -> dict[str, Figure]:
    """Seconds by batch size and text length at the chosen model size, and by number of posts with a tiny model.

    Each figure is the exponent between the smallest and the largest size: 1 is linear, less is better.
    """
    model = make_model(setting)
    curves = {"batch": (BATCHES, []), "text length": (LENGTHS, [])}
    with torch.inference_mode():
        for batch in BATCHES:
            inputs = make_inputs(setting, [28] * batch)
            curves["batch"][1].append(min(in_turn(2, run=lambda inputs=inputs: model(**inputs))["run"]))
        for length in LENGTHS:
            inputs = make_inputs(setting, [length] * 8)
            curves["text length"][1].append(min(in_turn(2, run=lambda inputs=inputs: model(**inputs))["run"]))
    curves["posts"] = (POSTS, [seconds_of_prediction(setting, count) for count in POSTS])
    plot(setting, curves)
    figures = {}
    for name, (sizes, times) in curves.items():
        what = f"exponent of the time from {sizes[0]} to {sizes[-1]}: {times[0]:.3g} s to {times[-1]:.3g} s"
        figures[f"growth_{name.replace(' ', '_')}"] = Figure(exponent(sizes, times), what)
    return figures


def exponent(sizes: list[int], times: list[float]) -> float:
    """k in time = c * size ** k, from the first and the last point."""
    return float(torch.tensor(times[-1] / times[0]).log() / torch.tensor(sizes[-1] / sizes[0]).log())


def plot(setting: Setting, curves: dict[str, tuple[list[int], list[float]]]) -> None:
    """Draw one panel per curve, with a line of proportional growth through its last point."""
    figure, axes = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.2), layout="constrained")
    for axis, (name, (sizes, times)) in zip(axes, curves.items(), strict=True):
        axis.loglog(sizes, times, marker="o", label="measured")
        axis.loglog(sizes, [times[-1] * size / sizes[-1] for size in sizes], ":", color="gray", label="proportional")
        axis.set(xlabel=name, ylabel="seconds", xticks=sizes, xticklabels=sizes)
        axis.minorticks_off()
        axis.legend()
    figure.savefig(setting.plot, dpi=120)
    plt.close(figure)


def seconds_of_prediction(setting: Setting, count: int) -> float:
    """Seconds of `predict_file` on `count` posts, which repeat the same hundred, with a tiny model."""
    tiny = Setting(**{**vars(setting), "size": "tiny"})
    source = many_posts(tiny, count)
    output = source.with_suffix(".out.jsonl")
    return seconds(partial(predict_file, make_model(tiny), make_processor(tiny), source, output, overwrite=True))


def many_posts(setting: Setting, count: int) -> Path:
    hundred = list(make_posts(setting, 100))
    posts = [{**hundred[number % 100], "id": str(number)} for number in range(count)]
    return write_posts(setting.folder / f"{count}.jsonl", posts)


def memory_of_prediction(setting: Setting) -> dict[str, Figure]:
    """Peak memory of `predict.py` on 20,000 posts against 2,000, each in a new process, with a tiny model."""
    peaks = [in_new_process(peak_of_prediction, setting, count) for count in (POSTS[1], POSTS[-1])]
    what = f"peak memory of predict.py, {POSTS[-1]} posts {peaks[1]:.0f} MiB / {POSTS[1]} posts {peaks[0]:.0f} MiB"
    return {"predict_memory_growth": Figure(peaks[1] / peaks[0], what)}


def peak_of_prediction(setting: Setting, count: int) -> float:
    seconds_of_prediction(setting, count)
    return resident_peak()


def processes(setting: Setting) -> dict[str, Figure]:
    """Training posts per second of two processes against one, with one thread each and the same total batch."""
    if torch.cuda.device_count() == 1:
        print("left out: two processes need two GPUs, or none")
        return {}
    rates = {}
    for count in (1, 2):
        output = setting.folder / f"processes{count}"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "-m", TRAIN]
        for part in ("text", "vision", "clip"):
            command += [f"--{part}_model", str(tiny_backbones(setting) / part)]
        command += f"--output_dir {output} --num_train_epochs 3 --save_strategy no --eval_strategy no".split()
        command += f"--load_best_model_at_end False --per_device_train_batch_size {32 // count}".split()
        if not torch.cuda.is_available():
            command += ["--use_cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(setting.folder / "hf")}
        subprocess.run(command, check=True, env=environment, capture_output=True)
        rates[count] = json.loads((output / "all_results.json").read_text())["train_samples_per_second"]
    what = f"two processes / one, on {os.cpu_count()} cores or {torch.cuda.device_count()} GPUs in all, sample's job"
    return {"two_process_speedup": Figure(rates[2] / rates[1], what)}
