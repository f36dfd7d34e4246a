"""`harness data verify`: is a dataset what it was when it was made, to the last sample?

Nothing is taken from caches or earlier checks, and nothing stops at the first finding: every shard
is read and listed anew, every image decoded, and what that gives is compared with the index and
with dataset.json.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from harness.data.images import Refusal, store_video
from harness.data.index import (
    Index,
    build_index,
    check_size,
    damaged_rows,
    finish_index,
    index_file,
    layout_of,
    load_index,
    sha256_of,
    shard_part,
)
from harness.data.labels import labels_fingerprint
from harness.data.pack import fingerprint_of, fingerprint_row
from harness.data.pack_shard import Packed, extra_digest
from harness.data.ready import ready
from harness.data.relabel import Labelling, read_labelling, relabelled_listing, tagged
from harness.data.shards import Listed, samples_of
from harness.data.storage import Storage
from harness.errors import DataError, NotFoundError, UserError
from harness.study.builtin import builtin
from harness.study.datasets import DatasetMeta, ShardEntry, describe, locate

_MOST_LINES = 100
"""Samples of one shard of which the index says something else; an index of another set has all."""
_COLUMNS = {
    "starts": "begins at byte",
    "lengths": "bytes",
    "image_starts": "image begins at byte",
    "image_sizes": "bytes of the image",
    "class_ids": "class",
}
Progress = Callable[[int, int], None]
"""Called with the number of samples looked at so far, and of all."""


@dataclass
class SplitCounts:
    """What was found of a split."""

    images: int = 0
    labels: int = 0
    unlabelled: int = 0
    by_class: dict[str, int] = field(default_factory=dict)
    by_hashtag: dict[str, int] = field(default_factory=dict)


@dataclass
class Verdict:
    """All that is wrong with a set, and what is in it."""

    location: str
    meta: DatasetMeta
    damage: list[str] = field(default_factory=list)
    """A line each: file, byte offset and key as far as they are known, then what is wrong."""
    splits: dict[str, SplitCounts] = field(default_factory=dict)
    is_fingerprint_checked: bool = False


def verify(
    spec: str, root: Path, *, quick: bool = False, progress: Progress | None = None
) -> Verdict:
    """Checks a packed set, here or behind a URL. With `quick`, images are not decoded.

    Raises NotFoundError if there is no such set, DataError if its dataset.json cannot be read.
    """
    found = builtin(spec)
    location = locate(spec) if found is None else str(ready(found, root))
    try:
        meta = describe(location)
    except NotFoundError:
        raise
    except UserError as error:
        raise DataError(str(error)) from None
    if meta.is_planned:
        raise UserError(f"dataset '{spec}' is only described: its images are not here")
    check = _Check(location, meta, root, quick, progress or (lambda done, total: None))
    for split in meta.shards:
        check.split(split)
    check.fingerprint()
    return check.verdict


class _Check:
    def __init__(
        self, location: str, meta: DatasetMeta, root: Path, quick: bool, progress: Progress
    ) -> None:
        self.verdict = Verdict(location, meta)
        self._meta, self._quick, self._progress = meta, quick, progress
        owner = str(meta.labels.get("source", meta.fingerprint))
        self._storage = Storage(location, root / "cache" / owner / "files")
        self._manifest = self._storage.shown({"file": "dataset.json"})
        self._done = 0
        self._rows: list[str] = []
        self._indexes: dict[str, Index] = {}
        self._labelling: Labelling | None = None
        if meta.labels:
            try:
                self._labelling = read_labelling(self._storage.local(meta.labels), meta.labels)
            except DataError as error:
                self._add(str(error))

    def _add(self, line: str) -> None:
        self.verdict.damage.append(line)

    def split(self, name: str) -> None:
        """Checks the index of a split and all its shards."""
        entries, counts = self._meta.shards[name], SplitCounts()
        self.verdict.splits[name] = counts
        index = self._recorded_index(name, entries)
        tally = _Tally(self._meta)
        with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="verify") as pool:
            for place, entry in enumerate(entries):
                own = None if index is None else shard_part(index, place)
                found = self._shard(name, entry, own, pool)
                if found is not None:
                    tally.add(found)
        tally.fill(counts)
        if counts.images != self._meta.splits.get(name):
            self._add(
                f"{self._manifest}: split {name}: says {self._meta.splits.get(name)} samples,"
                f" found {counts.images}"
            )

    def _recorded_index(self, split: str, entries: Sequence[ShardEntry]) -> Index | None:
        entry = self._meta.indexes.get(split, {"file": index_file(split)})
        shown = self._storage.shown(entry)
        try:
            path = self._storage.local(entry) if "sha256" in entry else Path(shown)
            if "sha256" in entry:
                check_size(path, entry, 0, None, name=shown)
                if sha256_of(path) != entry["sha256"]:
                    raise DataError(f"{shown}: byte offset 0: its checksum is not dataset.json's")
            index = load_index(path, entries)
            most = len(self._meta.hashtags or self._meta.classes)
            if index is None or index.label_ids.max(initial=-1) >= most:
                raise DataError(f"{shown}: byte offset 0: not an index of these shards")
        except DataError as error:
            text = str(error).partition("; restore it")[0]
            is_there = self._storage.is_remote or Path(shown).exists()
            first = "delete it: it is" if is_there else "it is"
            self._add(f"{text}; {first} made again from the shards when the set is next opened")
            return None
        columns = {name: value for name, value in vars(index).items() if name != "by_hash"}
        if not np.array_equal(finish_index(**columns).by_hash, index.by_hash):
            self._add(f"{shown}: byte offset 0: its samples are not in the order of their keys")
        if self._meta.layout.get(split, layout := layout_of(index)) != layout:
            self._add(f"{self._manifest}: split {split}: its layout is not that of the index")
        self._indexes[split] = index
        return index

    def _shard(
        self, split: str, entry: ShardEntry, index: Index | None, pool: ThreadPoolExecutor
    ) -> Index | None:
        """The shard's own index, made from it if possible; None if nothing is known of it."""
        shown = self._storage.shown(entry)
        try:
            path = self._storage.local(entry)
        except DataError as error:
            return self._lost(str(error), index)
        try:
            check_size(path, entry, 0, index, name=shown)
        except DataError as error:
            line = str(error).partition("; restore it")[0]
            if not path.is_file():
                return self._lost(line, index)
            self._add(line)
        is_whole = sha256_of(path) == entry["sha256"]
        listed = self._listed(path, split, entry)
        made = None if listed is None else self._made(split, entry, listed)
        index = made if index is None else index
        if index is None:
            self._add(f"{shown}: byte offset 0: neither listed nor indexed: nothing is known of it")
            return None
        problems: dict[int, list[str]] = {}
        if made is not None:
            problems = self._differences(shown, made, index)
        elif not is_whole:
            for row in damaged_rows(path, 0, index):
                problems.setdefault(row, []).append("its bytes are not those that were written")
        if not is_whole and not problems:
            self._add(f"{shown}: byte offset 0: its checksum is not that of dataset.json")
        truth = index if made is None else made
        contents = self._read(path, truth, problems, pool)
        for row, what in sorted(problems.items()):
            offset = int(truth.starts[row]) + int(truth.image_starts[row])
            key = truth.keys[row]
            self._add(f"{shown}: byte offset {offset}: sample {key}: {'; '.join(what)}")
        self._count_fingerprint(split, listed, contents)
        return truth

    def _lost(self, line: str, index: Index | None) -> None:
        many = f" ({index.num_samples} samples lost)" if index is not None else ""
        self._add(line + many)

    def _listed(self, path: Path, split: str, entry: ShardEntry) -> list[tuple[Listed, str]] | None:
        """Every sample, with the digest of its labels beyond hashtags and classes."""
        origin = "hashtags" if self._labelling is None else self._labelling.origin
        try:
            found = [
                (tagged(sample, labels, origin), extra_digest(labels.fields, sample.hashtags))
                for sample, labels in samples_of(path)
            ]
        except DataError as error:
            self._add(str(error).replace(str(path), self._storage.shown(entry)))
            return None
        if len(found) != entry["samples"]:
            self._add(
                f"{self._manifest}: {entry['file']}: says {entry['samples']} samples, found"
                f" {len(found)}"
            )
        return found

    def _made(self, split: str, entry: ShardEntry, found: list[tuple[Listed, str]]) -> Index | None:
        listed, meta = [[sample for sample, _ in found]], self._meta
        if meta.labels and self._labelling is None:
            return None
        shown: ShardEntry = {**entry, "file": self._storage.shown(entry)}
        try:
            if self._labelling is not None:
                return relabelled_listing(split, listed, [shown], meta.classes, self._labelling)
            return build_index(listed, [shown], meta.hashtags, meta.classes)
        except DataError as error:
            self._add(str(error))
            return None

    def _differences(self, shown: str, made: Index, index: Index) -> dict[int, list[str]]:
        """What the recorded index says of the samples, and the shard does not."""
        if list(made.keys) != list(index.keys):
            ours, theirs = set(made.keys), set(index.keys)
            lost, extra = sorted(theirs - ours), sorted(ours - theirs)
            words = [f"only the index has {_named(lost)}"] if lost else []
            words += [f"only the shard has {_named(extra)}"] if extra else []
            what = "; ".join(words) or "in another order"
            self._add(f"{shown}: byte offset 0: its samples are not those of the index: {what}")
            return {}
        problems: dict[int, list[str]] = {}
        for name, text in _COLUMNS.items():
            ours, theirs = getattr(made, name), getattr(index, name)
            for row in np.flatnonzero(ours != theirs).tolist():
                line = f"{text}: {theirs[row]} in the index, {ours[row]} in the shard"
                problems.setdefault(row, []).append(line)
        for row in np.flatnonzero(made.crcs != index.crcs).tolist():
            problems.setdefault(row, []).append("its bytes are not those that were written")
        for row in range(made.num_samples):
            ours, theirs = _labels(made, row), _labels(index, row)
            if ours != theirs:
                line = f"labels: {theirs} in the index, {ours} in the shard"
                problems.setdefault(row, []).append(line)
        if len(problems) > _MOST_LINES:
            self._add(f"{shown}: byte offset 0: {len(problems)} samples differ from the index")
            problems = dict(sorted(problems.items())[:_MOST_LINES])
        return problems

    def _read(
        self, path: Path, index: Index, problems: dict[int, list[str]], pool: ThreadPoolExecutor
    ) -> list[str]:
        """Decodes every image of a shard; SHA-256 of each one's stored bytes."""
        offsets = index.starts + index.image_starts
        with open(path, "rb") as file:

            def look(row: int) -> tuple[str, str | None]:
                size = int(index.image_sizes[row])
                raw = os.pread(file.fileno(), size, int(offsets[row]))
                digest = hashlib.sha256(raw).hexdigest()
                if len(raw) != size:
                    return digest, f"cut short: {len(raw)} of {size} bytes"
                return digest, None if self._quick else _decoding_problem(raw)

            contents: list[str] = []
            total = sum(self._meta.splits.values())
            for row, (digest, problem) in enumerate(pool.map(look, range(index.num_samples))):
                contents.append(digest)
                if problem is not None:
                    problems.setdefault(row, []).append(problem)
                self._done += 1
                self._progress(self._done, total)
        return contents

    def _count_fingerprint(
        self, split: str, listed: list[tuple[Listed, str]] | None, contents: list[str]
    ) -> None:
        """Keeps what the fingerprint is made of, as long as it can still be right."""
        is_packed = self._meta.fingerprint.startswith("packed-")
        if listed is None or self.verdict.damage or not is_packed:
            return
        for (sample, extra), content in zip(listed, contents, strict=True):
            packed = Packed(sample, content, extra)
            try:
                self._rows.append(fingerprint_row(split, packed, self._meta.classes))
            except (ValueError, IndexError):  # sets of others, with names for classes
                self._rows.append("")

    def fingerprint(self) -> None:
        """Compares the fingerprint, where it is made of what was read and nothing is damaged."""
        verdict, meta = self.verdict, self._meta
        if verdict.damage:
            return
        if meta.labels:
            source = str(meta.labels["source"])
            found = labels_fingerprint(source, meta.hashtags, self._indexes)
        elif meta.fingerprint.startswith("packed-"):
            found = fingerprint_of(self._rows)
        else:
            return
        verdict.is_fingerprint_checked = True
        if found != meta.fingerprint:
            self._add(
                f"{self._manifest}: fingerprint {meta.fingerprint}: that of the images and labels"
                f" is {found}"
            )


class _Tally:
    """Counts by label, over the shards of a split."""

    def __init__(self, meta: DatasetMeta) -> None:
        self._meta = meta
        self._classes = np.zeros(len(meta.classes), dtype=np.int64)
        self._hashtags = np.zeros(len(meta.hashtags), dtype=np.int64)
        self._images = self._labels = self._unlabelled = 0

    def add(self, index: Index) -> None:
        self._images += index.num_samples
        self._labels += len(index.label_ids)
        self._unlabelled += int((np.diff(index.label_offsets) == 0).sum())
        if self._meta.hashtags:
            self._hashtags += np.bincount(index.label_ids, minlength=len(self._hashtags))
            of_class = index.class_ids[index.class_ids >= 0]
        else:  # labels are classes, of which an image may have several
            of_class = index.label_ids
        self._classes += np.bincount(of_class, minlength=len(self._classes))

    def fill(self, counts: SplitCounts) -> None:
        counts.images, counts.labels = self._images, self._labels
        counts.unlabelled = self._unlabelled
        counts.by_class = dict(zip(self._meta.classes, self._classes.tolist(), strict=True))
        counts.by_hashtag = dict(zip(self._meta.hashtags, self._hashtags.tolist(), strict=True))


def _labels(index: Index, row: int) -> list[int]:
    return index.label_ids[index.label_offsets[row] : index.label_offsets[row + 1]].tolist()


def _named(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more


def _decoding_problem(raw: bytes) -> str | None:
    """Why an image cannot be decoded, or a video's container is not whole."""
    kind = {b"ftyp": "mp4", b"\x1a\x45\xdf\xa3": "webm"}
    video = kind.get(raw[4:8]) or kind.get(raw[:4])
    try:
        if video is not None:
            store_video(raw, video)
            return None
        with Image.open(io.BytesIO(raw)) as picture:
            picture.convert("RGB")
    except Refusal as refusal:
        return str(refusal)
    except Image.UnidentifiedImageError:
        return "not a readable image (of no known type)"
    except Exception as error:  # Pillow raises many kinds for bytes that are no image
        text = " ".join(str(error).split()) or type(error).__name__
        return f"not a readable image ({text})"
    return None
