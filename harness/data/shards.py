"""Samples as webdataset shards: written with equal bytes every time, listed with byte offsets.

A shard is a plain tar that stock webdataset reads: members `<key>.png` (or .jpg, .webp) with
`<key>.json` {"hashtags": [...]} or `<key>.cls` (a class id). Training never walks a tar: it reads
at the offsets that `list_shard` found once.
"""

from __future__ import annotations

import json
import mmap
import re
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from webdataset.writer import TarWriter

from harness.errors import DataError

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
LABEL_TYPES = ("json", "cls", "txt")
# webdataset splits a member's name at the first dot of its last part.
_NAME = re.compile(r"^((?:.*/|)[^./][^./]*)\.([^/]*)$")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image to be written."""

    key: str
    """No dots in its last part: webdataset would split it there."""
    image: bytes
    image_type: str
    """File name extension: png, jpg or webp."""
    hashtags: list[str] | None = None
    class_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One sample found in a shard."""

    key: str
    start: int
    """Byte where the sample's first tar header begins."""
    stop: int
    """Byte after the sample, padding included."""
    offset: int
    """Byte where the image's content begins."""
    size: int
    """Bytes of the image's content."""
    crc: int
    """CRC-32 of the bytes from `start` to `stop`, tar headers included."""
    hashtags: tuple[str, ...]
    cls: str | None
    """Content of .cls: an integer, or a class name in sets that others wrote."""


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Writes a tar whose bytes depend on the samples only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(path, "wb") as file,
        TarWriter(
            file, encoder=False, mtime=0, user="", group="", mode=0o644, compress=False
        ) as writer,
    ):
        for sample in samples:
            members: dict[str, str | bytes] = {
                "__key__": sample.key,
                sample.image_type: sample.image,
            }
            if sample.hashtags is not None:
                text = json.dumps({"hashtags": sample.hashtags}, ensure_ascii=False)
                members["json"] = text.encode()
            if sample.class_id is not None:
                members["cls"] = str(sample.class_id).encode()
            writer.write(members)


def list_shard(path: Path) -> list[Listed]:
    """The samples of a shard, in order.

    Raises DataError, naming shard and byte offset, for a tar that is damaged or cut short, and
    for a sample without an image.
    """
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path}: byte offset 0: the shard is empty")
    groups: list[tuple[str, int, list[tarfile.TarInfo]]] = []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        end = 0
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    start = end
                    end = member.offset_data + -(-member.size // 512) * 512
                    match = _NAME.match(member.name)
                    if not member.isfile() or match is None:
                        continue
                    if not groups or groups[-1][0] != match[1]:
                        groups.append((match[1], start, []))
                    groups[-1][2].append(member)
        except tarfile.TarError as error:
            raise DataError(f"{path}: byte offset {end}: not a whole tar ({error})") from None
        if end + 512 > size:
            raise DataError(f"{path}: byte offset {size}: the tar is cut short: it has no end mark")
        starts = [start for _, start, _ in groups] + [end]
        return [
            _listed(path, view, key, start, starts[place + 1], members)
            for place, (key, start, members) in enumerate(groups)
        ]


def _listed(
    path: Path, view: mmap.mmap, key: str, start: int, stop: int, members: list[tarfile.TarInfo]
) -> Listed:
    image: tarfile.TarInfo | None = None
    hashtags: tuple[str, ...] = ()
    cls: str | None = None
    for member in members:
        kind = member.name.rsplit(".", 1)[1].lower()
        if kind in IMAGE_TYPES and image is None:
            image = member
        elif kind in LABEL_TYPES:
            content = view[member.offset_data : member.offset_data + member.size]
            try:
                found_tags, found_cls = _labels(kind, content)
            except (ValueError, TypeError, AttributeError) as error:
                where = f"{path}: byte offset {member.offset_data}"
                raise DataError(f"{where}: {member.name} is not a label ({error})") from None
            hashtags += found_tags
            cls = found_cls if cls is None else cls
    if image is None:
        known = ", ".join(f".{kind}" for kind in IMAGE_TYPES)
        raise DataError(
            f"{path}: byte offset {start}: sample {key} has no image; expected one of {known}"
        )
    return Listed(
        key=key,
        start=start,
        stop=stop,
        offset=image.offset_data,
        size=image.size,
        crc=zlib.crc32(view[start:stop]),
        hashtags=tuple(dict.fromkeys(hashtags)),
        cls=cls,
    )


def _labels(kind: str, content: bytes) -> tuple[tuple[str, ...], str | None]:
    text = content.decode("utf-8").strip()
    if kind == "cls":
        return (), text
    if kind == "json":
        value = json.loads(text)
        cls = value.get("cls")
        return tuple(str(tag) for tag in value.get("hashtags", [])), None if cls is None else str(
            cls
        )
    # A caption: its hashtags, or all words of a text that is nothing but words.
    words = re.findall(r"#\w+", text)
    return tuple(words or re.split(r"[\s,]+", text) if text else ()), None
