"""Writing MVSA as a Parquet data set: what `load_dataset` reads back, what is never overwritten, who may see it."""

from pathlib import Path
from types import SimpleNamespace

import commands
import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer
from huggingface_hub import constants
from PIL import Image

from clipcacg.scripts import prepare_mvsa
from clipcacg.scripts.data import load_mvsa, parquet, split_mvsa

RAW = datasets.Image(decode=False)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Forty posts in the official layout, four to a text, the last one without its text."""
    folder = tmp_path / "mvsa"
    (folder / "data").mkdir(parents=True)
    names = ("negative", "neutral", "positive")
    rows = [f"{i}\t{names[i % 3]},neutral\n" for i in range(40)]
    (folder / "labelResultAll.txt").write_text("ID\ttext,image\n" + "".join(rows))
    for i in range(40):
        noise = np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "data" / f"{i}.jpg")
        (folder / "data" / f"{i}.txt").write_text(
            f"post {i // 4} “quoted”\n", encoding="gb18030" if i % 2 else "utf-8"
        )
    (folder / "data" / "39.txt").unlink()
    return folder


@pytest.fixture
def run(data_dir: Path, tmp_path: Path):
    """Run the command in this process on the posts without a fault; returns the output folder."""

    def run_main(*flags: str, folder: Path = tmp_path / "out") -> Path:
        prepare_mvsa.main([str(data_dir), str(folder), "--on_error", "skip", *flags])
        return folder

    return run_main


def reload(folder: Path) -> datasets.DatasetDict:
    """Load an output as anybody would, with a cache of its own."""
    return datasets.load_dataset(str(folder), cache_dir=str(folder.parent / "cache"))


def test_command_line_writes_what_load_dataset_reads(data_dir: Path, tmp_path: Path):
    command = [prepare_mvsa.__file__, "mvsa", "out", "--seed", "1", "--group_duplicates"]
    with pytest.raises(SystemExit, match=r"problems in .*(?s:.*)labelResultAll.txt:41: missing text"):
        prepare_mvsa.main([str(data_dir), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    commands.run([*command, "--on_error", "skip"], tmp_path)
    expected = split_mvsa(load_mvsa(data_dir, on_error="skip"), seed=1, group_duplicates=True)
    loaded = reload(tmp_path / "out")
    assert list(loaded) == ["train", "validation", "test"]
    for split, dataset in loaded.items():
        assert dataset.features == expected[split].features
        for post, source in zip(dataset, expected[split], strict=True):
            assert np.array_equal(post.pop("image"), source.pop("image")) and post == source
        for image in dataset.cast_column("image", RAW)["image"]:
            assert image["bytes"] == (data_dir / "data" / image["path"]).read_bytes()
    assert len(split_mvsa(loaded["train"], group_duplicates=True)) == 3  # images are compared without their files


def test_card_describes_the_splits(run, data_dir: Path):
    folder = run("--splits", "random", "--seed", "7")
    text = (folder / "README.md").read_text()
    card = " ".join(text.split())
    data = parquet.DatasetCard(text).data.to_dict()
    assert data["license"] == "other" and data["pretty_name"] == "MVSA-Single"
    assert [part["num_examples"] for part in data["dataset_info"]["splits"]] == [31, 4, 4]
    labels = list(reload(folder)["train"]["label"])
    assert f"| train | {labels.count(0)} | {labels.count(1)} | {labels.count(2)} | 31 |" in card
    assert "Split: random, seed 7, duplicates not looked for" in card
    assert str(data_dir) not in card


def test_shards_and_row_groups_bound_the_memory(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parquet, "SHARD_BYTES", 10_000)
    monkeypatch.setattr(parquet, "BATCH_ROWS", 3)
    folder = run()
    files = sorted((folder / "data").glob("train-*"))
    assert len(files) > 1 and files[0].name == f"train-00000-of-{len(files):05d}.parquet"
    metadata = pq.read_metadata(files[0])
    assert max(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)) == 3
    assert len(reload(folder)["train"]) == 31


def test_max_samples(run):
    assert [len(part) for part in reload(run("--max_samples", "5")).values()] == [5, 4, 4]
    with pytest.raises(SystemExit, match="must be at least 1, got 0"):
        run("--max_samples", "0")


def test_only_an_earlier_output_is_replaced(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = run("--max_samples", "5")
    (folder / "data" / "train-00001-of-00002.parquet").write_bytes(b"of an earlier run")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(parquet, "_make_card", lambda *_: (_ for _ in ()).throw(RuntimeError("broken off")))
        run()
    assert (folder / "data" / "train-00001-of-00002.parquet").exists()
    assert sorted(path.name for path in run().iterdir()) == ["README.md", "data"]
    assert len(reload(folder)["train"]) == 31
    for name in ("notes.txt", "data/notes.txt"):
        (folder / name).write_text("mine")
        with pytest.raises(SystemExit, match="out is neither empty nor an earlier output of prepare_mvsa.py"):
            run()
        assert (folder / name).read_text() == "mine"
        (folder / name).unlink()
    (folder / "README.md").write_text("my own data set")
    with pytest.raises(SystemExit, match="neither empty"):
        run()
    with pytest.raises(SystemExit, match="neither empty"):
        run(folder=tmp_path / "mvsa")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A Hub that remembers the calls; `hub.private` is what it says of the data set."""
    hub = SimpleNamespace(private=True, created=[], uploaded=[])

    class FakeApi:
        """The three calls that the script makes."""

        def create_repo(self, name: str, **options) -> SimpleNamespace:
            hub.created.append(options)
            return SimpleNamespace(repo_id=f"user/{name}")

        def repo_info(self, name: str, repo_type: str) -> SimpleNamespace:
            return SimpleNamespace(private=hub.private)

        def upload_folder(self, **options) -> None:
            hub.uploaded.append(options)

    monkeypatch.setattr(parquet, "HfApi", FakeApi)
    return hub


@pytest.mark.parametrize(("name", "reason"), [("user/mvsa", "401"), ("a name", "Repo id")])
def test_a_refused_push_is_one_sentence(name: str, reason: str, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with HubServer(tmp_path / "hub", users={}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_nobody")
        with pytest.raises(SystemExit, match=f"out is complete, but the upload to {name} failed: .*{reason}") as error:
            run("--push_to_hub", name)
    assert "\n" not in str(error.value) and (tmp_path / "out/README.md").is_file()


def test_nothing_is_pushed_unasked(run, hub: SimpleNamespace):
    run()
    assert not hub.created and not hub.uploaded


def test_push_is_private(run, hub: SimpleNamespace):
    folder = run("--push_to_hub", "mvsa")
    assert hub.created == [{"repo_type": "dataset", "private": True, "exist_ok": True}]
    (upload,) = hub.uploaded
    assert upload["repo_id"] == "user/mvsa" and upload["repo_type"] == "dataset" and upload["folder_path"] == folder
    assert "data/*.parquet" in upload["delete_patterns"]


def test_push_to_a_public_data_set_needs_the_flag(run, hub: SimpleNamespace):
    hub.private = False
    with pytest.raises(SystemExit, match="user/mvsa is public, so nothing is uploaded"):
        run("--push_to_hub", "mvsa")
    assert not hub.uploaded
    run("--push_to_hub", "mvsa", "--public")
    assert hub.created[-1]["private"] is False and len(hub.uploaded) == 1
