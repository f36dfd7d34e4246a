"""Which sample stands at which position, as a closed form: resuming is one integer.

Position p counts samples since the start of training over all ranks. Epoch e covers positions
[e * num, (e + 1) * num) and visits every sample once, in an order of its own.
"""

from __future__ import annotations

import numpy as np

from harness.data.hashing import fold, mix

_ROUNDS = 6


def order(seed: int, num: int, start: int, count: int) -> np.ndarray:
    """int64 [count]: the samples, in range(num), at positions [start, start + count).

    Each epoch is a permutation: a Feistel network on the smallest even number of bits that holds
    num, walked along its cycles until it falls into range (Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains", sec. 3). Work and memory are O(count), whatever num is.
    """
    if num < 1:
        raise ValueError(f"an order needs at least one sample, found {num}")
    position = np.arange(start, start + count, dtype=np.int64)
    epochs, places = np.divmod(position, num)
    result = np.empty(count, dtype=np.int64)
    for epoch in range(start // num, (start + count - 1) // num + 1) if count else ():
        rows = epochs == epoch
        result[rows] = _permute(places[rows].astype(np.uint64), num, fold(seed, epoch))
    return result


def _permute(place: np.ndarray, num: int, key: int) -> np.ndarray:
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
