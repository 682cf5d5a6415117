"""Tables of text line by line: where the readers of `datasets` fail, this finds the rows that cannot be parsed."""

import csv
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TextIO

import fsspec
from huggingface_hub.constants import HF_HOME

from clipcacg.scripts.data.errors import InputError

MENDED = Path(HF_HOME) / "clipcacg" / "mended"
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
DELIMITERS = ",;\t|"

Reasons = dict[str, dict[int, str]]  # by split, what is wrong with a row, by its index
Row = dict[str, Any]


def table_suffix(path: Path) -> str:
    """The suffix that tells a table's format, in small letters and without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSED), "")


def delimiter_of(path: Path) -> str:
    """What separates the cells of a table: a tab in .tsv, else what its first line has most of, a comma if in doubt.

    Raises:
        InputError: If the table is in UTF-16, as Excel saves "Unicode text".
    """
    with fsspec.open(path, "rb", compression="infer") as file:
        head = file.readline(1 << 20)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path} is encoded in UTF-16: save it in UTF-8.")
    unquoted = re.sub(r'"[^"]*"', "", head.decode(errors="replace"))
    return "\t" if table_suffix(path) == ".tsv" else max(DELIMITERS, key=unquoted.count)


def parse(path: Path) -> Iterator[tuple[Row, str | None]]:
    """Yield the rows of a table of JSON lines or of cells, and for each what is wrong with it.

    A row that cannot be parsed is empty.

    Raises:
        ValueError: If the table is one JSON list that cannot be parsed.
    """
    with fsspec.open(path, "rt", compression="infer", encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = _json_rows(file) if ".json" in path.name.lower() else _cells(file, delimiter_of(path))
        for row, fault in rows:
            yield row, fault and f"{path.name}, {fault}"


def mend(paths: Iterable[Path]) -> tuple[dict[Path, Path], dict[int, str]]:
    """Copy tables of text, with an empty row in place of each that cannot be parsed.

    Returns:
        The copy of each table; and what is wrong with a row of all of them together, by its index.
    """
    copies, bad, index = dict[Path, Path](), dict[int, str](), 0
    MENDED.mkdir(parents=True, exist_ok=True)
    for path in paths:
        stat = path.stat()
        name = hashlib.sha256(f"{path.resolve()} {stat.st_mtime_ns} {stat.st_size}".encode()).hexdigest()[:16]
        is_json = ".json" in path.name.lower()
        copies[path] = MENDED / f"{name}{'.jsonl' if is_json else '.csv'}"
        with copies[path].open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            header = None
            for row, reason in parse(path):
                if is_json:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                else:
                    if header is None:
                        header = list(row)
                        table.writerow(header)
                    table.writerow(row.values())
                if reason:
                    bad[index] = reason
                index += 1
    return copies, bad


def _json_rows(file: TextIO) -> Iterator[tuple[Row, str | None]]:
    """The rows of JSON lines, or of one list over several lines."""
    first = file.readline()
    if first.startswith("["):
        try:
            items = json.loads(first + file.read())
        except RecursionError as error:
            raise ValueError(str(error)) from error
        yield from ((item if isinstance(item, dict) else {"text": item}, None) for item in items)
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


def _cells(file: TextIO, delimiter: str) -> Iterator[tuple[Row, str | None]]:
    """The rows below the header of a table.

    Strictly: an unclosed quote would otherwise swallow the rows below it. Behind such a line reading starts anew.
    """
    csv.field_size_limit(sys.maxsize)
    lines, taken, number = iter(file), list[str](), 0

    def take() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line

    reader = csv.reader(take(), delimiter=delimiter, strict=True)
    header = next(reader, [])
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
            reader = csv.reader(take(), delimiter=delimiter, strict=True)
            continue
        while len(cells) > len(header) and not cells[-1]:  # a delimiter at the end of the line
            cells.pop()
        if len(cells) > len(header):
            fault = f"line {number + 1}: it has {len(cells)} cells, the header {len(header)}"
            yield dict.fromkeys(header, ""), fault
        # pandas skips empty lines, and in a table of several columns lines of spaces.
        elif cells and (len(header) == 1 or len(cells) > 1 or cells[0].strip()):
            yield dict(zip_longest(header, cells, fillvalue="")), None
