"""Decoded pixels of small sets, kept in one memory-mapped file so that later epochs decode nothing.

Only a cache: it can be deleted at any time, and is made again from the shards.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

from harness.ledger.lease import exclusive

CACHE_BYTES = 1 << 30
"""Splits whose decoded pixels need more than this are decoded every time."""


def open_pixels(path: Path, num: int, decode: Callable[[int], np.ndarray]) -> np.ndarray | None:
    """uint8 [num, H, W, 4] in a mapped file, made with `decode` ([H, W, 3]) if absent.

    The fourth channel means nothing: so Pillow reads images where they lie, without a copy. None if
    the images differ in size or are too many.
    """
    first = decode(0)
    shape = (num, *first.shape[:2], 4)
    if math.prod(shape) > CACHE_BYTES:
        return None
    pixels = _mapped(path, shape)
    mixed = path.with_suffix(".mixed")
    if pixels is not None or mixed.exists():
        return pixels
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.with_suffix(".lock")):
        pixels = _mapped(path, shape)
        if pixels is not None:
            return pixels
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            made = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
            for place in range(num):
                image = decode(place)
                if image.shape != first.shape:
                    mixed.touch()
                    return None
                made[place, ..., :3] = image
            made.flush()
            del made
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return _mapped(path, shape)


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return None  # absent or cut short
    # A plain array over the mapping: np.memmap's own indexing is several times slower.
    return np.asarray(pixels) if pixels.shape == shape and pixels.dtype == np.uint8 else None
