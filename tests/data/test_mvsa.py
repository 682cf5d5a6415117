"""Reading and splitting MVSA: small folders made here, a full-size label file, and real posts where there are some."""

import json
import logging
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, ImageFile

from clipcacg.scripts.data import mvsa
from clipcacg.scripts.data.mvsa import (
    LABELS,
    MvsaDataError,
    as_dataset,
    combine_labels,
    load_mvsa,
    majority_label,
    split_mvsa,
)

HEADER = "ID\ttext,image\n"
REAL_POSTS = os.environ.get("MVSA_SINGLE_DIR")


def make_folder(folder: Path, labels: str, ids: list[str]) -> Path:
    """Write a label file, and a text and a picture of its own for each ID."""
    (folder / "data").mkdir(parents=True)
    (folder / "labelResultAll.txt").write_text(labels)
    for number, post_id in enumerate(ids):
        (folder / "data" / f"{post_id}.txt").write_text(f"post {post_id}\n")
        noise = np.random.default_rng(number).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "data" / f"{post_id}.jpg")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four posts: the third is dropped, and has no files that could be missed."""
    rows = "7\tpositive,neutral\n3\tnegative,negative\n5\tpositive,negative\n12\tneutral,neutral\n"
    return make_folder(tmp_path / "mvsa", HEADER + rows, ["7", "3", "12"])


def posts(labels: list[str], ids: list[str] | None = None, variant: str = "single") -> datasets.Dataset:
    """Posts in memory, for splits that look at neither texts nor pictures."""
    ids = ids or [str(number) for number in range(len(labels))]
    return as_dataset(
        [
            {"id": i, "text": i, "image": "", "text_label": label, "image_label": label, "label": label}
            for i, label in zip(ids, labels, strict=True)
        ],
        variant,
    )


def test_combine_labels_is_the_papers_rule():
    table = {(t, i): combine_labels(t, i) for t in LABELS for i in LABELS}
    dropped = {pair for pair, label in table.items() if label is None}
    assert dropped == {("positive", "negative"), ("negative", "positive")}
    assert table["neutral", "negative"] == table["negative", "neutral"] == table["negative", "negative"] == "negative"
    assert table["neutral", "positive"] == table["positive", "neutral"] == table["positive", "positive"] == "positive"
    assert table["neutral", "neutral"] == "neutral"
    assert [combine_labels(None, label) or combine_labels(label, None) for label in [*LABELS, None]] == [None] * 4


def test_majority_label():
    assert majority_label(["neutral"]) == majority_label(["neutral", "positive", "neutral"]) == "neutral"
    assert majority_label(["positive", "negative", "neutral"]) is None


def test_load_single(folder: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        dataset = load_mvsa(folder)
    assert list(dataset["id"]) == ["7", "3", "12"] and list(dataset["text"]) == ["post 7", "post 3", "post 12"]
    assert dataset.features["label"] == dataset.features["text_label"] == datasets.ClassLabel(names=LABELS)
    assert [dataset[column][0] for column in ("text_label", "image_label", "label")] == [2, 1, 2]
    paths = dataset.cast_column("image", datasets.Image(decode=False))["image"]
    assert paths[0] == {"bytes": None, "path": str(folder / "data" / "7.jpg")}
    assert dataset[0]["image"].size == (50, 40)
    assert "1 posts dropped: 1 positive against negative, 0 without a majority" in caplog.text


def test_load_multiple_takes_the_majority_of_each_modality(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = ["positive,neutral\tpositive,negative\tneutral,neutral", "\t".join(f"{label},neutral" for label in LABELS)]
    folder = make_folder(tmp_path / "mvsa", "".join(f"{i}\t{row}\n" for i, row in enumerate(rows)), ["0", "1"])
    with caplog.at_level(logging.INFO):
        dataset = load_mvsa(folder)
    assert [dataset[0][column] for column in ("id", "text_label", "image_label", "label")] == ["0", 2, 1, 2]
    assert len(dataset) == 1 and "1 without a majority" in caplog.text
    assert dataset.info.config_name == "multiple"


def test_full_size_multiple_without_decoding_and_within_2_gib(tmp_path: Path):
    draw = random.Random(0)
    votes = {str(2499 + n): [(draw.choice(LABELS), draw.choice(LABELS)) for _ in range(3)] for n in range(19_600)}
    rows = ["\t".join([i, *(",".join(pair) for pair in pairs)]) for i, pairs in votes.items()]
    folder = make_folder(tmp_path / "mvsa", "\n".join(rows), ["2499"])
    for post_id in list(votes)[1:]:
        (folder / "data" / f"{post_id}.txt").write_text(post_id)
        (folder / "data" / f"{post_id}.jpg").hardlink_to(folder / "data" / "2499.jpg")
    expected = Counter()
    for pairs in votes.values():
        text, image = (sorted(LABELS.index(label) - 1 for label in column) for column in zip(*pairs, strict=True))
        agreed = all(column[1] in (column[0], column[2]) for column in (text, image))  # the middle one has a twin
        if agreed and text[1] * image[1] != -1:
            expected[LABELS[1 + max(-1, min(1, text[1] + image[1]))]] += 1
    code = (
        "import json, resource, sys; from PIL import ImageFile; from clipcacg.scripts.data.mvsa import load_mvsa;"
        "ImageFile.ImageFile.load = None; labels = list(load_mvsa(sys.argv[1])['label']);"
        "print(json.dumps([[labels.count(k) for k in range(3)], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))"
    )
    command = [sys.executable, "-c", code, str(folder)]
    counts, kib = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert counts == [expected[label] for label in LABELS]
    assert kib < 2 * 1024**2


@pytest.mark.parametrize(
    "rows",
    [
        "\ufeffID\ttext,image\r\n7\tpositive,neutral\r\n3\tnegative,negative\r\n",
        "id \tText,Image\n\n 7 \t Positive , NEUTRAL \t \n   \n3\tnegative,negative",
        "7\tpositive,neutral\n3\tnegative,negative\n",
    ],
    ids=["bom and crlf", "blanks and case", "no header"],
)
def test_label_file_is_read_leniently(folder: Path, rows: str):
    (folder / "labelResultAll.txt").write_bytes(rows.encode())
    assert [(post["id"], post["label"]) for post in load_mvsa(folder)] == [("7", 2), ("3", 0)]


def test_texts_are_utf8_or_else_gb18030(folder: Path):
    for post_id, content in {
        "7": "“ok”… \n".encode("gb18030"),
        "3": b"\xef\xbb\xbf\xe2\x80\x9ca\nb \r\n",
        "12": b"",
    }.items():
        (folder / "data" / f"{post_id}.txt").write_bytes(content)
    assert list(load_mvsa(folder)["text"]) == ["“ok”… ", "“a\nb ", ""]


def add_row(row: str):
    """A fault in the label file."""
    return lambda folder: (folder / "labelResultAll.txt").open("a").write(row)


def set_file(name: str, content: bytes):
    """A fault in a text or picture."""
    return lambda folder: (folder / "data" / name).write_bytes(content)


def cut(folder: Path, image_format: str) -> None:
    """Cut a picture short, behind its header."""
    picture = folder / "data" / "3.jpg"
    Image.open(picture).save(picture, format=image_format)
    picture.write_bytes(picture.read_bytes()[:-400])


BOMB = b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x00;"
FAULTS = {
    "unknown label": (add_row("9\thappy,neutral\n"), "labelResultAll.txt:6: bad label row: post 9", "'happy'"),
    "one label": (add_row("9\tneutral\n"), "labelResultAll.txt:6: bad label row: post 9", "1 text,image column"),
    "too many columns": (add_row("9\tneutral,neutral\tneutral,neutral\n"), ":6: bad label row: post 9", "1 text"),
    "up": (add_row("../data/7\tneutral,neutral\n"), ":6: bad ID: '../data/7'", "cannot be the name"),
    "dots": (add_row("..\tneutral,neutral\n"), ":6: bad ID: '..'", "cannot be the name"),
    "backslash": (add_row("a\\7\tneutral,neutral\n"), r":6: bad ID: 'a\\7'", "cannot be the name"),
    "no id": (add_row("\tneutral,neutral\n"), ":6: bad ID: ''", "cannot be the name"),
    "duplicate": (add_row("7\tneutral,neutral\n"), ":6: duplicate ID: 7 is already on line 2", "1 x duplicate ID"),
    "no picture": (lambda f: (f / "data/3.jpg").unlink(), ":3: missing picture: data/3.jpg", "1 x missing picture"),
    "no text": (lambda f: (f / "data/3.txt").unlink(), ":3: missing text: data/3.txt", "1 x missing text"),
    "undecodable": (set_file("3.txt", b"\xff\xff"), ":3: undecodable text: data/3.txt", "neither UTF-8 nor GB18030"),
    "empty picture": (set_file("3.jpg", b""), ":3: broken picture: data/3.jpg", "UnidentifiedImageError"),
    "page": (set_file("3.jpg", b"<html>404</html>"), ":3: broken picture: data/3.jpg", "UnidentifiedImageError"),
    "cut JPEG": (lambda f: cut(f, "JPEG"), ":3: broken picture: data/3.jpg", "truncated"),
    "cut PNG": (lambda f: cut(f, "PNG"), ":3: broken picture: data/3.jpg", "truncated"),
    "bomb": (set_file("3.jpg", BOMB), ":3: broken picture: data/3.jpg", "DecompressionBomb"),
    "bomb warning": (set_file("3.jpg", BOMB.replace(b"\xff\xff\xff\xff", b"\x00\x28\x00\x28")), ":3:", "BombWarning"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_raised_or_skipped(name: str, folder: Path, caplog: pytest.LogCaptureFixture):
    damage, place, reason = FAULTS[name]
    damage(folder)
    with pytest.raises(MvsaDataError) as error:
        load_mvsa(folder)
    assert place in str(error.value) and reason in str(error.value) and str(folder) in str(error.value)
    dataset = load_mvsa(folder, on_error="skip")
    assert list(dataset["id"]) == (["7", "3", "12"] if ":6:" in place else ["7", "12"])
    assert dataset[0]["label"] == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"] and place in caplog.text


def test_report_counts_every_kind_and_lists_the_first_ten(tmp_path: Path):
    ids = [str(number) for number in range(20)]
    folder = make_folder(tmp_path / "mvsa", "".join(f"{i}\tneutral,neutral\n" for i in ids) + "20\tbad\n", [])
    for post_id in ids[:8]:
        (folder / "data" / f"{post_id}.txt").write_text("text")
    with pytest.raises(MvsaDataError, match=": 33 .*20 x missing picture, 12 x missing text, 1 x bad") as error:
        load_mvsa(folder)
    assert str(error.value).count("labelResultAll.txt:") == 10
    with pytest.raises(MvsaDataError, match="no usable post"):
        load_mvsa(folder, on_error="skip")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP"])
def test_complete_pictures_pass_and_are_not_decoded(folder: Path, image_format: str, monkeypatch: pytest.MonkeyPatch):
    picture, decoded = folder / "data" / "3.jpg", []
    Image.open(picture).save(picture, format=image_format)
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image.filename) or load(image))
    for junk in (b"", b"\0\0\r\n"):
        picture.write_bytes(picture.read_bytes() + junk)
        assert len(load_mvsa(folder)) == 3
        assert bool(decoded) == (image_format == "BMP")  # it has no end mark
    picture.write_bytes(picture.read_bytes() + b"more junk")
    assert len(load_mvsa(folder)) == 3 and decoded[-1] == str(picture)


def test_folder_is_checked_and_never_written(folder: Path):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    dataset = load_mvsa(folder, variant="single").filter(lambda post: post["label"] != 1).map(lambda post: {"new": 1})
    assert dataset.select([1]).info.config_name == "single" and dataset.info.dataset_name == "mvsa"
    assert len(split_mvsa(dataset, group_duplicates=True)["train"]) == 2
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for wrong in ({"variant": "multiple"}, {"variant": "triple"}, {"on_error": "ignore"}):
        with pytest.raises(ValueError, match="multiple|triple|ignore"):
            load_mvsa(folder, **wrong)
    for content in ("", HEADER, "7\tneutral,neutral\tneutral,neutral\n"):
        (folder / "labelResultAll.txt").write_text(content)
        with pytest.raises(MvsaDataError, match="no usable post"):
            load_mvsa(folder)
    no_data = make_folder(folder.parent / "no_data", "7\tneutral,neutral\n", [])
    (no_data / "data").rmdir()
    for missing in (folder / "data", folder / "nowhere", no_data):
        with pytest.raises(FileNotFoundError, match=f"{missing} is not an MVSA folder: it should hold labelResultAll"):
            load_mvsa(missing)


def test_random_split_is_stratified_and_seeded():
    dataset = posts(["positive"] * 600 + ["neutral"] * 100 + ["negative"] * 303)
    parts = split_mvsa(dataset)
    assert list(parts) == ["train", "validation", "test"]
    assert sorted(i for part in parts.values() for i in part["id"]) == sorted(dataset["id"])
    for part, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert abs(len(parts[part]) - 1003 * share) < 2
        counts = Counter(parts[part]["label"])
        assert all(abs(counts[label] - n * share) < 2 for label, n in ((0, 303), (1, 100), (2, 600)))
    assert list(split_mvsa(dataset)["test"]["id"]) == list(parts["test"]["id"])
    assert set(split_mvsa(dataset, seed=1)["test"]["id"]) != set(parts["test"]["id"])
    assert list(map(int, parts["test"]["id"])) == sorted(map(int, parts["test"]["id"]))
    assert list(split_mvsa(posts(["positive", "neutral"]))) == ["train"]


@pytest.mark.parametrize("variant, sizes", [("single", (3611, 450, 450)), ("multiple", (13_624, 1700, 1700))])
def test_published_splits(variant: str, sizes: tuple[int, int, int], caplog: pytest.LogCaptureFixture):
    folds = json.loads((mvsa.SPLITS_FOLDER / f"mvsa_{variant}_cheema.json").read_text())["folds"]
    ids = [str(i) for i in sorted(i for fold in folds for i in fold["test"])]
    dataset = posts(["neutral"] * len(ids), ids, variant)
    assert tuple(map(len, split_mvsa(dataset, "clmlf").values())) == sizes
    for k in (1, 10):
        parts = split_mvsa(dataset, f"cheema:{k}")
        assert [[int(i) for i in parts[part]["id"]] for part in ("validation", "test")] == [*folds[k - 1].values()]
        assert set(parts["train"]["id"]) == set(ids) - set(parts["validation"]["id"]) - set(parts["test"]["id"])
    assert not caplog.records
    for wrong in ("cheema", "cheema:0", "cheema:11", "published", "nowhere.json"):
        with pytest.raises(MvsaDataError, match="unknown split .* choose random, clmlf, cheema:1 to cheema:10, or"):
            split_mvsa(dataset, wrong)
    with pytest.raises(MvsaDataError, match="not come from load_mvsa"):
        split_mvsa(posts(["neutral"], variant="default"), "clmlf")


def test_split_from_a_json_file(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    dataset, path = posts(["neutral"] * 6), tmp_path / "split.json"
    path.write_text('{"train": [3, "0", 7], "validation": ["2"], "test": [8, 9]}')
    with caplog.at_level(logging.INFO):
        parts = split_mvsa(dataset, path)
    assert {part: list(parts[part]["id"]) for part in parts} == {"train": ["0", "3"], "validation": ["2"]}
    absent, unused, empty = (record.getMessage() for record in caplog.records)
    assert "3 posts" in absent and "train 1 of 3, validation 0 of 1, test 2 of 2" in absent
    assert "3 posts are in no part" in unused and "the test split" in empty
    wrong = {'{"train": [1], "test": ["1"]}': "1 IDs in two splits, 1 for one", '{"dev": [1]}': r"\['dev'\]"}
    wrong |= {"[1]": "not a JSON file of the form", '{"train": "12"}': "not a list", '{"test": [77]}': "none of the 6"}
    for content, message in (wrong | {"train: 1": "not a JSON file"}).items():
        path.write_text(content)
        with pytest.raises(MvsaDataError, match=message):
            split_mvsa(dataset, path)


def test_duplicates_stay_in_one_split(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    ids = [str(number) for number in range(200)]
    rows = "".join(f"{i}\t{LABELS[int(i) % 3]},neutral\n" for i in ids)
    data = make_folder(tmp_path / "mvsa", rows, ids) / "data"
    (data / "1.txt").write_text("RT @one:  The SAME https://t.co/1\n")  # 3 has the text of 1 and the picture of 2
    (data / "3.txt").write_text("rt @other: the same http://t.co/2 @third")
    (data / "3.jpg").write_bytes((data / "2.jpg").read_bytes())
    for post_id in ids[10:50]:
        (data / f"{post_id}.txt").write_text("@nobody https://t.co/3")  # nothing left: no reason to group them
    dataset = load_mvsa(data.parent)
    assert sorted(Counter(mvsa.duplicate_groups(dataset)).values()) == [1] * 197 + [3]
    for seed in range(5):
        assert [*map(len, mvsa.random_split([0] * 200, [0] * 151 + [*range(1, 50)], seed).values())] == [160, 20, 20]
        parts = split_mvsa(dataset, seed=seed, group_duplicates=True)
        assert max(abs(len(parts[k]) - n) for k, n in (("train", 160), ("validation", 20), ("test", 20))) < 2
        assert sum(bool({"1", "2", "3"} & set(part["id"])) for part in parts.values()) == 1
    (tmp_path / "split.json").write_text('{"train": [1, 4, 5], "validation": [2, 6], "test": [3, 7]}')
    parts = split_mvsa(dataset, tmp_path / "split.json", group_duplicates=True)
    assert [list(part["id"]) for part in parts.values()] == [["4", "5"], ["6"], ["3", "7"]]
    assert "1 training and 1 validation posts removed" in caplog.text


@pytest.mark.skipif(not REAL_POSTS, reason="MVSA_SINGLE_DIR is not set")
def test_real_posts(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        dataset = load_mvsa(REAL_POSTS)
    assert len(dataset) == 4061 and Counter(dataset["label"]) == {2: 2415, 1: 423, 0: 1223}
    assert "120 posts dropped" in caplog.text
    text = dataset["text"][list(dataset["id"]).index("656")]
    assert text.startswith("RT @KristianLH_: “@rickygervais")
    parts = split_mvsa(dataset, "clmlf")
    assert {part: len(parts[part]) for part in parts} == {"train": 3611, "validation": 450}
    assert "450 posts of the split clmlf are not in the data" in caplog.text
