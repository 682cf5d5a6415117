"""Reading MVSA: the label rule, small folders, a full-size label file, and real posts if there are some."""

import json
import logging
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from mvsa_folder import HEADER, make_folder
from PIL import Image, ImageFile

from clipcacg.scripts.data import load_mvsa, split_mvsa
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.mvsa import LABELS, combine_labels, majority_label

REAL_POSTS = os.environ.get("MVSA_SINGLE_DIR")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four posts. The third is dropped by the label rule and has no files."""
    rows = "7\tpositive,neutral\n3\tnegative,negative\n5\tpositive,negative\n12\tneutral,neutral\n"
    return make_folder(tmp_path / "mvsa", HEADER + rows, ["7", "3", "12"])


def test_combine_labels_is_the_papers_rule() -> None:
    table = {(t, i): combine_labels(t, i) for t in LABELS for i in LABELS}
    dropped = {pair for pair, label in table.items() if label is None}
    assert dropped == {("positive", "negative"), ("negative", "positive")}
    assert table["neutral", "negative"] == table["negative", "neutral"] == table["negative", "negative"] == "negative"
    assert table["neutral", "positive"] == table["positive", "neutral"] == table["positive", "positive"] == "positive"
    assert table["neutral", "neutral"] == "neutral"
    assert [combine_labels(None, label) or combine_labels(label, None) for label in [*LABELS, None]] == [None] * 4


def test_majority_label() -> None:
    assert majority_label(["neutral"]) == majority_label(["neutral", "positive", "neutral"]) == "neutral"
    assert majority_label(["positive", "negative", "neutral"]) is None


def test_load_single(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        dataset = load_mvsa(folder)
    assert list(dataset["id"]) == ["7", "3", "12"] and list(dataset["text"]) == ["post 7", "post 3", "post 12"]
    assert dataset.features["label"] == dataset.features["text_label"] == datasets.ClassLabel(names=LABELS)
    assert [dataset[column][0] for column in ("text_label", "image_label", "label")] == [2, 1, 2]
    paths = dataset.cast_column("image", datasets.Image(decode=False))["image"]
    assert paths[0] == {"bytes": None, "path": str(folder / "data" / "7.jpg")}
    assert dataset[0]["image"].size == (50, 40)
    assert "1 posts dropped: 1 positive against negative, 0 without a majority" in caplog.text


def test_load_multiple_takes_the_majority_of_each_modality(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = ["positive,neutral\tpositive,negative\tneutral,neutral", "\t".join(f"{label},neutral" for label in LABELS)]
    folder = make_folder(tmp_path / "mvsa", "".join(f"{i}\t{row}\n" for i, row in enumerate(rows)), ["0", "1"])
    with caplog.at_level(logging.INFO):
        dataset = load_mvsa(folder)
    assert [dataset[0][column] for column in ("id", "text_label", "image_label", "label")] == ["0", 2, 1, 2]
    assert len(dataset) == 1 and "1 without a majority" in caplog.text
    assert dataset.info.config_name == "multiple"


@pytest.mark.slow
def test_full_size_multiple_without_decoding_and_within_2_gib(tmp_path: Path) -> None:
    draw = random.Random(0)
    votes = {str(2499 + n): [(draw.choice(LABELS), draw.choice(LABELS)) for _ in range(3)] for n in range(19_600)}
    rows = ["\t".join([i, *(",".join(pair) for pair in pairs)]) for i, pairs in votes.items()]
    folder = make_folder(tmp_path / "mvsa", "\n".join(rows), ["2499"])
    for post_id in list(votes)[1:]:
        (folder / "data" / f"{post_id}.txt").write_text(post_id)
        (folder / "data" / f"{post_id}.jpg").hardlink_to(folder / "data" / "2499.jpg")
    expected: Counter[str] = Counter()
    for pairs in votes.values():
        text, image = (sorted(LABELS.index(label) - 1 for label in column) for column in zip(*pairs, strict=True))
        agreed = all(column[1] in (column[0], column[2]) for column in (text, image))  # the median has a twin
        if agreed and text[1] * image[1] != -1:
            expected[LABELS[1 + max(-1, min(1, text[1] + image[1]))]] += 1
    code = (
        "import json, re, sys; from PIL import ImageFile; from clipcacg.scripts.data import load_mvsa;"
        "ImageFile.ImageFile.load = None; labels = list(load_mvsa(sys.argv[1])['label']);"
        # The peak of this program alone: ru_maxrss starts at the size of the process that forked it.
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1];"
        "print(json.dumps([[labels.count(k) for k in range(3)], int(peak)]))"
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
    ids=["BOM and CRLF", "blanks and case", "no header"],
)
def test_label_file_is_read_leniently(folder: Path, rows: str) -> None:
    (folder / "labelResultAll.txt").write_bytes(rows.encode())
    assert [(post["id"], post["label"]) for post in load_mvsa(folder)] == [("7", 2), ("3", 0)]


def test_texts_are_utf8_or_else_gb18030(folder: Path) -> None:
    texts = {"7": "“ok”… \n".encode("gb18030"), "3": b"\xef\xbb\xbf\xe2\x80\x9ca\nb \r\n", "12": b""}
    for post_id, content in texts.items():
        (folder / "data" / f"{post_id}.txt").write_bytes(content)
    assert list(load_mvsa(folder)["text"]) == ["“ok”… ", "“a\nb ", ""]


def add_row(row: str) -> Callable[[Path], object]:
    """A fault in the label file."""
    return lambda folder: (folder / "labelResultAll.txt").open("a").write(row)


BOMB = b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x00;"
# test_data_faults.py damages texts and images in every other way.
FAULTS = {
    "unknown label": (add_row("9\thappy,neutral\n"), "labelResultAll.txt:6: bad label row: post 9", "'happy'"),
    "one label": (add_row("9\tneutral\n"), "labelResultAll.txt:6: bad label row: post 9", "1 text,image column"),
    "too many columns": (add_row("9\tneutral,neutral\tneutral,neutral\n"), ":6: bad label row: post 9", "1 text"),
    "bad ID": (add_row("a\\7\tneutral,neutral\n"), r":6: bad ID: 'a\\7'", "cannot be the name"),
    "duplicate": (add_row("7\tneutral,neutral\n"), ":6: duplicate ID: 7 is already on line 2", "1 x duplicate ID"),
    "no text": (lambda folder: (folder / "data/3.txt").unlink(), ":3: missing text: data/3.txt", "1 x missing text"),
    "bomb": (lambda folder: (folder / "data/3.jpg").write_bytes(BOMB), ":3: broken image: data/3.jpg", "Bomb"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_raised_or_skipped(name: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage, place, reason = FAULTS[name]
    damage(folder)
    with pytest.raises(InputError) as error:
        load_mvsa(folder)
    assert place in str(error.value) and reason in str(error.value) and str(folder) in str(error.value)
    dataset = load_mvsa(folder, on_error="skip")
    assert list(dataset["id"]) == (["7", "3", "12"] if ":6:" in place else ["7", "12"])
    assert dataset[0]["label"] == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"] and place in caplog.text


def test_report_counts_every_kind_and_lists_the_first_ten(tmp_path: Path) -> None:
    ids = [str(number) for number in range(20)]
    folder = make_folder(tmp_path / "mvsa", "".join(f"{i}\tneutral,neutral\n" for i in ids) + "20\tbad\n", [])
    for post_id in ids[:8]:
        (folder / "data" / f"{post_id}.txt").write_text("text")
    with pytest.raises(InputError, match=": 33 .*20 x missing image, 12 x missing text, 1 x bad") as error:
        load_mvsa(folder)
    assert str(error.value).count("labelResultAll.txt:") == 10
    with pytest.raises(InputError, match="no usable post"):
        load_mvsa(folder, on_error="skip")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP"])
def test_complete_images_are_not_decoded(folder: Path, image_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, decoded = folder / "data" / "3.jpg", []
    Image.open(path).save(path, format=image_format)
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image.format) or load(image))
    for junk in (b"", b"\0\0\r\n"):
        path.write_bytes(path.read_bytes() + junk)
        assert len(load_mvsa(folder)) == 3
        assert bool(decoded) == (image_format == "BMP")  # it has no end marker
    before = len(decoded)
    path.write_bytes(path.read_bytes() + b"more junk")
    assert len(load_mvsa(folder)) == 3 and len(decoded) > before


def test_folder_is_checked_and_never_written(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    dataset = load_mvsa(folder, variant="single").filter(lambda post: post["label"] != 1).map(lambda post: {"new": 1})
    assert dataset.select([1]).info.config_name == "single" and dataset.info.dataset_name == "mvsa"
    assert len(split_mvsa(dataset, group_duplicates=True)["train"]) == 2
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for wrong in ({"variant": "multiple"}, {"variant": "triple"}, {"on_error": "ignore"}):
        with pytest.raises(InputError, match="multiple|triple|ignore"):
            load_mvsa(folder, **wrong)
    for content in ("", HEADER, "7\tneutral,neutral\tneutral,neutral\n"):
        (folder / "labelResultAll.txt").write_text(content)
        with pytest.raises(InputError, match="no usable post"):
            load_mvsa(folder)
    no_data = make_folder(folder.parent / "no_data", "7\tneutral,neutral\n", [])
    (no_data / "data").rmdir()
    for missing in (folder / "data", folder / "nowhere", no_data):
        with pytest.raises(InputError, match=f"{missing} is not an MVSA folder: it should hold labelResultAll"):
            load_mvsa(missing)


@pytest.mark.skipif(not REAL_POSTS, reason="MVSA_SINGLE_DIR is not set")
def test_real_posts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        dataset = load_mvsa(REAL_POSTS)
    assert len(dataset) == 4061 and Counter(dataset["label"]) == {2: 2415, 1: 423, 0: 1223}
    assert "120 posts dropped" in caplog.text
    text = dataset["text"][list(dataset["id"]).index("656")]
    assert text.startswith("RT @KristianLH_: “@rickygervais")
    parts = split_mvsa(dataset, "clmlf")
    assert {part: len(parts[part]) for part in parts} == {"train": 3611, "validation": 450}
    assert "450 posts of the split clmlf are not in the data" in caplog.text
