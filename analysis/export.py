"""The data files of a report: frames as CSV and Parquet, fits as JSON."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import csv as arrow_csv
from pyarrow import parquet

from analysis.load import StudyData
from analysis.stages import clean
from analysis.tables import folders
from harness.errors import StorageError
from harness.ledger.files import temporary_name, write_bytes

MAX_CSV_ROWS = 1_000_000
"""About what a spreadsheet opens; curves beyond it are thinned in the CSV, whole in the Parquet."""
_ROW_GROUP = 1 << 20


def cells_frame(data: StudyData) -> pd.DataFrame:
    """Cells as in the table, axes and changes as JSON, with the folders of their stages."""
    frame = data.cells.drop(columns=["pair", "axes", "set", "stages"])
    for name in ("axes", "set"):
        frame[name] = [json.dumps(value, sort_keys=True) for value in data.cells[name]]
    frame["stages"] = [";".join(folders(data, own)) for own in data.cells["stages"]]
    return frame


def results_frame(data: StudyData) -> pd.DataFrame:
    """A row per cell and metric."""
    return data.results.drop(columns=["pair", "parent"])


def thinned(curves: pd.DataFrame, most: int = MAX_CSV_ROWS) -> pd.DataFrame:
    """Every k-th row of each stage, its first and last always, k the least that is enough."""
    if len(curves) <= most:
        return curves
    codes = curves["stage"].cat.codes.to_numpy()
    first = np.flatnonzero(np.diff(codes, prepend=-1))
    last = np.append(first[1:], len(codes)) - 1
    within = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    step = -(-len(curves) // most)
    while True:
        kept = within % step == 0
        kept[last] = True
        if kept.sum() <= most or step > len(curves):
            return curves[kept]
        step += max(1, step // 8)


# -- writing --------------------------------------------------------------------------------


def write_frame(folder: Path, name: str, frame: pd.DataFrame) -> None:
    """Writes name.csv and name.parquet, the former without more rows than a spreadsheet opens."""
    write_csv(folder / f"{name}.csv", thinned(frame) if name == "curves" else frame)
    write_parquet(folder / f"{name}.parquet", frame)


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Comma-separated; words in quotes, and harmless to a spreadsheet."""
    columns = {}
    for name in frame:
        column = frame[name]
        if isinstance(column.dtype, pd.CategoricalDtype):
            words = pa.array([_harmless(w) for w in column.cat.categories], pa.string())
            codes = pa.array(column.cat.codes.to_numpy(), mask=column.isna().to_numpy())
            columns[_harmless(name)] = words.take(codes.cast(pa.int32()))
        elif pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            columns[_harmless(name)] = pa.array(column.to_numpy(), from_pandas=True)
        else:
            columns[_harmless(name)] = pa.array(map(_harmless, column), pa.string())
    buffer = io.BytesIO()
    arrow_csv.write_csv(pa.table(columns), buffer)
    write_bytes(path, buffer.getvalue())


def _harmless(value: Any) -> str | None:
    """Text as a spreadsheet may show it: what it would take for a formula starts with a quote.

    Parquet and JSON have the text as it is.
    """
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    text = clean(str(value))
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r", "\n") else text


def write_parquet(path: Path, frame: pd.DataFrame) -> None:
    """The frame in row groups of a million, one at a time: never all of it twice in memory."""
    words = [str(n) for n in frame if not pd.api.types.is_numeric_dtype(frame[n])]
    temporary = path.with_name(temporary_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        schema = _arrow(frame.iloc[:1], frame).schema
        options = {"use_dictionary": words, "compression": "zstd", "write_statistics": False}
        with parquet.ParquetWriter(temporary, schema, **options) as writer:
            for start in range(0, max(1, len(frame)), _ROW_GROUP):
                writer.write_table(_arrow(frame.iloc[start : start + _ROW_GROUP], frame))
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(path, error) from error


def _arrow(part: pd.DataFrame, whole: pd.DataFrame) -> pa.Table:
    columns = {}
    for name in whole:
        column, kind = part[name], whole[name].dtype
        if isinstance(kind, pd.CategoricalDtype):
            codes = pa.array(column.cat.codes.to_numpy(np.int32), mask=column.isna().to_numpy())
            words = pa.array([clean(str(w)) for w in kind.categories], pa.string())
            columns[str(name)] = pa.DictionaryArray.from_arrays(codes, words)
        elif pd.api.types.is_numeric_dtype(kind):
            columns[str(name)] = pa.array(column.to_numpy(), from_pandas=True)
        else:
            texts = [None if _harmless(v) is None else clean(str(v)) for v in column]
            columns[str(name)] = pa.array(texts, pa.string())
    return pa.table(columns)


def write_json(path: Path, value: Any) -> None:
    """JSON of plain types; what is not a finite number becomes null."""
    text = json.dumps(_plain(value), indent=1, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
