"""Read the labels of posts."""

import logging

import datasets

from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.mvsa import UNKNOWN_LABEL

logger = logging.getLogger(__name__)


def label_names(posts: datasets.Dataset) -> list[str] | None:
    """Return the names of the classes in index order, or None for a regression."""
    label = posts.features["label"]
    return label.names if isinstance(label, datasets.ClassLabel) else None


def with_labels(posts: datasets.DatasetDict, name: str) -> datasets.DatasetDict:
    """Turn words and integers into the same ClassLabel in every split. Floats stay, for a regression."""
    label = next(iter(posts.values())).features["label"]
    if isinstance(label, datasets.ClassLabel):
        return _without_hidden_labels(posts)
    if not isinstance(label, datasets.Value):
        raise InputError(f"the labels of {name} are neither words nor numbers, but {label}")
    if label.dtype.startswith("float"):
        return posts
    values = {value for dataset in posts.values() for value in dataset.unique("label")}
    if None in values:
        raise InputError(f"{name} has posts without a label: remove them, or label them.")
    if label.dtype == "bool":
        posts, values = posts.cast_column("label", datasets.Value("int8")), {int(value) for value in values}
    classes = datasets.ClassLabel(names=[str(value) for value in sorted(values)])
    return posts.cast_column("label", datasets.Value("string")).cast_column("label", classes)


def with_modality_labels(posts: datasets.DatasetDict, column: str) -> datasets.DatasetDict:
    """Give text_label or image_label the classes of label; an empty cell becomes -100."""
    classes, flag = next(iter(posts.values())).features["label"], f"--{column}_column"
    if not isinstance(classes, datasets.ClassLabel):
        raise InputError(f"{flag} is for classes, and these labels are numbers.")
    for split, dataset in posts.items():
        own = dataset.features[column]
        values = [None if value in (None, "", -1) else value for value in dataset[column][:]]
        if isinstance(own, datasets.ClassLabel):
            values = [None if value is None else own.int2str(value) for value in values]
        # pandas turns a column of integers with an empty cell into floats.
        names = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
        unknown = {str(name) for name in names if name is not None} - set(classes.names)
        if unknown:
            raise InputError(f"{flag}: unknown label {min(unknown)}. Allowed: {', '.join(classes.names)}.")
        indices = [UNKNOWN_LABEL if name is None else classes.names.index(str(name)) for name in names]
        posts[split] = dataset.remove_columns(column).add_column(column, indices, feature=classes)
    return posts


def _without_hidden_labels(posts: datasets.DatasetDict) -> datasets.DatasetDict:
    """Drop a test split without labels (-1), as benchmarks publish it."""
    hidden = [split for split, dataset in posts.items() if {None, -1} & set(dataset.unique("label"))]
    if not hidden:
        return posts
    if hidden != ["test"] or len(posts) == 1:
        raise InputError(f"The split {hidden[0]} has posts without a label: remove them, or label them.")
    logger.warning("the test split has no labels and is left out")
    return datasets.DatasetDict({split: dataset for split, dataset in posts.items() if split != "test"})
