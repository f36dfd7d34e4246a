"""Random numbers that are a function of their place, never of what was drawn before.

All are built on splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
generators", fig. 15) in uint64 arithmetic, so they are equal on every machine.
"""

from __future__ import annotations

import hashlib

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(value: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose output bits look independent of the input's. [n] -> [n]."""
    value = value + np.uint64(GOLDEN)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def mix_int(value: int) -> int:
    """`mix` of one Python integer; cheaper than an array of one."""
    value = (value + GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def fold(*parts: int) -> int:
    """One 64-bit number from several, order included."""
    state = 0
    for part in parts:
        state = mix_int(state ^ (part & _MASK))
    return state


def unit(value: np.ndarray) -> np.ndarray:
    """uint64 -> float64 in [0, 1), from the upper 53 bits."""
    return (value >> np.uint64(11)).astype(np.float64) * 2.0**-53


def key_hash(key: str) -> int:
    """64 bits of a sample's key: the same whatever shard the sample lies in."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
