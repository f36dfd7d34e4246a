"""A dataset opened for reading: its splits, labels, nested subsets and decoded images.

Damage is noticed before it can move a number: the first time a process opens a split, every shard's
size is checked, and its checksum too unless this very file (size and time of change) passed before.
Only then is the cache of decoded pixels used.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image

from harness.data.cache import open_pixels
from harness.data.index import Index, ShardEntry, verified_index
from harness.data.ready import ready_scenes
from harness.errors import DataError, NotFoundError, UserError
from harness.study.datasets import DatasetMeta, dataset_folder, describe, scenes_count


def open_dataset(spec: str, root: Path) -> Dataset:
    """The dataset named `scenes`, `scenes-<count>`, or packed in a directory.

    `root` is HARNESS_ROOT: scenes are made once below it, and caches of decoded pixels lie there.
    """
    count = scenes_count(spec)
    folder = dataset_folder(spec) if count is None else ready_scenes(count, root)
    meta = describe(str(folder))
    if meta.is_planned:
        raise UserError(f"dataset '{spec}' is only described: its images are not here; pack them")
    return Dataset(meta, folder, root / "cache" / meta.fingerprint)


class Keys(Sequence[str]):
    """The samples' keys as text, decoded when asked for."""

    def __init__(self, raw: np.ndarray) -> None:
        self._raw = raw

    def __len__(self) -> int:
        return len(self._raw)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [raw.decode() for raw in self._raw[place]]
        return self._raw[place].decode()


class Dataset:
    """Metadata and splits of one dataset."""

    def __init__(self, meta: DatasetMeta, folder: Path, cache: Path) -> None:
        self.meta = meta
        self.folder = folder
        self._cache = cache
        self._splits: dict[str, Split] = {}

    def split(self, name: str) -> Split:
        """A split by its own name; see `DatasetMeta.split_for` for the name that serves a role.

        Raises NotFoundError if there is none, DataError if a shard is not as it was written.
        """
        if name not in self._splits:
            if name not in self.meta.shards:
                have = ", ".join(self.meta.shards) or "none"
                raise NotFoundError(f"{self.folder}: no split '{name}'; it has: {have}")
            self._splits[name] = Split(name, self.meta, self.folder, self._cache)
        return self._splits[name]


class Split:
    """The samples of one split, addressed by index in the order of the shards."""

    def __init__(self, name: str, meta: DatasetMeta, folder: Path, cache: Path) -> None:
        self.name = name
        entries: list[ShardEntry] = meta.shards[name]
        self._paths = [folder / str(entry["file"]) for entry in entries]
        self._index: Index = verified_index(name, meta, folder, cache)
        index = self._index
        self.num_samples = len(index.keys)
        if self.num_samples != meta.splits[name]:
            raise DataError(
                f"{folder}: split {name}: found {self.num_samples} samples, dataset.json says"
                f" {meta.splits[name]}; pack it again"
            )
        self.keys = Keys(index.keys)
        self.key_hashes = index.key_hashes
        self.class_ids = index.class_ids
        self.label_offsets = index.label_offsets
        self.label_ids = index.label_ids
        self._by_hash: np.ndarray | None = None
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()
        self._cache_file = cache / f"{name}.npy"
        self._pixels: np.ndarray | None = None
        self._is_prepared = False

    def subset(self, num: int) -> np.ndarray:
        """int64 [num]: the samples with the smallest key hashes, in that order.

        Nested (each subset opens every larger one) and independent of how shards are cut.
        Raises UserError if the split has fewer.
        """
        if not 1 <= num <= self.num_samples:
            raise UserError(
                f"split {self.name}: cannot take {num} images; expected 1 to {self.num_samples}"
            )
        if self._by_hash is None:
            self._by_hash = np.lexsort((self._index.keys, self.key_hashes)).astype(np.int64)
        return self._by_hash[:num]

    def decode(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3]. Raises DataError naming the shard and the byte offset."""
        if not self._is_prepared:
            self.prepare()
        return self._decode(index) if self._pixels is None else self._pixels[index]

    def prepare(self) -> bool:
        """Opens the cache of decoded pixels, making it if need be; False if the set has none."""
        if not self._is_prepared:
            self._pixels = open_pixels(self._cache_file, self.num_samples, self._decode)
            self._is_prepared = True
        return self._pixels is not None

    def _decode(self, index: int) -> np.ndarray:
        row = self._index
        shard, offset, size = int(row.shards[index]), int(row.offsets[index]), int(row.sizes[index])
        path = self._paths[shard]
        where = f"{path}: byte offset {offset}: sample {self.keys[index]}"
        try:
            raw = os.pread(self._file(shard), size, offset)
        except OSError as error:
            raise DataError(f"{where}: cannot be read ({error.strerror})") from None
        if len(raw) != size:
            raise DataError(f"{where}: the shard is truncated: {len(raw)} of {size} bytes")
        try:
            with Image.open(io.BytesIO(raw)) as picture:
                return np.asarray(picture.convert("RGB"))
        except Exception as error:  # Pillow raises many kinds for bytes that are no image
            raise DataError(f"{where}: not a readable image ({error})") from None

    def _file(self, shard: int) -> int:
        with self._lock:
            if shard not in self._files:
                self._files[shard] = os.open(self._paths[shard], os.O_RDONLY)
            return self._files[shard]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)
