"""All pairs of 64-bit codes within a Hamming distance, without comparing every pair.

Multi-index hashing (Norouzi, Punjani, Fleet 2012, "Fast search in Hamming space with multi-index
hashing"): codes that differ in at most d of 64 bits differ in at most floor(d / 4) bits of one of
four bands of 16 bits. So looking up every band of a query, with up to that many bits flipped, finds
all of them. What is looked up is exact; nothing is left to chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

MAX_DISTANCE = 11
"""A distance of 12 would take 697 look-ups per band and query instead of 137."""
_BANDS, _BITS = 4, 16
_CHUNK_CODES = 1 << 22
"""Codes that are indexed at a time: their tables take 160 MB."""
_CHUNK_PAIRS = 1 << 22
"""Candidates that are compared at a time."""

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]
"""int64 [p] places among the codes, int64 [p] places among the queries, uint8 [p] distances."""


def near_pairs(codes: np.ndarray, queries: np.ndarray, distance: int) -> Iterator[Pairs]:
    """All pairs of uint64 `codes` and `queries` that differ in at most `distance` bits, in parts.

    Each pair comes once. Raises ValueError for a distance above MAX_DISTANCE.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"distance {distance}; expected 0 to {MAX_DISTANCE}")
    radius = distance // _BANDS
    masks = _masks(radius)
    for start in range(0, len(codes), _CHUNK_CODES):
        chunk = codes[start : start + _CHUNK_CODES]
        for band in range(_BANDS):
            for place, query in _candidates(chunk, queries, band, masks):
                differ = chunk[place] ^ queries[query]
                found = popcount(differ)
                is_near = found <= distance
                # A pair that an earlier band has found already is left to that one.
                for earlier in range(band):
                    is_near &= popcount(differ & _band_mask(earlier)) > radius
                yield place[is_near] + start, query[is_near], found[is_near]


def _candidates(
    codes: np.ndarray, queries: np.ndarray, band: int, masks: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places of codes and queries that are alike in a band, but for the bits of one of `masks`."""
    values = _band(codes, band)
    order = np.argsort(values, kind="stable")  # radix sort: linear
    starts = np.zeros((1 << _BITS) + 1, dtype=np.int64)
    np.cumsum(np.bincount(values, minlength=1 << _BITS), out=starts[1:])
    wanted = _band(queries, band)
    for mask in masks:
        buckets = (wanted ^ mask).astype(np.int64)
        counts = starts[buckets + 1] - starts[buckets]
        ends = np.cumsum(counts)
        first = 0
        while first < len(queries):
            # As many queries as fit, at least one.
            before = int(ends[first - 1]) if first else 0
            last = int(np.searchsorted(ends, before + _CHUNK_PAIRS, side="right"))
            last = max(last, first + 1)
            many = counts[first:last]
            query = np.repeat(np.arange(first, last), many)
            offsets = starts[buckets[first:last]] - (ends[first:last] - many - before)
            place = order[np.arange(len(query)) + np.repeat(offsets, many)]
            if len(query):
                yield place, query
            first = last


def _masks(radius: int) -> np.ndarray:
    """uint16: all patterns of up to `radius` bits."""
    bits = (chosen for many in range(radius + 1) for chosen in combinations(range(_BITS), many))
    return np.array([sum(1 << bit for bit in chosen) for chosen in bits], dtype=np.uint16)


def _band(codes: np.ndarray, band: int) -> np.ndarray:
    return (codes >> np.uint64(_BITS * band)).astype(np.uint16)


def _band_mask(band: int) -> np.uint64:
    return np.uint64(((1 << _BITS) - 1) << (_BITS * band))


def popcount(values: np.ndarray) -> np.ndarray:
    """uint8: number of ones of each uint64 (Warren 2012, "Hacker's delight", fig. 5-2)."""
    values = values - ((values >> np.uint64(1)) & np.uint64(0x5555555555555555))
    pairs = np.uint64(0x3333333333333333)
    values = (values & pairs) + ((values >> np.uint64(2)) & pairs)
    values = (values + (values >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((values * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.uint8)
