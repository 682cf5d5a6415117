"""train.py, evaluate_checkpoint.py and predict.py read the same posts of the same source, whatever its format."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import commands
import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from hub_server import HubServer, Repo
from inputs import SCRIPTS, results
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.scripts import evaluate_checkpoint, predict, train
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.faults import Faults
from clipcacg.scripts.data.loading import DataArguments, load_posts, load_to_predict, training_stream
from clipcacg.scripts.data.streaming import PostStream
from clipcacg.scripts.tables import rows, runs
from clipcacg.scripts.training.arguments import RecipeArguments
from clipcacg.scripts.training.run import adapt_to_stream

SPLITS = {"train": 30, "validation": 8, "test": 8}
BAD = {"train": 3, "test": 5}  # row with an image that only decoding shows to be broken


def image(number: int, broken: bool) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    pixels[..., number % 2] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[len(content) // 2] ^= 255 * broken
    return bytes(content)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same posts as folders of Parquet, CSV and JSON lines, and the repository hub."""
    folder = tmp_path_factory.mktemp("sources")
    for kind in ("parquet", "csv", "jsonl"):
        (folder / kind).mkdir()
    (folder / "images").mkdir()
    for split, size in SPLITS.items():
        posts = []
        for row in range(1, size + 1):
            content = image(row, BAD.get(split) == row)
            (folder / f"images/{split}{row}.png").write_bytes(content)
            label = ("bad", "good")[row % 2]
            posts.append({"title": "NA", "tweet": f"a {label} day {row}", "photo": content, "mood": label})
        datasets.Dataset.from_list(posts).to_parquet(folder / f"parquet/{split}.parquet")
        named = [row | {"photo": f"../images/{split}{number}.png"} for number, row in enumerate(posts, start=1)]
        datasets.Dataset.from_list(named).to_csv(folder / f"csv/{split}.csv")
        datasets.Dataset.from_list(named).to_json(folder / f"jsonl/{split}.jsonl")
    return folder


@pytest.fixture(scope="module")
def trained(sources: Path, backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    names = [word for part in ("text", "vision", "clip") for word in (f"--{part}_model", str(backbones / part))]
    train.main(
        [
            str(SCRIPTS / "configs/sample.yaml"), "--dataset_name", str(sources / "parquet"), "--text_column", "title",
            "tweet", "--image_column", "photo", "--label_column", "mood", "--output_dir", str(output), *names,
            "--num_train_epochs", "1", "--hidden_size", "32", "--num_attention_heads", "4", "--on_error", "skip",
            "--disable_tqdm", "True", "--use_cpu",
        ]
    )  # fmt: skip
    return output


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_training_on_a_stream(kind: str, sources: Path, trained: Path, tmp_path: Path) -> None:
    flags = ["--text_column", "tweet", "--image_column", "photo", "--label_column", "mood", "--use_cpu"]
    source = ["--dataset_name", str(sources / kind), "--model_name_or_path", str(trained), "--max_train_samples", "20"]
    output = ["--output_dir", str(tmp_path), "--per_device_train_batch_size", "4", "--num_train_epochs", "2"]
    often = "--eval_strategy steps --eval_steps 7 --save_strategy steps --save_steps 7 --load_best_model_at_end False"
    more = f"--streaming --shuffle_buffer 5 --on_error skip --save_total_limit 9 {often}".split()
    command = [str(SCRIPTS / "configs/sample.yaml"), *source, *flags, *output, *more]
    train.main(command)
    found, weights = results(tmp_path), load_file(tmp_path / "model.safetensors")
    before = load_file(tmp_path / "checkpoint-7/model.safetensors")  # within the second epoch
    shutil.rmtree(tmp_path / "checkpoint-10")
    train.main([*command, "--resume_from_checkpoint", "True"])
    resumed = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert not torch.equal(weights["classifier.weight"], before["classifier.weight"])
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 10 and state["epoch"] == 2
    assert found["skipped_posts"] == 2 and len(lines(tmp_path / "predictions.jsonl")) == 7
    with pytest.raises(SystemExit, match="--cache_features needs all training posts"):
        train.main([*source, *flags, *output, "--streaming", "--cache_features", "--freeze_text"])
    with pytest.raises(SystemExit, match="--streaming is for train.py and predict.py"):
        evaluate_checkpoint.main([str(trained), *source[:2], "--streaming", "--output", str(tmp_path / "scores.json")])


def stream_of_nine(buffer: int) -> PostStream:
    """Every second of twenty rows; the last has no label."""
    table = datasets.Dataset.from_dict({"row": range(1, 21), "text": [f"text {row}" for row in range(1, 21)]})
    labels = datasets.Dataset.from_dict({"row": range(2, 20, 2), "label": [row % 3 for row in range(2, 20, 2)]})
    return PostStream(table.to_iterable_dataset(), labels, seed=0, buffer=buffer)


def test_a_stream_has_its_labels_and_an_order_of_its_own_in_every_epoch() -> None:
    posts, orders = stream_of_nine(buffer=5), []
    for epoch in (0, 1, 0):
        posts.set_epoch(epoch)
        found = list(posts)
        assert sorted(post["row"] for post in found) == list(range(2, 20, 2)) and len(posts) == 9
        assert all(post["label"] == post["row"] % 3 and post["text"] == f"text {post['row']}" for post in found)
        orders.append([post["row"] for post in found])
    assert orders[0] == orders[2] != orders[1]
    assert [post["row"] for post in stream_of_nine(buffer=0)] == list(range(2, 20, 2))
    positions = [row // 2 - 1 for row in orders[0]]  # in the source
    assert all(position <= turn + 5 for turn, position in enumerate(positions))


def test_the_buffer_of_a_stream_is_the_flags(sources: Path) -> None:
    columns = {"text_column": ["tweet"], "image_column": "photo", "label_column": "mood", "on_error": "skip"}
    orders = []
    for buffer in (0, 5, None):
        arguments = DataArguments(
            dataset_name=str(sources / "jsonl"), streaming=True, shuffle_buffer=buffer, **columns
        )
        stream = training_stream(arguments, "both", load_posts(arguments, faults=Faults("skip")), None, seed=0)
        orders.append([post["row"] for post in stream])
    rows = orders[0]
    assert rows == sorted(rows) == sorted(orders[1]) == sorted(orders[2])
    # Five rows in the buffer move none forward by more.
    assert max(turn - orders[1].index(row) for turn, row in enumerate(rows)) > 0
    assert all(rows.index(row) <= turn + 5 for turn, row in enumerate(orders[1]))
    assert any(rows.index(row) > turn + 5 for turn, row in enumerate(orders[2]))


def test_workers_of_a_stream_start_anew_in_each_epoch() -> None:
    """One that persists would repeat the order of the first epoch, and several would not keep an order."""
    flags = {"dataloader_num_workers": 4, "dataloader_persistent_workers": True, "report_to": "none", "use_cpu": True}
    arguments = RecipeArguments(output_dir="unused", **flags)
    adapt_to_stream(arguments, cache_features=False)
    assert (arguments.dataloader_num_workers, arguments.dataloader_persistent_workers) == (1, False)


def test_two_processes_see_each_row_of_a_stream_once_in_an_epoch() -> None:
    """The last of their batches is filled up with posts of the first, so that both have the same number of steps."""
    for epoch in (0, 1):
        alone = stream_of_nine(buffer=5)
        alone.set_epoch(epoch)
        order, seen = [post["row"] for post in alone], []
        for process in range(2):
            loader = DataLoader(stream_of_nine(buffer=5), batch_size=2, collate_fn=list)
            prepared = prepare_data_loader(
                loader, num_processes=2, process_index=process, dispatch_batches=False, put_on_device=False
            )
            prepared.set_epoch(epoch)
            seen.append([[post["row"] for post in batch] for batch in prepared])
        rows = [row for batches in zip(*seen, strict=True) for batch in batches for row in batch]
        assert rows == [*order, *order[:3]]


STREAMED = (
    "--streaming --on_error skip --text_column tweet --image_column photo --label_column mood --shuffle_buffer 5 "
    "--num_train_epochs 2 --save_strategy steps --save_steps 3 --eval_strategy steps --eval_steps 3 "
    "--load_best_model_at_end False --save_total_limit 9 --disable_tqdm True --use_cpu --dataloader_num_workers"
).split()  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_on_a_stream_continues_to_the_same_weights(
    sources: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """The kill comes within the second epoch, whose order is another."""
    command = {
        name: [
            SCRIPTS / "train.py", SCRIPTS / "configs/sample.yaml", "--dataset_name", sources / "jsonl", *STREAMED, "0",
            "--model_name_or_path", checkpoint, "--output_dir", tmp_path / name, "--per_device_train_batch_size", "4",
        ]
        for name in ("whole", "killed")
    }  # fmt: skip
    commands.run(command["whole"], tmp_path)
    commands.run_killed(command["killed"], tmp_path, (tmp_path / "killed/checkpoint-12/trainer_state.json").exists)
    assert not (tmp_path / "killed/all_results.json").exists()
    commands.run([*command["killed"], "--resume_from_checkpoint", "True"], tmp_path)
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert json.loads((tmp_path / "killed/trainer_state.json").read_text())["global_step"] == 16
    assert results(tmp_path / "whole")["test_loss"] == results(tmp_path / "killed")["test_loss"]


NOTING = """
import os
from clipcacg.scripts import train
from clipcacg.scripts.data.collator import PostCollator

def noted(self, rows, collate=PostCollator.__call__):
    with open(f"rank{os.environ['RANK']}", "a") as file:
        file.writelines(row["id"] + chr(10) for row in rows)
    return collate(self, rows)

PostCollator.__call__ = noted
train.main()
"""


@pytest.mark.slow
def test_two_processes_train_on_a_stream(sources: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Each reads its own posts; their weights are one model's, so both have taken the same steps."""
    (tmp_path / "noting.py").write_text(NOTING)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "noting.py"]
    flags = ["--dataset_name", sources / "parquet", *STREAMED, "0", "--model_name_or_path", checkpoint]
    output = ["--output_dir", tmp_path / "run", "--per_device_train_batch_size", "5"]
    command = [*torchrun, SCRIPTS / "configs/sample.yaml", *flags, *output]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = [(tmp_path / f"rank{rank}").read_text().splitlines() for rank in range(2)]
    trained = [[post_id for post_id in ids if post_id.startswith("train-")] for ids in seen]
    assert [len(ids) for ids in trained] == [30, 30]  # two epochs of three batches of five
    for epoch in (slice(0, 15), slice(15, 30)):
        assert sorted(trained[0][epoch] + trained[1][epoch]) == sorted(f"train-{row}" for row in range(1, 31))
    assert trained[0][:15] != trained[0][15:]
    assert json.loads((tmp_path / "run/trainer_state.json").read_text())["global_step"] == 6
    assert results(tmp_path / "run")["skipped_posts"] == 2


def lines(path: Path) -> dict[str, dict[str, Any]]:
    return {line["id"]: line for line in map(json.loads, path.read_text().splitlines())}


def test_a_post_that_fails_when_it_is_decoded_is_left_out_and_counted(trained: Path) -> None:
    found = results(trained)
    assert found["skipped_posts"] == 2
    assert [row.split(":")[0] for row in found["skipped_first"]] == ["post test-5 of the test split", "post train-3"]
    assert all("cannot be read as an image" in row for row in found["skipped_first"])
    assert len(lines(trained / "predictions.jsonl")) == 7
    config = ClipCaCgConfig.from_pretrained(trained)
    assert config.text_columns == ["title", "tweet"] and config.image_column == "photo"


def use_for_data(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    """Let the datasets library load from the server."""
    patch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    patch.setattr(datasets.config, "HUB_DATASETS_URL", hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}")
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "hub"])
def test_the_three_commands_give_the_same_scores(
    kind: str, sources: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer(tmp_path / "hub", {}) as hub, hub.used_here():
        files = {f"data/{path.name}": hub.store(path.read_bytes()) for path in (sources / "parquet").iterdir()}
        hub.repos["datasets", "user/posts"] = repo = Repo(private=False)
        repo.commit("main", files, "posts")
        use_for_data(hub, monkeypatch)
        source = "user/posts" if kind == "hub" else str(sources / kind)
        scores = tmp_path / "scores.json"
        evaluate_checkpoint.main(
            [
                str(trained),
                "--dataset_name",
                source,
                "--label_column",
                "mood",
                "--on_error",
                "skip",
                "--output",
                str(scores),
            ]
        )
        for name, more in (("whole", []), ("stream", ["--streaming"])):
            with pytest.raises(SystemExit, match="1 of 8 posts could not be read"):
                predict.main([str(trained), "--input", source, "--output", str(tmp_path / name), *more])
    expected = lines(trained / "predictions.jsonl")
    for name in ("whole", "stream"):
        found = lines(tmp_path / name)
        assert "cannot be read as an image" in found.pop("test-5")["error"]
        assert found.keys() == expected.keys()
        for post_id, line in found.items():
            assert line["probabilities"] == pytest.approx(expected[post_id]["probabilities"], abs=1e-5)
    evaluated = json.loads(scores.read_text())
    assert evaluated["posts"] == 7 and evaluated["skipped_posts"] == 1
    assert evaluated["accuracy"] == results(trained)["test_accuracy"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_line_of_the_hub_that_cannot_be_parsed_is_named_or_left_out(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posts = [("text,label" if row == 0 else f"t{row},{'ab'[row % 2]}") for row in range(21)]
    if kind == "jsonl":
        posts = [json.dumps({"text": f"t{row}", "label": "ab"[row % 2]}) for row in range(1, 21)]
    bad = [*posts[:9], {"csv": "t,a,more", "jsonl": "t"}[kind], *posts[9:]]
    with HubServer(tmp_path / "hub", {}) as hub, hub.used_here():
        found = {"train": bad, "test": posts}
        files = {f"{split}.{kind}": hub.store("\n".join(part).encode()) for split, part in found.items()}
        hub.repos["datasets", "user/posts"] = repo = Repo(private=False)
        repo.commit("main", files, "posts")
        use_for_data(hub, monkeypatch)
        arguments = DataArguments(dataset_name="user/posts", splits=None)
        with pytest.raises(InputError, match=f"user/posts cannot be read: train.{kind}, line 10: "):
            load_posts(arguments, "text")
        arguments.on_error, faults = "skip", Faults("skip")
        load_posts(arguments, "text", faults=faults)
        row = 9 + (kind == "jsonl")
        assert list(faults.left_out) == [f"row {row} of the split train of user/posts"] and faults.num_rows == 41
        if kind == "csv":
            arguments.streaming = True
            with pytest.raises(InputError, match="in line 10, saw 3. Without --streaming the row is named"):
                load_posts(arguments, "text")


def test_the_tables_of_reproduce_are_of_the_same_posts(sources: Path) -> None:
    source = ["--dataset_name", str(sources / "csv"), "--text_column", "title", "tweet", "--image_column", "photo"]
    _, settings = rows.parse([*source, "--label_column", "mood", "--on_error", "skip"])
    fold = runs.load_fold(None, settings)
    assert [*map(len, fold.posts.values())] == [29, 8, 7] and fold.facts["skipped_posts"] == 2
    assert fold.posts["test"]["text"][0] == "NA a good day 1"


def test_a_stream_stops_at_the_limit_and_continues(sources: Path, trained: Path, tmp_path: Path) -> None:
    flags = [str(trained), "--input", str(sources / "csv"), "--split", "validation", "--streaming", "--output"]
    predict.main([*flags, str(tmp_path / "out"), "--max_samples", "3"])
    assert list(lines(tmp_path / "out")) == ["validation-1", "validation-2", "validation-3"]
    predict.main([*flags, str(tmp_path / "out"), "--batch_size", "2"])
    assert list(lines(tmp_path / "out")) == [f"validation-{row}" for row in range(1, 9)]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_stream_names_and_counts_a_line_that_cannot_be_parsed_and_goes_on(
    kind: str, checkpoint: Path, posts_folder: Path, tmp_path: Path
) -> None:
    """It surfaces in the middle of a stream, when its reader has given out rows before it."""
    count, image = 10_020, str(posts_folder / "data/1.jpg")
    posts = [{"image": image, "text": f"day {row}", "label": "ab"[row % 2]} for row in range(count)]
    if kind == "csv":
        rows = ["image,text,label", *(",".join(post.values()) for post in posts)]
        rows[10_011], fault = f"{image},a,b,more", "line 10012: it has 4 cells, the header 3"
    else:
        posts[3]["text"] = "x" * (10 << 20)  # more than the reader takes at a time
        rows = [json.dumps(post) for post in posts]
        rows[10_010], fault = '{"text":', "line 10011: "
    path = tmp_path / f"posts.{kind}"
    path.write_text("\n".join(rows))
    arguments = DataArguments(dataset_name=str(path), streaming=True, on_error="skip")
    faults = Faults("skip")
    labels = load_posts(arguments, faults=faults)
    assert len(labels["train"]) == count - 1 and list(faults.left_out) == [f"row 10011 of {path}"]
    assert fault in faults.left_out[f"row 10011 of {path}"]
    stream = training_stream(arguments, "both", labels, None, seed=0)
    assert sum(post["label"] == ("ab".index(posts[post["row"] - 1]["label"])) for post in stream) == count - 1
    found = list(load_to_predict(arguments, str(path), "test", ClipCaCgConfig()).skip(10_009))
    assert [post["error"] is None for post in found] == [True, False, *[True] * 9] and fault in found[1]["error"]
    arguments.on_error = "raise"
    with pytest.raises(InputError, match=f"{path} cannot be read: posts.{kind}, {fault}"):
        load_posts(arguments)


def test_predictions_of_a_stream_go_on_behind_a_line_that_cannot_be_parsed(
    checkpoint: Path, posts_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = json.dumps({"text": "a", "image": str(posts_folder / "data/1.jpg")})
    (tmp_path / "posts.jsonl").write_text("\n".join(['{"text":', *[row] * 10]))
    predict.main([*f"{checkpoint} --input {tmp_path}/posts.jsonl --streaming --output {tmp_path}/out".split()])
    found = lines(tmp_path / "out")
    assert "posts.jsonl, line 1: " in found.pop("1")["error"] and all("label" in line for line in found.values())
    assert len(found) == 10 and "1 of 11 posts could not be read" in caplog.text


def test_withholding_leaves_out_posts_that_lack_the_other_side(checkpoint: Path) -> None:
    """They would be scored with neither."""
    posts = datasets.Dataset.from_dict({"text": ["a", "", None, "d"], "label": [0, 1, 0, 1]})
    images = [{"path": "x.png", "bytes": None}] * 3 + [None]
    posts = posts.add_column("image", images, feature=datasets.Image(decode=False))
    config = ClipCaCgConfig.from_pretrained(checkpoint, modality_dropout=0.1)
    for side in ("image", "text"):
        kept = evaluate_checkpoint.without(posts, side, config)
        assert kept["label"][:] == [0] and kept[side][:] == [None]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--max_train_samples", "0"], "--max_train_samples must be at least 1, got 0"),
        ([], "posts.csv cannot be read: posts.csv, line 11502: it has 3 cells"),
    ],
)
def test_a_stream_that_cannot_be_used_is_one_sentence(more: list[str], words: str, tmp_path: Path) -> None:
    """A row with a cell too many surfaces far down, after the reader has begun."""
    cells = [f"a day,{number % 2}" for number in range(12_000)]
    cells[11_500] += ",more"
    (tmp_path / "posts.csv").write_text("\n".join(["text,label", *cells]))
    flags = [
        "--dataset_name",
        str(tmp_path / "posts.csv"),
        "--output_dir",
        str(tmp_path / "out"),
        "--modality",
        "text",
    ]
    with pytest.raises(SystemExit, match=words):
        train.main([*flags, *more, "--streaming", "--max_steps", "1", "--use_cpu"])


@pytest.mark.slow
def test_a_search_counts_the_posts_that_it_leaves_out(sources: Path, backbones: Path, tmp_path: Path) -> None:
    """The share of bad posts is that of all posts."""
    pytest.importorskip("optuna")
    names = [word for part in ("text", "vision") for word in (f"--{part}_model", str(backbones / part))]
    columns = "--image_column photo --text_column tweet --label_column mood --modality image --on_error skip"
    few = "--hidden_size 16 --num_attention_heads 2 --hp_search 1 --num_train_epochs 1 --eval_strategy epoch --use_cpu"
    data = ["--dataset_name", str(sources / "csv"), "--output_dir", str(tmp_path / "run")]
    train.main([*data, *names, *columns.split(), *few.split(), "--train_sampling_strategy", "random"])
    assert json.loads((tmp_path / "run/all_results.json").read_text())["skipped_posts"] == 2
