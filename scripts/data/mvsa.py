"""MVSA as a Hugging Face data set: read the official folder, and split it.

MVSA (Niu et al., MMM 2016) is handed out as a folder that we read as it is, and never write into:

    DATA_DIR/labelResultAll.txt    a row a post: ID<TAB>text,image (one more text,image for each further annotator)
    DATA_DIR/data/<ID>.txt         its text, in UTF-8 or GB18030
    DATA_DIR/data/<ID>.jpg         its picture

MVSA-Single has one annotator a post, MVSA-Multiple three. `load_mvsa` gives one `datasets.Dataset` with the paper's
labels, `split_mvsa` cuts it into train, validation and test.
"""

import hashlib
import json
import logging
import random
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
from PIL import Image

logger = logging.getLogger(__name__)

LABELS = ["negative", "neutral", "positive"]
ANNOTATORS = {"single": 1, "multiple": 3}
LABEL_FILE = "labelResultAll.txt"
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
SPLITS_FOLDER = Path(__file__).parent / "published_splits"
SPLIT_CHOICES = "random, clmlf, cheema:1 to cheema:10, or the path of a JSON file of IDs"

# Names of files in data/: no separator, no leading dot and no two dots in a row, so that none can leave the folder.
SAFE_ID = re.compile(r"[\w-]+(\.[\w-]+)*")
NAMES_AND_LINKS = re.compile(r"@\w+|(?:https?://|www\.)\S+", re.IGNORECASE)
END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}


class MvsaDataError(ValueError):
    """An MVSA folder, or a split of it, that cannot be used as it is."""


class Fault(Exception):
    """One thing wrong with one post: `Fault(kind, detail)`. Caught by the reader, which goes on."""


class Problem(NamedTuple):
    """A fault and the line of the label file that leads to it."""

    line: int
    kind: str
    detail: str


class Post(NamedTuple):
    """A row of the label file; a label is None where the annotators have no majority."""

    line: int
    id: str
    text_label: str | None
    image_label: str | None


def combine_labels(text_label: str | None, image_label: str | None) -> str | None:
    """Combine the labels of a post's text and picture into the label of the post.

    Args:
        text_label: label of the text; None (no majority) gives None.
        image_label: label of the picture; None (no majority) gives None.

    Returns:
        The common label, or the one that is not neutral; None for positive against negative: such a post is dropped.

    Source: the paper's labelling rule, which leads to the counts of its Table I.
    """
    if text_label == image_label:
        return text_label
    if "neutral" in (text_label, image_label):
        return image_label if text_label == "neutral" else text_label
    return None


def majority_label(votes: Sequence[str]) -> str | None:
    """Return the label that more than half of the annotators gave, or None.

    Source: the paper's rule for the three annotators of MVSA-Multiple; one annotator alone is a majority.
    """
    label, count = Counter(votes).most_common(1)[0]
    return label if 2 * count > len(votes) else None


def load_mvsa(data_dir: str | Path, variant: str | None = None, on_error: str = "raise") -> datasets.Dataset:
    """Read an MVSA folder, without decoding its pictures.

    Args:
        data_dir: the folder that holds `labelResultAll.txt` and `data/`.
        variant: "single" or "multiple"; None tells it from the number of annotators in the label file.
        on_error: "raise" stops at faulty posts; "skip" logs the same report as a warning and keeps the others.

    Returns:
        A data set in the order of the label file with columns id, text, image (path, decoded on access), text_label,
        image_label and label. `info.config_name` is the variant. Posts without a label are dropped, which is logged:
        their files are not looked at.

    Raises:
        FileNotFoundError: the folder, its label file or its `data` folder is missing.
        MvsaDataError: a ValueError; posts are faulty, none is usable, or `variant` contradicts the label file.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error must be "raise" or "skip", not {on_error!r}')
    folder = Path(data_dir).expanduser().absolute()
    rows = read_rows(folder)
    variant = tell_variant(rows, folder, variant)
    problems: list[Problem] = []
    posts = drop_unlabelled(parse_rows(rows, ANNOTATORS[variant], problems))
    examples = [example for post in posts if (example := read_post(folder, post, problems))]
    report(problems, folder, on_error)
    if not examples:
        raise MvsaDataError(f"no usable post in {folder}: {len(rows)} rows, {len(problems)} problems")
    return as_dataset(examples, variant)


def read_rows(folder: Path) -> list[tuple[int, list[str]]]:
    """Read the label file into (line number, stripped tab-separated fields), without blank lines and header."""
    label_file = folder / LABEL_FILE
    if not label_file.is_file() or not (folder / "data").is_dir():
        layout = f"it should hold {LABEL_FILE} and data/ with <ID>.jpg and <ID>.txt for every post"
        raise FileNotFoundError(f"{folder} is not an MVSA folder: {layout}")
    # Bytes that are not UTF-8 turn into bad rows, with their line, instead of stopping us here.
    lines = label_file.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    rows = [
        (number, [field.strip() for field in line.rstrip().split("\t")])
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    has_header = bool(rows) and rows[0][1][0].lower().split()[:1] == ["id"]
    return rows[1:] if has_header else rows


def tell_variant(rows: list[tuple[int, list[str]]], folder: Path, variant: str | None) -> str:
    """Tell MVSA-Single from MVSA-Multiple by the columns of most rows, and check `variant` against that."""
    columns = Counter(len(fields) - 1 for _, fields in rows)
    found = max(ANNOTATORS, key=lambda name: columns[ANNOTATORS[name]])
    if not columns[ANNOTATORS[found]]:
        raise MvsaDataError(f"no usable post in {folder / LABEL_FILE}: no row has one or three text,image columns")
    if variant not in (None, found):
        raise MvsaDataError(f"{folder / LABEL_FILE} is MVSA-{found.title()}, but the variant asked for is {variant!r}")
    return found


def parse_rows(rows: list[tuple[int, list[str]]], annotators: int, problems: list[Problem]) -> list[Post]:
    """Turn the rows into posts; bad rows and repeated IDs go to `problems`, and the first row of an ID counts."""
    posts: dict[str, Post] = {}
    for line, fields in rows:
        try:
            post = parse_row(line, fields, annotators)
            if post.id in posts:
                raise Fault("duplicate ID", f"{post.id} is already on line {posts[post.id].line}")
            posts[post.id] = post
        except Fault as fault:
            problems.append(Problem(line, *fault.args))
    return list(posts.values())


def parse_row(line: int, fields: list[str], annotators: int) -> Post:
    """Check one row, and take the majority of its annotators for the text and for the picture."""
    post_id, *pairs = fields
    if not SAFE_ID.fullmatch(post_id):
        raise Fault("bad ID", f"{post_id[:80]!r} cannot be the name of a file in data/")
    votes = [[label.strip().lower() for label in pair.split(",")] for pair in pairs]
    if len(votes) != annotators or any(len(vote) != 2 for vote in votes):
        raise Fault("bad label row", f"post {post_id} has not {annotators} text,image column(s)")
    unknown = [label for vote in votes for label in vote if label not in LABELS]
    if unknown:
        raise Fault("bad label row", f"post {post_id} has the unknown label {unknown[0][:80]!r}")
    text_votes, image_votes = zip(*votes, strict=True)
    return Post(line, post_id, majority_label(text_votes), majority_label(image_votes))


def drop_unlabelled(posts: list[Post]) -> list[Post]:
    """Drop the posts that the labelling rule leaves without a label, and log how many and why."""
    kept = [post for post in posts if combine_labels(post.text_label, post.image_label)]
    undecided = sum(None in (post.text_label, post.image_label) for post in posts)
    dropped = len(posts) - len(kept)
    if dropped:
        reasons = f"{dropped - undecided} positive against negative, {undecided} without a majority of annotators"
        logger.info("%d posts dropped: %s", dropped, reasons)
    return kept


def read_post(folder: Path, post: Post, problems: list[Problem]) -> dict[str, str] | None:
    """Read a post's text and check its picture; None if either is faulty, which goes to `problems`."""
    columns = {}
    for column, suffix, read in (("text", ".txt", read_text), ("image", ".jpg", check_picture)):
        try:
            columns[column] = read(folder / "data" / f"{post.id}{suffix}")
        except Fault as fault:
            problems.append(Problem(post.line, *fault.args))
    label = combine_labels(post.text_label, post.image_label)
    labels = {"text_label": post.text_label, "image_label": post.image_label, "label": label}
    return {"id": post.id, **columns, **labels} if len(columns) == 2 else None


def read_bytes(path: Path, what: str, size: int = -1) -> bytes:
    """Read a file of a post, or its first bytes only."""
    try:
        if not path.is_file():
            raise Fault(f"missing {what}", f"data/{path.name}")
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:  # it is forbidden, on a broken disk, or no name of a file is that long
        raise Fault(f"unreadable {what}", f"data/{path.name}: {error.strerror}") from error


def read_text(path: Path) -> str:
    """Read a text in UTF-8, or else in GB18030, as about a quarter of MVSA-Single is; no final line break."""
    content = read_bytes(path, "text")
    # GB18030 takes nearly any bytes, so it comes second; cp1252 or latin-1 would turn curly quotes into rubbish.
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            return content.decode(encoding).rstrip("\r\n")
        except UnicodeDecodeError:
            continue
    raise Fault("undecodable text", f"data/{path.name} is neither UTF-8 nor GB18030")


def check_picture(path: Path) -> str:
    """Return the path of a picture that can be decoded; only one that looks cut off is decoded to find out."""
    read_bytes(path, "picture", 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if not ends_complete(path, image.format):
                    image.load()
    except Exception as error:  # PIL raises nearly anything for a broken file
        raise Fault("broken picture", f"data/{path.name}: {type(error).__name__}: {error}") from error
    return str(path)


def ends_complete(path: Path, image_format: str | None) -> bool:
    """Tell whether a JPEG, PNG or GIF ends with its end mark, give or take some padding."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 64, 0))
        tail = file.read().rstrip(b"\0\r\n ")
    return image_format in END_MARKS and tail.endswith(END_MARKS[image_format])


def report(problems: list[Problem], folder: Path, on_error: str) -> None:
    """Raise, or log as one warning, the number of problems of each kind and the first ten of them."""
    if not problems:
        return
    kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(p.kind for p in problems).most_common())
    first = [f"  {LABEL_FILE}:{p.line}: {p.kind}: {p.detail}" for p in sorted(problems)[:10]]
    advice = "these posts are left out" if on_error == "skip" else 'on_error="skip" leaves these posts out'
    message = "\n".join([f"problems in {folder}: {len(problems)} ({kinds}); {advice}. The first:", *first])
    if on_error == "raise":
        raise MvsaDataError(message)
    logger.warning(message)


def as_dataset(examples: list[dict[str, str]], variant: str) -> datasets.Dataset:
    """Build the data set in memory, so that no cache file is written; the pictures stay paths."""
    string, label = datasets.Value("string"), datasets.ClassLabel(names=LABELS)
    labels = {"text_label": label, "image_label": label, "label": label}
    features = datasets.Features({"id": string, "text": string, "image": datasets.Image(), **labels})
    info = datasets.DatasetInfo(features=features, dataset_name="mvsa", config_name=variant)
    return datasets.Dataset.from_dict({name: [e[name] for e in examples] for name in features}, info=info)


def split_mvsa(
    dataset: datasets.Dataset, splits: str | Path = "random", seed: int = 42, group_duplicates: bool = False
) -> datasets.DatasetDict:
    """Cut a data set into train, validation and test; an empty one is left out, which is logged.

    Args:
        dataset: what `load_mvsa` gives; for "random" and JSON files any with its columns.
        splits: "random" (8:1:1, stratified by label); "clmlf" or "cheema:1" to "cheema:10", published for the variant
            in `dataset.info.config_name`; or a JSON file `{"train": [IDs], "validation": [IDs], "test": [IDs]}`.
        seed: of the random split.
        group_duplicates: keep posts that share a text (user names, links, case and spacing aside) or a picture (the
            same bytes) in one split. A random split then deals whole groups. A published one is not ours to reshuffle,
            and its test posts are what results are compared on: it loses the training posts whose group reaches into
            validation or test, and the validation posts whose group reaches into test.

    Returns:
        The splits, each in the order of `dataset`.

    Raises:
        MvsaDataError: a ValueError; an unknown split, a bad JSON file, or a split that shares no post with the data.

    Source: 8:1:1 from the paper; published splits in splits/README.md; grouping is our choice, since 42 of the 450
        test texts of clmlf (MVSA-Single) are also training texts.
    """
    groups = duplicate_groups(dataset) if group_duplicates else list(range(len(dataset)))
    if str(splits) == "random":
        rows = random_split(list(dataset["label"]), groups, seed)
    else:
        rows = published_split(dataset, str(splits))
        rows = remove_leaks(rows, groups) if group_duplicates else rows
    if not any(rows.values()):
        raise MvsaDataError(f"the split {str(splits)!r} holds none of the {len(dataset)} posts")
    for split in SHARES:
        if not rows[split]:
            logger.warning("the %s split of %s is empty and left out", split, splits)
    return datasets.DatasetDict({split: dataset.select(rows[split]) for split in SHARES if rows[split]})


def random_split(labels: list[int], groups: list[int], seed: int) -> dict[str, list[int]]:
    """Deal whole groups, the biggest first, each to the split whose counts it brings nearest to 8:1:1.

    Args:
        labels: label of each row.
        groups: group number of each row; all different where duplicates do not matter.
        seed: of the order in which groups of one size are dealt.

    Returns:
        Row numbers of each split, ascending.

    Source: our choice. Nearest means by chi-square over the count of each label and, with the weight of all labels
        together, of all posts. Ungrouped posts end within about one of their share, in total and in each class.
    """
    members = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    order = list(members.values())
    random.Random(seed).shuffle(order)
    weight = len(set(labels))
    wanted = Counter(labels) + Counter(all=weight * len(labels))
    dealt: dict[str, Counter] = {split: Counter() for split in SHARES}
    rows: dict[str, list[int]] = {split: [] for split in SHARES}
    for group in sorted(order, key=len, reverse=True):
        counts = Counter(labels[row] for row in group) + Counter(all=weight * len(group))
        growth = {split: chi_square_growth(counts, dealt[split], share, wanted) for split, share in SHARES.items()}
        nearest = min(growth, key=growth.get)
        dealt[nearest] += counts
        rows[nearest] += group
    return {split: sorted(rows[split]) for split in SHARES}


def chi_square_growth(counts: Counter, dealt: Counter, share: float, wanted: Counter) -> float:
    """Growth of the chi-square distance from its share of `wanted` when a split with `dealt` takes these counts."""
    return sum(n * (2 * (dealt[key] - share * wanted[key]) + n) / (share * wanted[key]) for key, n in counts.items())


def published_split(dataset: datasets.Dataset, splits: str) -> dict[str, list[int]]:
    """Find the rows of a published split or JSON file, and warn once of the posts that are not in the data set."""
    row_of = {post_id: row for row, post_id in enumerate(dataset["id"])}
    ids = read_split(splits, dataset.info.config_name, row_of.keys())
    absent = {split: len(ids[split] - row_of.keys()) for split in SHARES}
    if any(absent.values()):
        counts = ", ".join(f"{split} {absent[split]} of {len(ids[split])}" for split in SHARES)
        logger.warning("%d posts of the split %s are not in the data: %s", sum(absent.values()), splits, counts)
    unused = len(row_of.keys() - set().union(*ids.values()))
    if unused:
        logger.info("%d posts are in no part of the split %s", unused, splits)
    return {split: sorted(row_of[post_id] for post_id in ids[split] & row_of.keys()) for split in SHARES}


def read_split(splits: str, variant: str | None, valid: Iterable[str]) -> dict[str, set[str]]:
    """Look up the IDs of a split by its name or in a JSON file; `valid` are those of the data set."""
    fold = re.fullmatch(r"cheema:([1-9]|10)", splits)
    if splits == "clmlf" or fold:
        if variant not in ANNOTATORS:
            raise MvsaDataError(f"{splits} is a split of MVSA, and this data set does not come from load_mvsa")
        path = SPLITS_FOLDER / f"mvsa_{variant}_{splits.partition(':')[0]}.json"
    elif Path(splits).is_file():
        path = Path(splits)
    else:
        raise MvsaDataError(f"unknown split {splits!r}: choose {SPLIT_CHOICES}")
    if not fold:
        return read_ids(path)
    held_out = json.loads(path.read_text())["folds"][int(fold[1]) - 1]
    ids = {split: {str(post_id) for post_id in held_out[split]} for split in ("validation", "test")}
    return {"train": set(valid) - ids["validation"] - ids["test"], **ids}


def read_ids(path: Path) -> dict[str, set[str]]:
    """Read a JSON file of IDs, numbers or strings, and check that no ID is in two splits."""
    expected = '{"train": [IDs], "validation": [IDs], "test": [IDs]}'
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if not content.keys() <= SHARES.keys():
            raise ValueError(f"it has {sorted(content.keys() - SHARES.keys())}")
        if not all(isinstance(part, list) for part in content.values()):
            raise ValueError("a split is not a list")
        ids = {split: {str(post_id) for post_id in content.get(split, [])} for split in SHARES}
    except (ValueError, AttributeError, RecursionError) as error:
        raise MvsaDataError(f"{path} is not a JSON file of the form {expected}: {error}") from error
    repeated = [post_id for post_id, count in Counter(i for part in ids.values() for i in part).items() if count > 1]
    if repeated:
        raise MvsaDataError(f"{path} has {len(repeated)} IDs in two splits, {min(repeated)} for one")
    return ids


def remove_leaks(rows: dict[str, list[int]], groups: list[int]) -> dict[str, list[int]]:
    """Take out of training what is also in validation or test, and out of validation what is also in test."""
    kept, taken = {}, set()
    for split in ("test", "validation", "train"):
        kept[split] = [row for row in rows[split] if groups[row] not in taken]
        taken |= {groups[row] for row in rows[split]}
    removed = {split: len(rows[split]) - len(kept[split]) for split in ("train", "validation")}
    if any(removed.values()):
        message = "%d training and %d validation posts removed: their text or picture is also in a later split"
        logger.warning(message, removed["train"], removed["validation"])
    return kept


def duplicate_groups(dataset: datasets.Dataset) -> list[int]:
    """Number the groups of posts that are linked, directly or through others, by a text or a picture."""
    parents = list(range(len(dataset)))

    def root(row: int) -> int:
        """Follow a row to the one that stands for its group."""
        while parents[row] != row:
            parents[row] = parents[parents[row]]  # halves the way for the next one
            row = parents[row]
        return row

    first_row: dict[str, int] = {}
    pictures = dataset.cast_column("image", datasets.Image(decode=False))["image"]
    for row, (text, picture) in enumerate(zip(dataset["text"], pictures, strict=True)):
        for key in (normal_text(text), picture_hash(picture)):
            if key:
                parents[root(row)] = root(first_row.setdefault(key, row))
    return [root(row) for row in range(len(dataset))]


def normal_text(text: str) -> str:
    """Strip a text of user names, links, case and spacing: what is left is the same for near copies of a tweet."""
    return " ".join(NAMES_AND_LINKS.sub(" ", text).casefold().split())


def picture_hash(picture: dict[str, str | bytes | None]) -> str:
    """Hash the bytes of an undecoded picture; the prefix keeps it apart from any text."""
    content = picture["bytes"] if picture["bytes"] is not None else Path(picture["path"]).read_bytes()
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
