"""What a task measured sample by sample, so that two encoders can be compared on the same ones.

samples.parquet: metric, key, value; the mean of a metric's values is the result's number. Where
samples come in groups, such as the captions of an image, a column `group` says whose they are:
groups are drawn with replacement, not samples, as those of one group are alike.
replicates.parquet: metric, replicate, value; for numbers that are no mean over samples, such as
average precision: the number again, on samples drawn with replacement. Replicate r of one task
draws the same samples for every encoder, so differences of replicates are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from harness.models.weight_files import write_atomically

REPLICATES = 200

Values = Tensor | np.ndarray | Sequence[float]


def resample(num: int, replicate: int) -> np.ndarray:
    """int64 [num]: places drawn with replacement, for samples sorted by key."""
    return np.random.default_rng((0xB007, replicate)).integers(0, num, num)


def write_samples(
    folder: Path,
    metrics: Mapping[str, tuple[Sequence[str], Values]],
    groups: Mapping[str, str] | None = None,
) -> None:
    """samples.parquet: metric -> (keys, values), float64; key -> group, if not each its own."""
    names, keys, values = [], [], []
    for name, (own_keys, own) in metrics.items():
        array = np.asarray(own, dtype=np.float64)
        if len(own_keys) != len(array):
            raise ValueError(f"{name}: {len(own_keys)} keys for {len(array)} values")
        names += [name] * len(array)
        keys += own_keys
        values.append(array)
    columns: dict[str, Any] = {"metric": names, "key": keys, "value": np.concatenate(values)}
    if groups is not None:
        columns["group"] = [groups.get(key, key) for key in keys]
    write_table(folder / "samples.parquet", columns)


def write_replicates(folder: Path, metrics: Mapping[str, Values]) -> None:
    """replicates.parquet: metric -> values of replicates 0, 1, ..., float64."""
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in metrics.items()}
    write_table(
        folder / "replicates.parquet",
        {
            "metric": [name for name, values in arrays.items() for _ in values],
            "replicate": np.concatenate([np.arange(len(v)) for v in arrays.values()]),
            "value": np.concatenate(list(arrays.values())),
        },
    )


def write_table(path: Path, columns: Mapping[str, Any]) -> None:
    """A parquet file, whole or not at all; lists of texts as dictionaries."""
    # Here and not above: 0.2 s that only transfers need.
    import pyarrow
    from pyarrow import parquet

    arrays = {}
    for name, values in columns.items():
        array = pyarrow.array(values.numpy() if isinstance(values, Tensor) else values)
        is_text = pyarrow.types.is_string(array.type)
        arrays[name] = array.dictionary_encode() if is_text else array
    table = pyarrow.table(arrays)
    write_atomically(path, lambda file: parquet.write_table(table, file, compression="zstd"))
