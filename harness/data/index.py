"""The index of a split: where every image lies and what its labels are, as flat arrays.

One file per split, in the safetensors format, mapped into memory: opening costs nothing that grows
with the number of samples, and processes share its pages. It can be rebuilt from the shards at any
time, so it is never trusted: it must have the size and checksum that dataset.json records, or,
where that records none, be of shards with the recorded checksums.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import uuid
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import overload

import numpy as np
from safetensors.numpy import save_file

from harness.data.hashing import key_hash
from harness.data.shards import Listed
from harness.errors import DataError
from harness.study.datasets import ShardEntry

_DTYPES = {"U64": np.uint64, "I64": np.int64, "U32": np.uint32, "I32": np.int32, "U8": np.uint8}


class Keys(Sequence[str]):
    """The samples' keys as text, decoded when asked for."""

    def __init__(self, raw: np.ndarray, offsets: np.ndarray) -> None:
        self._raw, self._offsets = raw, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        start, stop = int(self._offsets[place]), int(self._offsets[place + 1])
        return self._raw[start:stop].tobytes().decode()


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """Arrays over the n samples of a split, in the order of its shards."""

    shard_rows: np.ndarray
    """int64 [shards + 1]: shard s holds samples [shard_rows[s], shard_rows[s + 1])."""
    starts: np.ndarray
    """int64 [n]: first byte of the sample in its shard."""
    lengths: np.ndarray
    """uint32 [n]: bytes of the sample, tar headers and padding included."""
    image_starts: np.ndarray
    """uint32 [n]: first byte of the image (or video), from the sample's."""
    image_sizes: np.ndarray
    """uint32 [n]: bytes of the image."""
    crcs: np.ndarray
    """uint32 [n]: CRC-32 of the sample's bytes."""
    class_ids: np.ndarray
    """int32 [n]; -1 where there is none."""
    label_offsets: np.ndarray
    """int64 [n + 1]: sample i has label_ids[label_offsets[i] : label_offsets[i + 1]]."""
    label_ids: np.ndarray
    """int32 [label_offsets[-1]]."""
    key_offsets: np.ndarray
    """int64 [n + 1]: the key of sample i is key_bytes[key_offsets[i] : key_offsets[i + 1]]."""
    key_bytes: np.ndarray
    """uint8 [key_offsets[-1]], utf-8."""
    key_hashes: np.ndarray
    """uint64 [n]."""
    by_hash: np.ndarray
    """uint32 [n]: the samples, those with the smallest key hash first (ties by key)."""

    @property
    def keys(self) -> Keys:
        """The samples' keys."""
        return Keys(self.key_bytes, self.key_offsets)

    @property
    def num_samples(self) -> int:
        """The n of the shapes above."""
        return len(self.starts)

    def shard_of(self, row: int) -> int:
        """Place of a sample's shard in the split's list."""
        return int(np.searchsorted(self.shard_rows, row, side="right")) - 1


def build_index(
    listed: Iterable[Sequence[Listed]],
    entries: Sequence[ShardEntry],
    hashtags: Sequence[str],
    classes: Sequence[str],
) -> Index:
    """Index of the samples of all shards of a split; of `listed` one shard is held at a time.

    A class is a place in `classes` or one of its names. Without hashtags in the whole set a
    sample's class, or its classes, are its labels. Raises DataError for a label that is not in the
    vocabulary.
    """
    place_of_tag = {tag: place for place, tag in enumerate(hashtags)}
    place_of_class = {name: place for place, name in enumerate(classes)}
    # Arrays grow by the bytes of a number, where a list would hold an object for each.
    starts, hashes, key_bytes = array("q"), array("Q"), bytearray()
    lengths, image_starts, image_sizes, crcs = (array("I") for _ in range(4))
    class_ids, label_ids = array("i"), array("i")
    shard_rows, label_offsets, key_offsets = (array("q", [0]) for _ in range(3))
    for entry, part in zip(entries, listed, strict=True):
        for sample in part:
            where = f"{entry['file']}: byte offset {sample.start}: sample {sample.key}"
            class_id = _class_id(sample.cls, place_of_class, where)
            if hashtags:
                unknown = [tag for tag in sample.hashtags if tag not in place_of_tag]
                if unknown:
                    many = len(hashtags)
                    raise DataError(f"{where}: hashtag '{unknown[0]}' is not one of {many}")
                label_ids.extend(place_of_tag[tag] for tag in sample.hashtags)
            elif sample.classes:
                label_ids.extend(_class_id(name, place_of_class, where) for name in sample.classes)
            elif class_id >= 0:
                label_ids.append(class_id)
            class_ids.append(class_id)
            label_offsets.append(len(label_ids))
            key_bytes += sample.key.encode()
            key_offsets.append(len(key_bytes))
        hashes.extend([key_hash(sample.key) for sample in part])
        starts.extend([sample.start for sample in part])
        lengths.extend([sample.stop - sample.start for sample in part])
        image_starts.extend([sample.offset - sample.start for sample in part])
        image_sizes.extend([sample.size for sample in part])
        crcs.extend([sample.crc for sample in part])
        shard_rows.append(len(starts))
    return finish_index(
        shard_rows=np.frombuffer(shard_rows, dtype=np.int64),
        starts=np.frombuffer(starts, dtype=np.int64),
        lengths=np.frombuffer(lengths, dtype=np.uint32),
        image_starts=np.frombuffer(image_starts, dtype=np.uint32),
        image_sizes=np.frombuffer(image_sizes, dtype=np.uint32),
        crcs=np.frombuffer(crcs, dtype=np.uint32),
        class_ids=np.frombuffer(class_ids, dtype=np.int32),
        label_offsets=np.frombuffer(label_offsets, dtype=np.int64),
        label_ids=np.frombuffer(label_ids, dtype=np.int32),
        key_offsets=np.frombuffer(key_offsets, dtype=np.int64),
        key_bytes=np.frombuffer(key_bytes, dtype=np.uint8),
        key_hashes=np.frombuffer(hashes, dtype=np.uint64),
    )


def finish_index(**columns: np.ndarray) -> Index:
    """The index of these columns, with `by_hash` worked out."""
    hashes = columns["key_hashes"]
    by_hash = np.argsort(hashes, kind="stable")
    ties = np.flatnonzero(np.diff(hashes[by_hash]) == 0)
    if len(ties):  # of different keys once in 2**32 samples or so; of one key in two shards
        keys = Keys(columns["key_bytes"], columns["key_offsets"])
        by_hash = np.array(sorted(by_hash.tolist(), key=lambda row: (int(hashes[row]), keys[row])))
    return Index(**columns, by_hash=by_hash.astype(np.uint32))


def _class_id(name: str | None, place_of_class: dict[str, int], where: str) -> int:
    if name is None:
        return -1
    found = place_of_class.get(name)
    if found is None and name.isdecimal() and int(name) < len(place_of_class):
        found = int(name)
    if found is None:
        raise DataError(f"{where}: class '{name}' is not one of {len(place_of_class)}")
    return found


def save_index(index: Index, path: Path, entries: Sequence[ShardEntry]) -> None:
    """Writes the index in one step; equal indexes have equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    columns = {field.name: np.ascontiguousarray(getattr(index, field.name)) for field in _COLUMNS}
    save_file(columns, temporary, metadata=_metadata(entries))
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def shard_part(index: Index, place: int) -> Index:
    """The part of an index that is about one shard, without `by_hash`."""
    first, last = (int(row) for row in index.shard_rows[place : place + 2])
    labels, keys = index.label_offsets[first : last + 1], index.key_offsets[first : last + 1]
    rows = slice(first, last)
    return Index(
        shard_rows=np.array([0, last - first]),
        starts=index.starts[rows],
        lengths=index.lengths[rows],
        image_starts=index.image_starts[rows],
        image_sizes=index.image_sizes[rows],
        crcs=index.crcs[rows],
        class_ids=index.class_ids[rows],
        label_offsets=labels - labels[0],
        label_ids=index.label_ids[int(labels[0]) : int(labels[-1])],
        key_offsets=keys - keys[0],
        key_bytes=index.key_bytes[int(keys[0]) : int(keys[-1])],
        key_hashes=index.key_hashes[rows],
        by_hash=np.zeros(0, dtype=np.uint32),
    )


def layout_of(index: Index) -> str:
    """Stands for the sequence of samples and how shards cut it."""
    digest = hashlib.sha256()
    for start, stop in zip(index.shard_rows[:-1], index.shard_rows[1:], strict=True):
        digest.update("".join(f"{key}\n" for key in index.keys[int(start) : int(stop)]).encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def index_file(split: str) -> str:
    """Name of a split's index in the dataset's folder."""
    return f"index/{split}.safetensors"


def write_index(
    folder: Path, split: str, index: Index, shards: Mapping[str, Sequence[ShardEntry]]
) -> ShardEntry:
    """Writes the index of a split where it belongs; what dataset.json records of it."""
    path = folder / index_file(split)
    save_index(index, path, shards[split])
    return file_entry(path, folder)


def load_index(path: Path, entries: Sequence[ShardEntry]) -> Index | None:
    """The saved index, mapped; None if it is absent, cut short or of other shards."""
    try:
        with open(path, "rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # https://huggingface.co/docs/safetensors: length of the header, header, arrays.
        begin = 8 + int.from_bytes(view[:8], "little")
        header = json.loads(view[8:begin])
        if header["__metadata__"] != _metadata(entries):
            return None
        return Index(**{field.name: mapped(view, begin, header[field.name]) for field in _COLUMNS})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # it can be rebuilt


def mapped(view: mmap.mmap, begin: int, entry: dict[str, object]) -> np.ndarray:
    """An array of a mapped safetensors file whose arrays `begin` there. Raises ValueError."""
    shape, (start, stop) = entry["shape"], entry["data_offsets"]  # type: ignore[misc]
    dtype = np.dtype(_DTYPES[str(entry["dtype"])])
    count = math.prod(shape)  # type: ignore[arg-type]
    if count * dtype.itemsize != stop - start:
        raise ValueError("shape and length disagree")
    return np.frombuffer(view, dtype, count, begin + start)


def _metadata(entries: Sequence[ShardEntry]) -> dict[str, str]:
    """Names the shards that an index is of. One key: the format does not fix the order of more."""
    shards = hashlib.sha256("".join(f"{e['sha256']}\n" for e in entries).encode()).hexdigest()
    return {"index": f"schema 2 of shards {shards}"}


_COLUMNS = fields(Index)


def file_entry(path: Path, base: Path) -> ShardEntry:
    """What dataset.json records of a file: name, size and checksum."""
    return {
        "file": path.relative_to(base).as_posix(),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
    }


def shard_entry(path: Path, base: Path, samples: int) -> ShardEntry:
    """What dataset.json records of a shard."""
    return {**file_entry(path, base), "samples": samples}


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_size(
    path: Path, entry: ShardEntry, place: int, index: Index | None, name: str = ""
) -> None:
    """Raises DataError if the shard is missing or not as long as it was written."""
    name, kind = name or str(path), "shard" if "samples" in entry else "file"
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{name}: byte offset 0: the {kind} cannot be read ({error.strerror})"
        ) from None
    expected = int(entry["bytes"])
    if found == expected:
        return
    lost = ""
    if index is not None and found < expected:
        rows = slice(int(index.shard_rows[place]), int(index.shard_rows[place + 1]))
        beyond = index.starts[rows] + index.lengths[rows] > found
        lost = f" ({int(beyond.sum())} samples lost)"
    what = "truncated" if found < expected else "grown"
    raise DataError(
        f"{name}: byte offset {min(found, expected)}: the {kind} is {what}: found {found} bytes,"
        f" expected {expected}{lost}; restore it, or remove the dataset and make it again"
    )


def check_content(path: Path, entry: ShardEntry, place: int, index: Index | None) -> None:
    """Raises DataError naming the first damaged sample if the shard's checksum is wrong."""
    if sha256_of(path) == entry["sha256"]:
        return
    where = "byte offset 0: the shard's bytes are not those that were written"
    if index is not None:
        rows = damaged_rows(path, place, index)
        if rows:
            start = int(index.starts[rows[0]])
            image = start + int(index.image_starts[rows[0]])
            key = index.keys[rows[0]]
            where = f"byte offset {start}: sample {key} (image at byte {image}) is damaged"
    raise DataError(f"{path}: {where}; restore it, or remove the dataset and make it again")


def damaged_rows(path: Path, place: int, index: Index) -> list[int]:
    """Samples of a shard whose bytes are not those that were written."""
    rows = range(int(index.shard_rows[place]), int(index.shard_rows[place + 1]))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return [
            row
            for row in rows
            if zlib.crc32(view[(start := int(index.starts[row])) : start + int(index.lengths[row])])
            != index.crcs[row]
        ]
