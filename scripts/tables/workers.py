"""Make runs in this process, or several at the same time in processes of their own.

Each worker process trains one run at a time, and only the process of the command writes results. A worker that dies
costs its own run alone, and an interrupted command ends them all. `concurrent.futures` offers neither: a process pool
gives up every pending run when one worker dies.
"""

import ctypes
import gc
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import datasets
import torch
import transformers

from clipcacg.scripts.data.errors import set_up_logging
from clipcacg.scripts.tables.rows import Settings
from clipcacg.scripts.tables.runs import Fold, load_fold, run

SPAWN = multiprocessing.get_context("spawn")
RUNS_PER_WORKER = 10  # A process that trains many runs grows. A new one takes about ten seconds.


class Outcome(NamedTuple):
    """What became of a run: what its line says and its predictions, or an error; and how long it took."""

    found: dict[str, Any] | None = None
    predictions: dict[str, list] | None = None
    error: str | None = None
    traceback: str = ""
    seconds: float = 0.0


class RunMaker:
    """Makes runs one after the other, and keeps the posts of one fold."""

    def __init__(self, settings: Settings, fold: Fold | None = None) -> None:
        self.settings, self.fold = settings, fold

    def __call__(self, line: dict[str, Any]) -> Outcome:
        """Make the run that a line describes."""
        start = time.monotonic()
        try:
            if self.fold is None or self.fold.number != line["fold"]:
                self.fold = load_fold(line["fold"], self.settings)
            settings = self.settings.for_row(line["row"], line["values"])
            found, predictions = run(line["row"], self.fold, settings, line["seed"])
            return Outcome(found, predictions, seconds=time.monotonic() - start)
        except Exception as error:  # one failed run must not end the others
            return Outcome(error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        finally:
            gc.collect()
            torch.cuda.empty_cache()
            with suppress(OSError, AttributeError):  # a system without glibc
                # Texts of varying length fragment glibc's heap, and glibc keeps freed pages: a process grew by 100 to
                # 200 MiB a run. oneDNN's cache was not the cause, as ONEDNN_PRIMITIVE_CACHE_CAPACITY=16 showed.
                ctypes.CDLL("libc.so.6").malloc_trim(0)


class Worker:
    """A process that makes runs, and the connection to it."""

    def __init__(self, settings: Settings, threads: int) -> None:
        self.connection, other = SPAWN.Pipe()
        self.process = SPAWN.Process(target=serve, args=(other, settings, threads))
        # Ctrl-C reaches every process. The workers inherit that they ignore it, and the command's process ends them.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.process.start()
        signal.signal(signal.SIGINT, handler)
        other.close()  # the process's own copy stays open, so its death closes the connection
        self.line: dict[str, Any] | None = None
        self.runs = 0

    def start(self, line: dict[str, Any]) -> None:
        self.line, self.runs = line, self.runs + 1
        with suppress(OSError):  # a process that has died since; `result` says so
            self.connection.send(line)

    def result(self) -> tuple[dict[str, Any], Outcome]:
        """Return the line that was started last and what became of it."""
        line, self.line = self.line, None
        try:
            return line, self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            self.runs = RUNS_PER_WORKER
            code = self.process.exitcode
            cause = f"was killed by signal {-code}, perhaps for lack of memory" if code < 0 else f"ended with {code}"
            return line, Outcome(error=f"the worker process {cause}")

    def end(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()


def make_runs(
    next_line: Callable[[], dict[str, Any] | None], settings: Settings, fold: Fold, jobs: int = 1
) -> Iterator[tuple[dict[str, Any], Outcome]]:
    """Make runs as long as there are any, and yield each when it ends.

    Args:
        next_line: Returns a line that describes the next run, or None if there is none before another run ends.
        settings: The config of all rows.
        fold: The first fold, which is loaded already.
        jobs: Number of runs at the same time. One run needs no further process.
    """
    if jobs == 1:
        make = RunMaker(settings, fold)
        while line := next_line():
            yield line, make(line)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    workers: list[Worker] = []
    try:
        while True:
            while sum(worker.line is not None for worker in workers) < jobs and (line := next_line()):
                free = next((worker for worker in workers if worker.line is None), None)
                if free is None:
                    free = Worker(settings, threads)
                    workers.append(free)
                free.start(line)
            busy = {worker.connection: worker for worker in workers if worker.line is not None}
            if not busy:
                return
            for connection in wait(list(busy)):
                worker = busy[connection]
                result = worker.result()
                if worker.runs >= RUNS_PER_WORKER:
                    worker.end()
                    workers.remove(worker)
                yield result
    finally:
        for worker in workers:
            worker.end()


def serve(connection: Connection, settings: Settings, threads: int) -> None:
    """Make the runs that arrive, until the connection is closed; what a worker process does."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    set_up_logging(is_main=False)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(threads)
    settings.training.disable_tqdm = True  # several bars would overwrite each other
    make = RunMaker(settings)
    while True:
        try:
            line = connection.recv()
        except EOFError:
            return
        connection.send(make(line))


def end_with_parent() -> None:
    """End this process if that of the command is killed, since a run that nobody waits for would go on."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
