"""The arrangement of a subset or a resampled set, kept on disk so that a resumed run maps it.

Making one sorts every image of the subset: seconds for ten million. Only a cache: it can be deleted
at any time, and is named after all that it is made of.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from harness.data.index import mapped
from harness.data.order import Arrangement
from harness.ledger.files import temporary_name
from harness.ledger.lease import exclusive

_VERSION = 1
"""Of what an arrangement is for the same images; a change makes new files."""


def kept(folder: Path, made_of: object, make: Callable[[], Arrangement]) -> Arrangement:
    """The arrangement below `folder` that is made of this (plain values); made if it is not there.

    Where the folder cannot be written to, it is made every time.
    """
    words = json.dumps([_VERSION, made_of]).encode()
    path = folder / f"{hashlib.sha256(words).hexdigest()[:32]}.safetensors"
    found = _read(path)
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(path.with_suffix(".lock")):  # one process of the machine sorts
            found = _read(path)
            if found is None:
                found = make()
                _write(path, found)
            return found
    except OSError:
        return found or make()


def _write(path: Path, made: Arrangement) -> None:
    columns = {name: column for name, column in vars(made).items() if column is not None}
    temporary = path.with_name(temporary_name(path.name))
    try:
        save_file({name: np.ascontiguousarray(c) for name, c in columns.items()}, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> Arrangement | None:
    try:
        with path.open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        begin = 8 + int.from_bytes(view[:8], "little")
        header = json.loads(view[8:begin])
        names = [field.name for field in fields(Arrangement)]
        columns = {n: mapped(view, begin, header[n]) if n in header else None for n in names}
        bounds = columns["bounds"]
        if bounds is None or all(columns[name] is None for name in ("rows", "ends")):
            return None
        return Arrangement(columns["rows"], bounds, columns["ends"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or torn: it is made again
