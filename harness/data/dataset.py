"""A dataset opened for reading: its splits, labels, nested subsets, order and decoded images.

Damage is noticed before it can move a number: the first time a process opens a split, every local
shard's size is checked, and its checksum too unless this very file (size and time of change) passed
before; a remote shard is checked when it is fetched. Only then is the cache of decoded pixels used.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.data.augment import view
from harness.data.cache import open_pixels
from harness.data.decode import decode_image, draw_view, put
from harness.data.index import (
    Index,
    check_content,
    check_size,
    index_file,
    load_index,
    sha256_of,
    write_index,
)
from harness.data.kept_order import kept
from harness.data.order import Arrangement, Stream, arrange
from harness.data.ready import ready
from harness.data.relabel import rebuilt_index
from harness.data.resample import expected_counts
from harness.data.storage import Reader, Storage
from harness.errors import DataError, NotFoundError, UserError
from harness.ledger.files import read_json, write_json
from harness.study.builtin import builtin
from harness.study.datasets import ORDER_WINDOW, DatasetMeta, describe, locate
from harness.study.locations import is_remote

if TYPE_CHECKING:
    from torch import Tensor


def open_dataset(spec: str, root: Path) -> Dataset:
    """The dataset that is built in, or packed in a directory or below a URL.

    `root` is HARNESS_ROOT: built-in sets are made once below it, and caches lie there: of decoded
    pixels, and of files that were fetched.
    """
    found = builtin(spec)
    location = locate(spec) if found is None else str(ready(found, root))
    meta = describe(location)
    if meta.is_planned:
        raise UserError(f"dataset '{spec}' is only described: its images are not here; pack them")
    return Dataset(meta, location, root / "cache" / meta.fingerprint)


class Dataset:
    """Metadata and splits of one dataset."""

    def __init__(self, meta: DatasetMeta, location: str, cache: Path) -> None:
        self.meta = meta
        self.location = location
        self._cache = cache
        self._splits: dict[str, Split] = {}

    def split(self, name: str) -> Split:
        """A split by its own name; see `DatasetMeta.split_for` for the name that serves a role.

        Raises NotFoundError if there is none, DataError if a shard is not as it was written.
        """
        if name not in self._splits:
            if name not in self.meta.shards:
                have = ", ".join(self.meta.shards) or "none"
                raise NotFoundError(f"{self.location}: no split '{name}'; it has: {have}")
            self._splits[name] = Split(name, self.meta, self.location, self._cache)
        return self._splits[name]


class Split:
    """The samples of one split, addressed by row in the order of the shards."""

    def __init__(self, name: str, meta: DatasetMeta, location: str, cache: Path) -> None:
        self.name = name
        self._entries = meta.shards[name]
        # Shards of a set with derived labels are those of its source: one copy serves both.
        owner = str(meta.labels.get("source", cache.name))
        self.storage = Storage(location, cache.with_name(owner) / "files")
        self._shown = [self.storage.shown(entry) for entry in self._entries]
        self.index = _verified_index(name, meta, self.storage, cache)
        self.num_samples = self.index.num_samples
        if self.num_samples != meta.splits[name]:
            raise DataError(
                f"{location}: split {name}: found {self.num_samples} samples, dataset.json says"
                f" {meta.splits[name]}; pack it again"
            )
        self.keys = self.index.keys
        self.key_hashes = self.index.key_hashes
        self.class_ids = self.index.class_ids
        self.label_offsets = self.index.label_offsets
        self.label_ids = self.index.label_ids
        self._reader = Reader(
            len(self._entries), lambda shard: self.storage.local(self._entries[shard])
        )
        self.cache = cache
        # Shards, and labels: of some sets the fingerprint tells neither cut nor order.
        self._made_of = [meta.fingerprint, *(str(entry["sha256"]) for entry in self._entries)]
        if name in meta.indexes:
            self._made_of.append(str(meta.indexes[name]["sha256"]))
        # Decoded pixels are in the order of the shards, which the fingerprint does not tell.
        layout = meta.layout.get(name)
        self._cache_file = cache / (f"{name}-{layout}.npy" if layout else f"{name}.npy")
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
        return self.index.by_hash[:num].astype(np.int64)

    def stream(self, num: int, seed: int, resample: float | None = None, views: int = 1) -> Stream:
        """The endless sequence of samples over the subset of `num` images, each shown `views` times
        in a row.

        With `resample`, an epoch has round(num * resample) samples: images with rare labels are
        repeated, see `harness.data.resample`. Raises UserError if the split has fewer images.
        """
        if not 1 <= num <= self.num_samples:
            self.subset(num)  # says what is wrong
        index, total = self.index, num if resample is None else round(num * resample)

        def make() -> Arrangement:
            repeats = None
            if resample is not None:
                repeats = expected_counts(index, self.subset(num), total)
            return arrange(index.by_hash, index.shard_rows, num, repeats)

        is_large = total > ORDER_WINDOW and (resample is not None or num < self.num_samples)
        if is_large:
            made_of = [*self._made_of, num, resample]
            arrangement = kept(self.cache / "order" / self.name, made_of, make)
        else:
            arrangement = make()
        return Stream(
            index.by_hash, index.shard_rows, num, seed, views=views, arrangement=arrangement
        )

    def decode(self, row: int) -> np.ndarray:
        """uint8 [H, W, 3]. Raises DataError naming the shard and the byte offset."""
        if not self._is_prepared:
            self.prepare()
        return self._decode(row) if self._pixels is None else self._pixels[row, ..., :3]

    def prepare(self) -> bool:
        """Opens the cache of decoded pixels, making it if need be; False if the set has none."""
        if not self._is_prepared:
            self._pixels = open_pixels(self._cache_file, self.num_samples, self._decode)
            self._is_prepared = True
        return self._pixels is not None

    def place(self, row: int) -> tuple[str, int]:
        """The shard's path or URL, and the byte where the image begins."""
        return self._shown[self.index.shard_of(row)], self._image_offset(row)

    def where(self, row: int) -> str:
        """Shard, byte offset and key of a sample, for messages."""
        shard, offset = self.place(row)
        return f"{shard}: byte offset {offset}: sample {self.keys[row]}"

    def read(self, row: int) -> bytes:
        """The image's (or the video's) bytes as they are stored. Raises DataError."""
        return self._bytes(row, self._image_offset(row), int(self.index.image_sizes[row]))

    def read_sample(self, row: int) -> bytes:
        """All of a sample as it is stored: its files with their tar headers. Raises DataError."""
        return self._bytes(row, int(self.index.starts[row]), int(self.index.lengths[row]))

    def fields(self, row: int) -> dict[str, Any]:
        """The sample's .json: caption, annotations, classes and what else it has; {} without one.

        Raises DataError naming the shard and the byte offset.
        """
        raw = self.read_sample(row)
        try:
            with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as members:
                for member in members:
                    file = members.extractfile(member) if member.name.endswith(".json") else None
                    if file is not None:
                        return json.load(file)
        except (tarfile.TarError, ValueError) as error:
            raise DataError(f"{self.where(row)}: its .json cannot be read ({error})") from None
        return {}

    def _bytes(self, row: int, offset: int, size: int) -> bytes:
        try:
            raw = self._reader.read(self.index.shard_of(row), offset, size)
        except OSError as error:
            raise DataError(f"{self.where(row)}: cannot be read ({error.strerror})") from None
        if len(raw) != size:
            raise DataError(
                f"{self.where(row)}: the shard is truncated: {len(raw)} of {size} bytes"
            )
        return raw

    def draw(
        self,
        out_1CSS: Tensor,
        row: int,
        rng_key: tuple[int, ...] | None,
        crop_scale: tuple[float, float] = (1.0, 1.0),
        flip: bool = False,
    ) -> None:
        """Draws a view of a sample into uint8 [1, 3, S, S], channels last; see `draw_view`.

        Raises DataError naming the shard and the byte offset.
        """
        self.prepare()
        if self._pixels is not None:
            seen = view(self._pixels[row], out_1CSS.shape[2], rng_key, crop_scale, flip)
            put(out_1CSS, seen)
            return
        raw = self.read(row)
        try:
            draw_view(out_1CSS, raw, rng_key, crop_scale, flip)
        except Exception as error:  # Pillow raises many kinds for bytes that are no image
            raise DataError(f"{self.where(row)}: not a readable image ({error})") from None

    def _decode(self, row: int) -> np.ndarray:
        raw = self.read(row)
        try:
            return decode_image(raw)
        except Exception as error:  # as above
            raise DataError(f"{self.where(row)}: not a readable image ({error})") from None

    def _image_offset(self, row: int) -> int:
        return int(self.index.starts[row]) + int(self.index.image_starts[row])


def _verified_index(split: str, meta: DatasetMeta, storage: Storage, cache: Path) -> Index:
    """The index of a split whose local shards are what was written; rebuilt if need be.

    Sizes are checked every time. Checksums are checked unless this file, with this size and time
    of change, passed before: `cache` remembers. Raises DataError naming shard and byte offset.
    """
    entries, known = meta.shards[split], _Passed(cache / f"{split}.verified.json")
    index = None
    if split in meta.indexes:
        entry = meta.indexes[split]
        path = storage.local(entry)
        if path.is_file() and path.stat().st_size == entry["bytes"]:
            if known.passed(path, entry) or sha256_of(path) == entry["sha256"]:
                index = load_index(path, entries)
                known.add(path, entry)
    else:
        path = Path(storage.name({"file": index_file(split)}))
        index = load_index(path, entries)
    local = [
        (place, Path(storage.name(entry)), entry)
        for place, entry in enumerate(entries)
        if not is_remote(storage.name(entry))
    ]
    for place, path, entry in local:
        check_size(path, entry, place, index)
    new = [shard for shard in local if not known.passed(*shard[1:])]
    # Hashing lets other threads run: the first time, a set is read as fast as disk and cores can.
    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="checksum") as pool:
        checks = [pool.submit(check_content, path, e, place, index) for place, path, e in new]
        try:
            for check in checks:  # in the order of the shards: the first damage is named
                check.result()
        finally:
            pool.shutdown(cancel_futures=True)
    for _, path, entry in local:
        known.add(path, entry)
    known.save()
    if index is None:
        index = rebuilt_index(split, meta, storage)
        _restore(index, split, meta, storage)
    return index


def _restore(index: Index, split: str, meta: DatasetMeta, storage: Storage) -> None:
    """Writes a rebuilt index where it belongs, if that is a folder that may be written to."""
    if storage.is_remote:
        return
    try:
        entry = write_index(Path(storage.location), split, index, meta.shards)
    except OSError:
        return  # a set on a read-only disk: its index is built anew each time
    # A rebuilt index has the bytes that dataset.json records, or dataset.json records none.
    assert meta.indexes.get(split, entry) == entry


class _Passed:
    """Which files passed their checksum before, by path and time of change."""

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._before = read_json(file) or {}
        except UserError:
            self._before = {}
        self._now: dict[str, object] = {}

    def passed(self, path: Path, entry: dict[str, str | int]) -> bool:
        """Whether this very file passed before."""
        return self._before.get(str(entry["file"])) == self._stamp(path, entry)

    def add(self, path: Path, entry: dict[str, str | int]) -> None:
        """This file passed now."""
        self._now[str(entry["file"])] = self._stamp(path, entry)

    def save(self) -> None:
        """Remembers what was added, nothing else."""
        if self._now != self._before:
            write_json(self._file, self._now)

    def _stamp(self, path: Path, entry: dict[str, str | int]) -> list[object]:
        return [str(path.resolve()), path.stat().st_mtime_ns, entry["sha256"]]
