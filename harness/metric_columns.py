"""The numbers of metrics.jsonl once more, column by column: an Arrow file, read in no time.

Only a copy, for what reads thousands of curves at once, such as a report. metrics.jsonl stays the
truth: the copy counts as long as that file has the size and the time of change that it had when it
was copied, or the checksum (a run tree that was moved has other times).
"""

from __future__ import annotations

import contextlib
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import ipc

from harness.errors import UserError
from harness.ledger.files import Guard, read_jsonl, unguarded, write_bytes

NAME = "metrics.arrow"
"""Beside metrics.jsonl. Float64 columns, one a key; NaN where a row has no number."""
WORTH_IT = 200
"""Rows from which there is a copy: a shorter file is read as fast as two."""
_ABOUT = b"metrics.jsonl"
"""Key of the schema's metadata: size, time of change and checksum of the text."""


def write_columns(metrics: Path, guard: Guard = unguarded) -> None:
    """Copies a metrics.jsonl that nobody writes to any more, if it is long and rows of numbers.

    A copy that cannot be written is none: that is no reason to lose a stage.
    """
    with contextlib.suppress(OSError, UserError):
        stat, raw = os.stat(metrics), metrics.read_bytes()
        if raw.count(b"\n") < WORTH_IT or not raw.endswith(b"\n") or len(raw) != stat.st_size:
            return
        columns = _columns(read_jsonl(metrics))
        if columns is None:
            return
        about = {"bytes": len(raw), "mtime_ns": stat.st_mtime_ns, "crc32": zlib.crc32(raw)}
        table = pa.table(columns).replace_schema_metadata({_ABOUT: orjson.dumps(about)})
        sink = pa.BufferOutputStream()
        with ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        write_bytes(metrics.with_name(NAME), sink.getvalue().to_pybytes(), guard)


def _columns(rows: list[dict[str, Any]]) -> dict[str, NDArray[np.float64]] | None:
    """Keys with a finite number somewhere, in their order; None if a row has more than numbers."""
    if not {type(value) for row in rows for value in row.values()} <= {int, float, type(None)}:
        return None
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            values = np.array([row.get(name) for row in rows], np.float64)
        except OverflowError:  # a whole number that no float holds
            return None
        values[~np.isfinite(values)] = math.nan
        if not np.isnan(values).all():
            columns[name] = values
    return columns


def read_columns(metrics: Path) -> tuple[dict[str, NDArray[np.float64]], int] | None:
    """Columns and number of rows of a metrics.jsonl by its copy; None if that does not count."""
    try:
        stat = os.stat(metrics)
        with open(metrics.with_name(NAME), "rb") as file:
            raw = file.read()
    except OSError:
        return None
    try:
        table = ipc.open_file(pa.py_buffer(raw)).read_all()
        about = orjson.loads((table.schema.metadata or {})[_ABOUT])
        if about["bytes"] != stat.st_size:
            return None
        if about["mtime_ns"] != stat.st_mtime_ns and about["crc32"] != _checksum(metrics):
            return None
        columns = {n: table.column(n).to_numpy() for n in table.column_names}
    except (pa.ArrowException, ValueError, KeyError, TypeError, OSError):
        return None
    if any(column.dtype != np.float64 for column in columns.values()):
        return None
    return columns, table.num_rows


def _checksum(path: Path) -> int:
    return zlib.crc32(path.read_bytes())
