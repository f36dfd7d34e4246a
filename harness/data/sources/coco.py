"""Sets with annotations in COCO's JSON format: COCO, LVIS, iNaturalist 2018."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.data.sources.listing import (
    Item,
    Source,
    all_items,
    file_item,
    find_file,
    first_existing,
    key_of,
    read_json_file,
    usual_side,
)
from harness.errors import UserError

_ROLES = {"train": "train", "val": "test"}
_Json = dict[str, Any]


def coco_files(folder: Path) -> dict[str, Path]:
    """COCO's annotation files by split: annotations/instances_{train,val}{2014,2017}.json."""
    found: dict[str, Path] = {}
    for place in (folder / "annotations", folder):
        for path in sorted(place.glob("instances_*.json"), reverse=True):
            match = re.fullmatch(r"instances_(train|val)\d{4}", path.stem)
            if match:
                found.setdefault(match[1], path)
    return found


def lvis_files(folder: Path) -> dict[str, Path]:
    """LVIS' annotation files by split: lvis_v1_{train,val}.json."""
    return _files(folder, "lvis_v1_{}.json")


def inaturalist_files(folder: Path) -> dict[str, Path]:
    """iNaturalist 2018's annotation files by split: {train,val}2018.json."""
    return _files(folder, "{}2018.json")


def _files(folder: Path, pattern: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for split in _ROLES:
        name = pattern.format(split)
        path = first_existing(folder / name, folder / "annotations" / name)
        if path is not None:
            found[split] = path
    return found


def read_coco(folder: Path) -> Source:
    """COCO (Lin et al. 2014): images in {train,val}2017/, all their categories, and boxes."""
    files = coco_files(folder)

    def places(image: _Json, annotations: Path) -> list[str]:
        name, of_split = image["file_name"], annotations.stem.removeprefix("instances_")
        return [f"{of_split}/{name}", f"images/{of_split}/{name}"]

    return _read_boxes("coco", folder, files, places)


def read_lvis(folder: Path) -> Source:
    """LVIS v1 (Gupta et al. 2019): images of COCO 2017, whose folder is in their coco_url.

    A sample's .json also says for which classes the image was searched in vain (`negative`) and
    of which not every object was marked (`not_exhaustive`).
    """

    def places(image: _Json, annotations: Path) -> list[str]:
        name = "/".join(image["coco_url"].split("/")[-2:])
        return [name, f"images/{name}"]

    return _read_boxes("lvis", folder, lvis_files(folder), places)


def _read_boxes(
    layout: str,
    folder: Path,
    files: dict[str, Path],
    places: Callable[[_Json, Path], list[str]],
) -> Source:
    """Items with `classes`, `annotations`, `width` and `height` in their .json.

    An annotation is {"bbox": [x, y, width, height] in pixels, "class": its place in the set's
    classes, "area": in square pixels, "iscrowd": 0 or 1, "segmentation": polygons or run lengths as
    they are in the source}. `image_id` is the source's.
    """
    source = Source(layout, folder)
    place: dict[int, int] = {}
    for split, path in _expected(layout, folder, files).items():
        content = _content(path)
        try:
            _set_categories(source, place, content["categories"], path)
            by_image: dict[int, list[_Json]] = {image["id"]: [] for image in content["images"]}
            for number, note in enumerate(content["annotations"]):
                if note["image_id"] in by_image:
                    by_image[note["image_id"]].append(_box(note, place))
                else:
                    source.refuse(
                        f"{path.name}: annotation {number}", "of an image that is not in it"
                    )
            for image in content["images"]:
                boxes = by_image.pop(image["id"], None)
                options = places(image, path)
                if boxes is None:
                    source.refuse(options[0], f"{path.name}: its id is there twice")
                    continue
                fields: _Json = {
                    "classes": sorted({box["class"] for box in boxes}),
                    "annotations": boxes,
                    "image_id": image["id"],
                    "width": image["width"],
                    "height": image["height"],
                }
                if "neg_category_ids" in image:
                    fields["negative"] = [place[k] for k in image["neg_category_ids"]]
                    kept = image["not_exhaustive_category_ids"]
                    fields["not_exhaustive"] = [place[k] for k in kept]
                _add(source, _ROLES[split], options, path, -1, **fields)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise _unexpected(path, error) from None
    source.image_size = usual_side(source, all_items(source))
    return source


def _box(note: _Json, place: dict[int, int]) -> _Json:
    left, top, width, height = note["bbox"]
    return {
        "bbox": [left, top, width, height],
        "class": place[note["category_id"]],
        "area": note["area"],
        "iscrowd": note.get("iscrowd", 0),  # LVIS has none
        "segmentation": note["segmentation"],
    }


def read_inaturalist(folder: Path) -> Source:
    """iNaturalist 2018 (Van Horn et al. 2018): one species per image.

    categories.json, which came out after the competition, has the species' names; without it they
    are numbers.
    """
    files = _expected("inaturalist-2018", folder, inaturalist_files(folder))
    source = Source("inaturalist-2018", folder)
    names = folder / "categories.json"
    place: dict[int, int] = {}
    for split, path in files.items():
        content = _content(path)
        try:
            named = read_json_file(names, list) if names.is_file() else content["categories"]
            _set_categories(source, place, named, path)
            classes: dict[int, int] = {}
            for note in content["annotations"]:
                classes[note["image_id"]] = place[note["category_id"]]
            for image in content["images"]:
                name = image["file_name"]
                if image["id"] not in classes:
                    source.refuse(name, f"{path.name}: has no annotation")
                    continue
                class_id = classes[image["id"]]
                _add(source, _ROLES[split], [name, f"images/{name}"], path, class_id)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise _unexpected(path, error) from None
    if (folder / "test2018.json").is_file():
        source.leave_out("test2018.json", "iNaturalist's test images have no published labels")
    source.image_size = usual_side(source, all_items(source))
    return source


def _expected(layout: str, folder: Path, files: dict[str, Path]) -> dict[str, Path]:
    if not files:
        name = {
            "coco": "annotations/instances_train2017.json",
            "lvis": "lvis_v1_train.json",
            "inaturalist-2018": "train2018.json",
        }[layout]
        raise UserError(f"{folder}: not {layout}: expected {name} or the one of val in it")
    return files


def _content(path: Path) -> _Json:
    return read_json_file(path, dict)


def _unexpected(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not as its layout says ({type(error).__name__}: {error})")


def _set_categories(
    source: Source, place: dict[int, int], categories: list[_Json], path: Path
) -> None:
    """Classes in the order of the categories' ids; the splits must agree on them."""
    ordered = sorted(categories, key=lambda category: category["id"])
    names = [str(category["name"]) for category in ordered]
    if len(set(names)) < len(names):
        names = [f"{category['id']} {category['name']}" for category in ordered]
    if not place:
        source.classes = names
        place.update({category["id"]: k for k, category in enumerate(ordered)})
        counts = ("image_count", "instance_count")  # of the file they stand in
        source.files["categories.json"] = [
            {key: value for key, value in category.items() if key not in counts}
            for category in ordered
        ]
    elif names != source.classes:
        raise UserError(f"{path}: its categories are not those of the other split")


def _add(
    source: Source, split: str, options: list[str], listed: Path, class_id: int, **fields: Any
) -> None:
    file = next((found for name in options if (found := find_file(source, name))), None)
    if file is None:
        source.refuse(options[0], f"in {listed.name}, but there is no such file")
    else:
        # The same key wherever the images lie.
        key = key_of(options[0])
        item: Item = file_item(file, key, class_id, **fields)
        source.add(split, item)
