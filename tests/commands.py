"""Run the project's commands as processes of their own, forked from one that has imported the libraries.

Importing torch, transformers and datasets takes a new process ten seconds. A fork has them, and none of our code. What
a library reads while it is imported, such as HF_HOME, is therefore that of the test session.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "transformers.trainer", "transformers.models.roberta.modeling_roberta", "torchvision.transforms.v2",
        "transformers.models.resnet.modeling_resnet", "transformers.models.clip.modeling_clip", "accelerate",
        "transformers.models.clip.image_processing_clip", "transformers.processing_utils", "transformers.pipelines",
        "datasets", "evaluate", "matplotlib.figure", "matplotlib.backends.backend_agg", "sklearn.metrics",
        "scipy.sparse.csgraph", "captum.attr",
    ]
)  # fmt: skip


def start(
    words: Sequence[str | Path], folder: Path, output: Path = Path(os.devnull), errors: Path = Path(os.devnull)
) -> BaseProcess:
    """Start a script, `-m` and a module, or `-c` and code, with its arguments, as a new process group in a folder."""
    process = FORKS.Process(target=_main, args=([str(word) for word in words], folder, output, errors))
    process.start()
    return process


def run(words: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Start a command, and wait for it.

    Raises:
        AssertionError: If it does not exit with 0; the message is what it printed.
    """
    with tempfile.TemporaryDirectory() as printed:
        output, errors = Path(printed, "output"), Path(printed, "errors")
        process = start(words, folder, output, errors)
        process.join()
        done = subprocess.CompletedProcess(words, process.exitcode, output.read_text(), errors.read_text())
    assert done.returncode == 0, done.stderr
    return done


def run_killed(words: Sequence[str | Path], folder: Path, moment: Callable[[], bool]) -> None:
    """Start a command, and kill it when `moment` returns True.

    Raises:
        AssertionError: If it ends before.
    """
    process = start(words, folder)
    while not moment():
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()


def _main(words: list[str], folder: Path, output: Path, errors: Path) -> None:
    os.setsid()
    os.chdir(folder)
    for path, stream in ((output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    option, *rest = words
    if option == "-m":
        sys.argv, sys.path[0] = rest, str(folder)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif option == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = words, str(Path(option).parent)
        runpy.run_path(option, run_name="__main__")
