"""Files that are whole or absent: JSON by write-temporary, fsync, rename; torn-proof JSONL."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from harness.errors import HarnessError, UserError


def write_bytes(path: Path, content: bytes, before: Callable[[], None] = lambda: None) -> None:
    """Replaces the file in one step: readers see the old content or the new, never a part.

    `before` is called right before that step; if it raises, nothing has changed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        before()
        os.replace(temporary, path)
    except HarnessError:
        temporary.unlink(missing_ok=True)
        raise
    except OSError as error:
        temporary.unlink(missing_ok=True)
        why = error.strerror
        raise UserError(f"{path}: cannot be written: {why}; free space or chmod") from error


def dump(value: Any) -> str:
    """JSON as the ledger writes it. NaN and infinity are refused: they are not JSON."""
    return json.dumps(value, indent=1, sort_keys=False, allow_nan=False, ensure_ascii=False)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file in one step."""
    write_bytes(path, (dump(value) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The content, or None if there is no such file. Raises UserError if it is not JSON."""
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); remove the file and submit again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole rows. A last line without its newline was torn by a kill and is left out."""
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return []
    end = raw.rfind(b"\n") + 1
    return [json.loads(line) for line in raw[:end].splitlines() if line.strip()]


def jsonl(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as JSONL bytes."""
    return b"".join(
        json.dumps(row, allow_nan=False, separators=(", ", ": ")).encode() + b"\n" for row in rows
    )


class JsonlWriter:
    """Appends rows to a file; one write call a row, so a reader sees whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # A torn last line of a killed writer is cut off, or the next row would be glued to it.
        if path.exists():
            raw = path.read_bytes()
            end = raw.rfind(b"\n") + 1
            if end != len(raw):
                write_bytes(path, raw[:end])

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one row and hands it to the operating system at once."""
        with open(self.path, "ab") as file:
            file.write(jsonl([row]))

    def rewind(self, step: int) -> None:
        """Keeps the rows up to `step`; a resumed run writes the later ones again."""
        rows = read_jsonl(self.path)
        kept = [r for r in rows if r.get("step", 0) <= step]
        if len(kept) != len(rows):
            write_bytes(self.path, jsonl(kept))
