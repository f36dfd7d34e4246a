"""Samples that come in groups, such as the captions of an image, are drawn by the group."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.bootstrap import Interval, of_difference, of_runs, read_samples
from harness.transfer.samples import write_samples

IMAGES = [f"image-{k:03d}" for k in range(200)]


def write(folder: Path, values: np.ndarray, copies: int, grouped: bool) -> pd.Series:
    """Every image's value for each of its captions."""
    folder.mkdir()
    groups = {f"{key}#{n}": key for key in IMAGES for n in range(copies)}
    metric = {"recall": (list(groups), np.repeat(values, copies))}
    write_samples(folder, metric, groups if grouped else None)
    found = read_samples(folder, "recall")
    assert found is not None
    return found


def width(interval: Interval) -> float:
    return interval.high - interval.low


def test_five_equal_captions_say_no_more_than_one(tmp_path: Path) -> None:
    right = (np.random.default_rng(1).random(200) < 0.4).astype(float)
    one = of_runs(0.4, [write(tmp_path / "one", right, 1, False)])
    five = of_runs(0.4, [write(tmp_path / "five", right, 5, True)])
    alone = of_runs(0.4, [write(tmp_path / "alone", right, 5, False)])
    assert five.samples == one.samples == 200
    assert (five.low, five.high) == pytest.approx((one.low, one.high), abs=1e-12)
    assert width(alone) == pytest.approx(width(one) / 5**0.5, rel=0.15)


def test_differences_are_drawn_by_the_group_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    values = [(rng.random(200) < share).astype(float) for share in (0.6, 0.4)]
    pairs = {
        copies: [write(tmp_path / f"{copies}-{k}", v, copies, True) for k, v in enumerate(values)]
        for copies in (1, 5)
    }
    one, five = (of_difference(0.2, [a], [b]) for a, b in (pairs[1], pairs[5]))
    assert (five.low, five.high) == pytest.approx((one.low, one.high), abs=1e-12)


def test_groups_of_unequal_size_count_by_their_samples(tmp_path: Path) -> None:
    write_samples(
        tmp_path,
        {"recall": (["x#0", "x#1", "x#2", "y#0"], [1.0, 1.0, 1.0, 0.0])},
        {"x#0": "x", "x#1": "x", "x#2": "x", "y#0": "y"},
    )
    found = read_samples(tmp_path, "recall")
    assert found is not None and found.mean() == 0.75
    interval = of_runs(0.75, [found])
    assert (interval.low, interval.high, interval.samples) == (0.0, 1.0, 2)
