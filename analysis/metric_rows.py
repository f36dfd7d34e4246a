"""Rows of many metrics.jsonl files as columns of numbers: whole lines only, broken ones counted.

Three ways to the same numbers. Long files of finished stages have a copy in columns
(`harness.metric_columns`). Others are given many at a time to Arrow's JSON reader, where every line
is one flat object of numbers, as the harness writes them. Whatever is not goes line by line through
Python's own parser.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import json as arrow_json

from harness.metric_columns import read_columns

_BATCH_BYTES = 8 << 20
"""Text given to Arrow at once: enough that its set-up does not count, and memory is used again."""
_THREADS = 2
_USUAL = ("step", "samples", "wall_s", "loss", "lr", "grad_norm", "flops", "val_loss", "val_floor")
"""Keys of the training loop: numbers to Arrow from the start, so that it need not find out."""
_SCHEMA = pa.schema([(name, pa.float64()) for name in _USUAL])


@dataclass(frozen=True, kw_only=True)
class MetricRows:
    """Rows of several files, file after file, row after row.

    columns: name -> float64 [rows]; NaN where a row has no such key, or no finite number there. A
    key without any finite number has no column.
    counts: rows of each file. broken: lines of each file that are no JSON object.
    """

    columns: dict[str, NDArray[np.float64]]
    counts: NDArray[np.int64]
    broken: NDArray[np.int64]


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Whole rows of a JSONL file and the number of broken ones.

    A last line without its newline was torn by a kill; it is left out and not counted.
    """
    return _parse_lines(_whole_lines(path))


def _whole_lines(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return b""
    return raw[: raw.rfind(b"\n") + 1]


def _parse_lines(text: bytes) -> tuple[list[dict[str, Any]], int]:
    rows, broken = [], 0
    for line in text.splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            broken += 1
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken += 1
    return rows, broken


def read_many(paths: Sequence[Path], *, fast: bool = True) -> MetricRows:
    """All rows of the files. `fast=False` takes the slow way throughout; the result is the same."""
    parts: dict[int, MetricRows] = {}
    rest = []
    for number, path in enumerate(paths):
        copied = read_columns(path) if fast else None
        if copied is None:
            rest.append(number)
        else:
            columns, rows = copied
            none = np.zeros(1, np.int64)
            parts[number] = MetricRows(columns=columns, counts=np.array([rows]), broken=none)
    with ThreadPoolExecutor(_THREADS) as pool:
        # Arrow lets go of the interpreter's lock, so one batch is parsed while the next is read.
        batches = _batches(paths, rest)
        for numbers, found in pool.map(lambda b: (b, _read_batch(paths, b, fast)), batches):
            parts |= zip(numbers, found, strict=True)
    return _join([parts[number] for number in range(len(paths))])


def _batches(paths: Sequence[Path], numbers: Sequence[int]) -> Iterable[list[int]]:
    """Places of files that are parsed at once."""
    batch: list[int] = []
    size = 0
    for number in numbers:
        batch.append(number)
        try:
            size += paths[number].stat().st_size
        except OSError:
            continue
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _read_batch(paths: Sequence[Path], numbers: Sequence[int], fast: bool) -> list[MetricRows]:
    texts = [_whole_lines(paths[number]) for number in numbers]
    return _split(_parse(texts)) if fast else [_parse_slowly(text) for text in texts]


def _split(rows: MetricRows) -> list[MetricRows]:
    """A part for each file."""
    ends = np.cumsum(rows.counts)
    return [
        MetricRows(
            columns={name: column[end - count : end] for name, column in rows.columns.items()},
            counts=rows.counts[i : i + 1],
            broken=rows.broken[i : i + 1],
        )
        for i, (count, end) in enumerate(zip(rows.counts, ends, strict=True))
    ]


def _parse(texts: Sequence[bytes]) -> MetricRows:
    """One call of Arrow for all; halves, down to single files, where it cannot take them all."""
    found = _parse_fast(texts)
    if found is not None:
        return found
    if len(texts) == 1:
        return _parse_slowly(texts[0])
    middle = len(texts) // 2
    return _join([_parse(texts[:middle]), _parse(texts[middle:])])


def _parse_fast(texts: Sequence[bytes]) -> MetricRows | None:
    whole = b"".join(texts)
    letters = np.frombuffer(whole, np.uint8)
    # Every text ends in a newline, so line k starts after the k-th.
    ends = np.flatnonzero(letters == ord("\n"))
    borders = np.cumsum([len(text) for text in texts])
    counts = np.diff(np.searchsorted(ends, borders), prepend=0)
    total = len(ends)
    none = np.zeros(len(texts), np.int64)
    if not total:
        return MetricRows(columns={}, counts=counts, broken=none)
    # A brace at the start of each line, and below as many rows as lines and no object in an object:
    # then a row for Arrow is a row for the line-wise reader too.
    starts = letters[np.concatenate([[0], ends[:-1] + 1])]
    if not (starts == ord("{")).all() or b"\r" in whole:
        return None
    read = arrow_json.ReadOptions(use_threads=False, block_size=len(whole))
    parse = arrow_json.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="infer")
    try:
        table = arrow_json.read_json(pa.BufferReader(whole), read, parse)
        names = table.column_names
    except (pa.ArrowException, ValueError):
        return None
    numeric = (pa.types.is_integer, pa.types.is_floating, pa.types.is_null)
    if table.num_rows != total or not all(any(t(f.type) for t in numeric) for f in table.schema):
        return None
    columns = {}
    for name in names:
        column = table.column(name)
        if column.null_count < total:
            is_float = pa.types.is_float64(column.type)
            numbers = column if is_float else column.cast(pa.float64())
            columns[name] = _finite(numbers.to_numpy())
    return MetricRows(columns=columns, counts=counts, broken=none)


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    good = np.isfinite(values)
    return values if good.all() else np.where(good, values, math.nan)


def _parse_slowly(text: bytes) -> MetricRows:
    rows, broken = _parse_lines(text)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {
        name: np.array([_number(row.get(name)) for row in rows], np.float64) for name in names
    }
    return MetricRows(columns=columns, counts=np.array([len(rows)]), broken=np.array([broken]))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _join(parts: Sequence[MetricRows]) -> MetricRows:
    none = np.zeros(0, np.int64)
    names = dict.fromkeys(name for part in parts for name in part.columns)
    columns = {}
    for name in names:
        # A column at a time, its parts given up: never all of it twice in memory.
        pieces, has_number = [], False
        for part in parts:
            piece = part.columns.pop(name, None)
            has_number = has_number or (piece is not None and not np.isnan(piece).all())
            pieces.append(np.full(int(part.counts.sum()), np.nan) if piece is None else piece)
        if has_number:
            columns[name] = np.concatenate(pieces)
    return MetricRows(
        columns=columns,
        counts=np.concatenate([part.counts for part in parts] or [none]),
        broken=np.concatenate([part.broken for part in parts] or [none]),
    )
