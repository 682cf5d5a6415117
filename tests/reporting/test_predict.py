"""predict.py: one post and files of posts, their order, errors and resuming."""

import importlib
import json
import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from PIL import Image
from transformers import pipeline

from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.predict import main as predict

SCRIPTS = Path(__file__).parents[2] / "scripts"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def probabilities(checkpoint: Path, image: Path, text: str) -> dict[str, float]:
    model = ClipCaCgForSequenceClassification.from_pretrained(checkpoint)
    inputs = ClipCaCgProcessor.from_pretrained(checkpoint)(images=image, text=text, return_tensors="pt")
    values = model(**inputs).logits.softmax(dim=-1)[0].tolist()
    return {model.config.id2label[index]: value for index, value in enumerate(values)}


def test_one_post_on_the_command_line(checkpoint: Path, posts_folder: Path, tmp_path: Path) -> None:
    image, text = posts_folder / "data/1.jpg", "so happy today"
    done = commands.run([SCRIPTS / "predict.py", checkpoint, "--image", image, "--text", text], tmp_path)
    line, expected = json.loads(done.stdout), probabilities(checkpoint, image, text)
    assert line["probabilities"] == pytest.approx(expected, abs=1e-5)
    assert line["label"] == max(expected, key=expected.get)
    assert not list(tmp_path.iterdir())


def test_sides_and_conflict_of_a_model_with_heads(checkpoint: Path, posts_folder: Path, tmp_path: Path) -> None:
    """The numbers of the pipeline; null where a post lacks a side, and beside it a post that cannot be read."""
    fields = {"use_modality_heads": True, "modality_dropout": 0.1}
    model = ClipCaCgForSequenceClassification.from_pretrained(checkpoint, **fields)
    processor = ClipCaCgProcessor.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "heads")
    processor.save_pretrained(tmp_path / "heads")
    image = str(posts_folder / "data/1.jpg")
    posts = [{"image": image, "text": "so happy"}, {"image": None, "text": "so sad"}, {"image": image, "text": None}]
    posts = [{"image": "none.jpg", "text": "no file"}, *posts]
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts))
    with pytest.raises(SystemExit, match="1 of 4 posts could not be read"):
        predict([str(tmp_path / "heads"), "--input", str(tmp_path / "posts.jsonl"), "--output", str(tmp_path / "out")])
    broken, *found = lines(tmp_path / "out")
    assert broken.keys() == {"id", "error"}
    sentiment = pipeline("image-text-sentiment", model=model, processor=processor, return_modalities=True)
    for line, post in zip(found, posts[1:], strict=True):
        expected = sentiment(post)
        for side in ("text", "image"):
            if post[side] is None:
                assert line[side] is None is expected[side] and line["conflict"] is None
                continue
            scores = {entry["label"]: entry["score"] for entry in expected[side]}
            assert line[side]["label"] == expected[side][0]["label"]
            assert line[side]["probabilities"] == pytest.approx(scores, abs=1e-5)
        assert line["conflict"] == pytest.approx(expected["conflict"], abs=1e-5)
    assert found[0]["conflict"] > 0


def test_a_folder_stays_in_order_with_any_number_of_workers(
    checkpoint: Path, posts_folder: Path, tmp_path: Path
) -> None:
    for name, more in (("a", ["--num_workers", "0"]), ("b", ["--num_workers", "2", "--batch_size", "7"])):
        predict([str(checkpoint), "--input", str(posts_folder), "--output", str(tmp_path / name), *more])
    first, second = lines(tmp_path / "a"), lines(tmp_path / "b")
    assert [line["id"] for line in first] == [str(number) for number in range(1, len(first) + 1)]
    assert [line["id"] for line in second] == [line["id"] for line in first]
    for one, other in zip(first, second, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


@pytest.fixture
def faulty(posts_folder: Path, tmp_path: Path) -> Path:
    """Six posts: the second has half an image, the fourth no text, and the image file of the fifth is missing."""
    for number in range(1, 7):
        shutil.copy(posts_folder / f"data/{number}.jpg", tmp_path)
    (tmp_path / "2.jpg").write_bytes((tmp_path / "2.jpg").read_bytes()[:800])
    (tmp_path / "5.jpg").unlink()
    rows = [{"id": f"post {number}", "text": f"text {number}", "image": f"{number}.jpg"} for number in range(1, 7)]
    del rows[3]["text"]
    file = tmp_path / "posts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no json\n")
    return file


@pytest.mark.parametrize("batch_size", ["1", "3", "64"])
def test_a_broken_post_gets_a_line_with_its_error(checkpoint: Path, faulty: Path, batch_size: str) -> None:
    output = faulty.with_name("out.jsonl")
    with pytest.raises(SystemExit, match="4 of 7 posts could not be read; their lines in .* more than a tenth"):
        predict([str(checkpoint), "--input", str(faulty), "--output", str(output), "--batch_size", batch_size])
    found = lines(output)
    assert [line["id"] for line in found] == [f"post {number}" for number in range(1, 7)] + ["7"]
    assert ["error" in line for line in found] == [False, True, False, True, True, False, True]
    assert "2.jpg" in found[1]["error"] and "text" in found[3]["error"] and "5.jpg" in found[4]["error"]
    assert "line 7" in found[6]["error"]
    alone = probabilities(checkpoint, faulty.parent / "6.jpg", "text 6")
    assert found[5]["probabilities"] == pytest.approx(alone, abs=1e-5)


def test_a_tenth_of_broken_posts_is_a_warning_and_on_error_raise_stops(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
    (tmp_path / "posts.csv").write_text("text,image\n" + "a,red.png\n" * 9 + "b,gone.png\n")
    flags = [str(checkpoint), "--input", str(tmp_path / "posts.csv"), "--num_workers", "0", "--output"]
    predict([*flags, str(tmp_path / "out.jsonl")])
    assert "1 of 10 posts could not be read" in caplog.text
    with pytest.raises(SystemExit, match="posts.csv, post 10: .*gone.png"):
        predict([*flags, str(tmp_path / "raise.jsonl"), "--on_error", "raise"])
    assert len(lines(tmp_path / "raise.jsonl")) == 9


def test_an_interrupted_run_continues(checkpoint: Path, faulty: Path) -> None:
    output = faulty.with_name("out.jsonl")
    arguments = [str(checkpoint), "--input", str(faulty), "--output", str(output)]

    def run(*more: str) -> None:
        with suppress(SystemExit):  # more than a tenth of the posts is broken
            predict([*arguments, *more])

    run("--max_samples", "2")
    assert [line["id"] for line in lines(output)] == ["post 1", "post 2"]
    run()
    whole = output.read_text()
    output.write_text(whole[: whole.index("post 4") + 3])  # in the middle of the fourth line
    run()
    assert lines(output) == [json.loads(line) for line in whole.splitlines()]
    run()
    assert len(lines(output)) == 7
    before = faulty.read_text()
    faulty.write_text('{"id": "post 0"}\n' + before)
    with pytest.raises(SystemExit, match="has changed: row 7 is post 6, and in .* it is 7"):
        predict(arguments)
    faulty.write_text(before)
    assert len(lines(output)) == 7
    other = faulty.with_name("other.jsonl")
    other.write_text(faulty.read_text().replace("post", "tweet").replace("no json\n", '{"id": "tweet 7"}\n'))
    with pytest.raises(SystemExit, match="does not belong to"):
        predict([str(checkpoint), "--input", str(other), "--output", str(output)])
    assert len(lines(output)) == 7


def test_errors_in_the_input_end_in_one_sentence(
    checkpoint: Path, backbones: Path, posts_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "posts.xls").touch()
    (tmp_path / "empty").mkdir()
    taken = ["--input", str(posts_folder), "--output", str(tmp_path / "posts.xls/out.jsonl")]
    for flags, message in (
        ([], "Give one post"),
        (["--input", str(tmp_path / "nothing.csv")], "nothing.csv"),
        (["--input", str(tmp_path / "posts.xls")], "posts.xls is not a table that can be read"),
        (["--input", str(tmp_path / "empty")], "empty cannot be read as a data set"),
        (taken, "out.jsonl cannot be written"),
        (["--text", "alone"], "it has no image, which the model needs"),
    ):
        with pytest.raises(SystemExit, match=message):
            predict([str(checkpoint), "--num_workers", "0", "--output", str(tmp_path / "out.jsonl"), *flags])
    with pytest.raises(SystemExit, match=f"The checkpoint {backbones / 'text'} cannot be loaded: "):
        predict([str(backbones / "text"), "--text", "a"])
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(SystemExit, match="nothing.csv"):
        predict([str(checkpoint), "--input", "nothing.csv", "--debug"])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "train --dataset_name {posts} --text_column text --model_name_or_path",
        "evaluate_checkpoint",
        "predict --text a --image b.png",
        "explain --text a --image b.png",
        "demo",
        "push_to_hub user/name",
    ],
)
def test_a_misspelt_checkpoint_is_one_sentence_of_every_command(
    words: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, *flags = words.split()
    if command in ("explain", "demo"):
        pytest.importorskip({"explain": "captum", "demo": "gradio"}[command])
    main = importlib.import_module(f"clipcacg.scripts.{command}").main
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/sample/checkpoint-9").mkdir(parents=True)
    (tmp_path / "posts.csv").write_text("text,image,label\n")
    shutil.copy(checkpoint / "config.json", tmp_path / "outputs/sample/checkpoint-9")
    flags = [flag.format(posts="posts.csv") for flag in flags]
    for name, answer in (
        ("outputs/smaple", "There is no checkpoint outputs/smaple. Did you mean sample?"),
        ("output", "There is no checkpoint output. Did you mean outputs?"),
        ("outputs/sample", "outputs/sample is no checkpoint: it has no config.json. Its folders checkpoint-9 are"),
    ):
        with pytest.raises(SystemExit, match=answer):
            main([*flags, name] if command == "train" else [name, *flags])


def test_a_folder_of_a_users_name_does_not_hide_the_users_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user/data").mkdir(parents=True)
    with pytest.raises(SystemExit, match="The checkpoint user/model cannot be loaded: "):  # the Hub is not reached
        predict(["user/model", "--text", "a"])


@pytest.mark.parametrize("text", [None, "of the folder"])
def test_a_table_beside_a_folder_of_images_is_read(
    text: str | None, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Predictions in the same folder are no table, neither then nor beside the files of MVSA."""
    caplog.set_level(logging.INFO)
    (tmp_path / "posts/data").mkdir(parents=True)
    Image.new("RGB", (30, 30), "red").save(tmp_path / "posts/data/1.jpg")
    if text:
        (tmp_path / "posts/data/1.txt").write_text(text)
    (tmp_path / "posts/posts.csv").write_text("id,text,image\nfirst,so good,data/1.jpg\nsecond,so bad,data/1.jpg\n")
    output = tmp_path / "posts/predictions.jsonl"
    for _ in range(2):
        predict([str(checkpoint), "--input", str(tmp_path / "posts"), "--output", str(output)])
        assert [line["id"] for line in lines(output)] == ["first", "second"]
        assert f"2 predictions are in {output}" in caplog.text
    if text:
        (tmp_path / "posts/posts.csv").unlink()
        predict([str(checkpoint), "--input", str(tmp_path / "posts"), "--output", str(output), "--overwrite"])
        predict([str(checkpoint), "--input", str(tmp_path / "posts"), "--output", str(output)])
        assert [line["id"] for line in lines(output)] == ["1"]


def test_a_checkpoint_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "other")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"model_type": "clipcacg"', '"model_type": "other"'))
    with pytest.raises(SystemExit, match="cannot be loaded: its model type is 'other', not 'clipcacg'"):
        predict([str(folder), "--text", "a"])


def test_a_run_never_touches_a_file_that_is_not_its_own(checkpoint: Path, faulty: Path) -> None:
    notes, before = faulty.with_name("notes.txt"), faulty.read_bytes()
    notes.write_text("mine\nand no line break")
    for output in (notes, faulty):
        with pytest.raises(SystemExit, match="does not belong to|both input and output"):
            predict([str(checkpoint), "--input", str(faulty), "--output", str(output)])
    with pytest.raises(SystemExit, match="both input and output"):
        predict([str(checkpoint), "--input", str(faulty), "--output", str(faulty), "--overwrite"])
    assert notes.read_text() == "mine\nand no line break" and faulty.read_bytes() == before


def test_odd_rows(checkpoint: Path, tmp_path: Path) -> None:
    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
    rows = [
        b"text,image,error",
        b"caf\xe9,red.png,",
        b'"' + b"x" * 200_000 + b'",red.png,',
        b"fine,red.png,none",
        b"a,missing.png,",
    ]
    (tmp_path / "posts.csv").write_bytes(b"\n".join(rows) + b"\n")
    with pytest.raises(SystemExit, match="1 of 4 posts"):
        predict([str(checkpoint), "--input", str(tmp_path / "posts.csv"), "--output", str(tmp_path / "out.jsonl")])
    found = lines(tmp_path / "out.jsonl")
    assert ["label" in line for line in found] == [True, True, True, False]
    assert [line["id"] for line in found] == ["1", "2", "3", "4"] and "missing.png" in found[3]["error"]
    table = b'{"text": "\\ud800", "image": "red.png"}\n\n{"text": "b", "image": "red.png"}\n'
    (tmp_path / "posts.jsonl").write_bytes(table)
    with pytest.raises(SystemExit, match="1 of 2 posts"):
        predict([str(checkpoint), "--input", str(tmp_path / "posts.jsonl"), "--output", str(tmp_path / "two.jsonl")])
    found = lines(tmp_path / "two.jsonl")
    assert [line["id"] for line in found] == ["1", "2"] and "surrogates not allowed" in found[0]["error"]


def test_bf16_is_close_and_not_mixed_with_float32(
    checkpoint: Path,
    posts_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = [str(checkpoint), "--input", str(posts_folder), "--max_samples", "20"]
    predict([*flags, "--output", str(tmp_path / "float32")])
    for has_instructions in (True, False):  # of the CPU
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda found=has_instructions: found)
        assert "--bf16 is slow here" not in caplog.text
        predict([*flags, "--output", str(tmp_path / "bf16"), "--bf16"])
    assert ("--bf16 is slow here" in caplog.text) == (not torch.accelerator.is_available())
    exact, rounded = (
        [value for line in lines(tmp_path / name) for value in line["probabilities"].values()]
        for name in ("float32", "bf16")
    )
    assert rounded == pytest.approx(exact, abs=0.02) and rounded != pytest.approx(exact, abs=1e-6)
    with pytest.raises(SystemExit, match="does not belong to this model"):
        predict([*flags, "--output", str(tmp_path / "float32"), "--bf16"])


def test_an_error_of_the_model_is_none_of_the_data(
    checkpoint: Path, posts_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(ClipCaCgForSequenceClassification, "forward", fail)
    with pytest.raises(ValueError, match="^a bug$"):
        predict([str(checkpoint), "--input", str(posts_folder), "--output", str(tmp_path / "out")])


def test_other_labels_are_another_model(checkpoint: Path, posts_folder: Path, tmp_path: Path) -> None:
    flags = ["--input", str(posts_folder), "--max_samples", "2", "--output", str(tmp_path / "out")]
    predict([str(checkpoint), *flags])
    shutil.copytree(checkpoint, tmp_path / "renamed", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((tmp_path / "renamed/config.json").read_text())
    config["id2label"] = {"0": "bad", "1": "neutral", "2": "good"}
    config["label2id"] = {"bad": 0, "neutral": 1, "good": 2}
    (tmp_path / "renamed/config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="does not belong to this model"):
        predict([str(tmp_path / "renamed"), *flags])


def test_uncertain_posts_keep_their_probabilities_and_are_not_mixed_with_others(
    checkpoint: Path, posts_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = [str(checkpoint), "--input", str(posts_folder), "--max_samples", "9", "--num_workers", "0", "--output"]
    predict([*flags, str(tmp_path / "all")])
    sure = sorted(max(line["probabilities"].values()) for line in lines(tmp_path / "all"))
    limit = str((sure[3] + sure[4]) / 2)
    predict([*flags, str(tmp_path / "some"), "--min_confidence", limit])
    found = lines(tmp_path / "some")
    assert [line["label"] for line in found].count("uncertain") == 4
    for line, other in zip(found, lines(tmp_path / "all"), strict=True):
        assert line["probabilities"] == other["probabilities"] and line["label"] in ("uncertain", other["label"])
    for more in ([], ["--min_confidence", "0.9"]):
        with pytest.raises(SystemExit, match="does not belong to this model"):
            predict([*flags, str(tmp_path / "some"), *more])
    capsys.readouterr()
    post = ["--image", str(posts_folder / "data/1.jpg"), "--text", "so happy", "--min_confidence"]
    predict([str(checkpoint), *post, "1"])
    assert json.loads(capsys.readouterr().out)["label"] == "uncertain"
    with pytest.raises(SystemExit, match="--min_confidence cannot be used: min_confidence must be from 0 to 1, not 7"):
        predict([str(checkpoint), *post, "7"])


def test_several_labels_get_the_same_probabilities_everywhere(
    checkpoint: Path, posts_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = ClipCaCgForSequenceClassification.from_pretrained(checkpoint)
    model.config.problem_type = "multi_label_classification"
    model.classifier.bias.data = torch.tensor([-9.0, 5.0, 4.0])
    model.save_pretrained(tmp_path)
    ClipCaCgProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path)
    post = {"image": str(posts_folder / "data/1.jpg"), "text": "so happy"}
    predict([str(tmp_path), "--image", post["image"], "--text", post["text"]])
    line = json.loads(capsys.readouterr().out)
    assert line["labels"] == ["neutral", "positive"] and min(list(line["probabilities"].values())[1:]) > 0.9
    entries = pipeline("image-text-sentiment", model=str(tmp_path), trust_remote_code=True)(post)
    assert {entry["label"]: entry["score"] for entry in entries} == pytest.approx(line["probabilities"], abs=1e-5)


def test_a_repeated_run_fails_as_the_first_did(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "posts.jsonl").write_text('{"text": "no image", "image": null}\n' * 3)
    command = [str(checkpoint), "--input", str(tmp_path / "posts.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    for _ in range(2):
        with pytest.raises(SystemExit, match="3 of 3 posts could not be read.*trained with --modality_dropout 0.1"):
            predict(command)


def test_predictions_of_another_split_are_not_continued(checkpoint: Path, posts_folder: Path, tmp_path: Path) -> None:
    for split in ("dev", "test"):
        (tmp_path / "table").mkdir(exist_ok=True)
        row = {"text": f"of {split}", "image": f"{posts_folder}/data/1.jpg"}
        (tmp_path / f"table/{split}.jsonl").write_text(json.dumps(row) + "\n")
    command = [str(checkpoint), "--input", str(tmp_path / "table"), "--output", str(tmp_path / "out.jsonl")]
    predict([*command, "--test_split", "dev"])
    with pytest.raises(SystemExit, match="does not belong to this model and"):
        predict(command)


@pytest.mark.parametrize(("flag", "value"), [("batch_size", 0), ("num_workers", -1), ("max_samples", -5)])
def test_numbers_out_of_range_are_refused(flag: str, value: int, checkpoint: Path) -> None:
    with pytest.raises(SystemExit, match=f"--{flag} must be at least ., got {value}"):
        predict([str(checkpoint), "--input", "posts.jsonl", f"--{flag}", str(value)])
