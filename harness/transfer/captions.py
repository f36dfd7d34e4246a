"""What is said of the images of a split, read from its shards when it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from harness.data.dataset import Split
from harness.data.hashing import fold
from harness.errors import DataError

CACHED = 500_000
"""Captions of so many images stay in memory; a small set is read once, not in every epoch."""


class Captions:
    """The captions of a split's images: `caption`, or the list `captions`, of a sample's .json."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self._known: dict[int, tuple[str, ...]] = {}

    def of(self, row: int) -> tuple[str, ...]:
        """All captions of an image, at least one. Raises DataError naming shard and byte offset."""
        known = self._known.get(row)
        if known is not None:
            return known
        fields = self.split.fields(row)
        said: Any = fields.get("captions", fields.get("caption"))
        captions = tuple(said) if isinstance(said, list) else (said,)
        if not captions or not all(isinstance(text, str) and text.strip() for text in captions):
            raise DataError(
                f"{self.split.where(row)}: has no caption; expected text as `caption` or a list as"
                " `captions` in its .json, or a .txt when the shards are packed"
            )
        if len(self._known) < CACHED:
            self._known[row] = captions
        return captions

    def one(self, row: int, key: Sequence[int]) -> str:
        """One of an image's captions, a function of `key`."""
        captions = self.of(row)
        return captions[fold(*key) % len(captions)]

    def all(self, rows: np.ndarray) -> tuple[list[str], np.ndarray]:
        """The captions of all these images, and int64: the place in `rows` that each belongs to."""
        texts: list[str] = []
        places: list[int] = []
        for place, row in enumerate(rows.tolist()):
            own = self.of(row)
            texts += own
            places += [place] * len(own)
        return texts, np.array(places, dtype=np.int64)
