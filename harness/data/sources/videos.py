"""Sets of videos: Kinetics-400 and Something-Something v2. Videos are packed as they are."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from harness.data.sources.listing import (
    VIDEO_SUFFIXES,
    File,
    Source,
    file_item,
    first_existing,
    key_of,
    read_json_file,
    suffix_of,
    walk,
)
from harness.errors import UserError

_KINETICS_COLUMNS = {"label", "youtube_id", "time_start", "time_end"}
_KINETICS_FILES = {"train": ("train",), "validate": ("val", "validate"), "test": ("test",)}
_SSV2_PREFIXES = ("", "something-something-v2-")


def kinetics_files(folder: Path) -> dict[str, Path]:
    """Kinetics' lists by split: {train,val,test}.csv, here or in annotations/."""
    found: dict[str, Path] = {}
    for split, names in _KINETICS_FILES.items():
        for name in names:
            for place in (folder, folder / "annotations"):
                for prefix in ("", "kinetics_400_", "kinetics400_"):
                    path = place / f"{prefix}{name}.csv"
                    if split not in found and path.is_file() and _is_kinetics(path):
                        found[split] = path
    return found


def _is_kinetics(path: Path) -> bool:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return set(next(csv.reader(file), [])) >= _KINETICS_COLUMNS - {"label"}
    except (OSError, ValueError, csv.Error):
        return False


def read_kinetics(folder: Path) -> Source:
    """Kinetics-400 (Kay et al. 2017): <id>_<start>_<end>.mp4, in whatever folders.

    Models are judged on its validation videos: these are the split `test`. Videos that are gone
    from the web are listed as refused.
    """
    files = kinetics_files(folder)
    if not files:
        raise UserError(
            f"{folder}: no train.csv or val.csv with label,youtube_id,time_start,time_end"
        )
    source = Source("kinetics-400", folder)
    videos = _videos(source, {path.relative_to(folder).as_posix() for path in files.values()})
    rows: list[tuple[str, str, str]] = []
    for split, path in files.items():
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                try:
                    start, end = int(row["time_start"]), int(row["time_end"])
                except (TypeError, ValueError):
                    source.refuse(f"{path.name}: {row['youtube_id']}", "its times are no numbers")
                    continue
                stem = f"{row['youtube_id']}_{start:06d}_{end:06d}"
                rows.append((row.get("split") or split, (row.get("label") or "").strip(), stem))
    source.classes = sorted({label for split, label, _ in rows if split != "test"} - {""})
    place = {label: k for k, label in enumerate(source.classes)}
    roles = {"train": "train", "validate": "test", "val": "test"}
    num_test = 0
    for split, label, stem in rows:
        file = videos.pop(stem, None)
        if split not in roles:
            num_test += 1
        elif file is None:
            source.refuse(stem, f"listed for {split}, but there is no such video")
        elif label not in place:
            source.refuse(file.name, "has no label")
        else:
            source.add(roles[split], file_item(file, key_of(f"{stem}.mp4"), place[label]))
    if num_test:
        source.leave_out("test", f"{num_test} videos: Kinetics is judged on its validation videos")
    for file in videos.values():
        source.leave_out(file.name, "not in the lists")
    return source


def ssv2_files(folder: Path) -> dict[str, Path]:
    """Something-Something's lists: {labels,train,validation,test}.json, here or in labels/."""
    found: dict[str, Path] = {}
    for name in ("labels", "train", "validation", "test"):
        options = [
            place / f"{prefix}{name}.json"
            for place in (folder, folder / "labels")
            for prefix in _SSV2_PREFIXES
        ]
        path = first_existing(*options)
        if path is not None:
            found[name] = path
    return found if {"labels", "train"} <= set(found) else {}


def read_ssv2(folder: Path) -> Source:
    """Something-Something v2 (Goyal et al. 2017): <id>.webm, in whatever folder.

    Classes are the templates, numbered as in labels.json; what the crowd worker wrote is the
    sample's `caption`. The validation videos are the split `test`.
    """
    files = ssv2_files(folder)
    if not files:
        raise UserError(
            f"{folder}: no labels.json and train.json; expected them here or in labels/"
        )
    source = Source("something-something-v2", folder)
    videos = _videos(source, {path.relative_to(folder).as_posix() for path in files.values()})
    labels = read_json_file(files["labels"], dict)
    try:
        place = {name: int(number) for name, number in labels.items()}
        source.classes = sorted(place, key=lambda name: place[name])
        if sorted(place.values()) != list(range(len(place))):
            raise ValueError("numbers are not 0, 1, 2 ...")
    except (TypeError, ValueError) as error:
        raise UserError(f"{files['labels']}: not names with their numbers ({error})") from None
    for name, role in (("train", "train"), ("validation", "test")):
        if name not in files:
            continue
        for entry in read_json_file(files[name], list):
            stem = str(entry.get("id", ""))
            template = re.sub(r"\[|\]", "", entry.get("template", ""))
            file = videos.pop(stem, None)
            if file is None:
                source.refuse(stem, f"in {files[name].name}, but there is no such video")
            elif template not in place:
                source.refuse(file.name, f"its template '{template}' is not in labels.json")
            else:
                key = key_of(f"{stem}.webm")
                caption = str(entry.get("label", ""))
                source.add(role, file_item(file, key, place[template], caption=caption))
    if "test" in files:
        entries = read_json_file(files["test"], list)
        left = sum(videos.pop(str(entry.get("id", "")), None) is not None for entry in entries)
        source.leave_out(files["test"].name, f"{left} videos without labels")
    for file in videos.values():
        source.leave_out(file.name, "not in the lists")
    return source


def _videos(source: Source, lists: set[str]) -> dict[str, File]:
    """Videos by name without suffix."""
    videos: dict[str, File] = {}
    for file in walk(source):
        stem = file.name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
        if suffix_of(file.name) not in VIDEO_SUFFIXES:
            if file.name not in lists:
                source.leave_out(file.name, "not a video of a known type")
        elif stem in videos:
            source.leave_out(file.name, f"{videos[stem].name} has the same name")
        else:
            videos[stem] = file
    return videos
