"""A run that is killed, or out of memory or disk space, loses no checkpoint and says what to do."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from commands import FORKS
from inputs import SCRIPTS, flags
from safetensors.torch import load_file

from clipcacg.scripts import train
from clipcacg.scripts.training import run as run_steps
from clipcacg.scripts.training.arguments import ModelArguments, RecipeArguments
from clipcacg.scripts.training.trainer import SentimentTrainer

STEPS = 12
RESUME = ["--resume_from_checkpoint", "True"]


def short_flags(posts: Path, backbones: Path, output: Path, *more: str) -> list[str]:
    """Flags of a dozen steps over 32 posts, with an evaluation and a checkpoint after every other step."""
    return flags(
        posts, backbones, output, "--use_cpu", "--train_sampling_strategy", "random", "--max_train_samples", "32",
        "--per_device_train_batch_size", "8", "--max_steps", str(STEPS), "--save_strategy", "steps", "--save_steps",
        "2", "--eval_strategy", "steps", "--eval_steps", "2", "--save_total_limit", "99", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(posts_folder: Path, backbones: Path) -> Callable[..., Path]:
    """A function that trains in this process, into a folder."""

    def train_into(output: Path, *more: str) -> Path:
        train.main(short_flags(posts_folder, backbones, output, *more))
        return output

    return train_into


@pytest.fixture(scope="module")
def whole(run: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without faults."""
    return run(tmp_path_factory.mktemp("whole") / "model")


def scores(folder: Path) -> dict[str, Any]:
    """All scores of a run, without times and the training loss, which is a mean over the steps since its start."""
    found = json.loads((folder / "all_results.json").read_text())
    return {name: found[name] for name in found if not re.search("runtime|per_second|train_loss|total_flos", name)}


def assert_same(folder: Path, whole: Path) -> None:
    """Weights, scores and predictions equal those of another run, bit for bit."""
    one, other = (load_file(path / "model.safetensors") for path in (folder, whole))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert scores(folder) == scores(whole) and len(scores(folder)) > 10
    assert (folder / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()


def assert_last_checkpoint_is_whole(folder: Path, whole: Path) -> str | None:
    """The checkpoint to resume from equals the other run's of that step; returns its name."""
    last = run_steps.last_checkpoint(folder)
    if last is None:
        return None
    one, other = Path(last), whole / Path(last).name
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    for name in ("optimizer.pt", "scheduler.pt"):
        first, second = (torch.load(path / name, weights_only=True) for path in (one, other))
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert json.loads((one / "trainer_state.json").read_text())["global_step"] == int(one.name.partition("-")[2])
    names = {path.name for path in other.iterdir()}
    assert names <= {path.name for path in one.iterdir()}
    return one.name


@pytest.mark.slow
def test_two_runs_of_one_seed_are_equal_bit_for_bit(run: Callable, whole: Path, tmp_path: Path) -> None:
    assert_same(run(tmp_path / "again"), whole)
    other = run(tmp_path / "other", "--seed", "1", "--max_steps", "2")
    mine, theirs = (load_file(path / "checkpoint-2/model.safetensors") for path in (other, whole))
    assert not torch.equal(mine["classifier.weight"], theirs["classifier.weight"])


@pytest.mark.slow
def test_full_determinism_holds_before_the_model_is_built(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, "")  # is put back at the end, as is the next
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "")
    found, build = [], train.build
    record = lambda *arguments: found.append(torch.are_deterministic_algorithms_enabled()) or build(*arguments)  # noqa: E731
    monkeypatch.setattr(train, "build", record)
    try:
        run(tmp_path / "model", "--full_determinism", "--max_steps", "2")
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    assert found == [True]


def test_too_high_a_learning_rate_stops_the_run(run: Callable, tmp_path: Path) -> None:
    said = r"loss of step 2 is (nan|inf), at a learning rate of 9.17e\+29: try a lower --learning_rate"
    with pytest.raises(SystemExit, match=said) as ended:
        run(tmp_path / "model", "--learning_rate", "1e30")
    assert "\n" not in str(ended.value)


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_loss_that_is_not_finite_leaves_earlier_checkpoints_complete(
    number: str, run: Callable, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = SentimentTrainer.compute_loss

    def compute_loss(self: SentimentTrainer, *arguments: Any, **keywords: Any) -> torch.Tensor:
        loss = compute(self, *arguments, **keywords)
        return loss * float(number) if self.model.training and self.state.global_step == 6 else loss

    with monkeypatch.context() as patch:
        patch.setattr(SentimentTrainer, "compute_loss", compute_loss)
        with pytest.raises(SystemExit, match=rf"loss of step 7 is {number}, at a learning rate of 0.0005: "):
            run(tmp_path / "model")
    assert assert_last_checkpoint_is_whole(tmp_path / "model", whole) == "checkpoint-6"
    assert_same(run(tmp_path / "model", *RESUME), whole)


FULL = {
    "of the CPU": (lambda: torch.empty(2**54), "can't allocate memory"),
    "of a GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more"), "2.00 GiB"),
    "of Windows": (RuntimeError("[enforce fail] . DefaultCPUAllocator: not enough memory: you tried"), "you tried"),
    "of Python": (MemoryError(), "MemoryError"),
}


@pytest.mark.parametrize("kind", FULL)
def test_full_memory_says_what_to_try(
    kind: str, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, reason = FULL[kind]

    def fail(*_: Any, **__: Any) -> None:
        if isinstance(fault, Exception):
            raise fault
        fault()

    monkeypatch.setattr(SentimentTrainer, "compute_loss", fail)
    with pytest.raises(SystemExit, match="The memory is full") as ended:
        run(tmp_path / "model")
    message = str(ended.value)
    assert reason in message and "\n" not in message
    named = {word for word in re.findall(r"--(\w+)", message)}
    fields = ModelArguments.__dataclass_fields__.keys() | RecipeArguments.__dataclass_fields__.keys()
    assert {"per_device_train_batch_size", "gradient_accumulation_steps", "freeze_text", "cache_features"} <= named
    assert {"bf16", "gradient_checkpointing"} <= named <= fields


def test_any_other_error_keeps_its_traceback(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(SentimentTrainer, "compute_loss", fail)
    with pytest.raises(RuntimeError, match="^a bug of ours$"):
        run(tmp_path / "model")


# The size limit of a file, in sizes of the weights: it cuts off the weights, or Adam's two averages of them.
@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 1.5])
def test_no_room_for_a_checkpoint_leaves_earlier_ones_complete(
    share: float, run: Callable, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (whole / "checkpoint-2/model.safetensors").stat().st_size
    before, save = resource.getrlimit(resource.RLIMIT_FSIZE), SentimentTrainer._save_checkpoint

    def save_in_little_room(self: SentimentTrainer, *arguments: Any) -> None:
        if self.state.global_step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), before[1]))
        try:
            save(self, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patch:
        patch.setattr(SentimentTrainer, "_save_checkpoint", save_in_little_room)
        with pytest.raises(
            SystemExit, match=r"model cannot be written to \(.*: earlier checkpoints are complete"
        ) as ended:
            run(tmp_path / "model")
    assert "\n" not in str(ended.value) and "--resume_from_checkpoint True" in str(ended.value)
    assert (tmp_path / "model/checkpoint-6").is_dir()
    assert assert_last_checkpoint_is_whole(tmp_path / "model", whole) == "checkpoint-4"
    assert_same(run(tmp_path / "model", *RESUME), whole)


@pytest.mark.slow
def test_a_full_disk(run: Callable, whole: Path, tmp_path: Path) -> None:
    """The same, in a file system with room for one and a half checkpoints."""
    sizes = [path.stat().st_size for path in (whole / "checkpoint-2").rglob("*") if path.is_file()]
    (tmp_path / "small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={sum(sizes) * 3 // 2}", "tmpfs", str(tmp_path / "small")]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(SystemExit, match=r"model cannot be written to \(.*: earlier checkpoints are complete"):
            run(tmp_path / "small/model")
        assert assert_last_checkpoint_is_whole(tmp_path / "small/model", whole) == "checkpoint-2"
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True)


@pytest.mark.slow
def test_a_checkpoint_is_incomplete_while_it_is_overwritten(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run resumed from an earlier checkpoint and then interrupted may leave the later ones half overwritten."""
    run(tmp_path / "model", "--max_steps", "4")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SentimentTrainer, "_save_optimizer_and_scheduler", fail)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "model", "--resume_from_checkpoint", str(tmp_path / "model/checkpoint-2"))
    assert run_steps.last_checkpoint(tmp_path / "model") == str(tmp_path / "model/checkpoint-2")


PHASES = ["training_step", "evaluate", "_save_checkpoint"]
BETWEEN = len(PHASES)
KILLS = 9


def watched(arguments: list[str], phase: Any, begun: Any) -> None:
    """Train in a child process, and count in shared memory the phases, and which one it is in."""

    def noting(number: int, method: Callable) -> Callable:
        def noted(self: SentimentTrainer, *positional: Any, **keywords: Any) -> Any:
            phase.value, begun[number] = number, begun[number] + 1
            try:
                return method(self, *positional, **keywords)
            finally:
                phase.value = BETWEEN

        return noted

    for number, name in enumerate(PHASES):
        setattr(SentimentTrainer, name, noting(number, getattr(SentimentTrainer, name)))
    train.main(arguments)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_anywhere_continues_to_the_same_result(
    posts_folder: Path, backbones: Path, whole: Path, tmp_path: Path
) -> None:
    dice = random.Random(20)
    killed, unfinished, finished = Counter(), 0, 0
    folder = tmp_path / "0"

    def start() -> tuple[Any, Any, Any]:
        phase, begun = FORKS.RawValue("i", BETWEEN), FORKS.RawArray("i", len(PHASES))
        arguments = short_flags(posts_folder, backbones, folder, *RESUME, "--save_total_limit", "2")
        child = FORKS.Process(target=watched, args=(arguments, phase, begun))
        child.start()
        return child, phase, begun

    while killed.total() < KILLS or min(killed[number] for number in range(len(PHASES))) < 2 or not unfinished:
        assert killed.total() < 4 * KILLS, killed
        # A tenth of a second is about what a phase takes; one kill in four comes at any moment from start to end.
        wanted, times = dice.randrange(len(PHASES) + 1), dice.randint(1, 2)
        delay = dice.uniform(0, 3) if wanted == BETWEEN else dice.uniform(0, 0.1)
        child, phase, begun = start()
        while wanted != BETWEEN and begun[wanted] < times and child.is_alive():
            time.sleep(0.001)
        time.sleep(delay)
        child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        if child.exitcode == 0:
            assert_same(folder, whole)
            folder, finished = tmp_path / str(finished + 1), finished + 1
            continue
        killed[phase.value] += 1
        last = assert_last_checkpoint_is_whole(folder, whole)
        unfinished += bool(run_steps.checkpoints(folder)) and run_steps.checkpoints(folder)[0].name != last
    child, _, _ = start()
    child.join()
    assert child.exitcode == 0
    assert_same(folder, whole)
    print(f"killed {[(*PHASES, 'between')[n] for n in killed.elements()]}, {unfinished = }, {finished = }")


@pytest.mark.slow
def test_a_killed_process_ends_the_other(posts_folder: Path, backbones: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = short_flags(posts_folder, backbones, tmp_path / "model", "--max_steps", "100000")
    with (tmp_path / "log").open("wb") as log:
        launched = subprocess.Popen(
            [*torchrun, str(SCRIPTS / "train.py"), *arguments], cwd=tmp_path, stdout=log, stderr=log
        )
    try:
        while not (tmp_path / "model/checkpoint-2/trainer_state.json").exists():
            assert launched.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        ranks = psutil.Process(launched.pid).children()
        assert len(ranks) == 2
        os.kill(ranks[1].pid, signal.SIGKILL)
        start = time.monotonic()
        assert launched.wait(timeout=60) != 0
        _, alive = psutil.wait_procs(ranks, timeout=60 - (time.monotonic() - start))
        assert not alive
    finally:
        if launched.poll() is None:
            launched.kill()
