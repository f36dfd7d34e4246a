"""The index of a split: where every image lies and what its labels are, as flat arrays.

One .npz per split beside the shards. It can be rebuilt from the shards at any time, so it is
never trusted: it must name the shards by the checksums that dataset.json records.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import uuid
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from harness.data.hashing import key_hash
from harness.data.shards import Listed, list_shard
from harness.errors import DataError, UserError
from harness.ledger.files import read_json, write_json
from harness.study.datasets import DatasetMeta

ShardEntry = dict[str, str | int]
"""One element of `shards` in dataset.json: file, samples, bytes, sha256."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """Arrays over the n samples of a split, in shard order."""

    keys: np.ndarray
    """bytes (utf-8) [n]."""
    key_hashes: np.ndarray
    """uint64 [n]."""
    shards: np.ndarray
    """int32 [n]: place in the split's list of shards."""
    starts: np.ndarray
    """int64 [n]: first byte of the sample."""
    stops: np.ndarray
    """int64 [n]: first byte after the sample."""
    offsets: np.ndarray
    """int64 [n]: first byte of the image."""
    sizes: np.ndarray
    """int64 [n]: bytes of the image."""
    crcs: np.ndarray
    """uint32 [n]: CRC-32 of the sample's bytes."""
    class_ids: np.ndarray
    """int64 [n]; -1 where there is none."""
    label_offsets: np.ndarray
    """int64 [n + 1]: sample i has label_ids[label_offsets[i] : label_offsets[i + 1]]."""
    label_ids: np.ndarray
    """int32 [label_offsets[-1]]."""
    sources: np.ndarray
    """str [number of shards]: their sha256, to tell an index of other shards."""


def build_index(
    listed: Sequence[Sequence[Listed]],
    entries: Sequence[ShardEntry],
    hashtags: Sequence[str],
    classes: Sequence[str],
) -> Index:
    """Index of the samples of all shards of a split.

    A class is a place in `classes` or one of its names. Without hashtags in the whole set a
    sample's class is its only label. Raises DataError for a label that is not in the vocabulary.
    """
    samples = [(place, sample) for place, part in enumerate(listed) for sample in part]
    place_of_tag = {tag: place for place, tag in enumerate(hashtags)}
    place_of_class = {name: place for place, name in enumerate(classes)}
    class_ids = np.full(len(samples), -1, dtype=np.int64)
    label_ids: list[int] = []
    label_offsets = np.zeros(len(samples) + 1, dtype=np.int64)
    for row, (place, sample) in enumerate(samples):
        where = f"{entries[place]['file']}: byte offset {sample.start}: sample {sample.key}"
        if sample.cls is not None:
            found = place_of_class.get(sample.cls)
            if found is None and sample.cls.isdecimal() and int(sample.cls) < len(classes):
                found = int(sample.cls)
            if found is None:
                raise DataError(f"{where}: class '{sample.cls}' is not one of {len(classes)}")
            class_ids[row] = found
        if hashtags:
            unknown = [tag for tag in sample.hashtags if tag not in place_of_tag]
            if unknown:
                raise DataError(f"{where}: hashtag '{unknown[0]}' is not one of {len(hashtags)}")
            label_ids += [place_of_tag[tag] for tag in sample.hashtags]
        elif class_ids[row] >= 0:
            label_ids.append(int(class_ids[row]))
        label_offsets[row + 1] = len(label_ids)
    return Index(
        keys=np.array([sample.key.encode() for _, sample in samples], dtype=np.bytes_),
        key_hashes=np.array([key_hash(sample.key) for _, sample in samples], dtype=np.uint64),
        shards=np.array([place for place, _ in samples], dtype=np.int32),
        starts=np.array([sample.start for _, sample in samples], dtype=np.int64),
        stops=np.array([sample.stop for _, sample in samples], dtype=np.int64),
        offsets=np.array([sample.offset for _, sample in samples], dtype=np.int64),
        sizes=np.array([sample.size for _, sample in samples], dtype=np.int64),
        crcs=np.array([sample.crc for _, sample in samples], dtype=np.uint32),
        class_ids=class_ids,
        label_offsets=label_offsets,
        label_ids=np.array(label_ids, dtype=np.int32),
        sources=np.array([str(entry["sha256"]) for entry in entries]),
    )


def save_index(index: Index, path: Path) -> None:
    """Writes the index in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **{field.name: getattr(index, field.name) for field in fields(Index)})
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_index(path: Path, entries: Sequence[ShardEntry]) -> Index | None:
    """The saved index, or None if it is absent, damaged or of other shards."""
    try:
        with np.load(path, allow_pickle=False) as saved:
            index = Index(**{field.name: saved[field.name] for field in fields(Index)})
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        return None  # it can be rebuilt
    same = [str(sha) for sha in index.sources] == [str(entry["sha256"]) for entry in entries]
    return index if same else None


def shard_entry(path: Path, base: Path, samples: int) -> ShardEntry:
    """What dataset.json records of a shard."""
    return {
        "file": path.relative_to(base).as_posix(),
        "samples": samples,
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
    }


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verified_index(split: str, meta: DatasetMeta, folder: Path, cache: Path) -> Index:
    """The index of a split whose shards are what was written; rebuilt from them if need be.

    Sizes are checked every time. Checksums are checked unless this file, with this size and time
    of change, passed before: `cache` remembers. Raises DataError naming shard and byte offset.
    """
    entries = meta.shards[split]
    paths = [folder / str(entry["file"]) for entry in entries]
    index_file = folder / "index" / f"{split}.npz"
    index = load_index(index_file, entries)
    passed_file = cache / f"{split}.verified.json"
    try:
        passed = read_json(passed_file) or {}
    except UserError:
        passed = {}
    now: dict[str, object] = {}
    for place, (path, entry) in enumerate(zip(paths, entries, strict=True)):
        check_size(path, entry, place, index)
        stamp = [str(path.resolve()), path.stat().st_mtime_ns, entry["sha256"]]
        if passed.get(str(entry["file"])) != stamp:
            check_content(path, entry, place, index)
        now[str(entry["file"])] = stamp
    if now != passed:
        write_json(passed_file, now)
    if index is None:
        index = build_index(
            [list_shard(path) for path in paths], entries, meta.hashtags, meta.classes
        )
        if os.access(folder, os.W_OK):
            save_index(index, index_file)
    return index


def check_size(path: Path, entry: ShardEntry, place: int, index: Index | None) -> None:
    """Raises DataError if the shard is missing or not as long as it was written."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{path}: byte offset 0: the shard cannot be read ({error.strerror})"
        ) from None
    expected = int(entry["bytes"])
    if found == expected:
        return
    lost = ""
    if index is not None:
        beyond = (index.shards == place) & (index.stops > found)
        lost = f" ({int(beyond.sum())} samples lost)" if found < expected else ""
    what = "truncated" if found < expected else "grown"
    raise DataError(
        f"{path}: byte offset {min(found, expected)}: the shard is {what}: found {found} bytes,"
        f" expected {expected}{lost}; restore it, or remove the dataset and make it again"
    )


def check_content(path: Path, entry: ShardEntry, place: int, index: Index | None) -> None:
    """Raises DataError naming the first damaged byte range if the shard's checksum is wrong."""
    if sha256_of(path) == entry["sha256"]:
        return
    where = "byte offset 0: the shard's bytes are not those that were written"
    if index is not None:
        rows = np.flatnonzero(index.shards == place)
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            for row in rows.tolist():
                start, stop = int(index.starts[row]), int(index.stops[row])
                if zlib.crc32(view[start:stop]) == index.crcs[row]:
                    continue
                image = f"image at byte {index.offsets[row]}"
                where = (
                    f"byte offset {start}: sample {index.keys[row].decode()} ({image}) is damaged"
                )
                break
    raise DataError(f"{path}: {where}; restore it, or remove the dataset and make it again")
