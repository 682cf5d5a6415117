"""Split posts into train, validation and test. No other module makes a split.

`split_mvsa` splits one data set: at random, by a published split of MVSA, or by a file of IDs. `complete_splits` makes
the splits that a data set came without, by the same random rule.
"""

import hashlib
import json
import logging
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.images import image_bytes
from clipcacg.scripts.data.labels import label_names
from clipcacg.scripts.data.mvsa import ANNOTATORS, has_label, labelled

logger = logging.getLogger(__name__)

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
PUBLISHED_SPLITS = Path(__file__).parent / "published_splits"
USER_NAMES_AND_LINKS = re.compile(r"@\w+|(?:https?://|www\.)\S+", re.IGNORECASE)


def split_mvsa(
    dataset: datasets.Dataset, splits: str | Path = "random", seed: int = 42, group_duplicates: bool = False
) -> datasets.DatasetDict:
    """Split a data set into train, validation and test.

    Args:
        dataset (`datasets.Dataset`): from `load_mvsa`; for "random" and JSON files, any with the same columns.
        splits (`str` or `Path`): "random" (8:1:1, stratified by label); "clmlf" or "cheema:1" to "cheema:10", which
            were published for the variant in `dataset.info.config_name`; or a JSON file
            `{"train": [IDs], "validation": [IDs], "test": [IDs]}`.
        seed (`int`): seed of the random split.
        group_duplicates (`bool`): keep posts in one split if they share a text (apart from user names, links, case and
            spacing) or an image (the same bytes). A random split assigns whole groups. A published split keeps its
            test posts, so that results stay comparable: it loses the training posts that duplicate a validation or
            test post, and the validation posts that duplicate a test post.

    Conflicting posts (`load_mvsa(keep_conflicting=True)`) change no split. They are added to the training posts,
    except for those that duplicate a validation or test post, whatever `group_duplicates` says.

    Returns:
        `datasets.DatasetDict`: each split in the order of `dataset`, the conflicting posts last. An empty split is
        left out, with a warning.

    Raises:
        InputError: the split is unknown, its JSON file is invalid, or it shares no post with the data.

    Source: 8:1:1 is the paper's; published splits: published_splits/README.md; grouping is our choice, because 42 of
        the 450 test texts of clmlf (MVSA-Single) are also training texts.
    """
    conflicting = [row for row, is_known in enumerate(has_label(dataset)) if not is_known]
    if conflicting:
        parts = split_mvsa(labelled(dataset), splits, seed, group_duplicates)
        return _add_to_training(parts, dataset.select(conflicting))
    if str(splits) == "random":
        return complete_splits({"train": dataset}, seed, group_duplicates)
    rows = _published_split(dataset, str(splits))
    groups = duplicate_groups(dataset) if group_duplicates else range(len(dataset))
    parts = {split: dataset.select(rows[split]) for split in SHARES}
    return _finish(parts, {split: [groups[row] for row in rows[split]] for split in SHARES})


def complete_splits(
    posts: Mapping[str, datasets.Dataset], seed: int = 42, group_duplicates: bool = False
) -> datasets.DatasetDict:
    """Split one data set 8:1:1, or take a ninth of the training posts for a missing validation split.

    Args:
        posts (`Mapping[str, datasets.Dataset]`): some of the splits train, validation and test.
        seed (`int`): seed of the random split.
        group_duplicates (`bool`): see `split_mvsa`. A split that the data came with is treated like a published one.

    Returns:
        `datasets.DatasetDict`: the new splits, stratified by label and in the order of the data; the others unchanged.
    """
    numbers = iter(duplicate_groups(*posts.values()) if group_duplicates else range(sum(map(len, posts.values()))))
    groups = {split: list(islice(numbers, len(dataset))) for split, dataset in posts.items()}
    parts = dict(posts)
    source, shares = "train", {"train": 8 / 9, "validation": 1 / 9}
    if len(posts) == 1:
        source, shares = next(iter(posts)), SHARES
    if len(posts) == 1 or ("train" in posts and "validation" not in posts):
        dataset, numbered = posts[source], groups[source]
        rows = random_split(_strata(dataset), numbered, seed, shares)
        parts |= {split: dataset.select(rows[split]) for split in shares}
        groups |= {split: [numbered[row] for row in rows[split]] for split in shares}
    return _finish(parts, groups)


def random_split(
    labels: list[Any], groups: list[int], seed: int, shares: Mapping[str, float] = SHARES
) -> dict[str, list[int]]:
    """Assign whole groups, the largest first, each to the split whose counts it brings closest to its share.

    Args:
        labels (`list`): label of each row, or a list of its labels.
        groups (`list[int]`): group number of each row; all different if duplicates do not matter.
        seed (`int`): seed of the order in which groups of equal size are assigned.
        shares (`Mapping[str, float]`): share of each split; they add up to 1.

    Returns:
        `dict[str, list[int]]`: row numbers of each split, ascending.

    Source: our choice. Distance is chi-square over the count of each label and the count of all posts; the latter
        weighs as much as all labels together. Without groups, every split ends within about one post of its share,
        in total and for each label.
    """
    members = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    order = list(members.values())
    random.Random(seed).shuffle(order)
    labels_of = [label if isinstance(label, list) else [label] for label in labels]
    wanted: Counter[Any] = Counter(label for own in labels_of for label in own)
    weight = max(len(wanted), 1)
    wanted += Counter(all=weight * len(labels))
    assigned: dict[str, Counter[Any]] = {split: Counter() for split in shares}
    rows: dict[str, list[int]] = {split: [] for split in shares}
    for member_rows in sorted(order, key=len, reverse=True):
        counts = Counter(label for row in member_rows for label in labels_of[row])
        counts += Counter(all=weight * len(member_rows))
        growth = {split: _chi_square_growth(counts, assigned[split], share, wanted) for split, share in shares.items()}
        closest = min(growth, key=growth.__getitem__)
        assigned[closest] += counts
        rows[closest] += member_rows
    return {split: sorted(rows[split]) for split in shares}


def _chi_square_growth(counts: Counter, assigned: Counter, share: float, wanted: Counter) -> float:
    """How much the chi-square distance of a split from its share grows when it takes these counts."""
    return sum(
        n * (2 * (assigned[key] - share * wanted[key]) + n) / (share * wanted[key]) for key, n in counts.items()
    )


def _strata(dataset: datasets.Dataset) -> list[Any]:
    """The classes of the posts; the numbers of a regression are not stratified."""
    return [0] * len(dataset) if label_names(dataset) is None else dataset["label"][:]


def _finish(posts: Mapping[str, datasets.Dataset], groups: dict[str, list[int]]) -> datasets.DatasetDict:
    """Remove posts whose group is also in a later split, and then empty splits."""
    kept, seen = {}, set[int]()
    for split in reversed(SHARES):
        if split in posts:
            rows = [row for row, group in enumerate(groups[split]) if group not in seen]
            if removed := len(posts[split]) - len(rows):
                logger.warning("%d %s posts removed: their text or image is also in a later split", removed, split)
            kept[split] = posts[split].select(rows) if removed else posts[split]
            seen |= set(groups[split])
    for split in SHARES:
        if split in kept and not len(kept[split]):
            logger.warning("the %s split is empty and left out", split)
    return datasets.DatasetDict({split: kept[split] for split in SHARES if len(kept.get(split, ()))})


def _add_to_training(posts: datasets.DatasetDict, conflicting: datasets.Dataset) -> datasets.DatasetDict:
    """Add the conflicting posts that duplicate no validation or test post to the training split, if there is one."""
    held_out = [part for split, part in posts.items() if split != "train"]
    groups = duplicate_groups(conflicting, *held_out)
    of_held_out = set(groups[len(conflicting) :])
    rows = [row for row, group in enumerate(groups[: len(conflicting)]) if group not in of_held_out]
    logger.info("%d of %d conflicting posts added to the training split", len(rows), len(conflicting))
    if "train" in posts:
        posts["train"] = datasets.concatenate_datasets([posts["train"], conflicting.select(rows)])
    return posts


def _published_split(dataset: datasets.Dataset, splits: str) -> dict[str, list[int]]:
    """Find the rows of a published split or JSON file, and warn once about its posts that are not in the data set."""
    row_of = {post_id: row for row, post_id in enumerate(dataset["id"][:])}
    ids = _read_split(splits, dataset.info.config_name, row_of.keys())
    absent = {split: len(ids[split] - row_of.keys()) for split in SHARES}
    if any(absent.values()):
        counts = ", ".join(f"{split} {absent[split]} of {len(ids[split])}" for split in SHARES)
        logger.warning("%d posts of the split %s are not in the data: %s", sum(absent.values()), splits, counts)
    unused = len(row_of.keys() - set().union(*ids.values()))
    if unused:
        logger.info("%d posts are in no part of the split %s", unused, splits)
    rows = {split: sorted(row_of[post_id] for post_id in ids[split] & row_of.keys()) for split in SHARES}
    if not any(rows.values()):
        raise InputError(f"the split {splits!r} holds none of the {len(dataset)} posts")
    return rows


def _read_split(splits: str, variant: str | None, valid: Iterable[str]) -> dict[str, set[str]]:
    """Look up the IDs of a split by its name or in a JSON file; `valid` are the IDs of the data set."""
    fold = re.fullmatch(r"cheema:([1-9]|10)", splits)
    if splits == "clmlf" or fold:
        if variant not in ANNOTATORS:
            raise InputError(f"{splits} is a split of MVSA, and this data set does not come from load_mvsa")
        path = PUBLISHED_SPLITS / f"mvsa_{variant}_{splits.partition(':')[0]}.json"
    elif Path(splits).is_file():
        path = Path(splits)
    else:
        allowed = "random, clmlf, cheema:1 to cheema:10, or the path of a JSON file of IDs"
        raise InputError(f"unknown split {splits!r}. Allowed: {allowed}")
    if not fold:
        return _read_ids(path)
    held_out = json.loads(path.read_text())["folds"][int(fold[1]) - 1]
    ids = {split: {str(post_id) for post_id in held_out[split]} for split in ("validation", "test")}
    return {"train": set(valid) - ids["validation"] - ids["test"], **ids}


def _read_ids(path: Path) -> dict[str, set[str]]:
    """Read a JSON file of IDs, numbers or strings, and check that no ID is in two splits."""
    expected = '{"train": [IDs], "validation": [IDs], "test": [IDs]}'
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if unknown := content.keys() - SHARES.keys():
            raise ValueError(f"it has {sorted(unknown)}")
        if not all(isinstance(part, list) for part in content.values()):
            raise ValueError("a split is not a list")
        ids = {split: {str(post_id) for post_id in content.get(split, [])} for split in SHARES}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not a JSON file of the form {expected}: {error}") from error
    repeated = [post_id for post_id, count in Counter(i for part in ids.values() for i in part).items() if count > 1]
    if repeated:
        raise InputError(f"{path} has {len(repeated)} IDs in two splits, {min(repeated)} for one")
    return ids


def duplicate_groups(*parts: datasets.Dataset) -> list[int]:
    """Number the groups of posts that are linked, directly or through others, by a text or an image.

    Args:
        *parts (`datasets.Dataset`): posts with a column text, image or both.

    Returns:
        `list[int]`: the group of each row, one part after the other.
    """
    return linked_groups([keys for part in parts for keys in duplicate_keys(part)])


def linked_groups(rows: Sequence[Sequence[str]]) -> list[int]:
    """Number the groups of rows that are linked, directly or through others, by a common key."""
    first_row: dict[str, int] = {}
    links = [(row, first_row.setdefault(key, row)) for row, keys in enumerate(rows) for key in keys]
    graph = coo_array((np.ones(len(links)), np.array(links, dtype=int).reshape(-1, 2).T), shape=(len(rows),) * 2)
    return connected_components(graph, directed=False)[1].tolist()


def duplicate_keys(dataset: datasets.Dataset) -> Iterator[list[str]]:
    """What each post shares with its duplicates: its text without user names, links, case and spacing; its image."""
    texts, images = [None] * len(dataset), [None] * len(dataset)
    if "text" in dataset.column_names:
        texts = dataset["text"][:]
    if "image" in dataset.column_names:
        images = dataset.cast_column("image", datasets.Image(decode=False))["image"][:]
    for text, image in zip(texts, images, strict=True):
        keys = [" ".join(USER_NAMES_AND_LINKS.sub(" ", text or "").casefold().split())]
        if image is not None:
            keys.append(f"image: {hashlib.sha256(image_bytes(image)).hexdigest()}")
        yield [key for key in keys if key]
