"""Which sample stands at which position, as a closed form: resuming is one integer.

Position p counts samples since the start of training over all ranks. An epoch has N samples of M
unique images; without resampling N = M and every epoch is a permutation. Epoch e covers positions
[e * N, (e + 1) * N) in an order of its own.

Up to ORDER_WINDOW samples the order is one pseudo-random permutation, blind to how shards are cut.
Beyond it, shards are permuted and samples are then permuted within windows of ORDER_WINDOW
positions, so that at any time few shards are read, each of them once an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness.data.hashing import fold, mix
from harness.study.datasets import ORDER_WINDOW

_ROUNDS = 6
_FRACTION_BITS = 24
ONE = 1 << _FRACTION_BITS
"""An expected count of 1 in the fixed-point numbers of `Stream(repeats=...)`."""
# Told apart from epochs' keys, which fold (seed, epoch) alone.
_OF_SHARDS, _OF_WINDOW, _OF_OFFSET = 1, 2, 3


@dataclass(frozen=True, eq=False)
class Places:
    """What stands at consecutive positions; arrays of one length."""

    rows: np.ndarray
    """int64: rows of the split's index."""
    epochs: np.ndarray
    """int64."""
    repeats: np.ndarray
    """int64: how often the image is in the same epoch's list before; 0 where it is there once."""


@dataclass(frozen=True, eq=False)
class Arrangement:
    """What a stream asks of its images whatever the seed: O(images) to make, so it can be kept."""

    rows: np.ndarray | None
    """Rows of the split's index by place; None where place and row are the same."""
    bounds: np.ndarray
    """int64 [shards + 1]: shard s holds places [bounds[s], bounds[s + 1])."""
    ends: np.ndarray | None
    """int64 by place: the image there owns the points up to this one, from the end before it, of a
    line of N * ONE points; None without resampling."""


def arrange(
    by_hash: np.ndarray,
    shard_rows: np.ndarray,
    num: int,
    repeats: np.ndarray | None = None,
    window: int = ORDER_WINDOW,
) -> Arrangement:
    """The arrangement of a stream; arguments as in `Stream`."""
    if num < 1:
        raise ValueError(f"an order needs at least one sample, found {num}")
    num_samples = num if repeats is None else int(repeats.sum()) // ONE
    rows: np.ndarray | None = by_hash[:num]
    if num_samples > window:  # places follow the order of the shards, not of the hashes
        is_whole = num == len(by_hash)
        if repeats is not None:
            by_row = np.argsort(rows, kind="stable")
            repeats, rows = repeats[by_row], by_hash[:num][by_row]
        elif not is_whole:
            rows = np.sort(by_hash[:num])
        if is_whole:
            rows = None
        else:
            shard_rows = np.searchsorted(rows, shard_rows)
    ends = None if repeats is None else np.cumsum(repeats.astype(np.int64))
    return Arrangement(rows, np.asarray(shard_rows, dtype=np.int64), ends)


class Stream:
    """The endless sequence of samples of one training run, addressed by position.

    `by_hash`: the split's rows, those with the smallest key hash first. `shard_rows` int64
    [shards + 1]: shard s holds rows [shard_rows[s], shard_rows[s + 1]). `num`: the M unique images,
    the first of `by_hash`. `repeats` uint64 [M], in the order of `by_hash`: each image's expected
    count in an epoch, times ONE, adding up to a multiple of ONE. `views`: how many positions in a
    row every sample then stands at (repeated augmentation: Hoffer et al. 2020, "Augment your
    batch", arXiv 1901.09335); an epoch is that much longer. `arrangement`: that of these images
    and counts, where it was kept; `repeats` is then not looked at.
    """

    def __init__(
        self,
        by_hash: np.ndarray,
        shard_rows: np.ndarray,
        num: int,
        seed: int,
        *,
        repeats: np.ndarray | None = None,
        views: int = 1,
        window: int = ORDER_WINDOW,
        arrangement: Arrangement | None = None,
    ) -> None:
        found = arrangement or arrange(by_hash, shard_rows, num, repeats, window)
        self._rows, self._bounds, self._ends = found.rows, found.bounds, found.ends
        self.seed, self.num_unique, self.views, self._window = seed, num, views, window
        self.num_samples = num if self._ends is None else int(self._ends[-1]) // ONE
        self._has_windows = self.num_samples > window
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def at(self, start: int, count: int) -> Places:
        """Positions [start, start + count). Work and memory are O(count), whatever N is.

        (Plus O(shards) where a call enters another epoch of a set with more than one window.)
        """
        if self.views == 1:
            return self._at(start, count)
        positions = np.arange(start, start + count, dtype=np.int64)
        samples, again = np.divmod(positions, self.views)
        first = start // self.views
        found, chosen = self._at(first, int(samples[-1]) - first + 1), samples - first
        repeats = found.repeats[chosen] * self.views + again
        return Places(found.rows[chosen], found.epochs[chosen], repeats)

    def _at(self, start: int, count: int) -> Places:
        epochs, slots = np.divmod(np.arange(start, start + count, dtype=np.int64), self.num_samples)
        rows = np.empty(count, dtype=np.int64)
        repeats = np.zeros(count, dtype=np.int64)
        for epoch in range(start // self.num_samples, (start + count - 1) // self.num_samples + 1):
            chosen = slice(*np.searchsorted(epochs, (epoch, epoch + 1)))
            if chosen.start < chosen.stop:
                rows[chosen], repeats[chosen] = self._in_epoch(epoch, slots[chosen])
        return Places(rows, epochs, repeats)

    def _in_epoch(self, epoch: int, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray | int]:
        if self._has_windows:
            slots = self._windowed(epoch, slots)
        else:
            key = fold(self.seed, epoch)
            slots = permute(slots.astype(np.uint64), self.num_samples, key)
        places, repeats = slots, 0
        if self._ends is not None:
            # Systematic sampling (Madow 1949): a comb of N teeth, laid down at a random offset,
            # hits each image's stretch floor or ceil of its length times, on average its length.
            offset = self._offset(epoch)
            places = np.searchsorted(self._ends, slots * ONE + offset, side="right")
            starts = np.where(places > 0, self._ends[places - 1], 0)
            repeats = slots - _teeth_before(starts, offset)
        return (places if self._rows is None else self._rows[places].astype(np.int64)), repeats

    def _windowed(self, epoch: int, slots: np.ndarray) -> np.ndarray:
        """Positions in the epoch -> slots in the order of the shards."""
        seen = np.empty_like(slots)
        numbers = slots // self._window
        for number in range(int(numbers[0]), int(numbers[-1]) + 1):
            chosen = slice(*np.searchsorted(numbers, (number, number + 1)))
            first = number * self._window
            size = min(self._window, self.num_samples - first)
            key = fold(self.seed, epoch, _OF_WINDOW, number)
            inside = permute((slots[chosen] - first).astype(np.uint64), size, key)
            seen[chosen] = first + inside
        ends, shift = self._shards(epoch)
        return seen + shift[np.searchsorted(ends, seen, side="right")]

    def _shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the permuted shards: where each ends, and what to add to come to its own slots."""
        known = self._epoch  # read once: other threads may put another epoch in its place
        if known is not None and known[0] == epoch:
            return known[1:]
        bounds = self._bounds
        if self._ends is not None:
            points = np.where(bounds > 0, self._ends[bounds - 1], 0)
            bounds = _teeth_before(points, self._offset(epoch))
        num = len(bounds) - 1
        key = fold(self.seed, epoch, _OF_SHARDS)
        order = permute(np.arange(num, dtype=np.uint64), num, key)
        ends = np.cumsum(np.diff(bounds)[order])
        shift = bounds[1:][order] - ends
        self._epoch = epoch, ends, shift
        return ends, shift

    def _offset(self, epoch: int) -> int:
        return fold(self.seed, epoch, _OF_OFFSET) >> (64 - _FRACTION_BITS)


def permute(place: np.ndarray, num: int, key: int) -> np.ndarray:
    """uint64 [n] below `num` -> int64 [n]: the permutation of range(num) that `key` stands for.

    A Feistel network on the smallest even number of bits that holds num, walked along its cycles
    until it falls into range (Black and Rogaway 2002, "Ciphers with arbitrary finite domains",
    sec. 3).
    """
    half_bits = max(1, ((num - 1).bit_length() + 1) // 2)
    result = _feistel(place, half_bits, key)
    # The domain is at most 4 times num, so a walk takes 4 rounds on average at the worst.
    while True:
        outside = np.flatnonzero(result >= np.uint64(num))
        if not len(outside):
            return result.astype(np.int64)
        result[outside] = _feistel(result[outside], half_bits, key)


def _feistel(value: np.ndarray, half_bits: int, key: int) -> np.ndarray:
    shift = np.uint64(half_bits)
    low = np.uint64((1 << half_bits) - 1)
    left, right = value >> shift, value & low
    for turn in range(_ROUNDS):
        left, right = right, left ^ (mix(right ^ np.uint64(fold(key, turn))) & low)
    return (left << shift) | right


def _teeth_before(points: np.ndarray, offset: int) -> np.ndarray:
    """Number of points k * ONE + offset, k >= 0, that lie before each of `points`."""
    return np.maximum(0, -((offset - points) // ONE))
