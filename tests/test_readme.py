"""The README's commands and code do what they say."""

import csv
import importlib
import re
import shlex
import sys
from pathlib import Path

import datasets
import pytest
from PIL import Image

from clipcacg.scripts.tables.lines import RUNS_FILE, read_lines, select
from clipcacg.scripts.tables.rows import ROWS, parse, short_hash

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
INSTALLING = [command for command in COMMANDS if command.startswith("pip install")]
TRAINING = [command for command in COMMANDS if "scripts/train.py" in command and command not in INSTALLING]
# What needs a server, a browser, an extra or minutes is run by the tests of its name.
OF_OTHER_TESTS = (
    "push_to_hub.py", "demo.py", "reproduce.py", "benchmark.py", "export_onnx.py", "quantize.py",
    "make_word_vectors.py",
)  # fmt: skip
ELSEWHERE = [command for command in COMMANDS if any(script in command for script in OF_OTHER_TESTS)]
NUMBERS = "accuracy accuracy_std f1 f1_std difference low high trainable_parameters seconds".split()
OTHERS = [command for command in COMMANDS if command not in INSTALLING + TRAINING + ELSEWHERE]


@pytest.fixture
def place(posts_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, where the README's names exist: MVSA folders, posts.csv, posts.jsonl and post.jpg."""
    for name, target in (("pictures", posts_folder / "data"), ("scripts", ROOT / "scripts")):
        (tmp_path / name).symlink_to(target)
    for name in ("MVSA_Single", "MVSA_Multiple"):
        (tmp_path / name).symlink_to(posts_folder)
    rows = [
        {"picture": f"pictures/{number}.jpg", "tweet": f"post {number}", "mood": ("good", "bad")[number % 2]}
        for number in range(1, 41)
    ]
    table = datasets.Dataset.from_list(rows)
    table.to_csv(tmp_path / "posts.csv")
    table.rename_columns({"picture": "image", "tweet": "text"}).to_json(tmp_path / "posts.jsonl")
    Image.new("RGB", (80, 60), "orange").save(tmp_path / "post.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_cache.CACHE_FOLDER", tmp_path / "features")


def run(command: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    """Run a command's script in this process: its launcher is not ours to test."""
    words = shlex.split(command)
    script = next(number for number, word in enumerate(words) if re.fullmatch(r"scripts/\w+\.py", word))
    monkeypatch.setattr(sys, "argv", [*words[script:], *more])
    importlib.import_module(Path(words[script]).stem).main()


def test_there_are_two_commands_to_install_and_ci_runs_both() -> None:
    run_it, test_it = INSTALLING
    assert run_it == "pip install -e . && accelerate launch scripts/train.py"
    assert test_it == 'pip install -e ".[test]" && python -m pytest'
    ci = (ROOT / ".ci/run").read_text()
    assert "readme_command 'pip install -e . && accelerate launch scripts/train.py'" in ci
    assert "readme_command 'python -m pytest'" in ci


@pytest.mark.parametrize("command", TRAINING)
def test_training(command: str, place: Path, backbones: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tiny backbones and for four steps; everything else as it stands."""
    names = [word for part in ("text", "vision", "clip") for word in (f"--{part}_model", str(backbones / part))]
    small = ["--hidden_size", "32", "--num_attention_heads", "4", "--max_steps", "4"]
    small += ["--freeze_text_layers", "1"] if "offline" in command else []  # the tiny one has two
    run(command, monkeypatch, *names, *small, "--dataloader_num_workers", "0")
    assert len(list(place.glob("outputs/*/all_results.json"))) == 1


@pytest.mark.parametrize("number", [0, 1])
def test_the_code_prints_a_probability_a_label(
    number: int, checkpoint: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "outputs").mkdir()
    (place / "outputs/sample").symlink_to(checkpoint)
    exec(CODE[number], {})
    shown = dict(re.findall(r"(negative|neutral|positive)\W+(?:score\W+)?(\d\.\d+)", capsys.readouterr().out))
    assert shown.keys() == {"negative", "neutral", "positive"}
    assert sum(map(float, shown.values())) == pytest.approx(1, abs=0.002)


def test_the_code_builds_on_backbones(backbones: Path) -> None:
    code = CODE[2]
    for name, part in (
        ("FacebookAI/roberta-base", "text"),
        ("microsoft/resnet-50", "vision"),
        ("openai/clip-vit-base-patch32", "clip"),
    ):
        assert name in code
        code = code.replace(name, str(backbones / part))
    built: dict[str, object] = {}
    exec(code, built)
    assert set(built["processor"].model_input_names) >= set(built["model"].config.required_inputs)


def test_scoring_predicting_and_preparing(
    checkpoint: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "outputs").mkdir()
    (place / "outputs/sample").symlink_to(checkpoint)
    for command in OTHERS:
        run(command, monkeypatch, *(["--data_dir", "MVSA_Single"] if "evaluate" in command else []))
    shown = capsys.readouterr().out
    assert "Weighted F1" in shown and '"label"' in shown
    assert (place / "results.json").is_file() and (place / "results.png").is_file()
    assert len((place / "predictions.jsonl").read_text().splitlines()) == 40
    assert datasets.load_dataset(str(place / "prepared"))["train"].features["label"].names[0] == "negative"


def of_tables() -> list[str]:
    """The command that made the committed tables."""
    (command,) = [command for command in COMMANDS if "reproduce.py" in command and "--trials" in command]
    return shlex.split(command.partition("reproduce.py")[2])


@pytest.mark.parametrize("command", [command for command in COMMANDS if "reproduce.py" in command])
def test_the_runner_of_the_tables_knows_its_flags(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert parse(shlex.split(command.partition("reproduce.py")[2]))[0].row_names()


def test_the_committed_runs_are_those_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked again, the command would find every run there."""
    monkeypatch.chdir(ROOT)
    own, settings = parse(of_tables())
    hashes = {name: short_hash(settings.describe(name)) for name in ROWS}
    runs = select(read_lines(Path(settings.training.output_dir) / RUNS_FILE), hashes)
    seeds = {name: sorted(line["seed"] for line in runs if line["row"] == name and line["seed"]) for name in ROWS}
    assert not [line for line in runs if "error" in line]
    assert {tuple(found) for name, found in seeds.items() if not ROWS[name].floor} == {(42, 43, 44)}
    assert len([line for line in runs if line["seed"] is None]) == len([row for row in ROWS.values() if row.floor])


def test_the_results_are_those_of_the_committed_tables() -> None:
    lines = [line.split("|") for line in README.splitlines() if line.count("|") == 7]
    shown = {cells[1].strip(): [cell.strip() for cell in cells[2:7]] for cells in lines}
    for table in (3, 4):
        with (ROOT / f"scripts/results/mvsa_single_offline/table{table}.csv").open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                numbers = {name: float(value or "nan") for name, value in row.items() if name in NUMBERS}
                scores = [f"{numbers[name]:.1f} ± {numbers[f'{name}_std']:.1f}" for name in ("accuracy", "f1")]
                gain = "{difference:+.1f} ({low:+.1f} to {high:+.1f})".format(**numbers)
                size = f"{numbers['trainable_parameters'] / 1e6:.1f} M"
                expected = [*scores, gain, size, f"{numbers['seconds']:.0f}"]
                expected = [cell.removesuffix(" ± nan") for cell in expected]
                assert shown[row["label"]] == ["–" if "nan" in cell else cell for cell in expected]
