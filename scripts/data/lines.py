"""Files of JSON lines that a killed command continues."""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

logger = logging.getLogger(__name__)

PART = ".part"


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append a line and flush it to disk. An incomplete last line of a killed run stays a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            file.write(b"" if file.read(1) == b"\n" else b"\n")
        file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a file; none if it does not exist."""
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines() if path.exists() else [], start=1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            if text:
                logger.warning("%s:%d is incomplete and ignored", path, number)
    return lines


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """Write a text file under a temporary name of this process alone, and rename it when it is whole.

    A process that is killed leaves its temporary file; see `remove_parts`.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PART}")
    try:
        with part.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        try:
            part.replace(path)
        except FileNotFoundError:  # another process wrote the same file and removed this one's part
            if not path.exists():
                raise
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left of files that `whole_file` was writing."""
    for part in folder.glob(f".*{PART}"):
        part.unlink(missing_ok=True)


def origin_note(output: Path) -> Path:
    """The hidden file that records what predictions are of: beside their file, or in their folder."""
    return output / ".origin" if output.is_dir() else output.with_name(f".{output.name}.origin")


def is_output(path: Path) -> bool:
    """Whether `predict.py` wrote the file, alone or in a folder of its own."""
    return origin_note(path).exists() or (path.suffix in (".jsonl", ".json") and origin_note(path.parent).exists())


def short_hash(value: Any) -> str:
    """Hash a JSON value independently of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
