"""predict.py into a folder: shards of every source, several processes, and processes that are killed.

The table of kills in scripts/results/README.md is what this prints:

    python -m pytest -s -m slow tests/reporting/test_shards.py
"""

import hashlib
import io
import json
import random
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import commands
import datasets
import pytest
from hub_server import HubServer, Repo
from inputs import SCRIPTS, free_port
from torch.utils.data import DataLoader, get_worker_info

from clipcacg.scripts.data.sources import is_table
from clipcacg.scripts.predict import main as predict
from clipcacg.scripts.reporting.predictions import StreamBatches, unchanged

SHARDS = ("2024-01", "2024-02", "2024-03")
SHARD_COUNT = 40  # of the test of kills


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """The files of predictions and the manifest; nothing else may be left but the record of the origin."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files.pop(".origin")
    return files


@pytest.fixture(scope="module")
def rows(posts_folder: Path) -> list[dict[str, str]]:
    """24 posts with texts that differ."""
    image = str(posts_folder / "data" / "{}.jpg")
    return [{"id": f"post {n}", "text": f"so happy {n}", "image": image.format(n)} for n in range(1, 25)]


@pytest.fixture(scope="module")
def expected(
    checkpoint: Path, rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """The predictions of one process in one file, by the posts' IDs."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    predict([*f"{checkpoint} --input {folder}/posts.jsonl --num_workers 0 --output {folder}/out".split()])
    return {line["id"]: line for line in lines(folder / "out")}


@pytest.fixture
def shards(rows: list[dict[str, str]], tmp_path: Path) -> Path:
    """Three tables of JSON lines; the last is empty, and the second has a post without an ID and a broken one."""
    folder = tmp_path / "shards"
    folder.mkdir()
    second = [
        *rows[12:],
        {"text": "no id", "image": rows[0]["image"]},
        {"id": "broken", "text": "", "image": "no.jpg"},
    ]
    for name, part in zip(SHARDS, (rows[:12], second, []), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def test_a_folder_has_a_file_for_each_shard_and_a_manifest(
    checkpoint: Path, shards: Path, expected: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    flags = [str(checkpoint), "--input", str(shards), "--num_workers", "0", "--output"]
    predict([*flags, f"{output}/"])
    names = [f"{name}.jsonl" for name in SHARDS]
    whole = contents(output)
    assert sorted(whole) == [*names, "manifest.json"]
    found = [line for name in names for line in lines(output / name)]
    assert found[24]["id"] == "2024-02-13" and found[25]["id"] == "broken" and "no.jpg" in found[25]["error"]
    assert found[:24] == list(expected.values())
    manifest = json.loads(whole["manifest.json"])
    assert (manifest["posts"], manifest["errors"]) == (26, 1)
    assert [manifest["shards"][name] for name in names] == [
        {"posts": posts, "errors": errors, "sha256": hashlib.sha256(whole[name]).hexdigest()}
        for name, posts, errors in zip(names, (12, 14, 0), (0, 1, 0), strict=True)
    ]

    # Only what is missing is computed, and the manifest is there only when all of it is.
    first, before = output / names[0], (output / names[1]).stat()
    first.unlink()
    (output / ".2024-01.jsonl.of-a-killed-process.part").write_text("half")
    with (shards / "2024-02.jsonl").open("a") as file:
        file.write('{"text": "not read again", "image": "none.jpg"}\n')
    predict([*flags, str(output)])
    assert contents(output) == whole and (output / names[1]).stat() == before
    first.unlink()
    (shards / "2024-01.jsonl").write_text('{"text": "a", "image": "none.jpg"}\n')
    with pytest.raises(SystemExit, match="post 2024-01-1: There is no image .*none.jpg"):
        predict([*flags, str(output), "--on_error", "raise"])
    assert contents(output).keys() == set(names[1:])


def test_a_folder_is_of_one_model_one_input_and_one_setting(checkpoint: Path, shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "shards" / "out"
    flags = [str(checkpoint), "--input", str(shards), "--num_workers", "0", "--output", f"{output}/"]
    for _ in range(2):  # its own files, within the input, are no input
        predict(flags)
    whole = contents(output)
    for more, message in (
        (["--bf16"], "out does not belong to this model and .*shards"),
        (["--max_samples", "2"], "--max_samples is for an --output of one file"),
        (["--overwrite"], "--overwrite is for an --output of one file"),
    ):
        with pytest.raises(SystemExit, match=message):
            predict([*flags, *more])
    (shards / "2024-03.jsonl").unlink()
    with pytest.raises(SystemExit, match="2024-03.jsonl is of no shard of .*shards: remove it"):
        predict(flags)
    assert contents(output) == whole
    with pytest.raises(SystemExit, match="shards is both input and output"):
        predict([*flags[:-1], str(shards)])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.jsonl").touch()
    with pytest.raises(SystemExit, match="mine does not belong to this model"):
        predict([*flags[:-1], str(tmp_path / "mine")])


def test_posts_that_shards_count_may_not_change(
    checkpoint: Path, posts_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more posts the shards would begin elsewhere, and those in between be lost."""
    monkeypatch.setattr("clipcacg.scripts.data.loading.SHARD_POSTS", 10)
    source, output = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for number in range(10, 25):
        for suffix in ("jpg", "txt"):
            (source / f"{number}.{suffix}").symlink_to(posts_folder / "data" / f"{number}.{suffix}")
    flags = [str(checkpoint), "--input", str(source), "--num_workers", "0", "--output", f"{output}/"]
    predict(flags)
    whole = contents(output)
    for suffix in ("jpg", "txt"):
        (source / f"25.{suffix}").symlink_to(posts_folder / "data" / f"25.{suffix}")
    with pytest.raises(SystemExit, match="does not belong to this model and .*source: give another --output\\."):
        predict(flags)
    assert contents(output) == whole
    manifest = json.loads(whole["manifest.json"])
    assert manifest["posts"] == 15 and manifest["content"]


@pytest.mark.parametrize("kind", ["imagefolder", "readme"])
def test_shards_without_names_are_of_the_files_they_were_cut_from(
    kind: str, checkpoint: Path, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    source.mkdir()

    def write(part: list[dict[str, str]], name: str) -> None:
        if kind == "readme":
            (source / "README.md").write_text("posts of some days")
            datasets.Dataset.from_list(part).to_parquet(source / name)
            return
        for row in part:
            (source / Path(row["image"]).name).write_bytes(Path(row["image"]).read_bytes())
        table = [{"file_name": Path(row["image"]).name, "id": row["id"], "text": row["text"]} for row in part]
        (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))

    write(rows[:6], "day1.parquet")
    flags = [str(checkpoint), "--input", str(source), "--num_workers", "0", "--output", f"{output}/"]
    for _ in range(2):
        predict(flags)
    whole = contents(output)
    write(rows[6:12], "day1.parquet")
    with pytest.raises(SystemExit, match="out does not belong to this model and .*source"):
        predict(flags)
    assert contents(output) == whole


def test_tables_beside_predictions_stay_tables(checkpoint: Path, shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.csv").write_text("text\na\n")
    predict([str(checkpoint), "--input", str(shards), "--num_workers", "0", "--output", str(output)])
    assert is_table(output / "mine.csv") and not is_table(output / "2024-01.jsonl")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_two_workers_lose_no_row_of_a_stream(
    suffix: str, checkpoint: Path, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    table, source = datasets.Dataset.from_list(rows), tmp_path / f"posts.{suffix}"
    {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}[suffix](source)
    found = []
    for workers in (0, 2):
        output = tmp_path / f"out{workers}"
        flags = f"--input {source} --batch_size 4 --num_workers {workers} --output {output}/"
        predict([str(checkpoint), *flags.split()])
        found.append([(line["id"], line["label"]) for line in lines(output / "posts.jsonl")])
    assert found[0] == found[1] and [post for post, _ in found[0]] == [row["id"] for row in rows]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # two cores
def test_several_workers_prepare_the_batches_of_a_stream_in_its_order() -> None:
    stream = datasets.Dataset.from_dict({"id": list(range(17))}).to_iterable_dataset()
    batches = StreamBatches(stream, 2, lambda rows: ([row["id"] for row in rows], get_worker_info().id))
    found = list(DataLoader(batches, batch_size=None, num_workers=3, collate_fn=unchanged))
    assert [number for ids, _ in found for number in ids] == list(range(17))
    assert [worker for _, worker in found] == [index % 3 for index in range(9)]


def tar_of(rows: list[dict[str, str]], path: Path) -> None:
    """Write a WebDataset: the image and the text of a post have its ID as their name."""
    with tarfile.open(path, "w") as tar:
        for row in rows:
            for suffix, content in (("jpg", Path(row["image"]).read_bytes()), ("txt", row["text"].encode())):
                entry = tarfile.TarInfo(f"{row['id']}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def test_a_shard_that_breaks_off_is_one_sentence(checkpoint: Path, rows: list[dict[str, str]], tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name, part in zip(SHARDS, (rows[:12], rows[12:]), strict=False):
        tar_of(part, source / f"{name}.tar")
    broken = source / f"{SHARDS[1]}.tar"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    flags = [str(checkpoint), "--input", str(source), "--batch_size", "4", "--num_workers", "0", "--output"]
    with pytest.raises(SystemExit, match="source cannot be read as a data set: ") as error:
        predict([*flags, f"{output}/"])
    assert "\n" not in str(error.value) and contents(output).keys() == {f"{SHARDS[0]}.jsonl"}


@pytest.mark.parametrize("kind", ["csv", "parquet", "images", "tar", "saved", "mvsa", "hub"])
def test_every_source_has_shards(
    kind: str,
    checkpoint: Path,
    rows: list[dict[str, str]],
    expected: dict[str, dict[str, Any]],
    posts_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, names = tmp_path / "source", [f"{name}.jsonl" for name in SHARDS[:2]]
    source.mkdir()
    for name, part in zip(SHARDS, (rows[:12], rows[12:]), strict=False):
        table = datasets.Dataset.from_list(part)
        if kind == "csv":
            table.to_pandas().to_csv(source / f"{name}.csv.gz", index=False)
        elif kind in ("parquet", "hub"):
            table.to_parquet(source / f"{name}.parquet")
        elif kind == "images":
            table.cast_column("image", datasets.Image()).to_parquet(source / f"{name}.parquet")
        elif kind == "tar":
            tar_of(part, source / f"{name}.tar")
    if kind in ("hub", "saved"):
        names = ["00000-of-00002.jsonl", "00001-of-00002.jsonl"]
    if kind in ("saved", "mvsa"):
        monkeypatch.setattr("clipcacg.scripts.data.loading.SHARD_POSTS", 12)
    if kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(source)
    if kind == "mvsa":
        names = [f"{index:05d}-of-00002.jsonl" for index in range(2)]
        for row in rows:
            (source / f"{row['id']}.txt").write_text(row["text"])
            (source / f"{row['id']}.jpg").write_bytes(Path(row["image"]).read_bytes())
    with HubServer(tmp_path / "server", {}) as hub, hub.used_here():
        files = {path.name: hub.store(path.read_bytes()) for path in source.glob("*.parquet")}
        hub.repos["datasets", "user/posts"] = repo = Repo(private=False)
        repo.commit("main", files, "posts")
        address = hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}"
        for name, value in (("HF_ENDPOINT", hub.url), ("HUB_DATASETS_URL", address), ("HF_HUB_OFFLINE", False)):
            monkeypatch.setattr(datasets.config, name, value)
        given = "user/posts" if kind == "hub" else str(source)
        flags = [str(checkpoint), "--input", given, "--num_workers", "0", "--output", f"{tmp_path / 'out'}/"]
        predict(flags)
        if kind == "hub":
            repo.commit("main", files, "posts of a later revision")
            with pytest.raises(SystemExit, match="out does not belong to this model and user/posts"):
                predict(flags)
    assert sorted(contents(tmp_path / "out")) == [*names, "manifest.json"]
    found = [line for name in names for line in lines(tmp_path / "out" / name)]
    assert Counter(line["id"] for line in found) == Counter(expected.keys())
    for line in found:
        assert line["probabilities"] == pytest.approx(expected[line["id"]]["probabilities"], abs=1e-5)


START = """
import os, runpy, sys
os.environ |= dict(word.split("=") for word in sys.argv[1:7])
sys.argv = sys.argv[7:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launch(processes: int, words: list[str], folder: Path) -> list[BaseProcess]:
    """Start a command in processes that find each other by gloo, with the variables that a launcher sets."""
    port = free_port()
    common = ["ACCELERATE_USE_CPU=true", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={port}", f"WORLD_SIZE={processes}"]
    return [
        commands.start(
            ["-c", START, *common, f"RANK={rank}", f"LOCAL_RANK={rank}", *words], folder, errors=folder / f"{rank}.log"
        )
        for rank in range(processes)
    ]


def test_two_processes_write_what_one_writes(checkpoint: Path, shards: Path, tmp_path: Path) -> None:
    words = [str(SCRIPTS / "predict.py"), str(checkpoint), "--input", str(shards), "--num_workers", "0", "--output"]
    predict([*words[1:], f"{tmp_path}/one/"])
    processes = launch(2, [*words, "two"], tmp_path)
    for rank, process in enumerate(processes):
        process.join()
        assert process.exitcode == 0, (tmp_path / f"{rank}.log").read_text()
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    log, other = ((tmp_path / f"{rank}.log").read_text() for rank in range(2))
    assert "25 predictions are in two" in log + other and "predicting" not in other
    for process in launch(2, [*words, "posts.jsonl"], tmp_path):
        process.join()
        assert process.exitcode == 1
    assert "Several processes cannot write one file, posts.jsonl" in (tmp_path / "0.log").read_text()


@pytest.fixture(scope="module")
def many(posts_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many tables of 10 posts."""
    folder = tmp_path_factory.mktemp("many") / "shards"
    folder.mkdir()
    for shard in range(SHARD_COUNT):
        posts = [
            {"id": f"{shard}-{n}", "text": f"day {n}", "image": f"{posts_folder}/data/{n}.jpg"} for n in range(1, 11)
        ]
        (folder / f"{shard}.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts))
    return folder


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, many: Path) -> dict[str, bytes]:
    """What one process writes that nobody kills."""
    output = many.parent / "undisturbed"
    predict([str(checkpoint), "--input", str(many), "--num_workers", "0", "--output", f"{output}/"])
    return contents(output)


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Rows of the table of kills, which is printed at the end."""
    head = ["", "| processes | kills | calls | posts | lost | double | files as undisturbed |", "|" + " --- |" * 7]
    found: list[str] = []
    yield found
    print(*head, *found, sep="\n")


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(1,), (2,), (4,), (1, 2, 4)], ids=str)
def test_nothing_is_lost_or_double_after_ten_kills(
    numbers: tuple[int, ...],
    checkpoint: Path,
    many: Path,
    undisturbed: dict[str, bytes],
    table: list[str],
    tmp_path: Path,
) -> None:
    """As a launcher does, the test ends the other processes a moment after one was killed."""
    draw, kills, calls = random.Random(0), 0, 0
    words = [
        str(SCRIPTS / "predict.py"),
        str(checkpoint),
        "--input",
        str(many),
        "--num_workers",
        "0",
        "--output",
        "out",
    ]
    output = tmp_path / "out"
    output.mkdir()
    while kills < 10 or not (output / "manifest.json").exists():
        if len(done := sorted(output.glob("*.jsonl"))) == SHARD_COUNT:  # before the last kill
            for path in draw.sample(done, SHARD_COUNT // 2):
                path.unlink()
        before, enough = set(output.iterdir()), draw.randint(1, 6)
        processes, calls = launch(draw.choice(numbers), words, tmp_path), calls + 1
        if kills < 10:
            victim = draw.choice(processes)
            while victim.is_alive() and len(set(output.iterdir()) - before) < enough:
                time.sleep(draw.uniform(0, 0.05))
            if victim.is_alive():
                victim.kill()
                kills += 1
                time.sleep(draw.uniform(0, 0.5))
                for process in processes:
                    process.kill()
        for process in processes:
            process.join()
    found = contents(output)
    ids = Counter(
        json.loads(line)["id"] for name, file in found.items() if "manifest" not in name for line in file.splitlines()
    )
    lost, double = SHARD_COUNT * 10 - len(ids), ids.total() - len(ids)
    is_same = found == undisturbed
    table.append(
        f"| {' or '.join(map(str, numbers))} | {kills} | {calls} | {ids.total()} | {lost} | {double} | {is_same} |"
    )
    assert (lost, double, is_same) == (0, 0, True)
