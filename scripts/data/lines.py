"""Files of JSON lines that a killed command continues."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


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


def origin_note(output: Path) -> Path:
    """The hidden file beside a file of predictions that records what they are of."""
    return output.with_name(f".{output.name}.origin")


def short_hash(value: Any) -> str:
    """Hash a JSON value independently of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
