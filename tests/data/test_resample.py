"""Resampling: repeat factors by the inverse square root of hashtag frequency, exact in sum."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import brentq

from harness.data.dataset import Dataset, open_dataset
from harness.data.order import ONE
from harness.data.resample import expected_counts
from harness.errors import UserError


def by_definition(labels: list[list[int]], total: int) -> np.ndarray:
    """max over hashtags of max(1, sqrt(t / f)), with t found by bisection."""
    frequency = np.bincount([tag for tags in labels for tag in tags])

    def factors(t: float) -> np.ndarray:
        return np.array(
            [max([1.0, *(np.sqrt(t / frequency[tag]) for tag in tags)]) for tags in labels]
        )

    if total == len(labels):
        return np.ones(len(labels))
    t = brentq(lambda t: factors(t).sum() - total, 1e-9, 1e9, xtol=1e-12, rtol=1e-14)
    return factors(float(t))


@pytest.mark.parametrize("factor", [1.0, 1.05, 5 / 3, 4.0])
@pytest.mark.parametrize("num", [600, 137])
def test_factors_are_those_of_the_definition(scenes: Dataset, factor: float, num: int) -> None:
    split = scenes.split("pretrain")
    rows = split.subset(num)
    total = round(num * factor)
    found = expected_counts(split.index, rows, total)
    assert int(found.sum()) == total * ONE, "exact to the last unit"
    offsets, ids = split.label_offsets, split.label_ids
    labels = [ids[offsets[row] : offsets[row + 1]].tolist() for row in rows]
    np.testing.assert_allclose(found / ONE, by_definition(labels, total), rtol=0, atol=3 / ONE)


def test_rarer_hashtags_are_seen_more_often_but_none_less_than_without(scenes: Dataset) -> None:
    split = scenes.split("pretrain")
    rows = split.stream(600, 0, 5 / 3).at(0, 1000).rows

    def share(chosen: np.ndarray) -> np.ndarray:
        ids = [split.label_ids[split.label_offsets[r] : split.label_offsets[r + 1]] for r in chosen]
        return np.bincount(np.concatenate(ids), minlength=len(scenes.meta.hashtags))

    before, after = share(split.subset(600)), share(rows)
    ratio = after[before > 0] / before[before > 0]
    order = np.argsort(before[before > 0])
    assert (ratio >= 1).all()
    assert ratio[order[:20]].mean() > 1.5 * ratio[order[-5:]].mean()


def test_views_of_an_image_that_is_repeated_within_an_epoch_differ(scenes: Dataset) -> None:
    from harness.data import loader
    from harness.study.recipes import Augmentation

    split = scenes.split("pretrain")
    stream = split.stream(60, 4, 3.0)
    (batch,) = loader.train_batches(
        split,
        stream,
        batch=180,
        start_step=0,
        num_steps=1,
        rank=0,
        ranks=1,
        image_size=24,
        augment=Augmentation(),
    )
    rows = stream.at(0, 180).rows
    assert len(set(rows.tolist())) == 60
    for row in set(rows.tolist()):
        views = [batch.images[place].numpy().tobytes() for place in np.flatnonzero(rows == row)]
        assert len(set(views)) == len(views)


def test_a_set_without_labels_cannot_be_resampled(scenes: Dataset, scenes_root: Path) -> None:
    split = open_dataset("scenes-600", scenes_root).split("test")
    object.__setattr__(split.index, "label_ids", np.zeros(0, np.int32))
    object.__setattr__(split.index, "label_offsets", np.zeros(81, np.int64))
    with pytest.raises(UserError, match="have no labels"):
        split.stream(10, 0, 2.0)


def test_an_epoch_has_no_more_samples_than_its_positions_can_tell_apart(scenes: Dataset) -> None:
    split = scenes.split("pretrain")
    with pytest.raises(UserError, match="an epoch of 600000000000000 samples; expected"):
        split.stream(600, 0, 1e12)
    most = split.stream(600, 0, 1000.0)
    assert most.num_samples == 600_000 and most.at(10**12, 3).rows.max() < split.num_samples
