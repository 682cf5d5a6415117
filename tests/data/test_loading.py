"""Any source of posts becomes splits with the same columns."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from inputs import table_of_images

from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.loading import DataArguments, load_posts


def test_splits_of_mvsa_are_refused_for_another_data_set() -> None:
    for splits in ("clmlf", "mine.json"):
        with pytest.raises(InputError, match=f"--splits {splits} is for --data_dir alone; posts.csv keeps"):
            DataArguments(dataset_name="posts.csv", splits=splits)


def sizes(posts: datasets.DatasetDict) -> dict[str, int]:
    return {split: len(dataset) for split, dataset in posts.items()}


def test_an_imagefolder_with_metadata(tmp_path: Path) -> None:
    for split, size in (("train", 30), ("test", 10)):
        (tmp_path / split).mkdir()
        rows = table_of_images(tmp_path / split, int)[:size]
        rows = [{"file_name": row["photo"], "text": row["tweet"], "label": row["mood"]} for row in rows]
        datasets.Dataset.from_list(rows).to_json(tmp_path / split / "metadata.jsonl")
    posts = load_posts(DataArguments(dataset_name=str(tmp_path)))
    assert sizes(posts) == {"train": 27, "test": 10, "validation": 3}
    assert posts["train"].features["label"].names == ["0", "1"]


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    datasets.Dataset.from_list(table_of_images(tmp_path, int)).to_csv(tmp_path / "posts.csv")
    with pytest.raises(ValueError, match="no column label, text, image; it has photo, tweet, mood"):
        load_posts(DataArguments(dataset_name=str(tmp_path / "posts.csv")))


def test_splits_by_other_names_and_data_in_one_piece(tmp_path: Path) -> None:
    rows = table_of_images(tmp_path, bool)
    columns = {"image_column": "photo", "text_column": "tweet", "label_column": "mood"}
    (tmp_path / "three").mkdir()
    for split, part in (("train", rows[:20]), ("dev", rows[20:30]), ("test", rows[30:])):
        named = [{**row, "photo": f"../{row['photo']}"} for row in part]
        datasets.Dataset.from_list(named).to_csv(tmp_path / "three" / f"{split}.csv")
    posts = load_posts(DataArguments(dataset_name=str(tmp_path / "three"), **columns))
    assert sizes(posts) == {"train": 20, "validation": 10, "test": 10}
    assert all(Path(value["path"]).is_file() for value in posts["test"]["image"])
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "whole.csv")
    assert sizes(load_posts(DataArguments(dataset_name=str(tmp_path / "whole.csv"), splits=None, **columns))) == {
        "test": 40
    }


@pytest.mark.parametrize(
    ("hidden", "answer"),
    [(["test"], None), (["train"], "train"), (["train", "test"], "train"), (["validation"], "validation")],
)
def test_only_a_test_split_may_lack_its_labels(
    hidden: list[str], answer: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    label = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    for split in ("train", "validation", "test"):
        labels = [-1] * 4 if split in hidden else [0, 1, 0, 1]
        dataset = datasets.Dataset.from_dict({"text": ["so"] * 4, "label": labels}, features=features)
        dataset.to_parquet(tmp_path / f"data/{split}.parquet")
    arguments = DataArguments(dataset_name=str(tmp_path / "data"))
    if answer:
        with pytest.raises(ValueError, match=f"row 1 of the split {answer} of .*: it has no label"):
            load_posts(arguments, "text")
    else:
        assert set(load_posts(arguments, "text")) == {"train", "validation"}
        assert "test split has no labels" in caplog.text


@pytest.mark.parametrize("names", [("bad", "good"), (0, 1), (-1, 1)])
def test_labels_of_text_and_image_alone_have_the_classes_of_the_posts(names: tuple[Any, Any], tmp_path: Path) -> None:
    rows = table_of_images(tmp_path, lambda colour: names[colour])
    for number, row in enumerate(rows):
        row |= {"of_text": names[0], "of_image": None if number == 0 else names[1]}
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "posts.csv")
    columns = {"image_column": "photo", "text_column": "tweet", "label_column": "mood"}
    arguments = DataArguments(
        dataset_name=str(tmp_path / "posts.csv"), splits=None, text_label_column="of_text",
        image_label_column="of_image", **columns,
    )  # fmt: skip
    posts = load_posts(arguments)["test"]
    assert posts.features["text_label"] == posts.features["image_label"] == posts.features["label"]
    assert posts["text_label"][:] == [0] * 40 and posts["image_label"][:] == [-100] + [1] * 39
    with pytest.raises(InputError, match="--text_label_column: unknown label a .*. Allowed: "):
        load_posts(replace(arguments, text_label_column="tweet", text_column="of_text"))


def test_half_a_class_is_no_label_of_a_text(tmp_path: Path) -> None:
    rows = [row | {"of_text": 0.5} for row in table_of_images(tmp_path, lambda colour: colour)]
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "posts.csv")
    columns = {"image_column": "photo", "text_column": "tweet", "label_column": "mood"}
    with pytest.raises(InputError, match="--text_label_column: unknown label 0.5. Allowed: 0, 1"):
        load_posts(DataArguments(dataset_name=str(tmp_path / "posts.csv"), text_label_column="of_text", **columns))


def test_flags_of_labels_that_the_data_cannot_have_are_refused() -> None:
    with pytest.raises(InputError, match="--use_conflicting_posts is for --data_dir alone"):
        DataArguments(dataset_name="posts.csv", use_conflicting_posts=True)
    with pytest.raises(InputError, match="are for --dataset_name alone"):
        DataArguments(data_dir="posts", text_label_column="of_text")
    with pytest.raises(InputError, match="--shuffle_buffer is for --streaming alone"):
        DataArguments(dataset_name="posts.csv", shuffle_buffer=5)
    for flags in ({"text_column": ["tweet"]}, {"test_split": "dev"}, {"streaming": True}):
        with pytest.raises(InputError, match=f"--{next(iter(flags))} is for --dataset_name alone"):
            DataArguments(data_dir="posts", **flags)
