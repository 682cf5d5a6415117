"""Read an MVSA folder as a Hugging Face data set.

MVSA (Niu et al., MMM 2016) is distributed as a folder, which this module never writes to:

    DATA_DIR/labelResultAll.txt    one row per post: ID<TAB>text,image, with one text,image column per annotator; or
                                   image,text, if the header says so
    DATA_DIR/data/<ID>.txt         the text, in UTF-8 or GB18030
    DATA_DIR/data/<ID>.jpg         the image

MVSA-Single has one annotator, MVSA-Multiple has three.
"""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from clipcacg.scripts.data.checks import check_image
from clipcacg.scripts.data.errors import InputError
from clipcacg.scripts.data.faults import Faults
from clipcacg.scripts.data.sources import is_table

logger = logging.getLogger(__name__)

LABELS = ["negative", "neutral", "positive"]
UNKNOWN_LABEL = -100  # PyTorch's losses ignore this class
ANNOTATORS = {"single": 1, "multiple": 3}
LABEL_FILE = "labelResultAll.txt"
# No separator, no leading dot and no two dots in a row: such a file name cannot leave the folder data/.
SAFE_ID = re.compile(r"[\w-]+(\.[\w-]+)*")


class Problem(NamedTuple):
    """A fault of one post, and the line of the label file that leads to it."""

    line: int
    kind: str
    detail: str


class Post(NamedTuple):
    """A row of the label file. A label is None if the annotators have no majority."""

    line: int
    id: str
    text_label: str | None
    image_label: str | None

    @property
    def label(self) -> str | None:
        return combine_labels(self.text_label, self.image_label)


def combine_labels(text_label: str | None, image_label: str | None) -> str | None:
    """Combine the labels of text and image into the label of the post.

    Args:
        text_label (`str`, *optional*): "negative", "neutral" or "positive"; None if there is no majority.
        image_label (`str`, *optional*): likewise.

    Returns:
        The common label; if one of them is neutral, the other; None for positive against negative or without a
        majority: such a post is dropped.

    Source: the paper's labelling rule, which gives the counts of its Table I.
    """
    if text_label == image_label:
        return text_label
    if "neutral" in (text_label, image_label):
        return image_label if text_label == "neutral" else text_label
    return None


def majority_label(votes: Sequence[str]) -> str | None:
    """Return the label that more than half of the annotators gave, or None.

    Source: the paper's rule for the three annotators of MVSA-Multiple. A single annotator is a majority.
    """
    label, count = Counter(votes).most_common(1)[0]
    return label if 2 * count > len(votes) else None


def load_mvsa(
    data_dir: str | Path,
    variant: str | None = None,
    on_error: str = "raise",
    keep_conflicting: bool = False,
    faults: Faults | None = None,
) -> datasets.Dataset:
    """Load an MVSA folder without decoding its images.

    Args:
        data_dir (`str` or `Path`): the folder that holds `labelResultAll.txt` and `data/`.
        variant (`str`, *optional*): "single" or "multiple". By default inferred from the number of annotators.
        on_error (`str`): "raise" stops at faulty posts; "skip" logs the same report as a warning and drops them.
        keep_conflicting (`bool`): keep the posts of a positive and a negative label, with the label -100. They can
            train modality heads; `split_mvsa` puts them into the training split.
        faults (`Faults`, *optional*): counts the posts that "skip" drops.

    Returns:
        `datasets.Dataset`: the posts in the order of the label file, with the columns id, text, image (a path, decoded
        on access), text_label, image_label and label. `info.config_name` is the variant. Other posts without a label
        are dropped and counted in the log; their files are not read.

    Raises:
        InputError: the folder is incomplete, posts are faulty, no post is usable, or `variant` contradicts the labels.
    """
    if on_error not in ("raise", "skip"):
        raise InputError(f'on_error must be "raise" or "skip", got {on_error!r}')
    folder = Path(data_dir).expanduser().absolute()
    rows = _read_rows(folder)
    variant = _check_variant(rows, folder, variant)
    problems: list[Problem] = []
    posts = _drop_unlabelled(_parse_rows(rows, ANNOTATORS[variant], problems), keep_conflicting)
    examples = [example for post in posts if (example := _read_post(folder, post, problems))]
    _report(problems, folder, on_error)
    if faults is not None:
        faults.num_rows += len(rows)
        faults.left_out |= {f"{LABEL_FILE}:{p.line}": f"{p.kind}: {p.detail}" for p in sorted(problems)}
    if not examples:
        raise InputError(f"no usable post in {folder}: {len(rows)} rows, {len(problems)} problems")
    return as_dataset(examples, variant)


def read_folder(source: Path, modalities: Sequence[str]) -> list[dict[str, str | None]]:
    """Read posts without labels: <ID>.jpg and <ID>.txt of a folder or of its subfolder `data`, in the order of IDs.

    Args:
        source: The folder.
        modalities: "image", "text" or both.

    Returns:
        One {id, text, image, error} per post; error is None if its text could be read. No post if there is no such
        folder, or if it or `data` holds a table and it has no label file of MVSA.
    """
    folder = source / "data" if (source / "data").is_dir() else source
    files = list(folder.iterdir()) if folder.is_dir() else []
    ids = {path.stem for path in files if path.suffix in (".jpg", ".txt")}
    tables = [path for path in {*files, *source.glob("*")} if path.stem == "metadata" or is_table(path)]
    if tables and not (source / LABEL_FILE).is_file():
        return []
    rows = []
    for post_id in sorted(ids, key=lambda post_id: (len(post_id), post_id)):
        row = {"id": post_id, "text": None, "image": str(folder / f"{post_id}.jpg"), "error": None}
        try:
            row["text"] = read_text(folder / f"{post_id}.txt") if "text" in modalities else None
        except InputError as error:
            row["error"] = str(error)
        rows.append(row)
    return rows


def read_text(path: Path) -> str:
    """Read a text in UTF-8 or, like about a quarter of MVSA-Single, in GB18030, without its final line break.

    Raises:
        InputError: "missing text", "unreadable text" or "undecodable text", a colon, and the file.
    """
    content = _read_bytes(path, "text")
    # GB18030 accepts nearly any bytes, so it comes second. cp1252 or latin-1 would turn curly quotes into garbage.
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            return content.decode(encoding).rstrip("\r\n")
        except UnicodeDecodeError:
            continue
    raise InputError(f"undecodable text: data/{path.name} is neither UTF-8 nor GB18030")


def as_dataset(examples: list[dict[str, Any]], variant: str) -> datasets.Dataset:
    """Build the data set in memory, so that no cache file is written."""
    string, label = datasets.Value("string"), datasets.ClassLabel(names=LABELS)
    features = datasets.Features(
        {"id": string, "text": string, "image": datasets.Image(), "text_label": label, "image_label": label}
    )
    info = datasets.DatasetInfo(features=features, dataset_name="mvsa", config_name=variant)
    dataset = datasets.Dataset.from_dict({name: [e[name] for e in examples] for name in features}, info=info)
    # `from_dict` refuses -100 as a class.
    labels = [UNKNOWN_LABEL if e["label"] is None else LABELS.index(e["label"]) for e in examples]
    return dataset.add_column("label", labels, feature=label)


def has_label(dataset: datasets.Dataset) -> list[bool]:
    """Whether each post has a label; a conflicting post has none."""
    if not isinstance(dataset.features["label"], datasets.ClassLabel):
        return [True] * len(dataset)
    return [label != UNKNOWN_LABEL for label in dataset["label"][:]]


def labelled(dataset: datasets.Dataset) -> datasets.Dataset:
    """Leave out the conflicting posts, which `load_mvsa(keep_conflicting=True)` keeps."""
    known = has_label(dataset)
    return dataset if all(known) else dataset.select([row for row, is_known in enumerate(known) if is_known])


def _read_rows(folder: Path) -> list[tuple[int, list[str]]]:
    """Read the label file into (line number, stripped fields), without blank lines and the header."""
    label_file = folder / LABEL_FILE
    if not label_file.is_file() or not (folder / "data").is_dir():
        layout = f"it should hold {LABEL_FILE} and data/ with <ID>.jpg and <ID>.txt for every post"
        raise InputError(f"{folder} is not an MVSA folder: {layout}")
    try:
        # Bytes that are not UTF-8 make a bad row, which is reported with its line.
        lines = label_file.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    except OSError as error:
        raise InputError(f"{label_file} cannot be read: {error.strerror}") from error
    rows = [
        (number, [field.strip() for field in line.rstrip().split("\t")])
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    has_header = bool(rows) and rows[0][1][0].lower().split()[:1] == ["id"]
    if not has_header:
        return rows
    # "image,text" names the columns in the other order.
    swapped = {column for column, names in enumerate(rows[0][1]) if names.lower().startswith("im")}
    return [
        (number, [",".join(reversed(f.split(","))) if column in swapped else f for column, f in enumerate(fields)])
        for number, fields in rows[1:]
    ]


def _check_variant(rows: list[tuple[int, list[str]]], folder: Path, variant: str | None) -> str:
    """Infer MVSA-Single or MVSA-Multiple from the number of columns of most rows."""
    columns = Counter(len(fields) - 1 for _, fields in rows)
    found = max(ANNOTATORS, key=lambda name: columns[ANNOTATORS[name]])
    if not columns[ANNOTATORS[found]]:
        raise InputError(f"no usable post in {folder / LABEL_FILE}: no row has one or three text,image columns")
    if variant not in (None, found):
        raise InputError(f"{folder / LABEL_FILE} is MVSA-{found.title()}, but the variant asked for is {variant!r}")
    return found


def _parse_rows(rows: list[tuple[int, list[str]]], annotators: int, problems: list[Problem]) -> list[Post]:
    """Turn rows into posts. Bad rows and repeated IDs go to `problems`; the first row of an ID counts."""
    posts: dict[str, Post] = {}
    for line, fields in rows:
        try:
            post = _parse_row(line, fields, annotators)
            if post.id in posts:
                raise InputError(f"duplicate ID: {post.id} is already on line {posts[post.id].line}")
            posts[post.id] = post
        except InputError as error:
            problems.append(_as_problem(line, error))
    return list(posts.values())


def _parse_row(line: int, fields: list[str], annotators: int) -> Post:
    post_id, *pairs = fields
    if not SAFE_ID.fullmatch(post_id):
        raise InputError(f"bad ID: {post_id[:80]!r} cannot be the name of a file in data/")
    votes = [[label.strip().lower() for label in pair.split(",")] for pair in pairs]
    if len(votes) != annotators or any(len(vote) != 2 for vote in votes):
        raise InputError(f"bad label row: post {post_id} does not have {annotators} text,image column(s)")
    unknown = [label for vote in votes for label in vote if label not in LABELS]
    if unknown:
        raise InputError(f"bad label row: post {post_id} has the unknown label {unknown[0][:80]!r}")
    text_votes, image_votes = zip(*votes, strict=True)
    return Post(line, post_id, majority_label(text_votes), majority_label(image_votes))


def _as_problem(line: int, error: InputError) -> Problem:
    kind, _, detail = str(error).partition(": ")
    return Problem(line, kind, detail)


def _drop_unlabelled(posts: list[Post], keep_conflicting: bool) -> list[Post]:
    """Drop the posts that the labelling rule leaves without a label, and log how many and why."""
    decided = [post for post in posts if None not in (post.text_label, post.image_label)]
    kept = [post for post in decided if post.label or keep_conflicting]
    if dropped := len(posts) - len(kept):
        conflicting, undecided = len(decided) - len(kept), len(posts) - len(decided)
        reasons = f"{conflicting} positive against negative, {undecided} without a majority of annotators"
        logger.info("%d posts dropped: %s", dropped, reasons)
    return kept


def _read_post(folder: Path, post: Post, problems: list[Problem]) -> dict[str, str | None] | None:
    """Read a post's text and check its image; if either is faulty, record the problems and return None."""
    columns: dict[str, str | None] = {}
    for column, suffix, read in (("text", ".txt", read_text), ("image", ".jpg", _check_image)):
        try:
            columns[column] = read(folder / "data" / f"{post.id}{suffix}")
        except InputError as error:
            problems.append(_as_problem(post.line, error))
    if len(columns) < 2:
        return None
    columns |= {"id": post.id, "text_label": post.text_label, "image_label": post.image_label, "label": post.label}
    return columns


def _read_bytes(path: Path, what: str, size: int = -1) -> bytes:
    """Read a file of a post, or only its first bytes."""
    try:
        if not path.is_file():
            raise InputError(f"missing {what}: data/{path.name}")
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:  # no permission, a broken disk, or a file name that is too long
        raise InputError(f"unreadable {what}: data/{path.name}: {error.strerror}") from error


def _check_image(path: Path) -> str:
    """Return the path of an image that exists and passes `check_image`."""
    _read_bytes(path, "image", 1)
    with path.open("rb") as file:
        check_image(file, f"data/{path.name}")
    return str(path)


def _report(problems: list[Problem], folder: Path, on_error: str) -> None:
    """Raise, or log as one warning, the number of problems of each kind and the first ten of them."""
    if not problems:
        return
    kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(p.kind for p in problems).most_common())
    first = [f"  {LABEL_FILE}:{p.line}: {p.kind}: {p.detail}" for p in sorted(problems)[:10]]
    advice = "these posts are left out" if on_error == "skip" else 'on_error="skip" leaves these posts out'
    message = "\n".join([f"problems in {folder}: {len(problems)} ({kinds}); {advice}. The first:", *first])
    if on_error == "raise":
        raise InputError(message)
    logger.warning(message)
