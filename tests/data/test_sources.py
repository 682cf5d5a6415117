"""Tables, folders and data sets of every kind give the same posts, and a bad row is named or left out."""

import base64
import gzip
import io
import json
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from clipcacg.configuration_clipcacg import ClipCaCgConfig
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.faults import Faults
from clipcacg.scripts.data.images import image_bytes
from clipcacg.scripts.data.labels import label_names
from clipcacg.scripts.data.loading import ColumnArguments, DataArguments, load_posts, load_to_predict

Rows = list[dict[str, Any]]
# What pandas would read as empty cells, numbers and truth values.
TEXTS = [
    "NA",
    "null",
    "123",
    "007",
    "1e5",
    "True",
    "None",
    "nan",
    ' so, "good" ',
    "two\nlines",
    "#N/A",
    "été",
    "x",
    "y",
]
COUNT = len(TEXTS)


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    """Fourteen posts, whose images lie in the folder photos."""
    (tmp_path / "photos").mkdir()
    for number in range(COUNT):
        (tmp_path / f"photos/{number}.png").write_bytes(png(number))
    labels = ["bad", "good"] * (COUNT // 2)
    return [
        {"id": f"0{number}", "text": text, "image": f"photos/{number}.png", "label": label}
        for number, (text, label) in enumerate(zip(TEXTS, labels, strict=True))
    ]


def table(rows: Rows) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


def by_split(rows: Rows, folder: Path, write: Callable[[Rows, Path], Any]) -> None:
    """Write the first eight rows as training, and three each for validation and test."""
    for name, part in (("train", rows[:8]), ("dev", rows[8:11]), ("test", rows[11:])):
        write(part, folder / name)


def with_bytes(rows: Rows, folder: Path) -> Rows:
    return [row | {"image": (folder / row["image"]).read_bytes()} for row in rows]


def metadata(rows: Rows, folder: Path, suffix: str) -> None:
    """An imagefolder: per split a folder with the images and a table that names them."""
    photos = folder.parents[1]
    folder.mkdir(parents=True)
    named = [{k: v for k, v in row.items() if k != "image"} | {"file_name": Path(row["image"]).name} for row in rows]
    for row in rows:
        (folder / Path(row["image"]).name).write_bytes((photos / row["image"]).read_bytes())
    (table(named).to_csv if suffix == "csv" else table(named).to_json)(folder / f"metadata.{suffix}")


def to_arrow(rows: Rows, path: Path) -> None:
    table(rows).save_to_disk(path.with_suffix(""))
    next(path.with_suffix("").glob("*.arrow")).rename(path)


def to_csv(rows: Rows, path: Path, first: str = "", between: str = ",", around: str = "") -> None:
    """Write cells that are all quoted, as other programs do.

    Args:
        rows: Posts.
        path: The file, whose folder is made.
        first: Lines above the header.
        between: What separates the cells.
        around: Spaces around the names of the columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    quoted = ['"{}"'.format(cell.replace('"', '""')) for row in rows for cell in row.values()]
    lines = [between.join(f"{around}{name}{around}" for name in rows[0])]
    lines += [between.join(quoted[start : start + len(rows[0])]) for start in range(0, len(quoted), len(rows[0]))]
    path.write_text(first + "\n".join(lines) + "\n", encoding="utf-8")


def in_two(rows: Rows, folder: Path, write: Callable[[Rows, Path], Any]) -> None:
    """Write the last six rows with a column more, into a second table."""
    folder.mkdir()
    write(rows[:8], folder / "a")
    write([{"more": "x", **row} for row in rows[8:]], folder / "b")


def with_left_overs(rows: Rows, folder: Path) -> None:
    """A table in a folder, one in a folder inside, which is a link, and what editors, macOS and Excel leave."""
    to_csv(rows[:8], folder / "posts.csv")
    to_csv(rows[8:], folder.parent / "elsewhere/more.csv")
    (folder / "rest").symlink_to(folder.parent / "elsewhere")
    (folder / "self").symlink_to(folder)
    for name in (".ipynb_checkpoints/posts.csv", "__MACOSX/._posts.csv", ".git/x.csv", "~$posts.csv", ".hidden.csv"):
        to_csv([{"x": "1"}], folder / name)


def up(rows: Rows) -> Rows:
    """The same rows for a folder beside the images."""
    return [row | {"image": f"../{row['image']}"} for row in rows]


WHOLE: dict[str, Callable[[Rows, Path], Any]] = {
    "posts.csv": lambda rows, path: table(rows).to_csv(path),
    "posts.tsv": lambda rows, path: table(rows).to_csv(path, sep="\t"),
    "posts.csv.gz": lambda rows, path: (
        table(rows).to_csv(path.with_suffix("")),
        path.write_bytes(gzip.compress(path.with_suffix("").read_bytes())),
    ),
    "posts.CSV": lambda rows, path: table(rows).to_csv(path),
    "bom.csv": lambda rows, path: table(rows).to_csv(path, encoding="utf-8-sig"),
    "posts.jsonl": lambda rows, path: table(rows).to_json(path),
    "bom.jsonl": lambda rows, path: path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8-sig"),
    "posts.jsonl.gz": lambda rows, path: path.write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    ),
    "posts.json": lambda rows, path: path.write_text(json.dumps(rows, indent=1)),
    "posts.parquet": lambda rows, path: table(rows).to_parquet(path),
    "posts.arrow": to_arrow,
    "bytes.parquet": lambda rows, path: table(with_bytes(rows, path.parent)).to_parquet(path),
    "saved": lambda rows, path: table(with_bytes(rows, path.parent)).save_to_disk(path),
    "spaces.csv": lambda rows, path: to_csv(rows, path, between=", "),
    "names.csv": lambda rows, path: to_csv(rows, path, around=" "),
    "excel.csv": lambda rows, path: to_csv(rows, path, first="sep=;\n", between=";"),
    "bars.csv": lambda rows, path: to_csv(rows, path, first="\n  \n", between="|"),
    "a [1]*{x}.csv": lambda rows, path: to_csv(rows, path),
    "columns of csv": lambda rows, path: in_two(up(rows), path, lambda part, to: to_csv(part, Path(f"{to}.csv"))),
    "columns of jsonl": lambda rows, path: in_two(up(rows), path, lambda part, to: table(part).to_json(f"{to}.jsonl")),
    "columns of parquet": lambda rows, path: in_two(
        up(rows), path, lambda part, to: table(part).to_parquet(f"{to}.parquet")
    ),
    "left over": lambda rows, path: with_left_overs(up(rows), path),
}
SPLIT: dict[str, Callable[[Rows, Path], Any]] = {
    "csv": lambda rows, path: by_split(up(rows), path, lambda part, to: table(part).to_csv(f"{to}.csv")),
    "tsv": lambda rows, path: by_split(up(rows), path, lambda part, to: table(part).to_csv(f"{to}.tsv", sep="\t")),
    "jsonl": lambda rows, path: by_split(up(rows), path, lambda part, to: table(part).to_json(f"{to}.jsonl")),
    "parquet": lambda rows, path: by_split(
        with_bytes(rows, path.parent), path / "data", lambda part, to: table(part).to_parquet(f"{to}-0-of-1.parquet")
    ),
    "folders": lambda rows, path: by_split(
        up(rows), path, lambda part, to: (to.mkdir(), table(part).to_csv(to / "posts.csv"))
    ),
    "metadata_jsonl": lambda rows, path: by_split(rows, path, lambda part, to: metadata(part, to, "jsonl")),
    "metadata_csv": lambda rows, path: by_split(rows, path, lambda part, to: metadata(part, to, "csv")),
}  # fmt: skip


def contents(dataset: datasets.Dataset) -> list[tuple[str, str, bytes]]:
    return [(row["id"], row["text"], image_bytes(row["image"])) for row in dataset]


@pytest.mark.parametrize("name", WHOLE)
def test_a_table_of_any_format_holds_the_same_posts(name: str, rows: Rows, tmp_path: Path) -> None:
    WHOLE[name](rows, tmp_path / name)
    expected = [(row["id"], row["text"], png(number)) for number, row in enumerate(rows)]
    posts = load_posts(DataArguments(dataset_name=str(tmp_path / name), splits=None))
    assert list(posts) == ["test"] and contents(posts["test"]) == expected
    assert posts["test"].features["label"].names == ["bad", "good"]
    assert contents(load_to_predict(ColumnArguments(), str(tmp_path / name), "test", ClipCaCgConfig())) == expected


@pytest.mark.parametrize("name", SPLIT)
def test_a_folder_of_any_format_has_its_splits(name: str, rows: Rows, tmp_path: Path) -> None:
    (tmp_path / name / "data").mkdir(parents=True)
    SPLIT[name](rows, tmp_path / name)
    expected = [(row["id"], row["text"], png(number)) for number, row in enumerate(rows)]
    posts = load_posts(DataArguments(dataset_name=str(tmp_path / name)))
    assert [*map(len, posts.values())] == [8, 3, 3] and list(posts) == ["train", "validation", "test"]
    assert [row for part in posts.values() for row in contents(part)] == expected
    found = load_to_predict(ColumnArguments(), str(tmp_path / name), "validation", ClipCaCgConfig())
    assert contents(found) == expected[8:11]


def accent(folder: Path) -> str:
    """An image whose name is in another form of Unicode than in the table."""
    (folder / unicodedata.normalize("NFD", "photos/\u00e9.png")).write_bytes(png(1))
    return "photos/\u00e9.png"


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return file.getvalue()


URL = "https://example.org/1.png"
IMAGES: dict[str, tuple[Callable[[Path], Any], Any]] = {
    "relative path": (lambda folder: "photos/1.png", png(1)),
    "absolute path": (lambda folder: str(folder / "photos/1.png"), png(1)),
    "URL": (lambda folder: URL, URL),
    "bytes": (lambda folder: png(1), png(1)),
    "path and bytes": (lambda folder: {"path": None, "bytes": png(1)}, png(1)),
    "base64": (lambda folder: base64.b64encode(png(1)).decode(), png(1)),
    "data URI": (lambda folder: "data:image/png;base64," + base64.b64encode(png(1)).decode(), png(1)),
    "list of paths": (lambda folder: ["photos/1.png", "photos/2.png"], png(1)),
    "list of bytes": (lambda folder: [png(1)], png(1)),
    "PIL image": (lambda folder: Image.open(folder / "photos/1.png"), png(1)),
    "path of Windows": (lambda folder: ".\\photos\\1.png", png(1)),
    "file URL": (lambda folder: (folder / "photos/1.png").as_uri(), png(1)),
    "accent of macOS": (lambda folder: accent(folder), png(1)),
    "path among parts": (lambda folder: {"path": "photos/1.png", "bytes": None}, png(1)),
    "path as a part": (lambda folder: {"path": "photos/1.png"}, png(1)),
    "bytes as a part": (lambda folder: {"bytes": png(1)}, png(1)),
    "base64 among parts": (lambda folder: {"path": None, "bytes": base64.b64encode(png(1)).decode()}, png(1)),
    "more parts": (lambda folder: {"path": None, "bytes": png(1), "width": 8}, png(1)),
}  # fmt: skip


@pytest.mark.parametrize("kind", IMAGES)
def test_an_image_column_of_any_kind(kind: str, rows: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make, expected = IMAGES[kind]
    table([row | {"image": make(tmp_path)} for row in rows]).to_parquet(tmp_path / "posts.parquet")
    found = load_posts(DataArguments(dataset_name=str(tmp_path / "posts.parquet"), splits=None))["test"]["image"]
    if expected == URL:
        assert {image["path"] for image in found} == {URL}
    else:
        assert {Image.open(io.BytesIO(image_bytes(image))).getpixel((0, 0)) for image in found} == {(1, 0, 0)}
        arguments = ColumnArguments(streaming=True)
        stream = load_to_predict(arguments, str(tmp_path / "posts.parquet"), "test", ClipCaCgConfig())
        assert {image_bytes(post["image"]) for post in stream} == {image_bytes(image) for image in found}
    assert ("14 rows of" in caplog.text and "several images" in caplog.text) == (kind == "list of paths")


@pytest.mark.parametrize(
    ("cells", "joined"),
    [
        ({"title": "Sea", "caption": "so blue"}, "Sea so blue"),
        ({"title": None, "caption": "so blue"}, "so blue"),
        ({"title": 123, "caption": "x"}, "123 x"),
        ({"title": True, "caption": "x"}, "True x"),
        ({"title": "", "caption": ""}, ""),
    ],
)
def test_several_text_columns_are_joined(cells: dict[str, Any], joined: str, rows: Rows, tmp_path: Path) -> None:
    rows = [{**cells, "label": row["label"]} for row in rows]
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = DataArguments(
        dataset_name=str(tmp_path / "posts.jsonl"), text_column=["title", "caption"], splits=None
    )
    assert set(load_posts(arguments, "text")["test"]["text"]) == {joined}
    remembered = ClipCaCgConfig(modality="text", text_columns=["title", "caption"])
    found = load_to_predict(ColumnArguments(), str(tmp_path / "posts.jsonl"), "test", remembered)
    assert set(found["text"]) == {joined} and found["id"][:3] == ["1", "2", "3"]


def test_columns_of_the_checkpoint_give_way_to_flags_and_to_the_usual_names(rows: Rows, tmp_path: Path) -> None:
    table([{**row, "title": "t", "photo": row["image"]} for row in rows]).to_csv(tmp_path / "posts.csv")
    source = str(tmp_path / "posts.csv")
    for columns, expected in (
        ({"text_columns": ["title"], "image_column": "photo"}, "t"),
        ({"text_columns": ["headline"], "image_column": "picture"}, "NA"),  # which the table has not
    ):
        assert load_to_predict(ColumnArguments(), source, "test", ClipCaCgConfig(**columns))["text"][0] == expected
    flags = ColumnArguments(text_column=["id"])
    assert load_to_predict(flags, source, "test", ClipCaCgConfig(text_columns=["title"]))["text"][0] == "00"


def test_splits_of_any_name(rows: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = {"train_split": "2019", "validation_split": "2020", "test_split": "hold-out"}
    (tmp_path / "years").mkdir()
    for name, part in (("2019", rows[:8]), ("2020", rows[8:11]), ("hold-out", rows[11:])):
        table(up(part)).to_csv(tmp_path / f"years/posts {name}.csv")
    posts = load_posts(DataArguments(dataset_name=str(tmp_path / "years"), **names))
    assert [*map(len, posts.values())] == [8, 3, 3]
    dataset = table(with_bytes(rows, tmp_path))
    datasets.DatasetDict(a=dataset, b=dataset.select(range(2)), c=dataset).save_to_disk(tmp_path / "saved")
    arguments = DataArguments(dataset_name=str(tmp_path / "saved"), train_split="a", test_split="b")
    assert set(load_posts(arguments)) == {"train", "validation", "test"} and "split c of" in caplog.text
    for flags, message in (
        ({"train_split": "z"}, "--train_split z: .* has the splits a, b, c"),
        ({}, "has the splits a, b, c: name those to use with --train_split"),
    ):
        with pytest.raises(InputError, match=message):
            load_posts(DataArguments(dataset_name=str(tmp_path / "saved"), **flags))
    with pytest.raises(InputError, match="--test_split 1999: no table of .* has this name"):
        load_posts(DataArguments(dataset_name=str(tmp_path / "years"), test_split="1999"))
    with pytest.raises(InputError, match="--test_split x: .* is one file without splits"):
        load_posts(DataArguments(dataset_name=str(tmp_path / "years/posts 2019.csv"), test_split="x"))


def test_a_data_set_of_several_configs_lists_them(rows: Rows, tmp_path: Path) -> None:
    for name, part in (("english", rows[:10]), ("german", rows[10:])):
        table(with_bytes(part, tmp_path)).to_parquet(tmp_path / f"hub/{name}/test.parquet")
    configs = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("english", "german"))
    (tmp_path / "hub/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    source = {"dataset_name": str(tmp_path / "hub"), "splits": None}
    assert len(load_posts(DataArguments(dataset_config="german", **source))["test"]) == 4
    for flags, message in (({}, "has several configs"), ({"dataset_config": "french"}, "has no config french")):
        with pytest.raises(InputError, match=f"{message}: name one with --dataset_config. Choices: english, german."):
            load_posts(DataArguments(**source, **flags))
    table(rows).to_csv(tmp_path / "posts.csv")
    with pytest.raises(InputError, match="--dataset_config german: .* has no configs"):
        load_posts(DataArguments(dataset_name=str(tmp_path / "posts.csv"), dataset_config="german"))


GZIPPED = gzip.compress(b"text,label\na,b\n", mtime=0)  # a time would change the tests' names


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("posts.xls", b"", "is not a table that can be read. Allowed: .csv, .tsv"),
        ("posts.csv", b"", "cannot be read as a data set"),
        ("posts.csv", "text,label\na,b\n".encode("utf-16"), "is encoded in UTF-16: save it in UTF-8"),
        ("posts.jsonl", b"", "cannot be read as a data set: it is empty"),
        ("posts.csv", b"id,text\n", "cannot be read as a data set"),
        ("posts.parquet", b"PAR1", "cannot be read as a data set"),
        ("posts.jsonl", b"[1]\n", "has no column label, image; it has text"),
        ("gone.csv", None, "There is no file .*gone.csv"),
        ("posts.csv", b"text,label\na,b\n", "has no column image; it has text, label"),
        ("posts.jsonl", b'{"image": 1, "text": "a", "label": 1}\n', "column image of .* holds no images, but Value"),
        ("posts.jsonl", b'{"image": "x", "text": ["a"], "label": 1}\n', "column text of .* holds no texts, but List"),
        ("posts.jsonl", '{"text": "a"}\n'.encode("utf-16"), "is encoded in UTF-16: save it in UTF-8"),
        ("posts.csv", "text,label\na,b\n".encode("utf-16-le"), "is compressed, encoded in UTF-16 or not a text"),
        ("posts.csv", GZIPPED, "is compressed, encoded in UTF-16 or not a text"),
        ("posts.csv", zipped(), "is compressed, encoded in UTF-16 or not a text"),
        ("posts.csv.gz", GZIPPED[:-9], "cannot be read .*: Compressed file ended"),
        ("posts.csv", b"text,label\n", "cannot be read as a data set: it is empty .posts.csv."),
        ("posts.json", b"[]", "cannot be read as a data set: it is empty .posts.json."),
        ("posts.json", b'[{"text": "a"},\n{"text":', "posts.json cannot be read: .*: line 2 .*one list: mend it"),
        ("posts.jsonl", b'{"text": "a"},\n' * 9, "posts.jsonl, line 1: Extra data"),
        ("posts.jsonl", b"{'text': 'a'}\n" * 9, "posts.jsonl, line 1: Expecting property name"),
        ("posts.csv", b'"te"xt,label\na,b,c\n', "posts.csv cannot be read: its header: ',' expected"),
    ],
)  # fmt: skip
def test_a_source_that_cannot_be_read_is_one_sentence(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for on_error in ("raise", "skip"):
        with pytest.raises(InputError, match=message) as error:
            load_posts(DataArguments(dataset_name=str(tmp_path / name), on_error=on_error))
        assert name in str(error.value) and "\n" not in str(error.value)


BAD_ROWS = {
    "missing file": ("csv", {"image": "photos/gone.png"}, "missing image: .*photos/gone.png"),
    "no image": ("csv", {"image": ""}, "it has no image"),
    "a page": ("csv", {"image": "page.png"}, "broken image: .*page.png: UnidentifiedImageError"),
    "half an image": ("csv", {"image": "half.png"}, "broken image: .*half.png"),
    "a folder": ("csv", {"image": "photos"}, "missing image: .*photos"),
    "an empty file": ("csv", {"image": "empty.png"}, "broken image: .*empty.png"),
    "a link to nothing": ("csv", {"image": "link.png"}, "missing image: .*link.png"),
    "null": ("jsonl", {"image": None}, "it has no image"),
    "broken bytes": ("parquet", {"image": b"no image"}, "broken image: image: UnidentifiedImageError"),
    "no bytes": ("parquet", {"image": None}, "it has no image"),
    "no JSON": ("jsonl", b'{"text": "a", "image"', "line 3: "),
    "a number": ("jsonl", b"7", "line 3: it is no JSON object"),
    "half a character": ("jsonl", b'{"text": "\\ud800", "image": "photos/1.png", "label": "bad"}', "line 3: "),
    "unclosed quote": ("csv", b'2,"a,photos/1.png,good', "line 4: unexpected end of data"),
    "too many cells": ("csv", b"2,a,photos/1.png,good,more", "line 4: it has 5 cells, the header 4"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named_or_left_out(
    kind: str, rows: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    suffix, bad, reason = BAD_ROWS[kind]
    (tmp_path / "page.png").write_text("<html>404</html>")
    (tmp_path / "half.png").write_bytes(png(1)[:40])
    (tmp_path / "empty.png").touch()
    (tmp_path / "link.png").symlink_to(tmp_path / "nothing")
    path = tmp_path / f"posts.{suffix}"
    rows = [row | {"text": "a"} for row in rows]
    rows = with_bytes(rows, tmp_path) if suffix == "parquet" else rows
    rows[2] |= bad if isinstance(bad, dict) else {}
    write = {"csv": table(rows).to_csv, "jsonl": table(rows).to_json, "parquet": table(rows).to_parquet}[suffix]
    write(path)
    if isinstance(bad, bytes):
        lines = path.read_bytes().splitlines()
        lines[2 + (suffix == "csv")] = bad
        path.write_bytes(b"\n".join(lines) + b"\n")
    arguments = DataArguments(dataset_name=str(path), splits=None)
    with pytest.raises(InputError, match=f"posts.{suffix}(.|\n)*{reason}") as error:
        load_posts(arguments)
    assert "row 3 of" in str(error.value) or "line" in str(error.value)
    arguments.on_error, faults = "skip", Faults("skip")
    assert load_posts(arguments, faults=faults)["test"]["id"][:] == [r["id"] for r in rows if r is not rows[2]]
    assert faults.summary()["skipped_posts"] == 1 and "1 bad row, left out" in caplog.text
    assert faults.summary()["skipped_first"][0].startswith(f"row 3 of {path}: ")


def test_more_than_a_tenth_of_bad_rows_is_an_error(rows: Rows, tmp_path: Path) -> None:
    for row in rows[:2]:
        row["image"] = "gone.png"
    table(rows).to_csv(tmp_path / "posts.csv")
    arguments = DataArguments(dataset_name=str(tmp_path / "posts.csv"), on_error="skip")
    answer = "2 bad rows, more than a tenth of the 14 rows: paths of images start from the folder of their table"
    with pytest.raises(InputError, match=answer):
        load_posts(arguments)
    for row in rows[:12]:
        row["image"] = None
    table(rows).to_csv(tmp_path / "posts.csv")
    for on_error in ("skip", "raise"):  # which would otherwise advise to skip
        arguments.on_error = on_error
        with pytest.raises(InputError, match="12 bad rows, .*--modality_dropout 0.1(.|\n)*Row 1 is (.|\n)*and 2 more"):
            load_posts(arguments)


@pytest.mark.parametrize(
    ("kind", "late", "bad"),
    [("csv", "0.5", None), ("csv", "so", "'so' is a word"), ("jsonl", 0.5, None), ("jsonl", "so", "'so' is a word")],
)
def test_columns_whose_type_changes_far_down(
    kind: str, late: Any, bad: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The readers judge types anew after 10,000 rows of CSV, and after 10 MB of JSON lines."""
    count, path = {"csv": 10_600, "jsonl": 600}[kind], tmp_path / f"posts.{kind}"
    labels = [late if row >= count - 50 else row % 2 for row in range(count)]
    if kind == "csv":
        cells = [str(row) if row < count - 50 else "so" for row in range(count)]
        path.write_text("text,other,label\n" + "".join(f"{c},{c},{y}\n" for c, y in zip(cells, labels, strict=True)))
    else:
        cells = [f"{row} " + "x" * 20_000 for row in range(count)]
        posts = [{"text": text, "label": label} for text, label in zip(cells, labels, strict=True)]
        path.write_text("".join(json.dumps(row | {"other": row["label"]}) + "\n" for row in posts))
    arguments = DataArguments(dataset_name=str(path), splits=None)
    if bad is None:
        found = load_posts(arguments, "text")["test"]
        assert found["label"][:] == [float(label) for label in labels] and found["text"][:] == cells
        return
    with pytest.raises(InputError, match=f"50 bad rows(.|\n)*row {count - 49} of .*: its label {bad}"):
        load_posts(arguments, "text")
    arguments.on_error = "skip"
    found = load_posts(arguments, "text")["test"]
    assert found.features["label"].names == ["0", "1"] and found["text"][:] == cells[:-50]


@pytest.mark.parametrize(
    "content",
    [
        "text;label\n1,5 km;a\nso;b\n",
        "text\tlabel\n1,5 km\ta\nso\tb\n",
        "text|label\n1,5 km|a\nso|b\n",
        '"text";"label"\n"1,5 km";a\n"so";b\n',
        'text,label,\n"1,5 km",a,\nso,b,\n',
        'text,label\n"1,5 km",a,\nso,b,\n',
    ],
)
def test_a_csv_file_with_other_delimiters_or_one_too_many_at_the_end_of_a_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "posts.csv").write_text(content)
    for streaming in (False, True):
        arguments = DataArguments(dataset_name=str(tmp_path / "posts.csv"), splits=None, streaming=streaming)
        (found,) = load_posts(arguments, "text").values()
        assert found["label"][:] == [0, 1] and label_names(found) == ["a", "b"]
        if not streaming:
            assert found["text"][:] == ["1,5 km", "so"]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_item_of_a_list_that_is_no_row_is_named_or_left_out(streaming: bool, tmp_path: Path) -> None:
    items = [{"text": f"t{number}", "label": number % 2} for number in range(20)]
    (tmp_path / "posts.json").write_text(json.dumps([*items[:9], 7, *items[9:]]))
    arguments = DataArguments(dataset_name=str(tmp_path / "posts.json"), splits=None, streaming=streaming)
    with pytest.raises(InputError, match="posts.json cannot be read: posts.json, item 10: it is no JSON object"):
        load_posts(arguments, "text")
    arguments.on_error = "skip"
    (found,) = load_posts(arguments, "text").values()
    assert found["row"][:] == [*range(1, 10), *range(11, 22)] if streaming else len(found) == 20


def test_a_second_column_of_the_same_name_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a line that cannot be parsed, the last one was read in place of the first."""
    rows = [f"a{number},{'ab'[number % 2]},wrong" for number in range(12)]
    arguments = DataArguments(dataset_name=str(tmp_path / "posts.csv"), splits=None, on_error="skip")
    for more in ([], ["a,b,c,d,e"]):
        (tmp_path / "posts.csv").write_text("\n".join(["text,label,text", *rows, *more]))
        assert load_posts(arguments, "text")["test"]["text"][:] == [f"a{number}" for number in range(12)]
        assert "has several columns text: the first counts" in caplog.text


def test_texts_that_are_not_in_utf_8_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "posts.csv").write_text("text,label\ncaf\u00e9,a\nb,b\n", encoding="cp1252")
    load_posts(DataArguments(dataset_name=str(tmp_path / "posts.csv"), splits=None), "text")
    assert "1 texts of" in caplog.text and "save it in UTF-8" in caplog.text


def test_splits_may_have_other_columns(rows: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A test split without the label is one without labels; a split without texts is refused."""
    (tmp_path / "data").mkdir()
    rows = up(rows)
    to_csv([{"more": "x", **row} for row in rows[:8]], tmp_path / "data/train.csv")
    to_csv(rows[8:11], tmp_path / "data/val.csv")
    to_csv([{"text": row["text"], "image": row["image"]} for row in rows[11:]], tmp_path / "data/test.csv")
    for streaming in (False, True):
        arguments = DataArguments(dataset_name=str(tmp_path / "data"), streaming=streaming)
        posts = load_posts(arguments)
        assert {split: len(part) for split, part in posts.items()} == {"train": 8, "validation": 3}
        assert "the test split has no labels and is left out" in caplog.text
        arguments.label_column = "mood"
        with pytest.raises(InputError, match="the split train of .* has no column mood; it has more, id"):
            load_posts(arguments)
    to_csv([{"image": row["image"], "label": row["label"]} for row in rows[8:11]], tmp_path / "data/val.csv")
    with pytest.raises(InputError, match="the split validation of .* has no column text; it has image, label"):
        load_posts(DataArguments(dataset_name=str(tmp_path / "data")))


def test_a_first_row_with_a_cell_too_many_does_not_shift_the_columns(tmp_path: Path) -> None:
    (tmp_path / "posts.csv").write_text("text,label\na,bad,more\n" + "b,good\nc,bad\n" * 6)
    arguments = DataArguments(dataset_name=str(tmp_path / "posts.csv"), splits=None)
    with pytest.raises(InputError, match="posts.csv, line 2: it has 3 cells, the header 2"):
        load_posts(arguments, "text")
    arguments.on_error = "skip"
    assert load_posts(arguments, "text")["test"]["text"][:] == ["b", "c"] * 6


def test_images_lie_in_the_folder_of_their_table_or_else_in_the_folder_named(rows: Rows, tmp_path: Path) -> None:
    """Two tables name another image in the same way."""
    for number, part in enumerate(("one", "two")):
        named = [rows[2 * number] | {"image": "own.png"}, rows[2 * number + 1] | {"image": "../photos/1.png"}]
        named = [row | {"user": {"name": "of no interest"}} for row in named]
        for kind in ("csv", "parquet"):
            (tmp_path / f"{kind}/{part}").mkdir(parents=True, exist_ok=True)
            (tmp_path / f"{kind}/{part}/own.png").write_bytes(png(100 + number))
            getattr(table(named), f"to_{kind}")(tmp_path / f"{kind}/{part}/posts.{kind}")
    for kind in ("csv", "parquet"):
        source, config = str(tmp_path / kind), ClipCaCgConfig()
        trained = load_posts(DataArguments(dataset_name=source, splits=None))["test"]
        whole = load_to_predict(ColumnArguments(), source, "test", config)
        stream = load_to_predict(ColumnArguments(streaming=True), source, "test", config)
        for posts in (trained, whole, stream):
            assert [image_bytes(post["image"]) for post in posts] == [png(100), png(1), png(101), png(1)]


def test_a_folder_with_splits_of_several_formats_is_refused(rows: Rows, tmp_path: Path) -> None:
    """The split of the rarer format was left out without a word."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    table(rows).to_csv(folder / "train.csv")
    table(rows).to_json(folder / "test.jsonl")
    with pytest.raises(InputError, match="tables of several formats .*one format"):
        load_posts(DataArguments(dataset_name=str(folder)))


def test_a_line_of_spaces_does_not_shift_the_bad_row(tmp_path: Path) -> None:
    lines = [
        "text,label",
        "t1,a",
        "  ",
        "t2,b",
        "t3,a,EXTRA",
        *(f"t{number},{'ab'[number % 2]}" for number in range(4, 24)),
    ]
    (tmp_path / "posts.csv").write_text("\n".join(lines) + "\n")
    arguments = DataArguments(dataset_name=str(tmp_path / "posts.csv"), splits=None, on_error="skip")
    faults = Faults("skip")
    posts = load_posts(arguments, "text", faults=faults)["test"]
    assert posts["text"][:] == ["t1", "t2", *(f"t{number}" for number in range(4, 24))]
    assert list(faults.left_out) == [f"row 3 of {tmp_path / 'posts.csv'}"]


def test_a_line_of_spaces_in_a_table_of_one_column_does_not_shift_the_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "posts.csv"
    path.write_text(
        "\n".join(["text", "a", "   ", '"  "', "bad,cell", *(f"t{number}" for number in range(20))]) + "\n"
    )
    config = ClipCaCgConfig(modality="text", clip_mode="none")
    for streaming in (False, True):
        posts = load_to_predict(ColumnArguments(on_error="skip", streaming=streaming), str(path), "test", config)
        found = [(row["text"], row["error"]) for row in posts]
        assert [text for text, error in found if not error] == ["a", "  ", *(f"t{number}" for number in range(20))]
        assert "line 5: it has 2 cells" in found[2][1]


def test_a_bad_line_between_cells_behind_spaces_is_named(tmp_path: Path) -> None:
    path = tmp_path / "posts.csv"
    lines = ["id, text", *(f'{number}, "well, {number}"' for number in range(20)), '20, "a", b']
    path.write_text("\n".join(lines) + "\n")
    config = ClipCaCgConfig(modality="text", clip_mode="none")
    for streaming in (False, True):
        posts = load_to_predict(ColumnArguments(on_error="skip", streaming=streaming), str(path), "test", config)
        *good, bad = [(row["text"], row["error"]) for row in posts]
        assert good == [(f"well, {number}", None) for number in range(20)] and "line 22: it has 3 cells" in bad[1]


def test_bad_lines_of_any_suffix_of_json_are_named(tmp_path: Path) -> None:
    lines = [*(json.dumps({"text": f"t{number}"}) for number in range(20)), "{bad"]
    for suffix in (".jsonl", ".ndjson", ".json"):
        path = tmp_path / f"tweets.csv{suffix}"
        path.write_text("\n".join(lines) + "\n")
        config = ClipCaCgConfig(modality="text", clip_mode="none")
        posts = list(load_to_predict(ColumnArguments(on_error="skip"), str(path), "test", config))
        assert len(posts) == 21 and "line 21" in posts[20]["error"]


def test_a_stream_doubles_no_row_behind_a_broken_quote(tmp_path: Path) -> None:
    """One row for the reader of tables, two for the reader of lines: the latter would give a row twice."""
    path = tmp_path / "posts.csv"
    rows = [f"{number},good" for number in range(1, 10_500)]
    path.write_text("\n".join(["id,text", '0,"a', 'b"c', *rows, "x,y,z,w"]) + "\n")
    config, arguments = ClipCaCgConfig(modality="text", clip_mode="none"), ColumnArguments(on_error="skip")
    arguments.streaming = True
    seen = []
    with pytest.raises(InputError, match="behind a cell with a broken quote"):
        for row in load_to_predict(arguments, str(path), "test", config):
            seen.append(row["id"])
    assert len(seen) == len(set(seen)) >= 10_000


@pytest.mark.parametrize("may_lack", [False, True])
def test_a_post_without_a_text_is_a_bad_row(may_lack: bool, rows: Rows, tmp_path: Path) -> None:
    """Unless the model has learned to do without."""
    rows[2]["text"] = None
    table(rows).to_json(tmp_path / "posts.jsonl")
    arguments = DataArguments(dataset_name=str(tmp_path / "posts.jsonl"), splits=None)
    if may_lack:
        assert load_posts(arguments, may_lack=True)["test"]["text"][2] is None
    else:
        with pytest.raises(InputError, match="row 3 of .*posts.jsonl: it has no text"):
            load_posts(arguments)


def test_one_column_cannot_be_two_labels(rows: Rows, tmp_path: Path) -> None:
    table(rows).to_json(tmp_path / "posts.jsonl")
    with pytest.raises(InputError, match="must name different columns"):
        load_posts(DataArguments(dataset_name=str(tmp_path / "posts.jsonl"), text_label_column="label"))


def test_a_saved_data_set_has_no_configs(rows: Rows, tmp_path: Path) -> None:
    table(rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="--dataset_config en: .* has no configs"):
        load_posts(DataArguments(dataset_name=str(tmp_path / "saved"), dataset_config="en"))
