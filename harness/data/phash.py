"""A 64-bit perceptual hash: images that look alike differ in few bits of it.

The hash of Zauner 2010 ("Implementation and benchmarking of perceptual image hash functions",
sec. 3.2.1) in the form that the package imagehash computes: the 8 x 8 lowest frequencies of the
cosine transform of a grey 32 x 32 reduction, each 1 where it is above their median.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE = 32
_KEPT = 8
NUM_BITS = _KEPT * _KEPT
MIN_CLEAR_BITS = 32
"""Images with fewer are not compared: they are flat, a gradient, a disc on a plain ground, and
most of their hash is decided by rounding."""
_CLEAR = 1.0
"""Distance of a coefficient from the median, in grey levels. Rounding pixels to whole levels moves
most coefficients by 12 ** -0.5 = 0.29 levels (one standard deviation)."""


@dataclass(frozen=True, eq=False)
class Hashes:
    """Of n images."""

    plain: np.ndarray
    """uint64 [n]."""
    mirrored: np.ndarray
    """uint64 [n]: of the images flipped left to right."""
    clear_bits: np.ndarray
    """uint8 [n]: bits that rounding cannot have decided."""


def grey_reduction(image_HWC: np.ndarray) -> np.ndarray:
    """uint8 [32, 32] of a uint8 [H, W, 3]: what is hashed of an image."""
    grey = Image.fromarray(image_HWC).convert("L")
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def hash_reductions(grey: np.ndarray) -> Hashes:
    """Hashes of uint8 [n, 32, 32]."""
    low = _BASIS @ grey.astype(np.float64) @ _BASIS.T
    # Flipping an image left to right changes the sign of its odd horizontal frequencies.
    flipped = low * np.where(np.arange(_KEPT) % 2, -1.0, 1.0)
    low, flipped = low.reshape(-1, NUM_BITS), flipped.reshape(-1, NUM_BITS)
    median = np.median(low, axis=1, keepdims=True)
    return Hashes(
        _packed(low > median),
        _packed(flipped > np.median(flipped, axis=1, keepdims=True)),
        (np.abs(low - median) > _CLEAR).sum(axis=1).astype(np.uint8),
    )


def _packed(bits: np.ndarray) -> np.ndarray:
    """bool [n, 64] -> uint64 [n], the first bit highest."""
    return np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)


def _cosines() -> np.ndarray:
    """float64 [8, 32]: the first rows of the DCT-II, orthonormal but for the first.

    That one is not made smaller by sqrt(2), here as in imagehash: it decides some bits.
    """
    rows, columns = np.arange(_KEPT)[:, None], np.arange(SIDE)[None, :]
    return np.sqrt(2 / SIDE) * np.cos(np.pi * rows * (2 * columns + 1) / (2 * SIDE))


_BASIS = _cosines()
