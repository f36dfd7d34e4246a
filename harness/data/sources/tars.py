"""Shards that webdataset, img2dataset or `harness data pack` wrote."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from harness.data.shards import LABEL_TYPES, Labels, Member, split_name, walk_tar
from harness.data.sources.listing import (
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    SPLITS,
    VIDEO_SUFFIXES,
    Item,
    Source,
    fields_text,
    is_test,
    read_json_file,
    suffix_of,
    usual_side,
    walk,
)
from harness.errors import DataError, UserError

_MEDIA = IMAGE_SUFFIXES | VIDEO_SUFFIXES
_Found = tuple[Item, str | None, list[str]]
"""An item, its .cls and its list of classes, of which the numbers are not yet known."""


def has_tars(folder: Path) -> bool:
    """Whether there are shards to read: SRC/*.tar or SRC/<split>/*.tar."""
    return any(folder.glob("*.tar")) or any(folder.glob("*/*.tar"))


def read_webdataset(folder: Path, split: str | None = None) -> Source:
    """Splits by the names of shards or their folders; otherwise by key.

    Without splits one sample in five is held out: `test` of `train` if there are classes, else
    `val` of `pretrain`; or all are for `split`. A damaged tar is an error, a sample without an
    image is refused.
    """
    source = Source("webdataset", folder)
    by_split: dict[str, list[_Found]] = {}
    unnamed = ""
    for file in walk(source):
        parts = file.name.split("/")
        if suffix_of(file.name) != ".tar" or len(parts) > 2:
            source.leave_out(file.name, "not a tar file in SRC or a folder of it")
            continue
        name = parts[0].lower()
        to = next((of for word, of in SPLIT_NAMES.items() if name.startswith(word)), "")
        unnamed = unnamed or ("" if to else file.name)
        try:
            by_split.setdefault(to, []).extend(_samples(source, file.name, file.stamp))
        except DataError as error:
            raise UserError(str(error)) from None
    if len(by_split) > 1 and "" in by_split:
        raise UserError(
            f"{folder / unnamed}: belongs to no split; expected files or folders named"
            f" {', '.join(SPLITS)}"
        )
    if split and "" not in by_split:
        raise UserError(
            f"{folder}: its shards name their splits ({', '.join(by_split)}): no --split"
        )
    everything = [found for part in by_split.values() for found in part]
    source.classes, place = _classes(source, everything)
    held_out = ("train", "test") if source.classes else ("pretrain", "val")
    for to, part in by_split.items():
        for item, cls, names in part:
            fields = item.fields
            if names:
                whole = {"classes": [place[name] for name in names]}
                fields = fields_text(whole)[:-1] + ("," + fields[1:] if fields else "}")
            item = item._replace(class_id=-1 if cls is None else place[cls], fields=fields)
            source.add(to or split or held_out[is_test(item.key)], item)
    first = everything[0][0] if everything else None
    source.image_size = usual_side(source, [first] if first else [])
    return source


def _samples(source: Source, tar: str, stamp: int) -> list[_Found]:
    groups: list[tuple[str, list[Member]]] = []
    other: Counter[str] = Counter()
    for member in walk_tar(source.base / tar):
        cut = split_name(member.name)
        if not member.is_file or cut is None:
            if not member.name.endswith("/") and member.size:
                source.leave_out(f"{tar}: {member.name}", "belongs to no sample")
            elif not member.is_file and cut is not None:
                source.refuse(f"{tar}: {member.name}", "a link or device, not a file")
            continue
        if not groups or groups[-1][0] != cut[0]:
            groups.append((cut[0], []))
        groups[-1][1].append(member)
    found: list[_Found] = []
    with open(source.base / tar, "rb") as file:
        for key, members in groups:
            media: Member | None = None
            labels = Labels()
            damaged = ""
            for member in members:
                suffix = suffix_of(member.name)
                if suffix in _MEDIA and media is None:
                    media = member
                elif suffix[1:] in LABEL_TYPES:
                    file.seek(member.offset)
                    try:
                        labels.add(suffix[1:], file.read(member.size))
                    except (ValueError, TypeError, AttributeError) as error:
                        damaged = f"{member.name} is not a label ({error})"
                else:
                    other[suffix] += 1
            where = f"{tar}: byte offset {members[0].start}: {key}"
            if media is None:
                source.refuse(where, "no image")
            elif damaged:
                source.refuse(where, damaged)
            else:
                item = _item(tar, stamp, key, media, labels)
                found.append((item, labels.cls, labels.classes))
    for suffix, count in sorted(other.items()):
        source.leave_out(f"{tar}: {count} members", f"'{suffix}' is neither first image nor label")
    return found


def _item(tar: str, stamp: int, key: str, media: Member, labels: Labels) -> Item:
    suffix = suffix_of(media.name)
    return Item(
        key=key,
        file=tar,
        offset=media.offset,
        size=media.size,
        stamp=stamp,
        hashtags=tuple(labels.hashtags) or None,
        fields=fields_text(labels.fields),
        kind=suffix[1:] if suffix in VIDEO_SUFFIXES else "",
    )


def _classes(source: Source, found: list[_Found]) -> tuple[list[str], dict[str, int]]:
    """Names of the classes, and the place among them of each that was found.

    Names are those found, in order; of numbers they are all up to the largest, or, in a set that
    was packed before, what its dataset.json calls them.
    """
    names = {cls for _, cls, _ in found if cls is not None}
    names |= {name for _, _, several in found for name in several}
    if not all(name.isdecimal() for name in names):
        return sorted(names), {name: k for k, name in enumerate(sorted(names))}
    place = {name: int(name) for name in names}
    largest = max(place.values(), default=-1)
    if (source.base / "dataset.json").is_file():
        known = read_json_file(source.base / "dataset.json", dict).get("classes")
        if isinstance(known, list) and largest < len(known):
            return [str(name) for name in known], place
    return [str(k) for k in range(largest + 1)], place
