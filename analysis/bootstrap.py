"""Intervals of numbers measured on a test set, from what was measured sample by sample.

They say how far a number would move on other test samples of the same kind; not how far it would
move with other training seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number with the ends of its 95 % percentile interval; NaN where there are no samples."""

    value: float
    low: float = math.nan
    high: float = math.nan
    samples: int = 0
    """Test samples, groups of them where they come in groups, or replicates of a number that is no
    mean over samples."""


def read_samples(folder: Path, metric: str) -> pd.Series | None:
    """Values by key of a stage's samples.parquet, by (group, key) where it has groups, or by
    replicate; None if it left none.
    """
    for name, key in (("samples.parquet", "key"), ("replicates.parquet", "replicate")):
        path = folder / name
        if not path.is_file():
            continue
        rows = pd.read_parquet(path, filters=[("metric", "==", metric)])
        if len(rows):
            by = ["group", key] if "group" in rows else key
            values = rows.groupby(by, sort=True, observed=True)["value"].mean()
            return values.rename("replicate" if key == "replicate" else "sample")
    return None


def of_runs(value: float, runs: Sequence[pd.Series | None]) -> Interval:
    """Interval of the mean over `runs` (seeds) on the test samples that all of them have."""
    joined = _joined(runs)
    return Interval(value=value) if joined is None else _interval(value, joined)


def of_difference(
    value: float, runs: Sequence[pd.Series | None], others: Sequence[pd.Series | None]
) -> Interval:
    """Interval of mean(runs) - mean(others), sample by sample: what both find hard cancels."""
    one, two = _joined(runs), _joined(others)
    if one is None or two is None or one.name != two.name or not one.index.equals(two.index):
        return Interval(value=value)
    return _interval(value, (one - two).rename(str(one.name)))


def _joined(runs: Sequence[pd.Series | None]) -> pd.Series | None:
    """Mean over runs; None where they were not judged on the same samples."""
    found = [run for run in runs if run is not None]
    if not found or len(found) < len(runs):
        return None
    first = found[0]
    if any(run.name != first.name or not run.index.equals(first.index) for run in found):
        return None
    return (sum(found[1:], start=first) / len(found)).rename(str(first.name))


def _interval(value: float, values: pd.Series) -> Interval:
    array, num = values.to_numpy(float), len(values)
    if values.name == "replicate":  # drawn already, where the samples were
        means = array
    else:
        counts = np.ones(num)
        if values.index.nlevels > 1:  # samples of a group are alike: groups are drawn
            groups = values.groupby(level="group", sort=True)
            array, counts = groups.sum().to_numpy(float), groups.size().to_numpy(float)
            num = len(array)
        rng = np.random.default_rng(0)
        drawn = (rng.integers(0, num, num) for _ in range(RESAMPLES))
        means = np.array([array[rows].sum() / counts[rows].sum() for rows in drawn])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value=value, low=float(low), high=float(high), samples=num)
