"""Files that are whole or absent: JSON by write-temporary, fsync, rename; torn-proof JSONL."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson

from harness.errors import StorageError, UserError

_DAY_S = 86_400.0

Guard = Callable[[], None]
"""Raises where this process must write nothing more, as a `Lease.guard` does."""


def unguarded() -> None:
    """The guard of files that nobody takes over."""


def temporary_name(name: str) -> str:
    """A file of this process's own, of which `leftovers` can tell whether it lives.

    The whole name stays at the end: some writers choose the format by it.
    """
    return f".tmp.{uuid.uuid4().hex[:8]}-{_machine()}-{os.getpid()}.{name}"


def leftovers(folder: Path) -> list[Path]:
    """Temporary files in a stage's folder whose writer is gone.

    Of a writer on another machine only age can tell; a file is written in far less than a day.
    """
    found = []
    places = (".tmp.*", "*/.tmp.*", "attempts/*/.tmp.*")
    for path in [p for place in places for p in folder.glob(place)]:
        match = re.match(r"\.tmp\.[0-9a-f]+-([0-9a-f]+)-(\d+)\.", path.name)
        if match and match[1] == _machine() and sys.platform == "linux":
            is_left = not process_exists(int(match[2]))
        else:
            try:
                is_left = time.time() - path.stat().st_mtime > _DAY_S
            except OSError:  # gone by now
                continue
        found += [path] * is_left
    return found


def remove_leftovers(folder: Path) -> None:
    """Takes away what `leftovers` finds."""
    for path in leftovers(folder):
        path.unlink(missing_ok=True)


def process_exists(pid: int) -> bool:
    """Asked of the system: /proc may be missing, or show the pids of another namespace."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


@functools.cache
def _machine() -> str:
    """Differs between machines, boots and containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        boot += os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = ""
    name = os.environ.get("HARNESS_HOST") or socket.gethostname()
    return hashlib.sha256(f"{name}{boot}".encode()).hexdigest()[:8]


def write_bytes(path: Path, content: bytes, guard: Guard = unguarded) -> None:
    """Replaces the file in one step: readers see the old content or the new, never a part.

    `guard` is called right before that step: by then a process that was stopped while it wrote, or
    whose file server hung, may own the file no more.
    """
    temporary = path.with_name(temporary_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        guard()
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise StorageError(path, error) from error
        raise


def dump(value: Any) -> str:
    """JSON as the ledger writes it. NaN and infinity are refused: they are not JSON."""
    return json.dumps(value, indent=1, sort_keys=False, allow_nan=False, ensure_ascii=False)


def write_json(path: Path, value: Any, guard: Guard = unguarded) -> None:
    """Writes a JSON file in one step; `guard` as in `write_bytes`."""
    write_bytes(path, (dump(value) + "\n").encode(), guard)


def parse(raw: bytes) -> Any:
    """JSON, by the fast parser; by Python's own what that refuses, such as a lone surrogate.

    Raises ValueError.
    """
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return json.loads(raw)


def _read(path: Path) -> bytes:
    for _ in range(3):
        try:
            return path.read_bytes()
        except OSError as error:
            # On NFS, of a file that another host replaced between opening and reading it.
            if error.errno != errno.ESTALE:
                raise
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any] | None:
    """The content, or None if there is no such file. Raises UserError if it is not JSON."""
    try:
        raw = _read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        value = parse(raw)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); remove the file and submit again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole rows. A last line without its newline was torn by a kill and is left out.

    Raises UserError, naming the line, if any other is not a JSON object.
    """
    try:
        raw = _read(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    end = raw.rfind(b"\n") + 1
    rows = []
    for number, line in enumerate(raw[:end].split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse(line)
        except ValueError as error:
            raise UserError(
                f"{path}:{number}: not JSON ({error}); mend or remove the line"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object; mend or remove the line")
        rows.append(row)
    return rows


def jsonl(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as JSONL bytes."""
    return b"".join(
        json.dumps(row, allow_nan=False, separators=(", ", ": ")).encode() + b"\n" for row in rows
    )


class JsonlWriter:
    """Appends rows to a file; one write call a row, so a reader sees whole lines.

    `guard` is called right before every write.
    """

    def __init__(self, path: Path, guard: Guard = unguarded) -> None:
        self.path, self.guard = path, guard
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            raw = _read(path) if path.exists() else b""
        except OSError as error:
            raise StorageError(path, error) from error
        # A torn last line of a killed writer is cut off, or the next row would be glued to it.
        end = raw.rfind(b"\n") + 1
        if end != len(raw):
            write_bytes(path, raw[:end], guard)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one row and hands it to the operating system at once."""
        try:
            with open(self.path, "ab") as file:
                self.guard()
                file.write(jsonl([row]))
        except OSError as error:
            raise StorageError(self.path, error) from error

    def sync(self) -> None:
        """Makes sure that what was added survives a machine that goes down."""
        try:
            with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(self.path, error) from error

    def rewind(self, step: int) -> None:
        """Keeps the rows up to `step`; a resumed run writes the later ones again."""
        rows = read_jsonl(self.path)
        kept = [r for r in rows if r.get("step", 0) <= step]
        if len(kept) != len(rows):
            write_bytes(self.path, jsonl(kept), self.guard)
