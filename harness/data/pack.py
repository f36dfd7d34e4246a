"""`harness data pack`: images of other formats into shards, whole or not at all.

First the source is listed, which reads no image: see `harness.data.sources`. The listing is put
in the order of the keys' hashes, so that any n samples in a row are a fair mix and the first n are
the subset of n images, and cut into shards. Then each shard is made on its own, by any process:
see `harness.data.pack_shard`. Work in progress lies in .<name>.partial beside OUT. A run that was
killed goes on from there, and ends with the same bytes, because they depend on the plan alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

import numpy as np
import PIL
from safetensors import SafetensorError

from harness.data.hashing import key_hash
from harness.data.images import ImageOptions
from harness.data.index import build_index, write_index
from harness.data.pack_pool import make_all
from harness.data.pack_shard import Made, Packed, Task, read_made
from harness.data.shards import split_name
from harness.data.sources import find_source
from harness.data.sources.listing import SPLITS, Item, Note, Source, is_utf8
from harness.errors import UserError
from harness.ledger.files import read_json, write_bytes, write_json
from harness.ledger.lease import Lease, LeaseHeldError
from harness.study.datasets import DatasetMeta, ShardEntry

SHARD_SAMPLES = 10_000
SHARD_BYTES = 256 << 20
"""Of the source's files: what they become is not known when shards are cut."""
_PARALLEL_BYTES = 64 << 20
"""Sources from which further processes pay for their start."""
_LEASE = "lease"
_VERSION = 1
"""Of what packing does; another one does not go on where this one stopped."""
Progress = Callable[[int, int], None]
"""Called now and then with the number of images dealt with, and of all."""


@dataclass(frozen=True)
class PackReport:
    """What was packed and what was not."""

    meta: DatasetMeta
    folder: Path
    refused: list[Note] = field(default_factory=list)
    converted: list[Note] = field(default_factory=list)
    left_out: list[Note] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    """How often which conversion was done, those that the options ask for included."""
    remarks: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A few lines for the command line."""
        counts = ", ".join(f"{name} {count}" for name, count in self.meta.splits.items())
        lines = [
            f"{self.folder}: {counts} images, {self.meta.num_classes} classes,"
            f" {len(self.meta.hashtags)} hashtags, fingerprint {self.meta.fingerprint}",
            *self.remarks,
        ]
        if self.done:
            what = ", ".join(f"{kind} {count}" for kind, count in sorted(self.done.items()))
            lines.append(f"converted: {what}")
        if self.converted:
            lines.append(
                f"{len(self.converted)} had to be converted, listed in"
                f" {self.folder / 'converted.txt'}"
            )
        if self.left_out:
            lines.append(
                f"{len(self.left_out)} left out by the layout's rules, listed in"
                f" {self.folder / 'left_out.txt'}"
            )
        if self.refused:
            lines.append(
                f"warning: {len(self.refused)} refused, listed in {self.folder / 'refused.txt'};"
                f" the first: {_said(self.refused[0])}"
            )
        return "\n".join(lines)


def pack(
    src: str,
    out: Path,
    *,
    layout: str = "auto",
    split: str | None = None,
    options: ImageOptions | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> PackReport:
    """Writes the images of `src` to `out` as shards with an index and a fingerprint.

    The bytes do not depend on `workers`, nor on whether it was killed on the way. Raises UserError
    if `src` holds nothing known or `out` holds something already.
    """
    out = Path(out).expanduser().absolute()
    if split is not None and split not in SPLITS:
        raise UserError(f"--split {split}: unknown; known: {', '.join(SPLITS)}")
    work = out.with_name(f".{out.name}.partial")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if work.exists() and not (work / "set").exists():
            shutil.rmtree(work, ignore_errors=True)  # of a run that was killed after its last step
        raise UserError(f"{out}: exists and is not empty; choose another --out or remove it")
    source = find_source(src, layout, split)
    options = ImageOptions() if options is None else options
    plan = _Plan(source, options, work)
    try:
        work.mkdir(parents=True, exist_ok=True)
        lease = Lease.acquire(work / _LEASE)
    except OSError as error:
        raise UserError(
            f"{work}: cannot be written ({error.strerror}); chmod or free space"
        ) from None
    except LeaseHeldError as error:
        raise UserError(f"{out}: another process is packing to it ({error})") from None
    lease.start_beating()
    try:
        _prepare(work, plan, say or (lambda line: None))
        report = _pack(plan, work, out, workers, progress or (lambda done, total: None))
    finally:
        lease.release()
        with suppress(OSError):
            work.rmdir()  # which fails if there is something to go on with
    shutil.rmtree(work, ignore_errors=True)
    return report


class _Plan:
    """Which items go into which shard."""

    def __init__(self, source: Source, options: ImageOptions, work: Path) -> None:
        self.source, self._work = source, work
        self.options = replace(options, crop_border=source.crop_border)
        self.shards: dict[str, list[Item]] = {}
        for split, items in source.splits.items():
            ordered = sorted(_valid(source, items), key=lambda item: (key_hash(item.key), item.key))
            for number, part in enumerate(_cut(ordered)):
                self.shards[f"{split}/{number:06d}.tar"] = part
        self.num_items = sum(len(part) for part in self.shards.values())
        self.num_bytes = sum(item.size for part in self.shards.values() for item in part)
        self.digest = self._digest()

    def tasks(self) -> Iterator[Task]:
        """The shards to be made, in order."""
        for file, part in self.shards.items():
            pixels = self.source.arrays.get(file.split("/")[0])
            yield Task(
                plan=self.digest,
                file=file,
                work=self._work,
                base=self.source.base,
                items=part,
                options=self.options,
                pixels=None if pixels is None else pixels[[item.offset for item in part]],
            )

    def _digest(self) -> str:
        """Stands for everything that the result depends on."""
        digest = hashlib.sha256()
        source = self.source
        # Pillow encodes JPEG and WebP, and decides what is damaged.
        made_by = (_VERSION, PIL.__version__, source.layout, astuple(self.options))
        for part in (made_by, source.classes, source.files, source.refused, source.left_out):
            digest.update(f"{part}\n".encode())
        for split, pixels in source.arrays.items():
            digest.update(f"{split} {pixels.shape}\n".encode())
            digest.update(np.ascontiguousarray(pixels).data)
        for file, items in self.shards.items():
            digest.update(f"{file}\n".encode())
            for item in items:
                digest.update(f"{tuple(item)}\n".encode())
        return digest.hexdigest()


def _valid(source: Source, items: list[Item]) -> list[Item]:
    """The items with keys that a shard can hold, each its own: a second "a" becomes "a~2"."""
    known: set[str] = set()
    valid: list[Item] = []
    num_renamed = 0
    for item in items:
        key, number = item.key, 1
        while key in known:
            number += 1
            key = f"{item.key}~{number}"
        if split_name(f"{key}.x") != (key, "x") or key.startswith("/") or "\0" in key:
            source.refuse(item.name, f"'{key}' cannot be a key: it needs a name after its last '/'")
            continue
        if not is_utf8(f"{key}{item.hashtags}{item.fields}"):
            source.refuse(item.name, "its key or labels are not UTF-8")
            continue
        known.add(key)
        num_renamed += number > 1
        valid.append(item if number == 1 else item._replace(key=key))
    if num_renamed:
        source.remarks.append(f"{num_renamed} keys were taken: '~2' and so on was added to them")
    return valid


def _cut(items: list[Item]) -> Iterator[list[Item]]:
    part: list[Item] = []
    num_bytes = 0
    for item in items:
        part.append(item)
        num_bytes += item.size
        if len(part) >= SHARD_SAMPLES or num_bytes >= SHARD_BYTES:
            yield part
            part, num_bytes = [], 0
    if part:
        yield part


def _prepare(work: Path, plan: _Plan, say: Callable[[str], None]) -> None:
    """The folder of work in progress, emptied if it is of another plan."""
    file = work / "plan.json"
    try:
        known = (read_json(file) or {}).get("plan")
    except UserError:
        known = None
    if known == plan.digest:
        say(f"going on where an earlier run stopped ({work})")
        shutil.rmtree(work / "tmp", ignore_errors=True)
        return
    if file.exists():
        say(f"starting over: the source or the options changed since {work} was begun")
    _clear(work)
    write_json(file, {"schema": 1, "plan": plan.digest})


def _clear(work: Path) -> None:
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif _LEASE not in path.name:
            path.unlink()


def _pack(
    plan: _Plan, work: Path, out: Path, workers: int | None, progress: Progress
) -> PackReport:
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = (cores or 1) if plan.num_bytes >= _PARALLEL_BYTES else 1
    workers = max(1, min(workers, len(plan.shards)))
    make_all(plan.tasks(), workers, lambda done: progress(done, plan.num_items))
    try:
        report = _finish(plan, work, out)
        if out.exists():
            out.rmdir()  # empty, or the rename would fail on some systems
        os.replace(work / "set", out)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{out}: cannot be written ({error}); free space or chmod, then run the same command"
            " again: finished shards are kept"
        ) from None
    return report


def _finish(plan: _Plan, work: Path, out: Path) -> PackReport:
    """Everything beside the shards: index, lists of what was refused, dataset.json."""
    source, folder = plan.source, work / "set"
    # One shard's record is held at a time: all of them are ten times as large as the index.
    made = _Everything(source)
    for file in plan.shards:
        made.add(file, read_made(work, file, plan.digest))
    refused = sorted(source.refused + made.refused)
    if not made.shards:
        _clear(work)
        first = f"; the first of {len(refused)} refused: {_said(refused[0])}" if refused else ""
        raise UserError(f"no image could be packed{first}")
    for path in folder.rglob("*"):  # of a run that was killed while it finished
        if path.is_file() and path.relative_to(folder).as_posix() not in plan.shards:
            path.unlink()
    hashtags = sorted(made.hashtags)
    indexes: dict[str, ShardEntry] = {}
    for split, entries in made.shards.items():
        listed = (
            [sample.listed for sample in read_made(work, str(entry["file"]), plan.digest).samples]
            for entry in entries
        )
        index = build_index(listed, entries, hashtags, source.classes)
        indexes[split] = write_index(folder, split, index, made.shards)
    notes = {
        "refused": refused,
        "converted": sorted(made.converted),
        "left_out": sorted(source.left_out),
    }
    for name, lines in notes.items():
        if lines:
            write_bytes(folder / f"{name}.txt", "".join(map(_line, lines)).encode())
    for name, content in source.files.items():
        write_json(folder / name, content)
    meta = DatasetMeta(
        name=out.name,
        fingerprint=fingerprint_of(made.rows),
        image_size=_image_size(source, plan.options),
        hashtags=hashtags,
        classes=source.classes,
        splits={
            split: sum(int(e["samples"]) for e in entries) for split, entries in made.shards.items()
        },
        shards=made.shards,
        indexes=indexes,
        layout={split: made.layouts[split].hexdigest()[:16] for split in made.shards},
    )
    write_json(folder / "dataset.json", meta.model_dump(mode="json", by_alias=True))
    return PackReport(meta=meta, folder=out, done=made.done, remarks=source.remarks, **notes)


class _Everything:
    """What the shards' records say together, but for what the index holds."""

    def __init__(self, source: Source) -> None:
        self._classes = source.classes
        self.shards: dict[str, list[ShardEntry]] = {}
        """Without those that nothing could be packed into."""
        self.layouts = {split: hashlib.sha256() for split in source.splits}
        """Each stands for the sequence of samples and how shards cut it."""
        self.rows: list[str] = []
        self.hashtags: set[str] = set()
        self.refused: list[Note] = []
        self.converted: list[Note] = []
        self.done: Counter[str] = Counter()

    def add(self, file: str, part: Made) -> None:
        split = file.split("/")[0]
        keys = "".join(f"{sample.listed.key}\n" for sample in part.samples)
        self.layouts[split].update(f"{keys}\n".encode())  # no key is empty
        self.refused += part.refused
        self.converted += part.converted
        self.done += part.done
        if not part.samples:
            return
        self.shards.setdefault(split, []).append(
            {
                "file": file,
                "bytes": part.bytes,
                "sha256": part.sha256,
                "samples": len(part.samples),
            }
        )
        self.rows += [fingerprint_row(split, sample, self._classes) for sample in part.samples]
        self.hashtags.update(tag for sample in part.samples for tag in sample.listed.hashtags)


def _line(note: Note) -> str:
    return f"{_said(note, between=chr(9))}\n"


def _said(note: Note, between: str = ": ") -> str:
    # A name may hold anything, line ends and what is no text included.
    return between.join(
        part if part.isprintable() else part.encode("unicode_escape").decode() for part in note
    )


def _image_size(source: Source, options: ImageOptions) -> int:
    side = max(1, source.image_size - 2 * options.crop_border)
    return side if options.resize is None else min(side, options.resize)


def fingerprint_of(rows: Iterable[str]) -> str:
    """Hash over (split, key, SHA-256 of the image, labels), sorted: shards may be cut anew."""
    return "packed-" + hashlib.sha256("".join(sorted(rows)).encode()).hexdigest()[:16]


def fingerprint_row(split: str, sample: Packed, classes: Sequence[str]) -> str:
    """What the fingerprint says of a sample."""
    listed = sample.listed
    ids = listed.classes if listed.cls is None else (listed.cls, *listed.classes)
    label = ",".join(classes[int(class_id)] for class_id in ids)
    tags = " ".join(sorted(listed.hashtags))
    extra = f"\t{sample.extra}" if sample.extra else ""
    return f"{split}\t{listed.key}\t{sample.content}\t{label}\t{tags}{extra}\n"
