"""Splits: random, published or from a file, for MVSA and for any other data set, with and without duplicates."""

import json
import logging
from collections import Counter
from pathlib import Path

import datasets
import pytest
from mvsa_folder import HEADER, make_folder

from clipcacg.scripts.data import load_mvsa, load_posts, split_mvsa
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.loading import DataArguments
from clipcacg.scripts.data.mvsa import LABELS, as_dataset, labelled
from clipcacg.scripts.data.splitting import PUBLISHED_SPLITS, complete_splits, duplicate_groups, random_split


def make_posts(labels: list[str], ids: list[str] | None = None, variant: str = "single") -> datasets.Dataset:
    """Posts in memory, for splits that read neither texts nor images."""
    ids = ids or [str(number) for number in range(len(labels))]
    return as_dataset(
        [
            {"id": i, "text": i, "image": "", "text_label": label, "image_label": label, "label": label}
            for i, label in zip(ids, labels, strict=True)
        ],
        variant,
    )


def ids_of(parts: datasets.DatasetDict) -> dict[str, list[str]]:
    return {split: part["id"][:] for split, part in parts.items()}


def test_random_split_is_stratified_and_seeded() -> None:
    dataset = make_posts(["positive"] * 600 + ["neutral"] * 100 + ["negative"] * 303)
    parts = split_mvsa(dataset)
    assert list(parts) == ["train", "validation", "test"]
    assert sorted(i for part in parts.values() for i in part["id"]) == sorted(dataset["id"])
    for part, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert abs(len(parts[part]) - 1003 * share) < 2
        counts = Counter(parts[part]["label"])
        assert all(abs(counts[label] - n * share) < 2 for label, n in ((0, 303), (1, 100), (2, 600)))
    assert ids_of(split_mvsa(dataset)) == ids_of(parts)
    assert set(split_mvsa(dataset, seed=1)["test"]["id"]) != set(parts["test"]["id"])
    assert list(map(int, parts["test"]["id"])) == sorted(map(int, parts["test"]["id"]))
    assert list(split_mvsa(make_posts(["positive", "neutral"]))) == ["train"]


def test_random_split_is_stratified_by_each_of_several_labels() -> None:
    labels = [[name for name, every in (("a", 2), ("b", 5), ("c", 10)) if not row % every] for row in range(200)]
    rows = random_split(labels, list(range(200)), seed=1)
    for name, total in (("a", 100), ("b", 40), ("c", 20)):
        counts = [sum(name in labels[row] for row in rows[split]) for split in ("train", "validation", "test")]
        assert counts == pytest.approx([0.8 * total, 0.1 * total, 0.1 * total], abs=1)


def test_a_table_of_the_same_posts_gets_the_same_random_split(posts_folder: Path, tmp_path: Path) -> None:
    """`--data_dir` and `--dataset_name` share one splitter."""
    dataset = load_mvsa(posts_folder)
    rows = [
        {"id": post["id"], "text": post["text"], "image": f"{posts_folder}/data/{post['id']}.jpg", "label": name}
        for post, name in zip(dataset, map(dataset.features["label"].int2str, dataset["label"]), strict=True)
    ]
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "posts.csv")
    for settings in ({}, {"split_seed": 3, "group_duplicates": True}):
        folder = load_posts(DataArguments(data_dir=str(posts_folder), **settings))
        table = load_posts(DataArguments(dataset_name=str(tmp_path / "posts.csv"), **settings))
        assert ids_of(folder) == ids_of(table) and len(table) == 3


def test_the_splits_of_a_data_set_are_completed() -> None:
    rows = [{"id": str(number), "text": f"text {number}", "label": number / 50} for number in range(50)]
    numbers = datasets.Dataset.from_list(rows)  # of a regression, which has no classes to stratify by
    assert {split: len(part) for split, part in complete_splits({"train": numbers}).items()} == {
        "train": 40, "validation": 5, "test": 5,
    }  # fmt: skip
    brought = {"train": numbers.select(range(45)), "test": numbers.select(range(45, 50))}
    parts = complete_splits(brought)
    assert {split: len(part) for split, part in parts.items()} == {"train": 40, "validation": 5, "test": 5}
    assert list(parts["test"]["id"]) == [str(number) for number in range(45, 50)]
    assert sorted(int(i) for split in ("train", "validation") for i in parts[split]["id"]) == list(range(45))


def test_duplicates_of_a_data_set_stay_out_of_its_earlier_splits(caplog: pytest.LogCaptureFixture) -> None:
    def part(*texts: str) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"id": list(texts), "text": list(texts), "label": [0.0] * len(texts)})

    train = part("So good!", "so  GOOD! @me", *(f"number {number}" for number in range(16)))
    parts = complete_splits({"train": train, "test": part("so good! http://t.co/1", "other")}, group_duplicates=True)
    assert {split: len(dataset) for split, dataset in parts.items()} == {"train": 14, "validation": 2, "test": 2}
    assert "2 train posts removed: their text or image is also in a later split" in caplog.text


@pytest.mark.parametrize("variant, sizes", [("single", (3611, 450, 450)), ("multiple", (13_624, 1700, 1700))])
def test_published_splits(variant: str, sizes: tuple[int, int, int], caplog: pytest.LogCaptureFixture) -> None:
    folds = json.loads((PUBLISHED_SPLITS / f"mvsa_{variant}_cheema.json").read_text())["folds"]
    ids = [str(i) for i in sorted(i for fold in folds for i in fold["test"])]
    dataset = make_posts(["neutral"] * len(ids), ids, variant)
    assert tuple(map(len, split_mvsa(dataset, "clmlf").values())) == sizes
    for k in (1, 10):
        parts = split_mvsa(dataset, f"cheema:{k}")
        assert [list(map(int, parts[part]["id"][:])) for part in ("validation", "test")] == [*folds[k - 1].values()]
        found = ids_of(parts)
        assert set(found["train"]) == set(ids) - set(found["validation"]) - set(found["test"])
    assert not caplog.records


def test_an_unknown_split_is_named() -> None:
    for wrong in ("cheema", "cheema:0", "cheema:11", "published", "nowhere.json"):
        with pytest.raises(InputError, match="unknown split .* Allowed: random, clmlf, cheema:1 to cheema:10, or"):
            split_mvsa(make_posts(["neutral"]), wrong)
    with pytest.raises(InputError, match="not come from load_mvsa"):
        split_mvsa(make_posts(["neutral"], variant="default"), "clmlf")


def test_split_from_a_json_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset, path = make_posts(["neutral"] * 6), tmp_path / "split.json"
    path.write_text('{"train": [3, "0", 7], "validation": ["2"], "test": [8, 9]}')
    with caplog.at_level(logging.INFO):
        parts = split_mvsa(dataset, path)
    assert ids_of(parts) == {"train": ["0", "3"], "validation": ["2"]}
    absent, unused, empty = (record.getMessage() for record in caplog.records)
    assert "3 posts" in absent and "train 1 of 3, validation 0 of 1, test 2 of 2" in absent
    assert "3 posts are in no part" in unused and "the test split" in empty
    wrong = {'{"train": [1], "test": ["1"]}': "1 IDs in two splits, 1 for one", '{"dev": [1]}': r"\['dev'\]"}
    wrong |= {"[1]": "not a JSON file of the form", '{"train": "12"}': "not a list", '{"test": [77]}': "none of the 6"}
    for content, message in (wrong | {"train: 1": "not a JSON file"}).items():
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            split_mvsa(dataset, path)


def test_duplicates_stay_in_one_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids = [str(number) for number in range(200)]
    rows = "".join(f"{i}\t{LABELS[int(i) % 3]},neutral\n" for i in ids)
    data = make_folder(tmp_path / "mvsa", rows, ids) / "data"
    (data / "1.txt").write_text("RT @one:  The SAME https://t.co/1\n")  # 3 has the text of 1 and the image of 2
    (data / "3.txt").write_text("rt @other: the same http://t.co/2 @third")
    (data / "3.jpg").write_bytes((data / "2.jpg").read_bytes())
    for post_id in ids[10:50]:
        (data / f"{post_id}.txt").write_text("@nobody https://t.co/3")  # an empty rest is no reason to group
    dataset = load_mvsa(data.parent)
    assert sorted(Counter(duplicate_groups(dataset)).values()) == [1] * 197 + [3]
    for seed in range(5):
        assert [*map(len, random_split([0] * 200, [0] * 151 + [*range(1, 50)], seed).values())] == [160, 20, 20]
        parts = split_mvsa(dataset, seed=seed, group_duplicates=True)
        assert max(abs(len(parts[k]) - n) for k, n in (("train", 160), ("validation", 20), ("test", 20))) < 2
        assert sum(bool({"1", "2", "3"} & set(part["id"])) for part in parts.values()) == 1
    (tmp_path / "split.json").write_text('{"train": [1, 4, 5], "validation": [2, 6], "test": [3, 7]}')
    parts = split_mvsa(dataset, tmp_path / "split.json", group_duplicates=True)
    assert list(ids_of(parts).values()) == [["4", "5"], ["6"], ["3", "7"]]
    assert "1 train posts removed" in caplog.text and "1 validation posts removed" in caplog.text


def test_conflicting_posts_train_and_change_no_other_split(tmp_path: Path) -> None:
    fold = json.loads((PUBLISHED_SPLITS / "mvsa_single_cheema.json").read_text())["folds"][0]
    conflicting = [f"c{number}" for number in range(4)]
    ids = [*map(str, fold["validation"][:4] + fold["test"][:4]), *(f"t{number}" for number in range(20)), *conflicting]
    rows = "".join(f"{i}\tpositive,{'negative' if i in conflicting else 'positive'}\n" for i in ids)
    folder = make_folder(tmp_path / "mvsa", HEADER + rows, ids)
    (tmp_path / "mine.json").write_text(json.dumps({"train": ids[:12], "validation": ids[12:16], "test": ids[16:20]}))
    for splits in ("random", "cheema:1", str(tmp_path / "mine.json")):
        plain = split_mvsa(load_mvsa(folder), splits)
        for copy, original, suffix in (("c0", plain["test"], "txt"), ("c1", plain["validation"], "jpg")):
            source = folder / f"data/{original['id'][0]}.{suffix}"
            (folder / f"data/{copy}.{suffix}").write_bytes(source.read_bytes())
        parts = split_mvsa(load_mvsa(folder, keep_conflicting=True), splits)
        expected = ids_of(plain)
        expected["train"] = [*expected["train"], "c2", "c3"]
        assert ids_of(parts) == expected
        last = parts["train"][len(plain["train"])]
        assert (last["label"], last["text_label"], last["image_label"]) == (-100, 2, 0)
        assert labelled(parts["train"])["id"][:] == plain["train"]["id"][:]
        assert parts["train"].info.config_name == "single" and parts["train"].features == plain["train"].features
    for splits, split in ((None, "test"), ("random", "train")):
        posts = load_posts(DataArguments(data_dir=str(folder), splits=splits, use_conflicting_posts=True))
        assert (-100 in posts[split]["label"]) == (split == "train")
