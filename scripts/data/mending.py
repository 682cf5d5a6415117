"""Tables of text line by line: where the readers of `datasets` fail, this finds the rows that cannot be parsed."""

import csv
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, count, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import fsspec
from huggingface_hub.constants import HF_HOME

from clipcacg.scripts.data.errors import InputError

MENDED = Path(HF_HOME) / "clipcacg" / "mended"
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
DELIMITERS = ",;\t|"
SEP_LINE = re.compile(r"""sep=(.)[\r\n]+""")  # with which Excel says what separates the cells
HEAD = 1 << 16  # bytes of a table that tell its form
csv.field_size_limit(sys.maxsize)

Reasons = dict[str, dict[int, str]]  # by split, what is wrong with a row, by its index
Row = dict[str, Any]


def table_suffix(path: Path) -> str:
    """The suffix that tells a table's format, in small letters and without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSED), "")


def is_json(path: Path) -> bool:
    """Whether a table of text is of JSON."""
    return table_suffix(path) in (".json", ".jsonl", ".ndjson")


class Form(NamedTuple):
    """How the cells of a table are written.

    Args:
        delimiter: What separates them: a tab in .tsv, else what the header has most of, a comma if in doubt.
        has_spaces: Each delimiter has a space behind it, which belongs to no cell.
        skipped: Lines above the header.
        header: Names of the columns without spaces around them; a second column text is text.1, as in pandas.
    """

    delimiter: str
    has_spaces: bool
    skipped: int
    header: tuple[str, ...]


def head_of(path: Path) -> str:
    """The first lines of a table of text.

    Raises:
        InputError: If it is no text in UTF-8. Excel saves "Unicode text" in UTF-16.
    """
    with fsspec.open(path, "rb", compression="infer") as file:
        first = file.readline(1 << 20)
        head = first + file.read(HEAD)
    if first.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path} is encoded in UTF-16: save it in UTF-8.")
    if b"\0" in first:
        raise InputError(f"{path} is compressed, encoded in UTF-16 or not a text: save it as a text in UTF-8.")
    return head.decode("utf-8-sig", errors="replace")


def form_of(path: Path) -> Form:
    """How the cells of a table are written, by its first lines; see `head_of`."""
    head = head_of(path)
    separator = SEP_LINE.match(head)
    lines = re.split(r"[\r\n]+", head[separator.end() :] if separator else head)
    unquoted = re.sub(r'"[^"]*"', "", next(filter(str.strip, lines), ""))
    delimiter = "\t" if table_suffix(path) == ".tsv" else max(DELIMITERS, key=unquoted.count)
    delimiter = separator[1] if separator else delimiter
    has_spaces = f"{delimiter} " in unquoted
    rows = csv.reader(io.StringIO(head, newline=""), delimiter=delimiter, skipinitialspace=has_spaces)
    for _ in range(bool(separator)):
        next(rows)
    header, names = next((row for row in rows if _is_row(row)), []), list[str]()
    for index, cell in enumerate(header):
        name = cell.strip() or f"Unnamed: {index}"
        names.append(next(n for n in chain([name], (f"{name}.{again}" for again in count(1))) if n not in names))
    return Form(delimiter, has_spaces, int(bool(separator)), tuple(names))


def _is_row(cells: list[str]) -> bool:
    """Whether a line is the header, and not an empty one above it."""
    return len(cells) > 1 or any(cell.strip() for cell in cells)


def parse(path: Path) -> Iterator[tuple[Row, str | None]]:
    """Yield the rows of a table of JSON lines or of cells, and for each what is wrong with it.

    A row that cannot be parsed is empty.

    Raises:
        InputError: If the table has no header that can be parsed, or is one JSON list that cannot be.
    """
    with fsspec.open(path, "rt", compression="infer", encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = _json_rows(file) if is_json(path) else _cells(file, form_of(path))
        try:
            for row, fault in rows:
                yield row, fault and f"{path.name}, {fault}"
        except ValueError as error:
            raise InputError(f"{path} cannot be read: {error}.") from error


def mend(paths: Iterable[Path]) -> tuple[dict[Path, Path], dict[int, str], int]:
    """Copy tables of text, with an empty row in place of each that cannot be parsed.

    Returns:
        The copy of each table; what is wrong with a row of all of them together, by its index; and how many there are.
    """
    copies, bad, index = dict[Path, Path](), dict[int, str](), 0
    MENDED.mkdir(parents=True, exist_ok=True)
    for path in paths:
        stat = path.stat()
        name = hashlib.sha256(f"{path.resolve()} {stat.st_mtime_ns} {stat.st_size}".encode()).hexdigest()[:16]
        copies[path] = MENDED / f"{name}{'.jsonl' if is_json(path) else '.csv'}"
        with copies[path].open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, quoting=csv.QUOTE_ALL)  # or a cell of spaces alone would be an empty line
            if not is_json(path):
                table.writerow(form_of(path).header)
            for row, reason in parse(path):
                if is_json(path):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                else:
                    table.writerow(row.values())
                if reason:
                    bad[index] = reason
                index += 1
    return copies, bad, index


def _json_rows(file: TextIO) -> Iterator[tuple[Row, str | None]]:
    """The rows of JSON lines, or of one list over several lines."""
    first = file.readline()
    if first.startswith("["):
        try:
            items = json.loads(first + file.read())
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{error}. It is one list: mend it, or save each row as a line of its own") from error
        for number, item in enumerate(items, start=1):
            yield (item, None) if isinstance(item, dict) else ({}, f"item {number}: it is no JSON object")
        return
    for number, line in enumerate(chain([first], file), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
            if not isinstance(row, dict):
                raise ValueError("it is no JSON object")
            yield row, None
        except (RecursionError, ValueError) as error:
            yield {}, f"line {number}: {error}"


def _cells(file: TextIO, form: Form) -> Iterator[tuple[Row, str | None]]:
    """The rows below the header of a table.

    Strictly: an unclosed quote would otherwise swallow the rows below it. Behind such a line reading starts anew.
    """
    lines, taken, number, header = iter(file), list[str](), 0, form.header

    def take() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line

    def read() -> Any:
        return csv.reader(take(), delimiter=form.delimiter, skipinitialspace=form.has_spaces, strict=True)

    reader = read()
    try:
        for _ in range(form.skipped):
            next(reader)
        next(filter(_is_row, reader), None)
    except csv.Error as error:
        raise ValueError(f"its header: {error}") from error
    while True:
        number += len(taken)
        taken.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield dict.fromkeys(header, ""), f"line {number + 1}: {error}"
            lines = chain(taken[1:], lines)
            del taken[1:]
            reader = read()
            continue
        while len(cells) > len(header) and not cells[-1]:  # a delimiter at the end of the line
            cells.pop()
        if len(cells) > len(header):
            fault = f"line {number + 1}: it has {len(cells)} cells, the header {len(header)}"
            yield dict.fromkeys(header, ""), fault
        elif len(cells) > 1 or "".join(taken).strip():  # pandas skips lines of spaces
            yield dict(zip_longest(header, cells, fillvalue="")), None
