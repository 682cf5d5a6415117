"""The commands and the code of README.md and of the two pages it leads to do what they say."""

import importlib
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import datasets
import pytest
from PIL import Image
from transformers import HfArgumentParser, TrainingArguments

from clipcacg.scripts.data.loading import DataArguments
from clipcacg.scripts.tables.rows import parse
from clipcacg.scripts.training.arguments import ModelArguments, RecipeArguments

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "scripts/README.md", "scripts/results/README.md")
README, COMMANDS_PAGE, RESULTS_PAGE = ((ROOT / name).read_text(encoding="utf-8") for name in PAGES)
CODE = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [
    line
    for page in (README, COMMANDS_PAGE, RESULTS_PAGE)
    for block in re.findall(r"```bash\n(.*?)```", page, re.S)
    for line in block.splitlines()
]
SCRIPT = re.compile(r"scripts/(\w+)\.py")
INSTALLING = [command for command in COMMANDS if command.startswith("pip install")]
# What a launcher does before the script is Accelerate's and torchrun's to test.
RUNS = sorted({command[SCRIPT.search(command).start() :] for command in COMMANDS[1:] if command not in INSTALLING})
# Of two commands that differ little the second is slow.
ALIKE = ("mvsa_multiple.yaml", "outputs/two_processes")
TRAINING = [
    pytest.param(command, marks=[pytest.mark.slow] if any(word in command for word in ALIKE) else [])
    for command in RUNS
    if command.startswith("scripts/train.py")
]
# Those that need a server, a browser, an extra or minutes have a test file of their own.
ELSEWHERE = {
    "push_to_hub", "demo", "explain", "reproduce", "benchmark", "export_onnx", "quantize", "make_word_vectors",
}  # fmt: skip
TEST_FILES = {"make_word_vectors": "test_baselines_words"}
HERE = [command for command in RUNS if SCRIPT.match(command)[1] not in ELSEWHERE | {"train"}]
GROUPS = ("data", "model", "modality heads", "ablations", "freezing", "recipe")


@pytest.fixture
def place(posts_folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, where the names in the commands exist."""
    for name in ("sample", "outputs"):
        (tmp_path / name).mkdir()
    links = {"images": posts_folder / "data", "scripts": ROOT / "scripts", "sample/posts": posts_folder}
    links |= {"MVSA_Single": posts_folder, "MVSA_Multiple": posts_folder, "outputs/sample": checkpoint}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    rows = [
        {"photo": f"images/{number}.jpg", "tweet": f"post {number}", "mood": ("good", "bad")[number % 2]}
        for number in range(1, 41)
    ]
    table = datasets.Dataset.from_list(rows)
    table.to_csv(tmp_path / "posts.csv")
    table = table.rename_columns({"photo": "image", "tweet": "text"})
    table.to_json(tmp_path / "posts.jsonl")
    (tmp_path / "shards").mkdir()
    for index in range(2):
        table.shard(2, index).to_parquet(tmp_path / f"shards/{index}.parquet")
    (tmp_path / "shards/images").symlink_to(posts_folder / "data")
    Image.new("RGB", (80, 60), "orange").save(tmp_path / "post.jpg")
    monkeypatch.setattr("clipcacg.scripts.data.features.CACHE_FOLDER", tmp_path / "features")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    words = [*shlex.split(command), *more]
    monkeypatch.setattr(sys, "argv", words)
    importlib.import_module(f"clipcacg.scripts.{SCRIPT.match(command)[1]}").main()


def test_readme_is_short() -> None:
    assert len(README.splitlines()) < 250


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    links = re.findall(r"\]\(((?!https?:|#)[^)#]+)", path.read_text(encoding="utf-8"))
    assert links and not [link for link in links if not (path.parent / link).exists()]


def test_every_flag_of_the_training_table_exists() -> None:
    named = set(re.findall(r"--\w+", "".join(table_rows(COMMANDS_PAGE, 2)[group][0] for group in GROUPS)))
    parser = HfArgumentParser((ModelArguments, DataArguments, RecipeArguments))
    flags = {flag for action in parser._actions for flag in action.option_strings}
    own = {
        f"--{field.name}"
        for arguments in (ModelArguments, DataArguments, RecipeArguments)
        for field in fields(arguments)
        if field.init and field.name not in {field.name for field in fields(TrainingArguments)}
    }
    assert named <= flags
    assert own - named <= {"--overwrite_output_dir"}  # described under Resuming


def test_ci_runs_the_two_commands() -> None:
    run_it, test_it = INSTALLING
    assert run_it == "pip install -e . && accelerate launch scripts/train.py"
    assert test_it == 'pip install -e ".[test]" && python -m pytest'
    ci = (ROOT / ".ci/run").read_text()
    assert "readme_command 'pip install -e . && accelerate launch scripts/train.py'" in ci
    assert "readme_command 'python -m pytest'" in ci


@pytest.mark.parametrize("command", TRAINING)
def test_training(command: str, place: Path, backbones: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiny encoders and four steps; everything else as it stands."""
    names = [word for part in ("text", "vision", "clip") for word in (f"--{part}_model", str(backbones / part))]
    small = ["--hidden_size", "32", "--num_attention_heads", "4", "--max_steps", "4", "--dataloader_num_workers", "0"]
    if "offline_full" in command:  # the tiny encoders have two layers and two blocks
        small += ["--freeze_text_layers", "1", "--freeze_vision_blocks", "1"]
    if "--hp_search" in command:
        pytest.importorskip("optuna")
        small += ["--hp_search", "1"]
    (place / "outputs/sample").unlink()
    run(command, monkeypatch, *names, *small)
    assert len(list(place.glob("outputs/*/all_results.json"))) == 1


def test_commands_that_read_a_checkpoint_or_data(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "sample/posts").unlink()
    more = {"make_sample": ["--num_posts", "30"], "evaluate_checkpoint": ["--data_dir", "MVSA_Single"]}
    for command in HERE:
        run(command, monkeypatch, *more.get(SCRIPT.match(command)[1], []))
    shown = capsys.readouterr().out
    assert "Weighted F1" in shown and '"label"' in shown
    assert (place / "results.json").is_file() and (place / "results.png").is_file()
    assert len((place / "predictions.jsonl").read_text().splitlines()) == 40
    assert sum(len(path.read_text().splitlines()) for path in (place / "predictions").glob("*.jsonl")) == 40
    assert datasets.load_dataset(str(place / "prepared"))["train"].features["label"].names[0] == "negative"


def test_every_other_command_has_a_test_file() -> None:
    for name in ELSEWHERE:
        assert list((ROOT / "tests").rglob(f"{TEST_FILES.get(name, f'test_{name}')}.py")), name


@pytest.mark.parametrize("number", [0, 1])
def test_the_code_prints_probabilities(number: int, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(CODE[number], {})
    shown = re.findall(r"(negative|neutral|positive)\W+(?:score\W+)?(\d\.\d+)", capsys.readouterr().out)
    assert len(shown) == (3, 1)[number]
    assert number == 1 or sum(float(probability) for _, probability in shown) == pytest.approx(1, abs=0.002)


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


def test_the_code_loads_and_splits_mvsa(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(CODE[3], {})
    assert re.search(r"'train': \d+, 'validation': \d+, 'test': \d+", capsys.readouterr().out)


def test_the_code_trains(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(CODE[4].replace("num_train_epochs=1", "max_steps=2, report_to='none', disable_tqdm=True"), {})
    assert (place / "outputs/notebook/processor_config.json").exists()
    assert 0 < float(capsys.readouterr().out.splitlines()[-1]) < 5


@pytest.mark.parametrize("command", [command for command in RUNS if "reproduce.py" in command])
def test_reproduce_knows_its_flags(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert parse(shlex.split(command)[1:])[0].row_names()


def table_rows(page: str, columns: int) -> dict[str, list[str]]:
    """Return the cells of every Markdown table row with that many columns, by their first cell."""
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.count("|") == columns + 1]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_readme_repeats_the_unseen_figures_of_the_results_page() -> None:
    short, full = table_rows(README, 3), table_rows(RESULTS_PAGE, 6)
    rows = {name: cells for name, cells in short.items() if name in full and "---" not in name}
    assert len(rows) == 6 and {"CLIP-CA-CG", "Concatenation"} < set(rows)
    for name, cells in rows.items():
        assert cells == full[name][1:3]
