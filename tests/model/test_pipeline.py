"""The pipeline, from a checkpoint's own code: the same numbers as `scripts/predict.py`."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import datasets
import pytest
import torch
from PIL import Image
from transformers import pipeline

from clipcacg.modeling_clipcacg import ClipCaCgForSequenceClassification
from clipcacg.pipeline_clipcacg import ImageTextSentimentPipeline
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts.predict import main as predict

TASK = "image-text-sentiment"


def posts_of(folder: Path, count: int) -> list[dict[str, Any]]:
    return [
        {"image": str(folder / f"data/{number}.jpg"), "text": f"post {number} " * number}
        for number in range(1, count + 1)
    ]


@pytest.fixture
def sentiment(checkpoint: Path) -> ImageTextSentimentPipeline:
    return pipeline(TASK, model=str(checkpoint), trust_remote_code=True)


def test_it_gives_the_numbers_of_predict(checkpoint: Path, posts_folder: Path, tmp_path: Path) -> None:
    """In a fresh process where this project cannot be imported, from an empty folder."""
    posts = posts_of(posts_folder, 5)
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts))
    predict([str(checkpoint), "--input", str(tmp_path / "posts.jsonl"), "--output", str(tmp_path / "out.jsonl")])
    expected = [json.loads(line)["probabilities"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    code = (
        "import json, sys; sys.modules['clipcacg'] = None\n"
        "from transformers import pipeline\n"
        f"sentiment = pipeline({TASK!r}, model=sys.argv[1], trust_remote_code=True)\n"
        "json.dump(sentiment(json.loads(sys.argv[2])), open('found.json', 'w'))\n"
    )
    (tmp_path / "empty").mkdir()
    commands.run(["-c", code, checkpoint, json.dumps(posts)], tmp_path / "empty")
    for found, scores in zip(json.loads((tmp_path / "empty/found.json").read_text()), expected, strict=True):
        assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(scores, abs=1e-5)


def test_it_takes_objects(sentiment: ImageTextSentimentPipeline, checkpoint: Path, posts_folder: Path) -> None:
    model = ClipCaCgForSequenceClassification.from_pretrained(checkpoint)
    built = pipeline(TASK, model=model, processor=ClipCaCgProcessor.from_pretrained(checkpoint))
    (post,) = posts_of(posts_folder, 1)
    assert built(post) == sentiment(post)


def test_batches_and_datasets_give_the_same_as_single_posts(
    sentiment: ImageTextSentimentPipeline, posts_folder: Path
) -> None:
    posts = posts_of(posts_folder, 7)
    single = [sentiment(post) for post in posts]
    assert sentiment(tuple(posts[:2])) == sentiment(posts[:2]) and sentiment([]) == sentiment(()) == []
    table = datasets.Dataset.from_list(posts).cast_column("image", datasets.Image())
    for several in (sentiment(posts, batch_size=3), list(sentiment(table, batch_size=4))):
        for one, other in zip(single, several, strict=True):
            assert [entry["label"] for entry in one] == [entry["label"] for entry in other]
            assert [entry["score"] for entry in one] == pytest.approx([entry["score"] for entry in other], abs=1e-5)


def test_every_form_of_an_image(sentiment: ImageTextSentimentPipeline, posts_folder: Path) -> None:
    path = posts_folder / "data/3.jpg"
    expected = sentiment({"image": str(path), "text": "hello"})
    for image in (Image.open(path), path, base64.b64encode(path.read_bytes()).decode()):
        assert sentiment({"image": image, "text": "hello"}) == expected


def test_the_likeliest_come_first_and_top_k_cuts(sentiment: ImageTextSentimentPipeline, posts_folder: Path) -> None:
    post = posts_of(posts_folder, 1)[0]
    every = sentiment(post)
    assert sorted(every, key=lambda entry: -entry["score"]) == every
    assert sum(entry["score"] for entry in every) == pytest.approx(1)
    assert {entry["label"] for entry in every} == {"negative", "neutral", "positive"}
    assert sentiment(post, top_k=2) == every[:2]
    for top_k in (0, -1):
        with pytest.raises(ValueError, match=f"top_k must be at least 1, not {top_k}"):
            sentiment(post, top_k=top_k)


def test_an_uncertain_answer_comes_before_the_probabilities(checkpoint: Path, posts_folder: Path) -> None:
    model = ClipCaCgForSequenceClassification.from_pretrained(checkpoint, temperature=4.0)
    sentiment = pipeline(TASK, model=model, processor=ClipCaCgProcessor.from_pretrained(checkpoint))
    post = posts_of(posts_folder, 1)[0]
    every = sentiment(post)
    inputs = sentiment.processor(images=post["image"], text=post["text"], return_tensors="pt")
    expected = (model(**inputs).logits / 4).softmax(-1).max().item()
    assert every[0]["score"] == pytest.approx(expected, abs=1e-6)
    uncertain = {"label": "uncertain", "score": every[0]["score"]}
    assert sentiment(post, min_confidence=0.99) == [uncertain, *every]
    assert sentiment([post], min_confidence=0.99, top_k=1) == [[uncertain, every[0]]]
    assert sentiment(post, min_confidence=0.1) == every
    with pytest.raises(ValueError, match="min_confidence must be from 0 to 1, not 80"):
        sentiment(post, min_confidence=80)


@pytest.mark.parametrize("part", ["image", "text"])
def test_one_modality_does_with_its_part(part: str, backbones: Path, posts_folder: Path) -> None:
    names = {"text_model": backbones / "text", "vision_model": backbones / "vision"}
    model = ClipCaCgForSequenceClassification.from_backbones(
        **names, modality=part, hidden_size=32, num_attention_heads=4, problem_type="regression", num_labels=1
    )
    sentiment = ImageTextSentimentPipeline(model, processor=ClipCaCgProcessor.from_backbones(**names), task=TASK)
    post = posts_of(posts_folder, 1)[0]
    (entry,) = sentiment({part: post[part]})
    assert torch.isfinite(torch.tensor(entry["score"])) and entry == sentiment(post)[0]
    other = {"image": "text", "text": "image"}[part]
    with pytest.raises(ValueError, match=f"reads the {part} of a post, but this one has no {part}"):
        sentiment({other: post[other]})


def test_a_post_is_one_image_and_one_text(sentiment: ImageTextSentimentPipeline, posts_folder: Path) -> None:
    path = str(posts_folder / "data/1.jpg")
    for image, text, words in (
        (path, ["I love it", "I hate it"], r"text\[0\] must be a string, not list"),
        ([path, path], "I love it", r"images\[0\] must be a PIL image, .* not list"),
        (path, 5, r"text\[0\] must be a string, not int"),
        (5, "I love it", r"images\[0\] must be a PIL image, .* not int"),
    ):
        with pytest.raises(TypeError, match=words):
            sentiment({"image": image, "text": text})
    for post, words in (
        ({"image": torch.zeros(2, 3, 32, 32), "text": "two images"}, "is not an image"),
        ({"text": "alone", "photo": path}, "this one has no image: got the keys 'text', 'photo'. Give "),
        ({"text": "alone", "image": " "}, "this one has no image: "),
        ({"text": float("nan"), "image": path}, "this one has no text: "),
        ("just a string", "this one has no image and no text: got a str. Give "),
    ):
        with pytest.raises(ValueError, match=words):
            sentiment(post)


def test_a_post_of_one_part_needs_modality_dropout(
    sentiment: ImageTextSentimentPipeline, checkpoint: Path, posts_folder: Path
) -> None:
    image = str(posts_folder / "data/1.jpg")
    with pytest.raises(ValueError, match="this one has no image: .* Give .*, or train with modality_dropout."):
        sentiment({"text": "alone"})
    model = ClipCaCgForSequenceClassification.from_pretrained(checkpoint, modality_dropout=0.1)
    sentiment = pipeline(TASK, model=model, processor=ClipCaCgProcessor.from_pretrained(checkpoint))
    empty = {"text": "alone", "image": ""}
    assert sentiment(empty) == sentiment({"text": "alone", "image": float("nan")}) == sentiment({"text": "alone"})
    posts = [{"text": "alone"}, {"image": image}, {"image": image, "text": " "}, {"image": image, "text": "both"}]
    one_by_one = [sentiment(post) for post in posts]
    assert [sum(entry["score"] for entry in answer) for answer in one_by_one] == pytest.approx([1.0] * 4)
    assert one_by_one[1] == one_by_one[2] != one_by_one[3]
    for together, alone in zip(sentiment(posts, batch_size=4), one_by_one, strict=True):
        assert [entry["score"] for entry in together] == pytest.approx([entry["score"] for entry in alone], abs=1e-5)
    for post in ({}, {"text": ""}):
        with pytest.raises(ValueError, match="this one has no image and no text: got the keys .*. Give .*[.]$"):
            sentiment(post)


LABELS = ("negative", "neutral", "positive")


@pytest.fixture
def build_with_heads(checkpoint: Path) -> Callable[..., ImageTextSentimentPipeline]:
    """A function that makes a pipeline whose model has modality heads; keywords are fields of its config."""

    def build(**fields: Any) -> ImageTextSentimentPipeline:
        torch.manual_seed(0)
        own = {"use_modality_heads": True, "modality_dropout": 0.1, **fields}
        model = ClipCaCgForSequenceClassification.from_pretrained(checkpoint, ignore_mismatched_sizes=True, **own)
        return pipeline(TASK, model=model, processor=ClipCaCgProcessor.from_pretrained(checkpoint))

    return build


@pytest.mark.parametrize("order", [LABELS, ("positive", "negative", "neutral")])
def test_each_side_and_their_conflict(
    build_with_heads: Callable[..., ImageTextSentimentPipeline], posts_folder: Path, order: tuple[str, ...]
) -> None:
    """Certain heads: a positive text on a negative image is a conflict, wherever the labels stand."""
    sentiment = build_with_heads(id2label=dict(enumerate(order)), label2id={name: i for i, name in enumerate(order)})
    (post,) = posts_of(posts_folder, 1)
    heads = sentiment.model.modality_heads
    for text, image, conflict in (
        ("positive", "negative", 1),
        ("negative", "positive", 1),
        ("positive", "neutral", 0),
    ):
        with torch.no_grad():
            heads.text.bias[:] = 50 * (torch.arange(3) == order.index(text))
            heads.image.bias[:] = 50 * (torch.arange(3) == order.index(image))
        found = sentiment(post, return_modalities=True, top_k=1)
        assert found["post"] == sentiment(post, top_k=1) and found["conflict"] == pytest.approx(conflict, abs=1e-6)
        assert [[entry["label"] for entry in found[side]] for side in ("text", "image")] == [[text], [image]]


def test_sides_in_batches_and_after_saving(
    build_with_heads: Callable[..., ImageTextSentimentPipeline], posts_folder: Path, tmp_path: Path
) -> None:
    """From the checkpoint's own code too; what a post lacks has no sentiment, and no conflict."""
    sentiment = build_with_heads()
    posts = posts_of(posts_folder, 3)
    del posts[0]["image"], posts[2]["text"]
    single = [sentiment(post, return_modalities=True) for post in posts]
    inputs = sentiment.preprocess(posts[1])
    outputs = sentiment.model(**inputs)
    text, image = (
        dict(zip(LABELS, outputs[name].softmax(-1)[0].tolist(), strict=True))
        for name in ("text_logits", "image_logits")
    )
    for found, expected in ((single[1]["text"], text), (single[1]["image"], image)):
        assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(expected)
        assert [entry["score"] for entry in found] == sorted(expected.values(), reverse=True)
    conflict = text["positive"] * image["negative"] + text["negative"] * image["positive"]
    assert single[1]["conflict"] == pytest.approx(conflict)
    assert single[0]["image"] is None is single[2]["text"] and single[0]["conflict"] is None is single[2]["conflict"]
    assert single[0]["text"] and single[2]["image"]
    sentiment.save_pretrained(tmp_path)
    again = pipeline(TASK, model=str(tmp_path), trust_remote_code=True, return_modalities=True)
    for found in (again(posts[1], return_modalities=False), sentiment(posts[1])):  # up to rounding
        for entry, expected in zip(found, single[1]["post"], strict=True):
            assert entry["label"] == expected["label"] and entry["score"] == pytest.approx(expected["score"], abs=1e-6)
    for one, other in zip(single, again(posts, batch_size=3), strict=True):
        assert json.dumps(one, indent=1, default=str).count("\n") == json.dumps(other, indent=1).count("\n")
        assert one["conflict"] == pytest.approx(other["conflict"], abs=1e-5)


def test_conflict_needs_heads_and_its_two_labels(
    build_with_heads: Callable[..., ImageTextSentimentPipeline], posts_folder: Path
) -> None:
    (post,) = posts_of(posts_folder, 1)
    found = build_with_heads(num_labels=2)(post, return_modalities=True)
    assert found["conflict"] is None and len(found["text"]) == len(found["image"]) == 2
    for fields in ({}, {"problem_type": "multi_label_classification"}):
        with pytest.raises(ValueError, match="has no modality heads, .*: train one with use_modality_heads"):
            build_with_heads(use_modality_heads=False, **fields)(post, return_modalities=True)


def test_what_it_saves_is_a_whole_checkpoint(
    sentiment: ImageTextSentimentPipeline, checkpoint: Path, posts_folder: Path, tmp_path: Path
) -> None:
    sentiment.save_pretrained(tmp_path / "saved")
    assert {path.name for path in checkpoint.iterdir()} == {path.name for path in (tmp_path / "saved").iterdir()}
    again = pipeline(TASK, model=str(tmp_path / "saved"), trust_remote_code=True)
    post = posts_of(posts_folder, 1)[0]
    assert again(post) == sentiment(post)
