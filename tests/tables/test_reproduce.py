"""`reproduce.py`: rows, configs, runs that are killed, fail or are selected, and its smoke test."""

import json
import multiprocessing
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import datasets
import pytest
import transformers
import yaml
from inputs import table_of_images

from clipcacg.scripts import reproduce
from clipcacg.scripts.baselines import SYSTEMS
from clipcacg.scripts.data import features, splitting
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.lines import read_lines, short_hash
from clipcacg.scripts.data.mvsa import load_mvsa
from clipcacg.scripts.tables import runs, workers
from clipcacg.scripts.tables.lines import PREDICTIONS_FILE, RUNS_FILE, read_predictions
from clipcacg.scripts.tables.rows import CONFIGS, ROWS, WORD_VECTORS, folds_of, parse

SCRIPT = Path(__file__).parents[2] / "scripts" / "reproduce.py"


@pytest.fixture(autouse=True)
def progress_bars() -> Iterator[None]:
    """The command turns progress bars off; turn them on again."""
    yield
    transformers.utils.logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture
def flags(posts_folder: Path, backbones: Path, tmp_path: Path) -> list[str]:
    """Flags of a smoke test on fewer posts."""
    names = [word for part in ("text", "vision", "clip") for word in (f"--{part}_model", str(backbones / part))]
    caps = ["--max_train_samples", "48", "--max_eval_samples", "12", "--num_train_epochs", "1"]
    output = ["--output_dir", str(tmp_path / "results"), "--seeds", "42"]
    return ["--smoke", "--data_dir", str(posts_folder), *names, *caps, *output]


def lines(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "results" / RUNS_FILE)


def with_config(folder: Path, **keys: Any) -> list[str]:
    """Write the sample's config with more keys to a file."""
    config = yaml.safe_load((CONFIGS / "sample.yaml").read_text()) | keys
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return ["--config", str(folder / "config.yaml")]


def test_the_rows_are_those_of_the_tables() -> None:
    table3 = [name for name, row in ROWS.items() if 3 in row.tables]
    table4 = [row.label for row in ROWS.values() if 4 in row.tables]
    ours = ["CLIP-CA-CG", "CLIP-CA-CG, modality heads"]
    assert table4 == ["V only", "T only", "w/o Clip", "w/o CA", "w/o CG", *ours]
    *floors, concatenation, with_heads = table3[:6]
    assert floors == ["majority", "regression_text", "regression_image", "regression_both"]
    assert (concatenation, with_heads) == ("concatenation", "concatenation_heads")
    assert table3[6:-2] == list(SYSTEMS)[:-1] and table3[-2:] == ["full", "full_heads"]
    for name in table3[6:-2]:
        assert (ROWS[name].fidelity, ROWS[name].published) == (SYSTEMS[name].fidelity, SYSTEMS[name].published)
        assert ROWS[name].substitutions


def test_an_ablation_is_one_field_of_the_full_model() -> None:
    settings = parse(["--smoke", "--use_gating", "False"])[1]
    full = settings.for_row("full").model
    assert (full.use_gating, full.use_cross_attention, full.modality, full.clip_mode) == (
        True,
        True,
        "both",
        "encoder",
    )
    changes = {
        "image_only": ("modality", "image"), "text_only": ("modality", "text"), "no_clip": ("clip_mode", "none"),
        "no_cross_attention": ("use_cross_attention", False), "no_gating": ("use_gating", False),
        "full_heads": ("use_modality_heads", True),
    }  # fmt: skip
    for name, (key, value) in changes.items():
        assert vars(settings.for_row(name).model) == {**vars(full), key: value}


def test_flags_override_the_config_and_both_are_checked(tmp_path: Path) -> None:
    own, settings = parse([*with_config(tmp_path, tuning={"dropout": [0.1, 0.2]}), "--learning_rate", "0.5"])
    assert (settings.training.learning_rate, settings.training.save_strategy, own.seeds) == (0.5, "no", [42])
    assert settings.training.output_dir == "outputs/reproduce/config" and settings.grid == {}
    assert parse(["--smoke"])[1].training.output_dir == "outputs/smoke"
    for words, seeds in (("--smoke", [42, 43]), ("--seeds 7 44 7", [7, 44]), ("--seed 5", [5]), ("--seeds 42", [42])):
        assert parse(words.split())[0].seeds == seeds
    faults = {
        "--rows image_only --table 3": "has none of the rows image_only", "--seeds -1": "from 0 to",
        "--jobs 0": "at least 1",
        "--model_name_or_path x": "same backbones",
        "--clip_mode none": "row of Table IV", "--augment --freeze_text_layers 1": "--augment_views",
        "--augment_views 2": "needs --augment",
        "--trials": "key tuning",
    }  # fmt: skip
    for words, message in faults.items():
        with pytest.raises(InputError, match=message):
            parse(["--smoke", *words.split()])
    faults = [
        ({"tuning": {"seed": [1]}}, "Unknown key seed"), ({"tuning": {"modality": ["text"]}}, "Unknown key modality"),
        ({"tuning": {"dropout": 0.1}}, "list of values"), ({"tuning": {"dropout": ["high"]}}, "dropout must be"),
        ({"systems": {"x": {}}}, "Unknown key x under"),
        ({"systems": {"itin": {"hiden_size": 8}}}, "itin has no keyword 'hiden_size'. Did you mean hidden_size\\?"),
        ({"rate": 1}, "Unknown key rate"),
    ]  # fmt: skip
    for keys, message in faults:
        with pytest.raises(InputError, match=f"{message}.*config.yaml|config.yaml: .*{message}"):
            parse(with_config(tmp_path, **keys))
    for words in ("--rows nobody", "--table 5"):
        with pytest.raises(SystemExit):
            parse(["--smoke", *words.split()])


def test_folds() -> None:
    def folds(*words: str) -> list[int | None]:
        own, settings = parse(["--smoke", *words])
        return folds_of(own, settings.data)

    assert folds() == [None] and folds("--splits", "cheema") == list(range(1, 11))
    assert folds("--splits", "cheema:3") == [3] and folds("--splits", "cheema", "--folds", "5,1-2") == [1, 2, 5]
    for wrong in ("0-3", "11", "a", "3-1"):
        with pytest.raises(InputError, match="such as 1-10"):
            folds("--splits", "cheema", "--folds", wrong)
    with pytest.raises(InputError, match="needs --splits cheema"):
        folds("--folds", "1")


def test_flags_that_change_a_rows_hash() -> None:
    def hashes(*words: str) -> dict[str, str]:
        settings = parse(["--smoke", *words])[1]
        return {name: short_hash(settings.describe(name)) for name in ROWS}

    def changed(*words: str) -> set[str]:
        return {name for name, value in hashes(*words).items() if value != plain[name]}

    plain, floors = hashes(), {name for name, row in ROWS.items() if row.floor}
    assert len(set(plain.values())) == len(ROWS)
    assert not changed("--output_dir", "x", "--seed", "7", "--logging_steps", "3", "--use_cpu", "False")
    assert changed("--learning_rate", "0.3") == ROWS.keys() - floors
    assert changed("--hidden_size", "32") == {name for name, row in ROWS.items() if row.fields and not row.system}
    assert changed("--text_model", "x") == ROWS.keys() - {"majority"}
    assert changed("--word_vectors", "x") == set(WORD_VECTORS)


def test_config_values_that_the_grid_replaces_do_not_matter(tmp_path: Path) -> None:
    words = [*with_config(tmp_path, tuning={"learning_rate": [0.1], "dropout": [0.2, 0.3]}), "--trials"]

    def hashed(*more: str) -> str:
        return short_hash(parse([*words, *more])[1].describe("full"))

    assert hashed() == hashed("--learning_rate", "0.7", "--dropout", "0.5") != hashed("--num_train_epochs", "7")


def test_a_row_tries_the_fields_that_it_reads(tmp_path: Path) -> None:
    grid = {"learning_rate": ["1e-3", 1], "hidden_size": [32, 64], "class_weights": ["none", "balanced"]}
    settings = parse([*with_config(tmp_path, tuning=grid), "--trials"])[1]
    numbers = {name: len(settings.trials(name)) for name in ("full", "text_only", "itin", "concatenation", "majority")}
    assert numbers == {"full": 8, "text_only": 8, "itin": 8, "concatenation": 4, "majority": 1}
    values = {"learning_rate": 1, "hidden_size": 64, "class_weights": "balanced"}
    assert settings.trials("itin")[-1] == values and settings.trials("full")[0]["learning_rate"] == 0.001
    ours, itin = settings.for_row("full", values), settings.for_row("itin", values)
    assert (ours.model.hidden_size, ours.training.learning_rate, ours.model.class_weights) == (64, 1, "balanced")
    assert itin.systems["itin"]["hidden_size"] == 64 and settings.systems == {}
    assert settings.choices_of_c() == pytest.approx([10 ** (-4 + 4 * step / 7) for step in range(8)])


@pytest.mark.slow
def test_a_killed_command_continues_without_repeating_a_run(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*flags, *"--rows majority image_only --seeds 42 43".split()]
    commands.run_killed([SCRIPT, *arguments], tmp_path, lambda: len(lines(tmp_path)) >= 2)
    path = tmp_path / "results" / RUNS_FILE
    with path.open("ab") as file:
        file.write(b'{"run": "broken o')  # as if the kill came during a write
    before, known = path.read_bytes(), {line["run"] for line in lines(tmp_path)}
    assert len(known) < 3 and not (tmp_path / "results/table4.md").exists()
    reproduce.main(arguments)
    after = lines(tmp_path)
    assert path.read_bytes().startswith(before) and known < {line["run"] for line in after}
    assert sorted((line["row"], line["seed"] or 0) for line in after) == [
        ("image_only", 42), ("image_only", 43), ("majority", 0),
    ]  # fmt: skip
    printed, page = capsys.readouterr().out, (tmp_path / "results/table4.md").read_text()
    assert page.startswith("# Smoke test, not a result. Table IV") and "| 2 " in page and page in printed


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*flags, "--rows", "image_only", "majority"]
    reproduce.main(arguments)
    (line, floor), results = sorted(lines(tmp_path), key=lambda line: line["row"]), tmp_path / "results"
    assert (line["seed"], floor["seed"], line["posts"]) == (42, None, {"train": 48, "validation": 12, "test": 12})
    answer = next(entry for entry in read_lines(results / PREDICTIONS_FILE) if entry["run"] == line["run"])
    right = [label == prediction for label, prediction in zip(answer["label"], answer["prediction"], strict=True)]
    assert sum(right) / 12 == pytest.approx(line["metrics"]["test"]["accuracy"]) and len(set(answer["id"])) == 12
    assert line["parameters"]["trainable"] == line["parameters"]["total"] > 0 and line["seconds"] > 0
    assert {path.suffix for path in results.iterdir()} == {".md", ".csv", ".png", ".jsonl"}

    trained = []
    real = workers.run
    monkeypatch.setattr(workers, "run", lambda name, *rest: trained.append(name) or real(name, *rest))
    reproduce.main(arguments)
    assert trained == [] and len(lines(tmp_path)) == 2
    reproduce.main([*arguments, "--learning_rate", "0.002"])
    reproduce.main([*arguments, "--max_train_samples", "40"])
    reproduce.main([*arguments, "--splits", "random", "--group_duplicates"])
    assert trained == ["image_only", "majority", "image_only", "majority", "image_only"]
    page = (results / "table4.md").read_text()  # three protocols of one config; the other config is left out
    assert page.count("## ") == 3 and "group duplicates" in page and page.count("| V only") == 6


@pytest.mark.slow
def test_a_failed_row_does_not_stop_the_others(flags: list[str], backbones: Path, tmp_path: Path) -> None:
    vectors, results = tmp_path / "glove", tmp_path / "results"
    arguments = [*flags, "--rows", "majority", "mvan", "image_only", "--word_vectors", str(vectors)]
    with pytest.raises(SystemExit, match="1 runs failed"):
        reproduce.main(arguments)
    errors = {line["row"]: line.get("error", "") for line in lines(tmp_path)}
    assert "glove" in errors["mvan"] and errors["majority"] == errors["image_only"] == ""
    page = (results / "table3.md").read_text()
    assert "Failed runs" in page and "- mvan: `" in page and "| Majority class" in page
    vectors.symlink_to(backbones / "text")
    reproduce.main(arguments)
    assert [line["row"] for line in lines(tmp_path)] == ["majority", "mvan", "image_only", "mvan"]
    page = (results / "table3.md").read_text()
    assert "Failed" not in page and "; text encoder: glove" in page


def test_trials_are_nested_and_the_best_is_the_run_of_the_first_seed(flags: list[str], tmp_path: Path) -> None:
    grid = {"learning_rate": [0.0, 0.01], "num_train_epochs": [2]}
    arguments = [*flags, *with_config(tmp_path, tuning=grid), "--rows", "image_only", "majority", "--trials"]
    reproduce.main([*arguments, "--seeds", "42", "43"])
    trials = [line for line in lines(tmp_path) if line["kind"] == "trial"]
    made = [line for line in lines(tmp_path) if line["row"] == "image_only" and line["kind"] == "run"]
    assert [line["values"]["learning_rate"] for line in trials] == [0.0, 0.01]
    assert all(line["metrics"].keys() == {"validation"} and line["seed"] == 42 for line in trials)
    best = max(trials, key=lambda line: line["metrics"]["validation"]["accuracy"])
    assert [line["values"] for line in made] == [best["values"]] * 2 and [line["seed"] for line in made] == [42, 43]
    assert made[0]["metrics"]["validation"] == best["metrics"]["validation"] and made[0]["seconds"] == best["seconds"]
    (again,) = [line for line in read_predictions(tmp_path / "results").values() if line["run"] == made[0]["run"]]
    right = [label == prediction for label, prediction in zip(again["label"], again["prediction"], strict=True)]
    assert made[0]["metrics"]["test"]["accuracy"] == pytest.approx(sum(right) / 12)
    assert {line["trials"] for line in made} == {2}
    before = (tmp_path / "results" / RUNS_FILE).read_bytes()
    reproduce.main([*arguments, "--seeds", "42", "43"])
    assert (tmp_path / "results" / RUNS_FILE).read_bytes() == before


@pytest.mark.slow
def test_test_labels_change_no_choice(flags: list[str], posts_folder: Path, tmp_path: Path) -> None:
    """Two folds, with the labels of their test posts as they are and then all turned round."""
    ids = sorted(path.stem for path in (posts_folder / "data").glob("*.txt"))
    dataset = load_mvsa(posts_folder)
    valid = [post for post in dataset["id"] if post in ids]
    split = {"train": valid[:48], "validation": valid[48:72], "test": valid[72:90]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    shutil.copytree(posts_folder, tmp_path / "turned")
    path = tmp_path / "turned" / "labelResultAll.txt"
    turned = []
    for row in path.read_text().splitlines():
        post, _, labels = row.partition("\t")
        turned.append(f"{post}\t{'neutral,neutral' if post in split['test'] else labels}")
    path.write_text("\n".join(turned) + "\n")
    grid = with_config(tmp_path, tuning={"learning_rate": [0.003, 0.03]})
    more = ["--splits", str(tmp_path / "split.json"), "--rows", "image_only", "regression_both", "--trials"]
    found = []
    for folder in (posts_folder, tmp_path / "turned"):
        output = tmp_path / f"results of {folder.name}"
        reproduce.main([*flags, *grid, *more, "--data_dir", str(folder), "--output_dir", str(output)])
        found.append((read_lines(output / RUNS_FILE), read_predictions(output)))
    (runs_before, before), (runs_after, after) = found
    assert [line["values"] for line in runs_before] == [line["values"] for line in runs_after]
    for one, other in zip(runs_before, runs_after, strict=True):
        assert one["metrics"]["validation"] == other["metrics"]["validation"]
        assert before[one["run"]]["prediction"] == after[other["run"]]["prediction"]
        assert before[one["run"]]["label"] != after[other["run"]]["label"]


@pytest.mark.slow
def test_several_processes_make_the_same_lines_and_one_that_is_killed_costs_its_own_run(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "SPAWN", commands.FORKS)  # starts in a tenth of the time
    grid = with_config(tmp_path, tuning={"learning_rate": [0.001, 0.01]})
    arguments = [*flags, *grid, "--rows", "majority", "image_only", "--trials", "--seeds", "42", "43"]
    alone = [*arguments, "--output_dir", str(tmp_path / "alone")]
    reproduce.main(alone)

    def kill_the_first() -> None:
        while not (children := [child for child in multiprocessing.active_children() if child not in others]):
            time.sleep(0.01)
        children[0].kill()

    others = multiprocessing.active_children()
    thread = threading.Thread(target=kill_the_first)
    thread.start()
    with pytest.raises(SystemExit, match="1 runs failed"):
        reproduce.main([*arguments, "--jobs", "2"])
    thread.join()
    (failed,) = [line for line in lines(tmp_path) if "error" in line]
    assert failed["row"] == "majority" and "killed by signal 9" in failed["error"]
    reproduce.main(arguments)
    facts = ("run", "kind", "row", "seed", "values", "metrics", "best_epoch")
    one, two = (
        {line["run"]: [line[name] for name in facts] for line in found if "error" not in line}
        for found in (read_lines(tmp_path / "alone" / RUNS_FILE), lines(tmp_path))
    )
    assert one == two and len(one) == 5
    assert multiprocessing.active_children() == others
    assert "1 row x 1 fold x 1 run + 1 row x 1 fold x (2 trials + 1 more seed) = 4 runs: 0 done, 4 left" in caplog.text
    assert "= 4 runs: 3 done, 1 left" in caplog.text and "runs left: 1, about 0:00:" in caplog.text


def test_the_best_epoch_is_measured(flags: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainers = []
    real = runs.make_trainer
    monkeypatch.setattr(runs, "make_trainer", lambda *parts: trainers.append(real(*parts)) or trainers[-1])
    more = ["--num_train_epochs", "6", "--learning_rate", "0.02", "--freeze_vision", "--early_stopping_patience", "3"]
    reproduce.main([*flags, *more, "--rows", "image_only"])
    (line,) = lines(tmp_path)
    history = [
        (entry["eval_accuracy"], -entry["epoch"]) for entry in trainers[0].state.log_history if "eval_loss" in entry
    ]
    accuracy, epoch = max(history)
    assert (line["metrics"]["validation"]["accuracy"], line["best_epoch"]) == (accuracy, -epoch)
    assert not list((tmp_path / "results").glob("checkpoint-*"))
    assert line["parameters"]["trainable"] < line["parameters"]["total"]


@pytest.mark.slow
def test_folds_are_runs_of_one_section(
    flags: list[str], posts_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = sorted(path.stem for path in (posts_folder / "data").glob("*.txt"))
    folds = [{"validation": ids[k : k + 10], "test": ids[k + 10 : k + 20]} for k in range(0, 100, 10)]
    (tmp_path / "mvsa_single_cheema.json").write_text(json.dumps({"folds": folds}))
    monkeypatch.setattr(splitting, "PUBLISHED_SPLITS", tmp_path)
    more = ["--splits", "cheema", "--folds", "2-3", "--rows", "majority", "regression_text"]
    reproduce.main([*flags, *more])
    found = lines(tmp_path)
    assert [(line["row"], line["fold"]) for line in found] == [
        ("majority", 2), ("regression_text", 2), ("majority", 3), ("regression_text", 3),
    ]  # fmt: skip
    page = (tmp_path / "results/table3.md").read_text()
    assert page.count("## ") == 1 and "folds of cheema" in page
    assert "test posts of these folds together, in" in page and "each of 2 folds (10)" in page


def test_without_test_posts_validation_is_measured_and_the_title_says_so(
    flags: list[str], posts_folder: Path, tmp_path: Path
) -> None:
    ids = [path.stem for path in (posts_folder / "data").glob("*.txt")]
    (tmp_path / "held_back.json").write_text(json.dumps({"train": ids[:60], "validation": ids[60:90]}))
    reproduce.main([*flags, "--splits", str(tmp_path / "held_back.json"), "--rows", "regression_both", "majority"])
    assert {line["measured"] for line in lines(tmp_path)} == {"validation"}
    page = (tmp_path / "results/table3.md").read_text()
    assert page.startswith(
        "# Smoke test, not a result. Table III: systems and simple baselines, measured on VALIDATION posts\n"
    )


@pytest.mark.slow
def test_a_system_of_two_inputs_on_cached_features(flags: list[str], tmp_path: Path) -> None:
    pytest.importorskip("vaderSentiment")
    frozen = ["--freeze_text", "--freeze_vision", "--rows", "sentibank_sentistrength", "cnn_multi"]
    reproduce.main([*flags, *frozen])
    assert [set(line["metrics"]) for line in lines(tmp_path)] == [{"validation", "test"}] * 2
    assert all(line["parameters"]["trainable"] < line["parameters"]["total"] for line in lines(tmp_path))


@pytest.mark.slow
def test_rows_with_heads_see_conflicting_posts_and_other_rows_do_not(flags: list[str], tmp_path: Path) -> None:
    more = [
        "--freeze_text",
        "--freeze_vision",
        "--freeze_clip",
        "--max_train_samples",
        "200",
        "--modality_combination",
    ]
    rows = ["concatenation", "concatenation_heads", "regression_both"]
    reproduce.main([*flags, *more, "average", "--use_conflicting_posts", "--rows", *rows])
    found = {line["row"]: line for line in lines(tmp_path)}
    assert sorted(found) == sorted(rows) and not any("error" in line for line in found.values())
    assert [found[row].get("combination") for row in rows] == ["classifier", "average", None]


def test_rows_with_heads_are_skipped_without_labels_of_text_and_image(
    flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = ["--image_column", "photo", "--text_column", "tweet", "--label_column", "mood"]
    datasets.Dataset.from_list(table_of_images(tmp_path, int)).to_csv(tmp_path / "posts.csv")
    flags[1:3] = ["--dataset_name", str(tmp_path / "posts.csv"), *own]
    reproduce.main([*flags, "--rows", "majority", "concatenation_heads"])
    assert [line["row"] for line in lines(tmp_path)] == ["majority"]
    assert "concatenation_heads is skipped" in caplog.text


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_the_smoke_test_of_both_tables(tmp_path: Path) -> None:
    pytest.importorskip("vaderSentiment")
    started = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            *"--smoke --seeds 42 --num_train_epochs 1 --max_train_samples 48 --max_eval_samples 24".split(),
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert time.monotonic() - started < 360
    assert done.stdout.count("# Smoke test, not a result") == 2
    found = read_lines(tmp_path / "outputs/smoke" / RUNS_FILE)
    assert {line["row"] for line in found} == ROWS.keys() and not any("error" in line for line in found)
    for table in (3, 4):
        for suffix in ("md", "csv", "png"):
            assert (tmp_path / f"outputs/smoke/table{table}.{suffix}").is_file()


def test_a_row_trains_on_stored_views(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "CACHE_FOLDER", tmp_path / "cache")
    views = "--augment --augment_views 2 --freeze_text_layers 1".split()
    reproduce.main([*flags, *views, "--rows", "text_only"])
    (store,) = (features.FeatureStore(folder) for folder in (tmp_path / "cache").iterdir())
    views = [name for name in store.file_of if "-" in name]
    assert len(views) == 2 * len({name.partition("-")[0] for name in views}) > 0
