"""One shard of `harness data pack`: made by some process, or found whole from an earlier run.

A shard counts as made once its sidecar lies in `done/`; that is written last, names the plan it
belongs to and the shard's checksum, and has all that the index and the fingerprint need, so that
no shard is read again. Bytes depend on the task alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harness.data.images import ImageOptions, Refusal, Stored, store_image, store_video
from harness.data.index import sha256_of
from harness.data.outlines import scaled_outline
from harness.data.png import encode_png
from harness.data.shards import Listed, Sample, list_shard, words_of, write_shard
from harness.data.sources.listing import WHOLE, Item, Note
from harness.errors import DataError, UserError
from harness.ledger.files import read_json, write_bytes

MAX_BYTES = 1 << 30
"""Files of more than this are refused: each is held in memory as a whole."""
_SCHEMA = 1
Tick = Callable[[int], None]
"""Called now and then with the number of items dealt with since the last call."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one shard is made of."""

    plan: str
    """Digest of the whole plan: sidecars of another one do not count."""
    file: str
    """The shard's path in the set: <split>/<number>.tar."""
    work: Path
    base: Path
    items: list[Item]
    options: ImageOptions
    pixels: np.ndarray | None = None
    """uint8 [n, H, W] or [n, H, W, 3] of the n items, where they are not in files."""

    @property
    def shard(self) -> Path:
        """Where the shard goes."""
        return self.work / "set" / self.file

    @property
    def sidecar(self) -> Path:
        """Where the record of it goes."""
        return _sidecar(self.work, self.file)


class Packed(NamedTuple):
    """A sample in a shard."""

    listed: Listed
    content: str
    """SHA-256 of the image's stored bytes."""
    extra: str
    """SHA-256 of labels beyond hashtags and classes; "" if there are none."""


@dataclass
class Made:
    """What a sidecar says of its shard."""

    bytes: int = 0
    """0: no item could be packed, and there is no shard."""
    sha256: str = ""
    samples: list[Packed] = field(default_factory=list)
    refused: list[Note] = field(default_factory=list)
    converted: list[Note] = field(default_factory=list)
    """Only what had to be done to an image, not what the options asked for."""
    done: Counter[str] = field(default_factory=Counter)
    """How often which conversion was done, both kinds."""


def make_shard(task: Task, tick: Tick) -> None:
    """Makes the shard and its sidecar, unless they are there.

    Raises UserError if the disk is full, DataError if a source changes meanwhile.
    """
    if is_made(task):
        tick(len(task.items))
        return
    made = Made()
    digests: list[tuple[str, str]] = []
    temporary = task.work / "tmp" / f"{uuid.uuid4().hex}.tar"
    try:
        write_shard(temporary, _samples(task, made, digests, tick))
        if digests:
            listed = list_shard(temporary)
            assert len(listed) == len(digests), (task.file, len(listed), len(digests))
            made.samples = [Packed(a, *b) for a, b in zip(listed, digests, strict=True)]
            made.bytes, made.sha256 = temporary.stat().st_size, sha256_of(temporary)
            task.shard.parent.mkdir(parents=True, exist_ok=True)
            _flush(temporary)
            os.replace(temporary, task.shard)
        _write(task, made)
    except OSError as error:
        raise UserError(
            f"{task.shard}: cannot be written: {error.strerror}; free space or chmod, then run the"
            " same command again: finished shards are kept"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def is_made(task: Task) -> bool:
    """Whether the shard is there as it was written."""
    content = _read_sidecar(task.sidecar, task.plan)
    if content is None:
        return False
    if not content["bytes"]:
        return True
    try:
        whole = task.shard.stat().st_size == content["bytes"]
        return whole and sha256_of(task.shard) == content["sha256"]
    except OSError:
        return False


def _samples(
    task: Task, made: Made, digests: list[tuple[str, str]], tick: Tick
) -> Iterator[Sample]:
    for place, item in enumerate(task.items):
        tick(1)
        fields = json.loads(item.fields) if item.fields else {}
        try:
            stored = _stored(task, place, item, fields)
        except Refusal as refusal:
            made.refused.append(Note(item.name, str(refusal)))
            continue
        made.done.update((*stored.changes, *stored.asked))
        if stored.changes:
            made.converted.append(Note(item.name, ", ".join(stored.changes)))
        if "annotations" in fields:
            fields = _scaled(fields, stored)
        content = hashlib.sha256(stored.content).hexdigest()
        digests.append((content, extra_digest(fields, item.hashtags)))
        yield Sample(
            key=item.key,
            image=stored.content,
            image_type=stored.kind,
            hashtags=None if item.hashtags is None else list(item.hashtags),
            class_id=item.class_id if item.class_id >= 0 else None,
            fields=fields,
        )


def _stored(task: Task, place: int, item: Item, fields: dict[str, Any]) -> Stored:
    if task.pixels is not None:
        pixels = task.pixels[place]
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[:, :, None], 3, axis=2)
        whole = encode_png(pixels)
        options = task.options
        if options.resize is None and options.format in ("keep", "png"):
            return Stored(content=whole, kind="png", size=(pixels.shape[1], pixels.shape[0]))
        return store_image(whole, options)
    if item.size > MAX_BYTES:
        raise Refusal(f"too large: {item.size} bytes; at most {MAX_BYTES}")
    raw = _read(task, item)
    if item.kind:
        return store_video(raw, item.kind)
    annotated = (fields["width"], fields["height"]) if "annotations" in fields else None
    return store_image(raw, task.options, annotated)


def _read(task: Task, item: Item) -> bytes:
    path = task.base / item.file
    try:
        with open(path, "rb") as file:
            stamp = os.fstat(file.fileno()).st_mtime_ns
            file.seek(max(item.offset, 0))
            raw = file.read() if item.offset == WHOLE else file.read(item.size)
    except PermissionError as error:
        raise Refusal(f"cannot be read: {error.strerror}") from None
    except OSError as error:  # it could be read when it was listed: not the file's fault
        raise DataError(
            f"{path}: byte offset 0: cannot be read ({error.strerror}); run the same command again"
        ) from None
    if len(raw) != item.size or stamp != item.stamp:
        raise DataError(
            f"{path}: byte offset 0: changed while it was being packed; run the same command again"
        )
    return raw


def _scaled(fields: dict[str, Any], stored: Stored) -> dict[str, Any]:
    """Annotations in the pixels of a resized image."""
    if stored.scale == (1.0, 1.0):
        return fields
    (x, y), size = stored.scale, stored.size
    annotations = [
        {
            **note,
            "bbox": [round(v * s, 3) for v, s in zip(note["bbox"], (x, y, x, y), strict=True)],
            "area": round(note["area"] * x * y, 3),
            "segmentation": scaled_outline(note["segmentation"], x, y, size),
        }
        for note in fields["annotations"]
    ]
    return {**fields, "annotations": annotations, "width": size[0], "height": size[1]}


def extra_digest(fields: Mapping[str, Any], hashtags: Sequence[str] | None) -> str:
    """Stands for labels that are neither hashtags nor classes, in the fingerprint.

    A caption whose words serve as the hashtags is counted with these.
    """
    names = ("annotations", "negative", "not_exhaustive", "caption", "captions")
    counted = {name: fields[name] for name in names if name in fields}
    if "caption" in counted and hashtags and set(words_of(counted["caption"])) <= set(hashtags):
        del counted["caption"]
    text = json.dumps(counted, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest() if counted else ""


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write(task: Task, made: Made) -> None:
    rows = [
        [s.key, s.start, s.stop, s.offset, s.size, s.crc, s.hashtags, s.cls, s.classes, *rest]
        for s, *rest in made.samples
    ]
    content = {
        "schema": _SCHEMA,
        "plan": task.plan,
        "bytes": made.bytes,
        "sha256": made.sha256,
        "samples": rows,
        "refused": made.refused,
        "converted": made.converted,
        "done": made.done,
    }
    write_bytes(task.sidecar, json.dumps(content, ensure_ascii=False).encode())


def _sidecar(work: Path, file: str) -> Path:
    return work / "done" / f"{file}.json"


def _read_sidecar(path: Path, plan: str) -> dict[str, Any] | None:
    try:
        content = read_json(path)
    except UserError:
        return None
    if content is None or content.get("plan") != plan or content.get("schema") != _SCHEMA:
        return None
    return content


def read_made(work: Path, file: str, plan: str) -> Made:
    """The record of a finished shard."""
    content = _read_sidecar(_sidecar(work, file), plan)
    assert content is not None, (work, file)
    return Made(
        bytes=content["bytes"],
        sha256=content["sha256"],
        samples=[_packed(*row) for row in content["samples"]],
        refused=[Note(*note) for note in content["refused"]],
        converted=[Note(*note) for note in content["converted"]],
        done=Counter(content["done"]),
    )


def _packed(
    key: str,
    start: int,
    stop: int,
    offset: int,
    size: int,
    crc: int,
    hashtags: list[str],
    cls: str | None,
    classes: list[str],
    content: str,
    extra: str,
) -> Packed:
    listed = Listed(
        key=key,
        start=start,
        stop=stop,
        offset=offset,
        size=size,
        crc=crc,
        hashtags=tuple(hashtags),
        cls=cls,
        classes=tuple(classes),
    )
    return Packed(listed, content, extra)
