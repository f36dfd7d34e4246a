"""How often each image is expected in an epoch when images with rare hashtags are repeated.

The factor of a hashtag of frequency f is max(1, sqrt(t / f)), that of an image the largest of its
hashtags': resampling by the inverse square root of the frequency (Mahajan et al. 2018, "Exploring
the limits of weakly supervised pretraining", sec. 2.2), in the form that never drops an image
(Gupta et al. 2019, "LVIS", sec. 5.2). The threshold t is the one at which the factors add up to the
samples an epoch is to have, so that "an epoch of 5 B samples from 3 B images" is a definition.
"""

from __future__ import annotations

import numpy as np

from harness.data.index import Index
from harness.data.order import ONE
from harness.errors import UserError

# Positions on the line of N * ONE points are int64; one bit is left for sums.
_MOST_SAMPLES = (1 << 62) // ONE


def expected_counts(index: Index, rows: np.ndarray, epoch_samples: int) -> np.ndarray:
    """uint64 [M]: expected count of each of `rows` in an epoch, times ONE; they add up exactly.

    Frequencies are counted over `rows`. An image without labels counts 1. Raises UserError if no
    image has a label, or for more samples than the fixed-point numbers hold.
    """
    if epoch_samples > _MOST_SAMPLES:
        raise UserError(
            f"resample: an epoch of {epoch_samples} samples; expected {_MOST_SAMPLES} at most:"
            " choose a smaller resample"
        )
    counts = np.diff(index.label_offsets)
    is_chosen = np.zeros(index.num_samples, dtype=bool)
    is_chosen[rows] = True
    ids = index.label_ids[np.repeat(is_chosen, counts)]
    if not len(ids):
        raise UserError("resample: the images have no labels; leave resample out")
    frequency = np.bincount(ids)
    # The rarest label of an image decides: the factor falls with the frequency.
    rarest = np.full(index.num_samples, np.iinfo(np.int64).max)
    owner = np.repeat(np.arange(index.num_samples), counts)[np.repeat(is_chosen, counts)]
    np.minimum.at(rarest, owner, frequency[ids])
    rarest = rarest[rows].astype(np.float64)

    values, number = np.unique(rarest, return_counts=True)
    return _scaled(_factors(values, number, epoch_samples), values, rarest, epoch_samples)


def _factors(values: np.ndarray, number: np.ndarray, total: int) -> np.ndarray:
    """Factors of ascending frequencies, `number` images each, that add up to `total`.

    With the k rarest frequencies above factor 1, t follows in closed form; k is the one that fits.
    """
    if total <= number.sum():
        return np.ones(len(values))
    ones = np.cumsum(number[::-1])[::-1]
    for k in range(1, len(values) + 1):
        rest = ones[k] if k < len(values) else 0
        root = (total - rest) / (number[:k] / np.sqrt(values[:k])).sum()  # sqrt(t)
        if k == len(values) or root <= np.sqrt(values[k]):
            return np.maximum(1.0, root / np.sqrt(values))
    raise AssertionError("the last k always fits")


def _scaled(factors: np.ndarray, values: np.ndarray, rarest: np.ndarray, total: int) -> np.ndarray:
    scaled = np.floor(factors[np.searchsorted(values, rarest)] * ONE).astype(np.uint64)
    # Rounding down leaves less than one unit an image: the first images get it.
    missing = total * ONE - int(scaled.sum())
    assert 0 <= missing <= 2 * len(scaled), missing
    share, extra = divmod(missing, len(scaled))
    scaled += np.uint64(share)
    scaled[:extra] += np.uint64(1)
    return scaled
