"""`harness data pack`: images of other formats into shards, whole or not at all.

Sources: IDX files (MNIST's format), scikit-learn's bundled digits, image folders, and shards that
webdataset wrote. Each has a reader of its own in `harness.data.sources`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from harness.data.index import build_index, shard_entry, write_index
from harness.data.shards import Listed, Sample, list_shard, write_shard
from harness.data.sources import Refused, Source, find_source
from harness.errors import UserError
from harness.ledger.files import write_json
from harness.study.datasets import DatasetMeta, ShardEntry

SHARD_SAMPLES = 10_000
SHARD_BYTES = 256 << 20
Progress = Callable[[str, int], None]
"""Called now and then with the split and the number of its images written so far."""


@dataclass(frozen=True)
class PackReport:
    """What was packed and what was refused."""

    meta: DatasetMeta
    folder: Path
    refused: list[Refused] = field(default_factory=list)

    def summary(self) -> str:
        """A few lines for the command line."""
        counts = ", ".join(f"{name} {count}" for name, count in self.meta.splits.items())
        lines = [
            f"{self.folder}: {counts} images, {self.meta.num_classes} classes,"
            f" {len(self.meta.hashtags)} hashtags, fingerprint {self.meta.fingerprint}"
        ]
        if self.refused:
            first = self.refused[0]
            lines.append(
                f"{len(self.refused)} refused, listed in {self.folder / 'refused.txt'};"
                f" the first: {first.name}: {first.reason}"
            )
        return "\n".join(lines)


def pack(src: str, out: Path, *, progress: Progress | None = None) -> PackReport:
    """Writes the images of `src` to `out` as shards with an index and a fingerprint.

    Raises UserError if `src` holds nothing known or `out` holds something already.
    """
    out = Path(out).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; choose another --out or remove it")
    source = find_source(src)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        meta = _write(source, temporary, out.name, progress or (lambda split, count: None))
        if out.exists():
            out.rmdir()  # empty, or the rename would fail on some systems
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return PackReport(meta, out, source.refused)


def _write(source: Source, folder: Path, name: str, progress: Progress) -> DatasetMeta:
    files = {
        split: _write_split(folder, split, samples, progress)
        for split, samples in source.splits.items()
    }
    files = {split: paths for split, paths in files.items() if paths}
    if not files:
        reasons = f"; the first of {len(source.refused)} refused: {source.refused[0].reason}"
        raise UserError(f"no image could be read{reasons if source.refused else ''}")
    listed = {split: [list_shard(path) for path in paths] for split, paths in files.items()}
    hashtags = sorted(
        {
            tag
            for parts in listed.values()
            for part in parts
            for sample in part
            for tag in sample.hashtags
        }
    )
    shards: dict[str, list[ShardEntry]] = {}
    indexes: dict[str, ShardEntry] = {}
    for split, paths in files.items():
        shards[split] = [
            shard_entry(path, folder, len(part))
            for path, part in zip(paths, listed[split], strict=True)
        ]
        index = build_index(listed[split], shards[split], hashtags, source.classes)
        indexes[split] = write_index(folder, split, index, shards)
    if source.refused:
        lines = "".join(f"{refused.name}\t{refused.reason}\n" for refused in source.refused)
        (folder / "refused.txt").write_text(lines, encoding="utf-8")
    meta = DatasetMeta(
        name=name,
        fingerprint=_fingerprint(files, listed, source),
        image_size=source.image_size,
        hashtags=hashtags,
        classes=source.classes,
        splits={split: sum(len(part) for part in parts) for split, parts in listed.items()},
        shards=shards,
        indexes=indexes,
    )
    write_json(folder / "dataset.json", meta.model_dump(mode="json", by_alias=True))
    return meta


def _write_split(
    folder: Path, split: str, samples: Iterable[Sample], progress: Progress
) -> list[Path]:
    paths: list[Path] = []
    waiting: list[Sample] = []
    num_bytes = written = 0

    def flush() -> None:
        nonlocal num_bytes, written
        path = folder / split / f"{len(paths):06d}.tar"
        write_shard(path, waiting)
        paths.append(path)
        written += len(waiting)
        num_bytes = 0
        waiting.clear()
        progress(split, written)

    for sample in samples:
        waiting.append(sample)
        num_bytes += len(sample.image)
        if len(waiting) >= SHARD_SAMPLES or num_bytes >= SHARD_BYTES:
            flush()
    if waiting:
        flush()
    return paths


def _fingerprint(
    files: dict[str, list[Path]], listed: dict[str, list[list[Listed]]], source: Source
) -> str:
    """Hash over (split, key, SHA-256 of the image, labels), sorted: shards may be cut anew."""
    rows: list[str] = []
    for split, paths in files.items():
        for path, part in zip(paths, listed[split], strict=True):
            with open(path, "rb") as file:
                for sample in part:
                    image = os.pread(file.fileno(), sample.size, sample.offset)
                    content = hashlib.sha256(image).hexdigest()
                    label = "" if sample.cls is None else sample.cls
                    if label.isdecimal() and int(label) < len(source.classes):
                        label = source.classes[int(label)]
                    tags = " ".join(sorted(sample.hashtags))
                    rows.append(f"{split}\t{sample.key}\t{content}\t{label}\t{tags}\n")
    return "packed-" + hashlib.sha256("".join(sorted(rows)).encode()).hexdigest()[:16]
