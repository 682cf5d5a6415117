"""Read the labels of posts from their values, whatever type their column has.

Words are classes, and so are a few whole numbers. Other numbers are the values of a regression. Lists hold several
labels of a post. `--task` decides where numbers can be either.
"""

import json
import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import datasets

from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.faults import Faults
from clipcacg.scripts.data.mvsa import UNKNOWN_LABEL, labelled

logger = logging.getLogger(__name__)

# What pandas reads as an empty cell. "none" is a class.
MISSING = {"", "NaN", "nan", "NULL", "null", "None", "NA", "N/A", "n/a", "<NA>", "#N/A"}
MOST_CLASSES = 30  # of whole numbers; more of them are values. Source: our choice.
KINDS = {str: "word", float: "number", list: "list"}
# An item of a list in a cell of a table, as JSON, Python or NumPy writes it: 'a', "b" or c.
ITEM = re.compile(r"""'([^']*)'|"([^"]*)"|([^\s,'"]+)""")
INVISIBLE = re.compile("[\u200b\u2060\ufe0e\ufe0f\ufeff]")  # spaces of no width, and variants of an emoji
DECIMAL_COMMA = re.compile(r"^(\s*[+-]?\d+),(\d+\s*)$")
NAMED = 10  # classes that a message lists


def label_names(posts: datasets.Dataset) -> list[str] | None:
    """Return the names of the classes in index order, or None for a regression."""
    return _names(posts.features["label"])


def task_of(posts: datasets.Dataset) -> str:
    """Return the `problem_type` that the labels ask for."""
    if isinstance(posts.features["label"], datasets.List):
        return "multi_label_classification"
    return "regression" if label_names(posts) is None else "single_label_classification"


def label_fields(posts: datasets.Dataset) -> dict[str, Any]:
    """Return the config fields that the labels ask for."""
    names = label_names(posts)
    if names is None:
        return {"problem_type": task_of(posts), "num_labels": 1}
    id2label = dict(enumerate(names))
    return {"problem_type": task_of(posts), "id2label": id2label, "label2id": {n: i for i, n in id2label.items()}}


def with_labels(posts: datasets.DatasetDict, name: str, task: str, faults: Faults) -> datasets.DatasetDict:
    """Give the labels of every split one form: a ClassLabel, a list of them, or a float for a regression.

    Args:
        posts: Splits with the columns label and row.
        name: Their source, for messages.
        task: "classification", "regression", or "auto" to judge by the values.
        faults: Stops at rows without a usable label, or leaves them out.

    Returns:
        The splits. A test split without any labels, as benchmarks publish it, is left out.

    Raises:
        InputError: If a row has no usable label, or none has one.
    """
    declared: list[str] = []
    if task != "regression":
        names_of = [_names(dataset.features["label"]) or [] for dataset in posts.values()]
        declared = list(dict.fromkeys(label for names in names_of for label in names))
    values = {split: _values(dataset, "label") for split, dataset in posts.items()}
    if len(posts) > 1 and set(map(str, values.get("test", ()))) == {"None"}:
        logger.warning("the test split has no labels and is left out")
        del values["test"]
    if not declared:
        values = _parsed(values, task)
    posts, values = _without_faults(posts, values, name, task, faults)
    labels = [label for split in values.values() for label in split]
    if not labels:
        raise InputError(f"{name} has no post with a label.")
    feature: Any
    encoded: dict[str, list[Any]]
    if isinstance(labels[0], list):
        _refuse_flags(labels, name)
        names, index_of = _classes(Counter(item for label in labels for item in label), declared)
        feature = datasets.List(datasets.ClassLabel(names=names))
        encoded = {split: [sorted({index_of[item] for item in label}) for label in values[split]] for split in values}
    elif declared or _are_classes(labels, name, task):
        names, index_of = _classes(Counter(labels), declared)
        feature = datasets.ClassLabel(names=names)
        encoded = {split: [index_of[label] for label in values[split]] for split in values}
    else:
        feature, encoded = datasets.Value("float64"), values
    return datasets.DatasetDict(
        {split: _replace(dataset, "label", encoded[split], feature) for split, dataset in posts.items()}
    )


def with_modality_labels(posts: datasets.DatasetDict, column: str, name: str, faults: Faults) -> datasets.DatasetDict:
    """Give text_label or image_label the classes of label; an empty cell becomes -100.

    Raises:
        InputError: If the labels of the posts are no classes, or a cell holds none of them.
    """
    first, flag = next(iter(posts.values())), f"--{column}_column"
    classes = first.features["label"]
    if not isinstance(classes, datasets.ClassLabel):
        raise InputError(f"{flag} is for posts of one class each, and these labels are numbers or lists.")
    index_of = {_key(label): index for index, label in enumerate(classes.names)} | {"": UNKNOWN_LABEL}
    index_of.setdefault("-1", UNKNOWN_LABEL)
    allowed = _listed(classes.names)
    for split, dataset in posts.items():
        cells = ["" if cell is None else _as_name(cell) for cell in _values(dataset, column)]
        # A class 1 may be spelled 1.0 here.
        found = {row: index_of.get(_key(cell), index_of.get(_plain(cell))) for row, cell in enumerate(cells)}
        unknown = [row for row, index in found.items() if index is None]
        reasons = {row: f"{flag}: unknown label {cells[row]}. Allowed: {allowed}." for row in unknown}
        indices = [index for index in found.values() if index is not None]
        posts[split] = _replace(faults.leave_out(dataset, reasons, name), column, indices, classes)
    return posts


def align(posts: datasets.Dataset, names: list[str]) -> datasets.Dataset:
    """Give labels the indices of a model's classes, by name. Case and spaces in names do not matter.

    Raises:
        InputError: If a post has a label that is none of `names`.
    """
    own = label_names(posts)
    if own is None or own == names:
        return posts
    index_of = {_key(name): index for index, name in enumerate(names)}
    for column in {"label", "text_label", "image_label"} & set(posts.column_names):
        labels, feature = posts[column][:], datasets.ClassLabel(names=names)
        unknown = [
            own[index] for index in sorted(set(_flat(labels)) - {UNKNOWN_LABEL}) if _key(own[index]) not in index_of
        ]
        if unknown:
            raise InputError(f"The data has the labels {_listed(unknown)}, the model {_listed(names)}.")
        to: dict[int, Any] = {index: index_of.get(_key(name)) for index, name in enumerate(own)} | {
            UNKNOWN_LABEL: UNKNOWN_LABEL
        }
        if isinstance(posts.features[column], datasets.List):
            aligned = [sorted(to[index] for index in label) for label in labels]
            posts = _replace(posts, column, aligned, datasets.List(feature))
        else:
            posts = _replace(posts, column, [to[index] for index in labels], feature)
    return posts


def check_classes(posts: datasets.DatasetDict) -> None:
    """Refuse posts that all have one label, and warn of classes that a split lacks.

    Raises:
        InputError: If there is nothing to tell apart.
    """
    names = label_names(posts["train"])
    counts = {split: Counter(_flat(labelled(dataset)["label"][:])) for split, dataset in posts.items()}
    found = set().union(*counts.values())
    if len(found) < 2:
        label = "none" if not found else found.pop() if names is None else names[found.pop()]
        raise InputError(
            "A model needs posts of at least two classes, or of different values, and the label of all "
            f"{sum(map(len, posts.values()))} posts is {label}."
        )
    for split in counts:
        lacking = []
        for index, label in enumerate(names or ()):
            others = {other: counts[other][index] for other in counts if counts[other][index]}
            if others and split not in others:
                lacking.append(f"{label} ({', '.join(f'{count} in {other}' for other, count in others.items())})")
        if lacking:
            effect = "the model cannot learn it" if split == "train" else "its scores do not cover it"
            logger.warning("The %s split has no post of %s: %s. Add posts.", split, _listed(lacking), effect)


def _names(feature: Any) -> list[str] | None:
    """The names of a ClassLabel, or of a list of them."""
    feature = feature.feature if isinstance(feature, (datasets.List, datasets.LargeList)) else feature
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def _values(dataset: datasets.Dataset, column: str) -> list[Any]:
    """The cells of a column as words, floats, lists of both, or None if missing; anything else stays as it is."""
    if names := _names(dataset.features[column]):
        # Benchmarks hide labels as -1.
        return [_value(cell, lambda index: None if index == -1 else names[index]) for cell in dataset[column][:]]
    return [_value(cell, _word_or_number) for cell in dataset[column][:]]


def _value(cell: Any, read: Any) -> Any:
    if cell is None:
        return None
    return [_value(item, read) for item in cell] if isinstance(cell, list) else read(cell)


def _word_or_number(cell: Any) -> Any:
    if isinstance(cell, bool):
        return str(cell)
    if isinstance(cell, (int, float, Decimal)):
        return None if math.isnan(cell) else float(cell)
    return None if isinstance(cell, str) and cell.strip() in MISSING else cell


def _parsed(values: dict[str, list[Any]], task: str) -> dict[str, list[Any]]:
    """Read words as what they spell: lists, if all do; numbers, if most do or `task` says so.

    With `task="classification"` numbers become words.
    """
    scalars = Counter(value for part in values.values() for value in part if isinstance(value, (str, float)))
    words = {value: count for value, count in scalars.items() if isinstance(value, str)}
    read: dict[Any, Any] = {}
    if words and all(word.strip()[0] + word.strip()[-1] == "[]" for word in words):
        read = {word: _items(word.strip()) for word in words}
    elif words and {word.strip().lower() for word in words} <= {"true", "false"}:
        read = {word: word.strip().capitalize() for word in words}
    elif task == "classification":
        read = {value: _as_name(value) for value in scalars}
    else:
        numbers = {word: number for word in words if (number := _number(word)) is not None}
        if task == "regression" or sum(words[word] for word in numbers) > sum(words.values()) / 2:
            read = numbers
    return {
        split: [value if isinstance(value, list | dict) else read.get(value, value) for value in part]
        for split, part in values.items()
    }


def _items(cell: str) -> list[Any]:
    """The labels in a cell that spells a list."""
    try:
        found = [_word_or_number(item) for item in json.loads(cell)]
        return [_as_name(item) if isinstance(item, float) else item for item in found]
    except ValueError:
        inside = cell[1:-1]
    if "," in inside and not {"'", '"'} & set(inside):
        return [_word_or_number(item.strip()) for item in inside.split(",") if item.strip()]
    return [_word_or_number("".join(item)) for item in ITEM.findall(inside)]


def _as_flag(item: Any) -> str:
    """A label as "1" or "0" if it spells a truth value."""
    word = _as_name(item)
    return {"True": "1", "False": "0"}.get(word, _plain(word))


def _number(word: str | float) -> float | None:
    """The number that a word spells, perhaps with a decimal comma."""
    try:
        number = float(DECIMAL_COMMA.sub(r"\1.\2", str(word)))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _without_faults(
    posts: datasets.DatasetDict, values: dict[str, list[Any]], name: str, task: str, faults: Faults
) -> tuple[datasets.DatasetDict, dict[str, list[Any]]]:
    """Stop at rows whose label is missing or unlike most, or leave them out, and then empty splits."""
    labels = [value for part in values.values() for value in part if value is not None]
    kind = float if task == "regression" else _most_common(map(type, labels))
    item_kind = _most_common(type(item) for label in labels if isinstance(label, list) for item in label)
    if kind not in (*KINDS, None) or (kind is list and item_kind not in (str, float, None)):
        split, row, label = next(
            (s, i, v) for s, part in values.items() for i, v in enumerate(part) if type(v) is kind
        )
        raise InputError(
            f"row {posts[split]['row'][row]} of {name} has the label {_shown(label)}. Labels are words, numbers, or "
            "lists of words or numbers."
        )
    kept, remaining = {}, {}
    for split, part in values.items():
        reasons = {i: reason for i, value in enumerate(part) if (reason := _fault(value, kind, item_kind, task))}
        source = name if len(posts) == 1 else f"the split {split} of {name}"
        dataset = faults.leave_out(posts[split], reasons, source)
        if len(dataset):
            kept[split], remaining[split] = dataset, [value for i, value in enumerate(part) if i not in reasons]
    return datasets.DatasetDict(kept), remaining


def _fault(value: Any, kind: Any, item_kind: Any, task: str) -> str | None:
    """What is wrong with a label, or None."""
    if value is None:
        return "it has no label"
    if type(value) is not kind:
        found = KINDS.get(type(value), type(value).__name__)
        wanted = "--task regression needs numbers" if task == "regression" else f"most labels are {KINDS[kind]}s"
        hint = "; --task classification reads all as words" if {type(value), kind} == {str, float} else ""
        return f"its label {_shown(value)} is a {found}, and {wanted}{hint if task == 'auto' else ''}"
    if kind is float and not math.isfinite(value):
        return f"its label is {value}"
    if kind is list and any(type(item) is not item_kind for item in value):
        return f"not all of its labels {_shown(value)} are {'words' if item_kind is str else 'numbers'}"
    return None


def _refuse_flags(labels: list[list[Any]], name: str) -> None:
    """Refuse lists such as [0, 1, 1], which mark labels by their place.

    Raises:
        InputError: If the labels are such lists.
    """
    width = len(labels[0])
    if width > 1 and all(len(label) == width and {_as_flag(item) for item in label} <= {"0", "1"} for label in labels):
        raise InputError(f"The labels of {name} are lists of 0 and 1: give the names of each post's labels instead.")


def _are_classes(labels: list[Any], name: str, task: str) -> bool:
    """Whether these words or numbers are classes; says so where numbers can be either."""
    if task == "regression" or isinstance(labels[0], str):
        return task != "regression"
    distinct = set(labels)
    if len(distinct) <= MOST_CLASSES and all(label.is_integer() for label in distinct):
        listed = _listed(map(_as_name, sorted(distinct)))
        logger.info(
            "The labels of %s are whole numbers, read as classes: %s. --task regression reads values.", name, listed
        )
        return True
    logger.info("The labels of %s are numbers, read as values. --task classification reads classes.", name)
    return False


def _classes(counts: Counter[Any], declared: list[str]) -> tuple[list[str], dict[Any, int]]:
    """Name the classes, and give each label the index of its class.

    Args:
        counts: Words or numbers, and how many posts have each.
        declared: Names that the data set itself declares; none if it does not.

    Returns:
        Names in order, numbers by size; and label to index. Words that differ in case or spaces alone are one class,
        which has the name of the most frequent.
    """
    if declared:
        names = [*declared, *sorted(counts.keys() - set(declared))]
        return names, {name: index for index, name in enumerate(names)}
    numbers = {label: number for label in counts if (number := _number(label)) is not None}
    if len(numbers) == len(counts):
        order = {number: index for index, number in enumerate(sorted(set(numbers.values())))}
        return [_as_name(number) for number in order], {label: order[number] for label, number in numbers.items()}
    variants: dict[str, list[str]] = {}
    shown: Counter[str] = Counter()
    for word, count in counts.items():
        shown[_tidy(word)] += count
    # The most frequent first, and small letters before capitals.
    for word in sorted(counts, key=lambda word: (-shown[_tidy(word)], word.swapcase())):
        variants.setdefault(_key(word), []).append(word)
    merged = [words for words in variants.values() if len(words) > 1]
    if merged:
        spelled = "; ".join(
            f"{' = '.join(f'{word!r} ({counts[word]})' for word in words)}, called {_tidy(words[0])!r}"
            for words in merged
        )
        logger.warning("Labels that differ only in case or spaces are one class: %s", spelled)
    classes = sorted((_tidy(words[0]), words) for words in variants.values())
    return [name for name, _ in classes], {word: index for index, (_, words) in enumerate(classes) for word in words}


def _tidy(name: str) -> str:
    """A name with single spaces, and each character in one encoding."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def _key(name: str) -> str:
    """A name without the differences that do not matter, those in case among them."""
    return INVISIBLE.sub("", _tidy(name)).casefold()


def _as_name(label: Any) -> str:
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _plain(word: str) -> str:
    """The name of the class of a number, in whatever way it is written."""
    number = _number(word)
    return word if number is None else _as_name(number)


def _replace(dataset: datasets.Dataset, column: str, values: list[Any], feature: Any) -> datasets.Dataset:
    return dataset.remove_columns(column).add_column(column, values, feature=feature)


def _flat(labels: list[Any]) -> Iterable[Any]:
    """Single labels, and those of lists."""
    for label in labels:
        yield from label if isinstance(label, list) else [label]


def _most_common(kinds: Iterable[Any]) -> Any:
    return next((kind for kind, _ in Counter(kinds).most_common(1)), None)


def _shown(label: Any) -> str:
    text = _as_name(label) if isinstance(label, float) else repr(label)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _listed(names: Iterable[str]) -> str:
    """The first names, and how many there are besides."""
    first = list(names)
    more = f" and {len(first) - NAMED} more" if len(first) > NAMED else ""
    return ", ".join(first[:NAMED]) + more
