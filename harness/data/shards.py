"""Samples as webdataset shards: written with equal bytes every time, listed with byte offsets.

A shard is a plain tar that stock webdataset reads: a member `<key>.png` (or .jpg, .webp, .mp4,
.webm) with `<key>.json` {"hashtags": [...], ...} or `<key>.cls` (a class id). Training never walks
a tar: it reads at the offsets that `list_shard` found once.
"""

from __future__ import annotations

import functools
import json
import mmap
import re
import tarfile
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import DataError

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
VIDEO_TYPES = ("mp4", "webm")
LABEL_TYPES = ("json", "cls", "txt")
# webdataset splits a member's name at the first dot of its last part.
_NAME = re.compile(r"^((?:.*/|)[^./][^./]*)\.([^/]*)$")
_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image or video to be written."""

    key: str
    """No dots in its last part: webdataset would split it there."""
    image: bytes
    """The image, or the video."""
    image_type: str
    """File name extension: png, jpg, webp, mp4 or webm."""
    hashtags: list[str] | None = None
    class_id: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    """More of its .json: `classes` of a sample with several, `caption`, `annotations` ..."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """One sample found in a shard."""

    key: str
    start: int
    """Byte where the sample's first tar header begins."""
    stop: int
    """Byte after the sample, padding included."""
    offset: int
    """Byte where the content of the image (or video) begins."""
    size: int
    """Bytes of that content."""
    crc: int
    """CRC-32 of the bytes from `start` to `stop`, tar headers included."""
    hashtags: tuple[str, ...]
    cls: str | None
    """Content of .cls: an integer, or a class name in sets that others wrote."""
    classes: tuple[str, ...] = ()
    """Of a sample with any number of classes: ids or names."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file in a tar."""

    name: str
    start: int
    """Byte where its first header begins."""
    offset: int
    """Byte where its content begins."""
    size: int
    is_file: bool
    """False for folders, links and devices."""

    @property
    def stop(self) -> int:
        """Byte after the content, padding included."""
        return self.offset + -(-self.size // _BLOCK) * _BLOCK


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Writes a tar whose bytes depend on the samples only."""
    from webdataset.writer import TarWriter  # it imports torch: only those who write wait for that

    path.parent.mkdir(parents=True, exist_ok=True)
    plain: dict[str, Any] = {"mtime": 0, "user": "", "group": "", "mode": 0o644, "compress": False}
    with open(path, "wb") as file, TarWriter(file, encoder=False, **plain) as writer:
        for sample in samples:
            members: dict[str, str | bytes] = {
                "__key__": sample.key,
                sample.image_type: sample.image,
            }
            content = dict(sample.fields)
            if sample.hashtags is not None:
                content = {"hashtags": sample.hashtags, **content}
            if content:
                members["json"] = json.dumps(content, ensure_ascii=False).encode()
            if sample.class_id is not None:
                members["cls"] = str(sample.class_id).encode()
            writer.write(members)


def walk_tar(path: Path) -> Iterator[Member]:
    """The members of a tar, in order.

    Raises DataError, naming shard and byte offset, for a tar that is damaged or cut short.
    """
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path}: byte offset 0: the shard is empty")
    end = 0
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for found in tar:
                    is_file = found.isfile() and not found.issparse()
                    length = found.size if is_file else 0
                    member = Member(found.name, end, found.offset_data, length, is_file)
                    if found.size < 0 or found.offset_data <= end or member.stop > size:
                        raise tarfile.ReadError(f"{found.name!r} does not end in the file")
                    # Where tarfile goes on: for a link or a folder it takes no content.
                    end = max(member.stop, tar.offset)
                    yield member
                    tar.members = []  # type: ignore[attr-defined]  # else all are kept
        # A damaged extended header makes tarfile raise these, too.
        except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as error:
            raise DataError(f"{path}: byte offset {end}: not a whole tar ({error})") from None
        if end + _BLOCK > size:
            raise DataError(f"{path}: byte offset {size}: the tar is cut short: it has no end mark")
        # tarfile takes a header that it cannot read for the end.
        file.seek(end)
        if file.read(_BLOCK).strip(b"\0"):
            raise DataError(f"{path}: byte offset {end}: not a whole tar (a damaged header)")
        while rest := file.read(1 << 20):
            if rest.strip(b"\0"):
                where = f"{path}: byte offset {end}"
                raise DataError(f"{where}: the tar ends here, but more follows: glued tars?")


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member, as webdataset cuts them; None if it belongs to no sample."""
    match = _NAME.match(name)
    return (match[1], match[2]) if match else None


def list_shard(path: Path) -> list[Listed]:
    """The samples of a shard, in order.

    Raises DataError, naming shard and byte offset, for a tar that is damaged or cut short, and
    for a sample without an image or video.
    """
    return [listed for listed, _ in samples_of(path)]


def samples_of(path: Path) -> Iterator[tuple[Listed, Labels]]:
    """As `list_shard`, with everything that the samples' labels say."""
    groups: list[tuple[str, int, list[Member]]] = []
    end = 0
    for member in walk_tar(path):
        end = member.stop
        name = split_name(member.name)
        if not member.is_file or name is None:
            continue
        if not groups or groups[-1][0] != name[0]:
            groups.append((name[0], member.start, []))
        groups[-1][2].append(member)
    starts = [start for _, start, _ in groups] + [end]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        for place, (key, start, members) in enumerate(groups):
            yield _listed(path, view, key, start, starts[place + 1], members)


def _listed(
    path: Path, view: mmap.mmap, key: str, start: int, stop: int, members: list[Member]
) -> tuple[Listed, Labels]:
    image: Member | None = None
    labels = Labels()
    for member in members:
        kind = member.name.rsplit(".", 1)[1].lower()
        if kind in IMAGE_TYPES + VIDEO_TYPES and image is None:
            image = member
        elif kind in LABEL_TYPES:
            try:
                labels.add(kind, view[member.offset : member.offset + member.size])
            except (ValueError, TypeError, AttributeError) as error:
                where = f"{path}: byte offset {member.offset}"
                raise DataError(f"{where}: {member.name} is not a label ({error})") from None
    if image is None:
        known = ", ".join(f".{kind}" for kind in IMAGE_TYPES + VIDEO_TYPES)
        raise DataError(
            f"{path}: byte offset {start}: sample {key} has no image; expected one of {known}"
        )
    listed = Listed(
        key=key,
        start=start,
        stop=stop,
        offset=image.offset,
        size=image.size,
        crc=zlib.crc32(view[start:stop]),
        hashtags=tuple(labels.hashtags),
        cls=labels.cls,
        classes=tuple(labels.classes),
    )
    return listed, labels


class Labels:
    """What the .json, .cls and .txt members of one sample say together."""

    def __init__(self) -> None:
        self.hashtags: dict[str, None] = {}
        self.cls: str | None = None
        self.classes: list[str] = []
        self.fields: dict[str, Any] = {}
        """The rest of .json, and a .txt as `caption`."""

    def add(self, kind: str, content: bytes) -> None:
        """Takes in a member. Raises ValueError, TypeError or AttributeError if it is no label."""
        text = content.decode("utf-8").strip()
        cls = None
        if kind == "cls":
            cls = text
        elif kind == "json":
            value = json.loads(text)
            self.hashtags |= dict.fromkeys(str(tag) for tag in value.get("hashtags", []))
            self.classes += [str(name) for name in value.get("classes", [])]
            cls = value.get("cls")
            own = ("hashtags", "classes", "cls")
            self.fields |= {name: value[name] for name in value if name not in own}
        elif text:
            self.hashtags |= dict.fromkeys(words_of(text))
            self.fields["caption"] = text
        if self.cls is None and cls is not None:
            self.cls = str(cls)


def words_of(caption: str) -> list[str]:
    """Hashtags of a caption, or all words of a text that has none."""
    return tags_in(caption) or [w for w in re.split(r"[\s,]+", caption) if w]


def tags_in(caption: str) -> list[str]:
    """The hashtags of a caption, each once, as they are written. '&#39;' and '/#top' are none."""
    return list(dict.fromkeys(_patterns()[0].findall(caption)))


def words_in(caption: str) -> list[str]:
    """All words of a caption, each once; a script without spaces is not cut into words."""
    return list(dict.fromkeys(_patterns()[1].findall(caption)))


@functools.cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    r"""Of hashtags, and of words. Python's \w lacks combining marks: half of Hindi's vowels."""
    codes = range(0x300, 0x20000)
    marks = "".join(chr(code) for code in codes if unicodedata.category(chr(code))[0] == "M")
    letter = rf"[\w{re.escape(marks)}\u200c\u200d]"
    hashtag = re.compile(rf"(?<![&/])[#\uff03]{letter}+")
    return hashtag, re.compile(rf"{letter}+(?:['\u2019-]{letter}+)*")
