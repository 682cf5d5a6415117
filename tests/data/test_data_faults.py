"""Faulty data: every fault is reported with its file or counted, and reading never changes a file."""

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mvsa_folder import JPEG, PIXELS, PNG, RGB, encoded, write_labels
from PIL import Image

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.processing_clipcacg import ClipCaCgProcessor
from clipcacg.scripts import evaluate_checkpoint, predict, train
from clipcacg.scripts.data import checks, load_mvsa, split_mvsa
from clipcacg.scripts.data.collator import PostCollator
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.loading import ColumnArguments, load_to_predict
from clipcacg.scripts.reporting import predictions

# The same examples on every machine, however slow it is.
FIXED = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MANY, SOME = settings(FIXED, max_examples=60), settings(FIXED, max_examples=30)


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything in a folder, with size, time of the last change and inode."""
    paths = [folder, *folder.rglob("*")]
    return {str(path): (at.st_size, at.st_mtime_ns, at.st_ino) for path in paths if (at := path.lstat())}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three posts in the layout of MVSA."""
    (tmp_path / "mvsa/data").mkdir(parents=True)
    write_labels(tmp_path / "mvsa", ["7", "3", "12"])
    for post_id in ("7", "3", "12"):
        (tmp_path / f"mvsa/data/{post_id}.txt").write_text(f"post {post_id}")
        (tmp_path / f"mvsa/data/{post_id}.jpg").write_bytes(JPEG)
    return tmp_path / "mvsa"


@pytest.fixture(scope="module")
def collator(checkpoint: Path) -> PostCollator:
    return PostCollator(ClipCaCgProcessor.from_pretrained(checkpoint), ClipCaCgConfig.from_pretrained(checkpoint))


def read(folder: Path) -> tuple[list[str], str]:
    """IDs of the posts that "skip" keeps, and the report that "raise" gives about the others."""
    before, report = listing(folder), ""
    try:
        load_mvsa(folder)
    except InputError as error:
        report = str(error)
        assert str(folder) in report
    try:
        kept = list(load_mvsa(folder, on_error="skip")["id"])
    except InputError as error:
        assert "no usable post" in str(error)
        kept = []
    assert listing(folder) == before
    return kept, report


def predicted(folder: Path, collator: PostCollator) -> list[dict]:
    """The posts of a folder as `predict.py` reads them: each is ready for the model or has an error."""
    before = listing(folder)
    posts = load_to_predict(ColumnArguments(on_error="skip"), str(folder), "test", collator.config)
    lines, inputs = predictions.prepare(list(posts), collator)
    assert (0 if inputs is None else len(inputs["input_ids"])) == sum(line["error"] is None for line in lines)
    assert listing(folder) == before
    return [{"id": line["id"]} if line["error"] is None else line for line in lines]


LABEL_PIECES = [
    b"7", b"3", b"../x", b"a b", b"ID\ttext,image", b"positive,neutral", b"neutral,neutral", b"happy", b"\t", b"\t",
    b"\n", b"\n", b"\r", b"\r\n", b"\0", b"\xef\xbb\xbf", b"\xff", "\u2028\x85\x0b".encode(), b",", b" ", b"9" * 300,
]  # fmt: skip


@MANY
@given(st.one_of(st.binary(max_size=80), st.lists(st.sampled_from(LABEL_PIECES), max_size=24).map(b"".join)))
def test_every_row_of_a_label_file_is_kept_or_reported(folder: Path, content: bytes) -> None:
    (folder / "labelResultAll.txt").write_bytes(content)
    kept, report = read(folder)
    text = content.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    rows = [number for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if rows and text.split("\n")[rows[0] - 1].split("\t")[0].lower().split()[:1] == ["id"]:
        del rows[0]
    if report.startswith("no usable post"):
        assert not kept
        return
    reported = set(map(int, re.findall(r"labelResultAll.txt:(\d+): ", report)))
    # No label here is positive against negative, so no post is dropped. The report lists ten problems.
    assert reported <= set(rows) and len(kept) + min(10, len(rows) - len(kept)) == len(kept) + len(reported)
    assert set(kept) <= {"7", "3"}


@pytest.mark.parametrize("post_id", ["../x", "../../x", "ROOT/x", "../data/7", "/etc/passwd", ".", "..", "~", "x/"])
def test_no_id_leaves_the_folder(folder: Path, post_id: str) -> None:
    for place in (folder, folder.parent):
        (place / "x.txt").write_text("secret")
        (place / "x.jpg").write_bytes(JPEG)
    write_labels(folder, ["3", post_id.replace("ROOT", str(folder.parent))])
    assert read(folder)[0] == ["3"]


def is_text(content: bytes) -> bool:
    for encoding in ("utf-8", "gb18030"):
        try:
            content.decode(encoding)
            return True
        except UnicodeDecodeError:
            pass
    return False


@MANY
@given(st.one_of(st.binary(max_size=60), st.text(max_size=30).map(lambda text: text.encode("utf-16"))))
def test_a_text_of_any_bytes_is_read_or_named(folder: Path, collator: PostCollator, content: bytes) -> None:
    (folder / "data/3.txt").write_bytes(content)
    kept, report = read(folder)
    assert ("3" in kept) == is_text(content) and len(kept) == 2 + is_text(content)
    assert ("undecodable text: data/3.txt" in report) == (not is_text(content))
    rows = {row["id"]: row for row in predicted(folder, collator)}
    assert ("error" in rows["3"]) == bool(report) and "data/3.txt" in rows["3"].get("error", "data/3.txt")


@st.composite
def damaged_images(draw: Callable) -> bytes:
    """An image file with some bytes changed, and perhaps truncated."""
    forms = ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "ICO", "TGA"]
    content = bytearray(encoded(RGB, draw(st.sampled_from(forms))))
    for _ in range(draw(st.integers(0, 8))):
        # Half of the changes are in the header, where they do most harm.
        at = draw(st.one_of(st.integers(0, 60), st.integers(0, len(content) - 1)))
        content[at] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))]) if draw(st.booleans()) else bytes(content)


@settings(FIXED, max_examples=80)
@given(st.one_of(damaged_images(), damaged_images(), st.binary(max_size=60)))
def test_an_image_of_any_bytes_is_read_or_named(folder: Path, collator: PostCollator, content: bytes) -> None:
    (folder / "data/3.jpg").write_bytes(content)
    kept, report = read(folder)
    assert ("3" in kept) == (not report) and len(kept) == 2 + (not report)
    assert not report or "broken image: data/3.jpg" in report
    rows = {row["id"]: row for row in predicted(folder, collator)}
    assert "error" not in rows["7"] and "3.jpg" in rows["3"].get("error", "3.jpg")
    # An image that the loader accepts without decoding it may still be broken; then the collator names the post.
    post = {"id": "3", "text": "", "image": str(folder / "data/3.jpg")}
    try:
        collator([{**post, "id": "7", "image": str(folder / "data/7.jpg")}, post])
    except InputError as error:
        assert str(error).startswith("post 3: ") and "data/3.jpg' cannot be read" in str(error)
        assert "\n" not in str(error) and "error" in rows["3"]


def gif(*frames: Image.Image) -> bytes:
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(RGB, "JPEG", exif=exif)


RED, BLUE = (Image.new("RGB", (70, 40), colour) for colour in ("red", "blue"))
GOOD = {
    "PNG called jpg": PNG,
    "WebP called jpg": encoded(RGB, "WEBP"),
    "BMP called jpg": encoded(RGB, "BMP"),
    "CMYK": encoded(RGB.convert("CMYK"), "JPEG"),
    "sixteen bits": encoded(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 256), "PNG"),
    "one bit": encoded(RGB.convert("1"), "PNG"),
    "palette": encoded(RGB.quantize(16), "PNG", transparency=bytes([0, 128] + [255] * 14)),
    "animated GIF": gif(RED, BLUE),
    "animated PNG": encoded(RED, "PNG", save_all=True, append_images=[BLUE]),
    "turned by EXIF": turned(),
    "progressive": encoded(RGB, "JPEG", progressive=True),
    "one pixel": encoded(Image.new("RGB", (1, 1)), "JPEG"),
    "sliver": encoded(Image.new("RGB", (30_000, 2), "red"), "PNG"),
    "upright sliver": encoded(Image.new("L", (2, 30_000), 9), "JPEG"),
    "padded": JPEG + b"\0" * 40,
}
BAD = {
    "empty": b"",
    "one byte": b"\xff",
    "NUL bytes": b"\0" * 4000,
    "page": b"<html>404</html>",
    "text": "no image".encode("utf-16"),
    "JPEG header": JPEG[:300],
    "half a JPEG": JPEG[: len(JPEG) // 2],
    "half a PNG": PNG[: len(PNG) // 2],
    "half a WebP": encoded(RGB, "WEBP")[:200],
    "GIF without a frame": gif(RED)[:13] + b";",
    "bomb": b"P6 40000 40000 255\n",
    "PNG bomb": PNG[:16] + b"\0\1\0\0\0\1\0\0" + PNG[24:],
    "no height": b"P6 40 0 255\n",
    "negative BMP": encoded(RGB, "BMP")[:18] + b"\xff\xff\xff\xff" + encoded(RGB, "BMP")[22:],
}


def test_images_of_every_kind_in_a_folder(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    names = {f"p{number}": kind for number, kind in enumerate([*GOOD, *BAD])}
    for post_id, kind in names.items():
        (folder / f"data/{post_id}.txt").write_text(kind)
        (folder / f"data/{post_id}.jpg").write_bytes((GOOD | BAD)[kind])
    write_labels(folder, list(names))
    kept, report = read(folder)
    assert [names[post_id] for post_id in kept] == list(GOOD)
    assert f": {len(BAD)} ({len(BAD)} x broken image)" in report
    before = listing(folder)
    with pytest.raises(SystemExit, match=f"{len(BAD)} of {len(names) + 3} posts could not be read"):
        predict.main(
            [str(checkpoint), "--input", str(folder), "--output", str(tmp_path / "out"), "--num_workers", "0"]
        )
    assert listing(folder) == before
    lines = {line["id"]: line for line in map(json.loads, (tmp_path / "out").read_text().splitlines())}
    assert {names.get(post_id, post_id) for post_id, line in lines.items() if "label" in line} == {
        "7", "3", "12", *GOOD
    }  # fmt: skip
    assert all(f"{post_id}.jpg" in lines[post_id]["error"] for post_id, kind in names.items() if kind in BAD)


@pytest.mark.parametrize("size", [(30_000, 2), (2, 30_000)])
def test_a_sliver_costs_no_more_than_other_images(
    collator: PostCollator, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resized by its short edge, 30,000 x 2 pixels would become 3,360,000 x 224, two gigabytes."""
    colours = np.random.default_rng(1).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    part, seen = type(collator.processor.image_processor), []
    call = part.__call__
    monkeypatch.setattr(
        part, "__call__", lambda self, arrays, **k: seen.append(arrays[0].shape) or call(self, arrays, **k)
    )
    whole = collator.processor(images=Image.fromarray(colours), return_tensors="pt")
    long, short = max(seen[0][1:]), min(seen[0][1:])
    assert short == 2 and long <= 200
    middle = [slice(edge // 2 - 100, edge // 2 + 100) if edge > 2 else slice(None) for edge in size[::-1]]
    expected = collator.processor(images=Image.fromarray(colours[tuple(middle)]), return_tensors="pt")
    assert all((whole[name] == expected[name]).all() for name in whole)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


# Looks like a regular file, but not even root can read its first byte.
UNREADABLE = "/proc/self/mem"
NOT_FILES = {
    "dangling link": (link_to("nowhere"), "missing"),
    "link to itself": (lambda path: path.symlink_to(path), "missing"),
    "link to a folder": (link_to("."), "missing"),
    "folder": (Path.mkdir, "missing"),
    "pipe": (os.mkfifo, "missing"),  # reading it would never end
    "device": (link_to("/dev/zero"), "missing"),
    "unreadable": (link_to(UNREADABLE), "unreadable"),
}


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("suffix", ["txt", "jpg"])
def test_an_unreadable_file_is_named(folder: Path, collator: PostCollator, kind: str, suffix: str) -> None:
    make, fault = NOT_FILES[kind]
    if kind == "unreadable" and not os.path.isfile(UNREADABLE):
        pytest.skip(f"there is no {UNREADABLE}")
    (folder / f"data/3.{suffix}").unlink()
    make(folder / f"data/3.{suffix}")
    kept, report = read(folder)
    assert kept == ["7", "12"] and f":3: {fault} {'text' if suffix == 'txt' else 'image'}: data/3.{suffix}" in report
    rows = {row["id"]: row for row in predicted(folder, collator)}
    assert f"3.{suffix}" in rows["3"]["error"] and "error" not in rows["7"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("suffix", ["txt", "jpg"])
def test_a_forbidden_file_is_named(folder: Path, suffix: str) -> None:
    (folder / f"data/3.{suffix}").chmod(0)
    kept, report = read(folder)
    assert kept == ["7", "12"] and f"data/3.{suffix}" in report and "Permission denied" in report


def test_links_to_good_files_are_followed(folder: Path, tmp_path: Path) -> None:
    for suffix in ("txt", "jpg"):
        (folder / f"data/3.{suffix}").rename(tmp_path / f"elsewhere.{suffix}")
        (folder / f"data/3.{suffix}").symlink_to(tmp_path / f"elsewhere.{suffix}")
    (tmp_path / "link").symlink_to(folder)
    assert read(folder) == read(tmp_path / "link") == (["7", "3", "12"], "")


def test_an_id_too_long_for_a_file_name_is_one_fault(folder: Path) -> None:
    write_labels(folder, ["7", "9" * 300, "3"])
    kept, report = read(folder)
    assert kept == ["7", "3"] and ":3: unreadable text: data/999" in report and "File name too long" in report


@pytest.mark.parametrize("kind", ["folder", "dangling link", "pipe"])
def test_a_label_file_that_is_no_file_is_reported(folder: Path, kind: str) -> None:
    (folder / "labelResultAll.txt").unlink()
    NOT_FILES[kind][0](folder / "labelResultAll.txt")
    with pytest.raises(InputError, match="is not an MVSA folder: it should hold labelResultAll.txt"):
        load_mvsa(folder, on_error="skip")


def test_rows_of_every_fault_are_counted(folder: Path) -> None:
    rows = [b"\xef\xbb\xbfID\ttext,image", b"7\tpositive,neutral\r", b"ID\ttext,image", b"3\tpositive,neutral\r12"]
    rows += [b"\tpositive,neutral", b"7", b"7\tpositive", b"a b\tpositive,neutral", b"\0\tpositive,neutral", b"\0" * 9]
    (folder / "labelResultAll.txt").write_bytes(b"\n".join(rows))
    kept, report = read(folder)
    assert kept == ["7", "3"]
    lines = [int(line) for line in re.findall(r"labelResultAll.txt:(\d+): ", report)]
    assert lines == [3, 5, 6, 7, 8, 9, 10, 11] and ": 8 (" in report


TABLE_PIECES = [
    b"id", b"text", b"image", b",", b",", b'"', b"\n", b"\r\n", b"\0", b"\xff", b"\xef\xbb\xbf", b"7.jpg", b"../x",
    b"{", b'{"id": 1, "text": "a", "image": "7.jpg"}\n', b'{"text": "\\ud800", "image": "7.jpg"}\n', b"NaN",
    b"[" * 60_000, b"9" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@SOME
@given(st.one_of(st.binary(max_size=60), st.lists(st.sampled_from(TABLE_PIECES), max_size=16).map(b"".join)))
def test_a_table_of_any_bytes_gives_posts_or_a_sentence(
    folder: Path, collator: PostCollator, suffix: str, content: bytes
) -> None:
    head = b"id,text,image\n" if suffix == "csv" else b'{"id": "x", "text": "y", "image": "7.jpg"}\n'
    table = folder / f"data/posts.{suffix}"
    table.write_bytes(head + content)
    before = listing(folder)
    try:
        posts = load_to_predict(ColumnArguments(on_error="skip"), str(table), "test", collator.config)
    except InputError as error:
        assert f"posts.{suffix} cannot be read" in str(error) or "has no column" in str(error)
    else:
        lines, _ = predictions.prepare(list(posts), collator)
        assert len(lines) == len(posts) and all(len(line["error"] or "") < 1000 for line in lines)
    assert listing(folder) == before


def test_an_unclosed_quote_is_reported(folder: Path, collator: PostCollator) -> None:
    """It would swallow the rows below it, which a model that reads only texts would not notice."""
    (folder / "posts.csv").write_text('id,text,image\n1,fine,7.jpg\n2,"so good\n3,so bad\n4,lost\n')
    posts = load_to_predict(ColumnArguments(on_error="skip"), str(folder / "posts.csv"), "test", collator.config)
    assert posts["text"][:] == ["fine", "", "so bad", "lost"]
    assert [error and "line 3: unexpected end of data" in error for error in posts["error"]] == [
        None,
        True,
        None,
        None,
    ]
    with pytest.raises(InputError, match="posts.csv, line 3: unexpected end of data"):
        load_to_predict(ColumnArguments(), str(folder / "posts.csv"), "test", collator.config)


def test_half_a_character_is_named(collator: PostCollator) -> None:
    with pytest.raises(ValueError, match=r"text\[1\] is not Unicode: .*surrogates not allowed"):
        collator.processor(text=["fine", "half \ud800"])


def test_a_folder_without_posts_is_reported(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/1.JPEG").write_bytes(JPEG)
    flags = [str(checkpoint), "--input", str(tmp_path / "empty"), "--output", str(tmp_path / "out")]
    # With one worker the error comes with the worker's traceback, which is not printed.
    for workers in ("0", "1"):
        with pytest.raises(SystemExit, match="empty has no column text; it has image") as ended:
            predict.main([*flags, "--num_workers", workers])
        assert "\n" not in str(ended.value)


@SOME
@given(st.one_of(st.binary(max_size=60), st.sampled_from([b"[" * 100_000, b'{"train": [{}]}', b"{" * 9, b"null"])))
def test_a_file_of_splits_or_of_settings_of_any_bytes_is_named(folder: Path, content: bytes) -> None:
    for name in ("split.json", "mine.yaml"):
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match="split"):
        split_mvsa(load_mvsa(folder), folder / "split.json")
    try:
        train.parse_arguments([str(folder / "mine.yaml"), "--output_dir", str(folder)])
    except ValueError as error:
        assert "mine.yaml" in str(error)


@pytest.mark.slow
def test_an_image_that_fails_during_training_or_evaluation_is_one_sentence(
    checkpoint: Path, posts_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader checks only the end of the file; the rest fails when it is decoded, perhaps in a worker."""
    content = bytearray(PNG)
    content[len(PNG) // 2] ^= 255
    monkeypatch.setattr(checks, "has_end_marker", lambda file, image_format: True)
    (tmp_path / "posts/data").mkdir(parents=True)
    ids = [str(number) for number in range(40)]
    for post_id in ids:
        (tmp_path / f"posts/data/{post_id}.txt").write_text("so good")
        (tmp_path / f"posts/data/{post_id}.jpg").write_bytes(bytes(content))
    write_labels(tmp_path / "posts", ids)
    labels = tmp_path / "posts/labelResultAll.txt"
    labels.write_text(labels.read_text().replace("0\tpositive", "0\tnegative"))  # a model needs two classes
    data = ["--data_dir", str(tmp_path / "posts")]
    output = ["--output_dir", str(tmp_path / "out"), "--use_cpu", "--report_to", "none", "--dataloader_num_workers"]
    message = r"\w+: post \d+: '.*/posts/data/\d+.jpg' cannot be read[^\n]*$"
    with pytest.raises(SystemExit, match=message):
        train.main([*data, "--model_name_or_path", str(checkpoint), *output, "1"])
    with pytest.raises(SystemExit, match=message):
        evaluate_checkpoint.main([str(checkpoint), *data, "--output", str(tmp_path / "results.json")])


@pytest.mark.slow
def test_four_thousand_posts_one_percent_broken(checkpoint: Path, tmp_path: Path) -> None:
    folder, total = tmp_path / "mvsa", 4_000
    (folder / "data").mkdir(parents=True)
    broken = set(random.Random(0).sample(range(total), total // 100))
    small = encoded(Image.new("RGB", (8, 8), "red"), "JPEG")
    (tmp_path / "good.jpg").write_bytes(small)
    for number in range(total):
        (folder / f"data/{number}.txt").write_text(f"post {number}")
        (folder / f"data/{number}.jpg").hardlink_to(tmp_path / "good.jpg")
    for turn, number in enumerate(sorted(broken)):
        path = folder / f"data/{number}.{('txt', 'jpg')[turn % 2]}"
        path.unlink()
        if turn % 4 >= 2:
            path.write_bytes(b"\xff\xff" if turn % 2 == 0 else small[:-60])
    write_labels(folder, [str(number) for number in range(total)])
    kept, report = read(folder)
    assert {int(post_id) for post_id in kept} == set(range(total)) - broken and len(kept) == total - len(broken)
    assert "10 x missing text" in report and "10 x undecodable text" in report
    assert "10 x missing image" in report and "10 x broken image" in report
    before = listing(folder)
    predict.main([str(checkpoint), "--input", str(folder), "--output", str(tmp_path / "out"), "--batch_size", "128"])
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [int(line["id"]) for line in lines] == list(range(total))
    assert {int(line["id"]) for line in lines if "error" in line} == broken
    assert all(line["id"] in line["error"] for line in lines if "error" in line) and listing(folder) == before
