"""`harness data labels`: a vocabulary out of raw hashtags, and the targets in it.

The result is a dataset folder without images: dataset.json names the source's shards where they
lie, the index has the new label ids, and labels.json says what became of every raw tag. Train and
test splits keep their images and classes; the splits for pretraining may lose images.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from harness.data.dataset import Dataset, open_dataset
from harness.data.index import Index, file_entry, layout_of, write_index
from harness.data.label_files import file_record, read_blocked, read_map
from harness.data.label_report import Fate, LabelReport, make_report, markdown, summary
from harness.data.relabel import (
    Origin,
    fold_tag,
    image_targets,
    kept_rows,
    kept_shards,
    raw_index,
    relabelled,
    select,
    tag_names,
    tagged_shard,
)
from harness.data.shards import Listed
from harness.errors import UserError
from harness.ledger.files import write_bytes, write_json
from harness.study.datasets import DatasetMeta, ShardEntry
from harness.study.locations import is_remote

Keep = Literal["drop", "keep"]
Progress = Callable[[int, int], None]
"""Called with the number of images looked at, and of all."""


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """How raw tags become labels."""

    split: str | None = None
    """Whose images are counted; the split for pretraining if None."""
    min_count: int = 5
    """Images that a class needs."""
    mapping: Path | None = None
    blocked: Path | None = None
    unmapped: Keep = "drop"
    unlabelled: Keep = "drop"
    captions: bool = False
    words: bool = False


@dataclass(frozen=True)
class Labels:
    """A derived set, and what its labels are like."""

    folder: Path
    meta: DatasetMeta
    report: LabelReport
    remarks: list[str]

    def summary(self) -> str:
        """A few lines for the command line."""
        counts = ", ".join(f"{name} {count}" for name, count in self.meta.splits.items())
        head = f"{self.folder}: {counts} images, fingerprint {self.meta.fingerprint}"
        return "\n".join([head, *summary(self.report), *self.remarks])


@dataclass(frozen=True)
class _Raw:
    """The source's samples with raw tags as labels."""

    origin: Origin
    names: list[str]
    indexes: dict[str, Index]


@dataclass(frozen=True)
class _Vocabulary:
    names: list[str]
    images: list[int]
    targets: list[list[int]]
    """Of every raw tag."""
    report: LabelReport


def make_labels(
    src: str, out: Path, root: Path, options: LabelOptions, progress: Progress | None = None
) -> Labels:
    """Writes the set `src` with labels of its own to the folder `out`.

    Raises UserError if `out` holds something, or if no label is left.
    """
    out = Path(os.path.realpath(Path(out).expanduser()))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; choose another --out or remove it")
    if options.unmapped == "keep" and options.mapping is None:
        raise UserError("--unmapped keep: of tags that are not in --map FILE; give that too")
    mapping = None if options.mapping is None else read_map(options.mapping)
    blocked = set() if options.blocked is None else read_blocked(options.blocked)
    data = open_dataset(src, root)
    if data.meta.labels:
        raise UserError(f"{src}: has derived labels itself; give the set that it was made from")
    counted = options.split or data.meta.split_for("pretrain")
    data.split(counted)  # says which splits there are
    raw = _raw_tags(data, options, progress or (lambda done, total: None))
    chosen = _choose(raw, counted, mapping, blocked, options)
    drops = sorted({counted, "val"} & raw.indexes.keys()) if options.unlabelled == "drop" else []
    remarks: list[str] = []
    indexes: dict[str, Index] = {}
    shards: dict[str, list[ShardEntry]] = {}
    for split, index in raw.indexes.items():
        index = relabelled(index, chosen.targets)
        rows = kept_rows(index, drop=split in drops)
        if len(rows) < index.num_samples:
            lost = index.num_samples - len(rows)
            remarks.append(f"{split}: {lost} images without a label left out")
        if len(rows):
            indexes[split] = select(index, rows)
            shards[split] = _entries(data, split, kept_shards(index, rows), out)
        else:
            remarks.append(f"{split}: nothing is left of it; the set has no such split")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        content = _content(data.meta, counted, raw, chosen, drops, options)
        meta = _write(temporary, out.name, data.meta, indexes, shards, chosen, content)
        if out.exists():
            out.rmdir()  # empty, or the rename would fail on some systems
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror}); free space or chmod"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Labels(out, meta, chosen.report, remarks)


def _raw_tags(data: Dataset, options: LabelOptions, progress: Progress) -> _Raw:
    meta = data.meta
    origin: Origin = "words" if options.words else "captions"
    if not options.captions and not options.words and (meta.hashtags or meta.classes):
        # The index has them: no shard is read.
        origin = "hashtags" if meta.hashtags else "classes"
        indexes = {split: data.split(split).index for split in meta.shards}
        return _Raw(origin, meta.hashtags or meta.classes, indexes)
    listed: dict[str, list[list[Listed]]] = {}
    total, done = sum(meta.splits.values()), 0
    for split, entries in meta.shards.items():
        storage = data.split(split).storage
        listed[split] = []
        for entry in entries:
            listed[split].append(tagged_shard(storage.local(entry), origin))
            done += len(listed[split][-1])
            progress(done, total)
    names = tag_names([part for parts in listed.values() for part in parts])
    if not names:
        what = "word" if options.words else "hashtag"
        hint = "" if options.words else "; --words takes all words"
        raise UserError(f"{data.location}: no caption has a {what}{hint}")
    return _Raw(
        origin,
        names,
        {
            split: raw_index(parts, meta.shards[split], names, meta.classes, origin)
            for split, parts in listed.items()
        },
    )


def _choose(
    raw: _Raw,
    counted: str,
    mapping: Mapping[str, list[str]] | None,
    blocked: set[str],
    options: LabelOptions,
) -> _Vocabulary:
    """Which classes there are, and which of them each raw tag stands for."""
    index = raw.indexes[counted]
    folded = [fold_tag(name) for name in raw.names]
    fates: list[Fate] = []
    wanted: list[list[str]] = []
    for tag in folded:
        fate, targets = _targets_of(tag, mapping, blocked, options.unmapped)
        fates.append(fate)
        wanted.append(targets)
    candidates = sorted({target for targets in wanted for target in targets})
    place = {target: k for k, target in enumerate(candidates)}
    _, ids = image_targets(index, [[place[target] for target in targets] for targets in wanted])
    images = np.bincount(ids, minlength=len(candidates)).tolist()
    # By falling number of images, then by name: ids are the same whatever order shards are in.
    order = sorted((-count, name) for count, name in zip(images, candidates, strict=True))
    kept = [(name, -count) for count, name in order if -count >= max(1, options.min_count)]
    if not kept:
        most = f"the most frequent, '{order[0][1]}', is on {-order[0][0]}" if order else "none left"
        raise UserError(
            f"no label is on {options.min_count} images of split {counted} ({most}); lower"
            " --min-count, or look at --map and --block"
        )
    names = [name for name, _ in kept]
    final = {name: k for k, name in enumerate(names)}
    targets = [sorted(final[name] for name in names if name in final) for names in wanted]
    for k, (ids_of_tag, names_of_tag) in enumerate(zip(targets, wanted, strict=True)):
        if names_of_tag and not ids_of_tag:
            fates[k] = "rare"
    owners, _ = image_targets(index, targets)
    counts = [count for _, count in kept]
    report = make_report(
        folded,
        raw.names,
        fates,
        np.bincount(index.label_ids, minlength=len(folded)),
        np.bincount(owners, minlength=index.num_samples),
        np.array(counts),
    )
    return _Vocabulary(names, counts, targets, report)


def _targets_of(
    tag: str, mapping: Mapping[str, list[str]] | None, blocked: set[str], unmapped: Keep
) -> tuple[Fate, list[str]]:
    if not tag:
        return "empty", []
    if tag in blocked:
        return "blocked", []
    if mapping is None or (tag not in mapping and unmapped == "keep"):
        return "kept", [tag]
    return ("kept", mapping[tag]) if tag in mapping else ("unmapped", [])


def _content(
    source: DatasetMeta,
    counted: str,
    raw: _Raw,
    chosen: _Vocabulary,
    drops: list[str],
    options: LabelOptions,
) -> dict[str, object]:
    """labels.json."""
    return {
        "schema": 1,
        "source": {"name": source.name, "fingerprint": source.fingerprint, "split": counted},
        "origin": raw.origin,
        "options": {
            "min_count": options.min_count,
            "map": file_record(options.mapping),
            "block": file_record(options.blocked),
            "unmapped": options.unmapped,
            "unlabelled": options.unlabelled,
        },
        "drops": drops,
        "report": chosen.report.as_json(),
        "images": dict(zip(chosen.names, chosen.images, strict=True)),
        "tags": {name: ids for name, ids in zip(raw.names, chosen.targets, strict=True) if ids},
    }


def _write(
    folder: Path,
    name: str,
    source: DatasetMeta,
    indexes: Mapping[str, Index],
    shards: Mapping[str, list[ShardEntry]],
    chosen: _Vocabulary,
    content: Mapping[str, object],
) -> DatasetMeta:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    write_bytes(folder / "labels.json", text.encode())
    vocabulary = dict(zip(chosen.names, chosen.images, strict=True))
    write_bytes(folder / "labels.md", markdown(name, chosen.report, vocabulary).encode())
    meta = source.model_copy(
        update={
            "name": name,
            "fingerprint": labels_fingerprint(source.fingerprint, chosen.names, indexes),
            "hashtags": chosen.names,
            "splits": {split: index.num_samples for split, index in indexes.items()},
            "shards": shards,
            "indexes": {s: write_index(folder, s, indexes[s], shards) for s in indexes},
            "layout": {split: layout_of(index) for split, index in indexes.items()},
            "labels": {
                **file_entry(folder / "labels.json", folder),
                "source": source.fingerprint,
            },
        }
    )
    write_json(folder / "dataset.json", meta.model_dump(mode="json", by_alias=True))
    return meta


def _entries(data: Dataset, split: str, places: list[int], out: Path) -> list[ShardEntry]:
    """What dataset.json in `out` says of some of the source's shards."""
    entries, storage = data.meta.shards[split], data.split(split).storage
    return [
        {**entries[place], "file": _reference(storage.name(entries[place]), out)}
        for place in places
    ]


def _reference(name: str, out: Path) -> str:
    """How dataset.json in `out` names a shard that lies elsewhere: a URL, or a relative path."""
    if is_remote(name):
        return name
    path = Path(name)
    # Of real folders: the system follows links before it goes up by "..".
    return Path(os.path.relpath(os.path.realpath(path.parent), out), path.name).as_posix()


def labels_fingerprint(source: str, names: list[str], indexes: Mapping[str, Index]) -> str:
    """Stands for the source's images, which of them are left, and their targets.

    Not for how shards are cut, nor for where they lie: samples are taken by the hash of their key.
    """
    digest = hashlib.sha256(f"{source}\n".encode())
    digest.update("".join(f"{name}\n" for name in names).encode())
    for split, index in sorted(indexes.items()):
        digest.update(f"\n{split}\n".encode())
        starts = index.label_offsets
        for row in index.by_hash.tolist():
            ids = index.label_ids[starts[row] : starts[row + 1]].tolist()
            digest.update(f"{index.keys[row]}\t{ids}\n".encode())
    return "labels-" + digest.hexdigest()[:16]
