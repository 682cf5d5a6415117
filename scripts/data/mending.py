"""Copies of tables of text in which a row that cannot be parsed is an empty row, and why it cannot."""

import csv
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

import fsspec
from huggingface_hub.constants import HF_HOME

MENDED = Path(HF_HOME) / "clipcacg" / "mended"

Reasons = dict[str, dict[int, str]]


def mend(files: Mapping[str, list[Path]], delimiter: str) -> tuple[dict[str, list[Path]], Reasons]:
    """Copy the tables that have rows that cannot be parsed.

    Args:
        files: Tables by split, of JSON lines or comma- or tab-separated.
        delimiter: What separates the cells of the latter.

    Returns:
        The tables, copies in place of the faulty ones; and by split, the reason for each bad row, by its index.
    """
    mended: dict[str, list[Path]] = {}
    reasons: Reasons = {}
    for split, part in files.items():
        first = 0
        for path in part:
            stat = path.stat()
            name = hashlib.sha256(f"{path.resolve()} {stat.st_mtime_ns} {stat.st_size}".encode()).hexdigest()[:16]
            is_json = ".json" in path.name.lower()
            copy = MENDED / f"{name}{'.jsonl' if is_json else '.csv'}"
            MENDED.mkdir(parents=True, exist_ok=True)
            count, bad = 0, {}
            with (
                fsspec.open(
                    path, "rt", compression="infer", encoding="utf-8-sig", errors="replace", newline=""
                ) as rows,
                copy.open("w", encoding="utf-8", newline="") as target,
            ):
                for count, reason in enumerate(
                    _json_lines(rows, target) if is_json else _cells(rows, target, delimiter), 1
                ):
                    if reason:
                        bad[first + count - 1] = f"{path.name}, {reason}"
            first += count
            mended.setdefault(split, []).append(copy if bad else path)
            reasons.setdefault(split, {}).update(bad)
            if not bad:
                copy.unlink()
    return mended, reasons


def _json_lines(rows: TextIO, target: TextIO) -> Iterator[str | None]:
    """Copy JSON lines, and yield for each what is wrong with it. Nothing for one list over several lines."""
    for number, line in enumerate(rows, start=1):
        if number == 1 and line.startswith("["):
            return
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
            if not isinstance(row, dict):
                raise ValueError("it is no JSON object")
        except (RecursionError, ValueError) as error:
            target.write("{}\n")
            yield f"line {number}: {error}"
        else:
            target.write(line.rstrip("\r\n") + "\n")
            yield None


def _cells(rows: TextIO, target: TextIO, delimiter: str) -> Iterator[str | None]:
    """Copy a table, and yield for each row below the header what is wrong with it.

    Strictly: an unclosed quote would otherwise swallow the rows below it.
    """
    csv.field_size_limit(sys.maxsize)
    reader, writer = csv.reader(rows, delimiter=delimiter, strict=True), csv.writer(target, delimiter=delimiter)
    header = next(reader, [])
    writer.writerow(header)
    while True:
        try:
            row = next(reader)
            if len(header) > 1 and len(row) == 1 and not row[0].strip():  # pandas skips lines of spaces
                continue
            if len(row) > len(header):
                raise csv.Error(f"it has {len(row)} cells, the header {len(header)}")
        except StopIteration:
            return
        except csv.Error as error:
            writer.writerow([""] * len(header))
            yield f"line {reader.line_num}: {error}"
        else:
            if row:
                writer.writerow(row)
                yield None
