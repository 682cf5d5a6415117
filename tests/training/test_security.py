"""No untrusted code runs, no untrusted text becomes markup, and no token is revealed.

ruff's rules S301, S307, S506 and S602 find calls that would run what they read; torch.load refuses by default.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import flags

from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification, ClipCaCgModel
from clipcacg.scripts import evaluate_checkpoint, predict, train
from clipcacg.scripts.reporting.tables import escape_markdown, markdown_table

MARKUP = "<script>alert(1)</script> | a `b` **c** [d](javascript:alert(2)) <img src=x onerror=alert(3)> &lt;"


class Trap:
    """Unpickling it makes a folder, which shows that untrusted code ran."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The folder that exists only if a trap was unpickled."""
    return tmp_path / "untrusted code ran"


@pytest.fixture
def trapped(checkpoint: Path, tmp_path: Path, mark: Path) -> Path:
    """A checkpoint whose weights are a pickle."""
    folder = shutil.copytree(checkpoint, tmp_path / "trapped")
    (folder / "model.safetensors").unlink()
    torch.save({"classifier.bias": Trap(mark)}, folder / "pytorch_model.bin")
    return folder


def test_a_trap_works(trapped: Path, mark: Path) -> None:
    torch.load(trapped / "pytorch_model.bin", weights_only=False)
    assert mark.is_dir()


@pytest.mark.parametrize("form", ["archive", "bare pickle", "shards"])
def test_weights_in_a_pickle_are_not_run(trapped: Path, mark: Path, form: str) -> None:
    if form == "bare pickle":
        (trapped / "pytorch_model.bin").write_bytes(pickle.dumps({"classifier.bias": Trap(mark)}))
    if form == "shards":
        (trapped / "pytorch_model.bin").rename(trapped / "pytorch_model-00001-of-00001.bin")
        shards = {"classifier.bias": "pytorch_model-00001-of-00001.bin"}
        index = {"metadata": {"total_size": 1}, "weight_map": shards}
        (trapped / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for cls in (ClipCaCgModel, ClipCaCgForSequenceClassification):
        with pytest.raises(OSError, match="model.safetensors"):
            cls.from_pretrained(trapped)
        with pytest.raises((pickle.UnpicklingError, RuntimeError)):  # even asked for, they run nothing
            cls.from_pretrained(trapped, use_safetensors=None)
    assert not mark.exists()


def test_a_pickle_beside_the_weights_is_not_read(checkpoint: Path, trapped: Path, mark: Path) -> None:
    shutil.copy(checkpoint / "model.safetensors", trapped)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin"):
        shutil.copy(trapped / "pytorch_model.bin", trapped / name)
    ClipCaCgForSequenceClassification.from_pretrained(trapped)
    assert not mark.exists()


@pytest.mark.parametrize("script", ["predict", "evaluate_checkpoint", "train", "explain", "demo", "backbone"])
def test_no_script_runs_them(
    trapped: Path, mark: Path, posts_folder: Path, backbones: Path, script: str, tmp_path: Path
) -> None:
    post = ["--image", str(posts_folder / "data/1.jpg"), "--text", "a"]
    data = ["--data_dir", str(posts_folder)]
    with pytest.raises((SystemExit, OSError)) as told:
        if script == "predict":
            predict.main([str(trapped), *post])
        elif script == "evaluate_checkpoint":
            evaluate_checkpoint.main([str(trapped), *data, "--output", str(tmp_path / "scores.json")])
        elif script == "train":
            train.main([*flags(posts_folder, None, tmp_path / "out"), "--model_name_or_path", str(trapped)])
        elif script == "explain":
            pytest.importorskip("captum")
            pytest.importorskip("clipcacg.scripts.explain").main([str(trapped), *post])
        elif script == "demo":
            pytest.importorskip("gradio")
            pytest.importorskip("clipcacg.scripts.demo").main([str(trapped)])
        else:
            names = shutil.copytree(backbones, tmp_path / "backbones")
            (names / "text/model.safetensors").unlink()
            shutil.copy(trapped / "pytorch_model.bin", names / "text")
            ClipCaCgModel.from_backbones(*(names / part for part in ("text", "vision", "clip")), hidden_size=32)
    assert "model.safetensors" in str(told.value) and not mark.exists()  # a sentence that says what is missing


FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin")


@pytest.fixture(scope="module")
def run(posts_folder: Path, backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended after its first step."""
    folder = tmp_path_factory.mktemp("run") / "out"
    steps = ["--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1", "--eval_strategy", "no"]
    more = ["--load_best_model_at_end", "False", "--max_train_samples", "8", "--max_eval_samples", "4"]
    tokens = [f"--{name}_token={TOKEN}" for name in ("hub", "text", "vision", "clip")]
    train.main(flags(posts_folder, backbones, folder, *steps, *more, *tokens))
    return folder


TOKEN = "hf_" + "Secret7" * 5


@pytest.mark.parametrize("file", FILES)
def test_a_resumed_run_executes_no_untrusted_pickle(
    run: Path, posts_folder: Path, backbones: Path, tmp_path: Path, mark: Path, file: str
) -> None:
    folder = shutil.copytree(run, tmp_path / "out")
    assert (folder / "checkpoint-1" / file).exists() or file in ("pytorch_model.bin", "training_args.bin")
    torch.save({"state": Trap(mark), "param_groups": [Trap(mark)]}, folder / "checkpoint-1" / file)
    steps = ["--max_steps", "2", "--save_strategy", "no", "--eval_strategy", "no", "--load_best_model_at_end", "False"]
    more = ["--resume_from_checkpoint", "True", "--max_train_samples", "8", "--max_eval_samples", "4"]
    try:
        train.main(flags(posts_folder, backbones, folder, *steps, *more))
    except (pickle.UnpicklingError, SystemExit, RuntimeError, ValueError):
        assert file not in ("training_args.bin", "pytorch_model.bin")  # which are never read
    assert not mark.exists()


def test_no_file_of_a_run_holds_a_token_or_a_local_path(run: Path, posts_folder: Path, backbones: Path) -> None:
    """Neither as text nor inside a pickle or a compressed archive of torch's, which stores without packing."""
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path.name for path in files if TOKEN.encode() in path.read_bytes()]
    places = [str(place).encode() for place in (run, posts_folder, backbones, Path.home())]
    found = {path.relative_to(run).as_posix() for path in files if any(place in path.read_bytes() for place in places)}
    # The Trainer's own records, which name its output folder. `push_to_hub.py` uploads neither.
    assert found <= {"training_args.bin", "checkpoint-1/training_args.bin", "trainer_state.json",
                     "checkpoint-1/trainer_state.json"}  # fmt: skip


@pytest.mark.slow
def test_a_push_reveals_no_token_at_any_log_level(checkpoint: Path, tmp_path: Path) -> None:
    """With every library logging at debug level, and a server that refuses."""
    code = (
        "import logging, sys; logging.basicConfig(level=logging.DEBUG)\n"
        "from clipcacg.scripts import push_to_hub\n"
        "logging.getLogger().setLevel(logging.DEBUG)\n"
        "for name in list(logging.root.manager.loggerDict): logging.getLogger(name).setLevel(logging.DEBUG)\n"
        "sys.argv = ['push_to_hub.py', *sys.argv[1:]]\n"
        "push_to_hub.main()\n"
    )
    folder = shutil.copytree(checkpoint, tmp_path / "pushed")
    (folder / "README.md").write_text("# a\n")
    env = os.environ | {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_DEBUG": "1"}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_VERBOSITY": "debug", "TRANSFORMERS_VERBOSITY": "debug"}
    command = [sys.executable, "-c", code, str(folder), "user/name"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode != 0 and "The push to user/name failed" in said and "DEBUG" in said
    assert TOKEN not in said and TOKEN[3:] not in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


class Tags(HTMLParser):
    """The elements of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.found.append(tag)


def rendered(text: str) -> str:
    """Markdown as a page of a renderer that lets HTML through, the worst case."""
    markdown = pytest.importorskip("markdown_it", reason="comes with gradio")
    return markdown.MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


def test_markup_in_names_stays_text_in_tables_and_lines() -> None:
    table = rendered(markdown_table([["Name", "Value"], [MARKUP, MARKUP]]))
    assert set(Tags(table).found) <= {"table", "thead", "tbody", "tr", "th", "td"} and table.count("<td>") == 2
    line = rendered(f"A label {escape_markdown(MARKUP)} in a line")
    assert Tags(line).found == ["p"]
    assert set(Tags(rendered(MARKUP)).found) >= {"script", "img"}  # it would be markup otherwise
