"""What a reader of a source finds: items that say where bytes lie, and what is not packed, why."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from harness.data.hashing import key_hash
from harness.data.shards import IMAGE_TYPES, VIDEO_TYPES
from harness.errors import UserError

SPLITS = ("pretrain", "val", "train", "test")
SPLIT_NAMES = {name: name for name in SPLITS} | {"validation": "val", "valid": "val"}
TEST_SHARE = 5
"""One in this many samples is a test sample where a source with classes has no splits."""
VAL_SHARE = 20
"""One in this many is held out of the pretraining samples of a manifest without splits."""
IMAGE_SUFFIXES = {f".{kind}" for kind in IMAGE_TYPES} | {".bmp", ".gif", ".tif", ".tiff", ".ppm"}
VIDEO_SUFFIXES = {f".{kind}" for kind in VIDEO_TYPES}
WHOLE = -1


class Note(NamedTuple):
    """A file, and what is to be said of it."""

    name: str
    text: str


class Item(NamedTuple):
    """One image or video to be packed. A tuple: a source may have millions."""

    key: str
    file: str
    """Below the source's base, or absolute; "" of an item in the source's arrays."""
    offset: int = WHOLE
    """Byte where it begins in `file`, or WHOLE; row of the split's array."""
    size: int = 0
    """Bytes."""
    stamp: int = 0
    """Time of change of the file, in ns: a pack that was interrupted must not mix two versions."""
    class_id: int = -1
    hashtags: tuple[str, ...] | None = None
    fields: str = ""
    """More for the sample's .json, as JSON; see `harness.data.shards.Sample.fields`."""
    kind: str = ""
    """mp4 or webm of a video; "" of an image."""

    @property
    def name(self) -> str:
        """What messages call it."""
        if not self.file:
            return self.key
        if self.offset == WHOLE:
            return self.file
        return f"{self.file}: byte offset {self.offset}: {self.key}"


@dataclass
class Source:
    """What a reader found."""

    layout: str
    base: Path
    splits: dict[str, list[Item]] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    image_size: int = 1
    """Usual side in pixels; of videos 1: they are not decoded."""
    refused: list[Note] = field(default_factory=list)
    """Damaged or unknown: these would be in the set if they were whole."""
    left_out: list[Note] = field(default_factory=list)
    """Not part of the set by the rules of its layout."""
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """Per split: uint8 [n, H, W] or [n, H, W, 3] of images that come as bare pixels."""
    files: dict[str, Any] = field(default_factory=dict)
    """JSON files to be kept beside dataset.json."""
    crop_border: int = 0
    remarks: list[str] = field(default_factory=list)
    """For the user, about the source as a whole."""

    def add(self, split: str, item: Item) -> None:
        """An item of a split."""
        self.splits.setdefault(split, []).append(item)

    def refuse(self, name: str, reason: str) -> None:
        """Something that cannot be packed."""
        self.refused.append(Note(name, reason))

    def leave_out(self, name: str, reason: str) -> None:
        """Something that need not be packed."""
        self.left_out.append(Note(name, reason))


class File(NamedTuple):
    """A regular file."""

    name: str
    """Path below the folder that was walked, with "/"."""
    size: int
    stamp: int


def walk(source: Source, under: str = "") -> list[File]:
    """All files of `source.base / under`, sorted; names are below `source.base`.

    What is hidden, broken or cannot be read is noted in `source`, never passed over.
    """
    found: list[File] = []
    waiting = [(under, frozenset[tuple[int, int]]())]
    while waiting:
        place, parents = waiting.pop()
        folder = source.base / place
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            source.refuse(place or ".", f"cannot be read: {error.strerror}")
            continue
        identity = (status.st_dev, status.st_ino)
        if identity in parents:
            source.refuse(place, "a link to a folder it lies in")
            continue
        for entry in entries:
            name = f"{place}/{entry.name}" if place else entry.name
            if entry.name.startswith("."):
                source.leave_out(name, "hidden")
            elif not is_utf8(name):
                source.refuse(name, "the name is not UTF-8: rename it")
            elif entry.is_dir():
                waiting.append((name, parents | {identity}))
            elif (file := find_file(source, name)) is not None:
                found.append(file)
            else:
                what = "a broken link" if entry.is_symlink() else "not a regular file"
                source.refuse(name, what)
    return sorted(found)


def is_utf8(text: str) -> bool:
    """Whether a text can be written; names of files and JSON may hold what cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def file_item(file: File, key: str, class_id: int = -1, **fields: Any) -> Item:
    """An item that is a whole file; `fields` go into the sample's .json."""
    return Item(
        key=key,
        file=file.name,
        size=file.size,
        stamp=file.stamp,
        class_id=class_id,
        fields=fields_text(fields),
        kind=suffix_of(file.name)[1:] if suffix_of(file.name) in VIDEO_SUFFIXES else "",
    )


def fields_text(fields: dict[str, Any]) -> str:
    """Fields of an item, as it carries them."""
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")) if fields else ""


def find_file(source: Source, name: str) -> File | None:
    """A file by its name below the base; None if there is no such file."""
    try:
        status = os.stat(source.base / name)
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return None
    return File(name, status.st_size, status.st_mtime_ns) if _is_regular(status) else None


def _is_regular(status: os.stat_result) -> bool:
    return (status.st_mode & 0o170000) == 0o100000


def suffix_of(name: str) -> str:
    """Lower-case suffix of a file's name, with its dot; "" if it has none."""
    return os.path.splitext(name)[1].lower()


def is_image(source: Source, name: str) -> bool:
    """Whether the name is of an image; the file is refused if not."""
    suffix = suffix_of(name)
    if suffix not in IMAGE_SUFFIXES:
        source.refuse(name, f"not an image type: '{suffix or 'no suffix'}'")
    return suffix in IMAGE_SUFFIXES


def key_of(name: str) -> str:
    """Key of a file: webdataset cuts keys at the first dot and takes "/" for folders."""
    stem, suffix = os.path.splitext(name)
    return stem.replace(".", "_") + suffix.lower().replace(".", "_")


def is_test(key: str) -> bool:
    """Whether a sample of a source without splits is one to test with, by its key alone."""
    return _any_hash(key) % TEST_SHARE == 0


def is_val(key: str) -> bool:
    """Whether a sample of a manifest without splits is held out, by its key alone."""
    return _any_hash(key) % VAL_SHARE == 0


def _any_hash(key: str) -> int:
    # A key that is not UTF-8 is refused, but later.
    return key_hash(key if is_utf8(key) else "")


def usual_side(source: Source, items: Iterable[Item]) -> int:
    """Median of the shorter sides of some images, from their headers; 1 if there are none."""
    chosen = list(items)
    sides: list[int] = []
    for item in chosen[:: max(1, len(chosen) // 200)]:
        try:
            with open(source.base / item.file, "rb") as file:
                file.seek(max(item.offset, 0))
                # Image.open goes back to the start of a file.
                part = file if item.offset == WHOLE else io.BytesIO(file.read(item.size))
                with warnings.catch_warnings(action="ignore"), Image.open(part) as picture:
                    sides.append(min(picture.size))
        except Exception:
            continue  # refused with its reason when its turn comes
    return int(np.median(sides)) if sides else 1


def all_items(source: Source) -> Iterator[Item]:
    """The items of all splits."""
    for items in source.splits.values():
        yield from items


def read_json_file(path: Path, expected: type) -> Any:
    """Content of an annotation file. Raises UserError if it is not what its layout says."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error}); fetch it again") from None
    if not isinstance(value, expected):
        found = type(value).__name__
        raise UserError(f"{path}: expected a JSON {expected.__name__}, found {found}")
    return value


def read_lines(path: Path) -> list[str]:
    """Lines of a text file that are not empty, stripped."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable text file ({error}); fetch it again") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def first_existing(*options: Path) -> Path | None:
    """The first of these that exists."""
    return next((path for path in options if path.exists()), None)
