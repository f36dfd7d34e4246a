"""ImageNet-1k and the test sets that share its classes: ReaL, ImageNetV2, ObjectNet.

Class k is the k-th WordNet id in sorted order, everywhere.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from harness.data.sources.folders import add_classes
from harness.data.sources.listing import (
    File,
    Item,
    Source,
    all_items,
    file_item,
    first_existing,
    is_image,
    key_of,
    read_json_file,
    read_lines,
    usual_side,
    walk,
)
from harness.errors import UserError

_WNID = re.compile(r"n\d{8}")
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")
_DEVKIT = "ILSVRC2012_devkit_t12/data"
_KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
OBJECTNET_SHARED = 113
"""Classes of ObjectNet that ImageNet-1k has (Barbu et al. 2019)."""
OBJECTNET_BORDER = 2
"""Pixels of red that ObjectNet's authors put around each image, to be cut off before use."""


def imagenet_place(folder: Path) -> str | None:
    """Where ImageNet's train/ or val/ lie below the folder; None if it is not ImageNet."""
    for place in ("", *_KAGGLE):
        for name in ("train", "val"):
            part = folder / place / name
            if part.is_dir() and any(
                _WNID.fullmatch(entry.name) or _VAL_NAME.match(entry.name)
                for entry in part.iterdir()
            ):
                return place
    return None


def is_imagenet(folder: Path) -> bool:
    """Whether this is ImageNet, and not its validation images kept for ReaL alone."""
    place = imagenet_place(folder)
    if place is None:
        return False
    return (folder / place / "train").is_dir() or not (folder / "real.json").is_file()


def read_imagenet(folder: Path) -> Source:
    """ILSVRC 2012: train/<wnid>/, and val/ with such folders or flat with its ground truth.

    The truth of a flat val/ is the devkit's (ILSVRC2012_validation_ground_truth.txt, meta.mat) or
    Kaggle's LOC_val_solution.csv. Keys are the same whichever of the layouts it is.
    """
    place = imagenet_place(folder)
    if place is None:
        raise UserError(f"{folder}: not ImageNet-1k: expected train/<wnid>/ or val/ in it")
    source = Source("imagenet-1k", folder)
    under = f"{place}/" if place else ""
    known: list[tuple[str, str, Item]] = []
    truth: dict[str, str] | None = None
    for split, role in (("train", "train"), ("val", "test")):
        if not (folder / under / split).is_dir():
            continue
        for file in walk(source, f"{under}{split}"):
            parts = file.name[len(under) :].split("/")
            if not is_image(source, file.name):
                continue
            wnid = parts[1] if len(parts) == 3 else None
            if split == "val" and len(parts) == 2:
                truth = _validation_truth(folder) if truth is None else truth
                wnid = truth.get(parts[1].rsplit(".", 1)[0])
            if wnid is None or not _WNID.fullmatch(wnid):
                source.refuse(file.name, "its class is not known: no WordNet id, no ground truth")
                continue
            item = file_item(file, key_of(f"{split}/{wnid}/{parts[-1]}"))
            known.append((role, wnid, item))
    if (folder / under / "test").is_dir():
        source.leave_out(f"{under}test", "ImageNet's test images have no published labels")
    add_classes(source, known)
    return source


def _validation_truth(folder: Path) -> dict[str, str]:
    """WordNet id by the name of a validation image, without suffix."""
    solution = first_existing(
        folder / "LOC_val_solution.csv", folder.parent / "LOC_val_solution.csv"
    )
    if solution is not None:
        with open(solution, encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            try:
                # PredictionString: a WordNet id and a box, again and again; one class per image.
                return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
            except (KeyError, IndexError, AttributeError) as error:
                raise UserError(f"{solution}: not ImageId,PredictionString ({error})") from None
    name = "ILSVRC2012_validation_ground_truth.txt"
    places = (folder / _DEVKIT, folder.parent / _DEVKIT, folder / "data", folder)
    truth = first_existing(*(place / name for place in places))
    if truth is None:
        raise UserError(
            f"{folder}: val/ is flat and its labels are not here: expected {_DEVKIT}/{name} with"
            " meta.mat, or LOC_val_solution.csv"
        )
    wnids = _devkit_wnids(truth.with_name("meta.mat"))
    try:
        return {
            f"ILSVRC2012_val_{number:08d}": wnids[int(line)]
            for number, line in enumerate(read_lines(truth), 1)
        }
    except (KeyError, ValueError) as error:
        raise UserError(f"{truth}: not numbers of classes in meta.mat ({error})") from None


def _devkit_wnids(path: Path) -> dict[int, str]:
    """WordNet id by ILSVRC2012_ID, which is not the sorted order."""
    from scipy.io import loadmat  # slow to import, and only needed here

    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not the devkit's meta.mat ({error})") from None
    return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}


def imagenet_wnids() -> list[str]:
    """The 1,000 WordNet ids in the order of the classes."""
    from timm.data.imagenet_info import ImageNetInfo  # imports torch, and is only needed here

    return list(ImageNetInfo("imagenet-1k").label_names())


def read_real(folder: Path) -> Source:
    """ReaL (Beyer et al. 2020): real.json beside ImageNet's validation images.

    Each image has any number of classes. Those with none are not scored, and left out.
    """
    answers = folder / "real.json"
    if not answers.is_file():
        raise UserError(f"{folder}: no real.json; expected it beside ImageNet's val/")
    labels: list[list[int]] = read_json_file(answers, list)
    source = Source("imagenet-real", folder, classes=imagenet_wnids())
    options = [f"{place}/val".lstrip("/") for place in ("", *_KAGGLE)]
    under = next((option for option in options if (folder / option).is_dir()), "")
    missing = set(range(1, len(labels) + 1))
    for file in walk(source, under):
        name = file.name.rsplit("/", 1)[-1]
        if name == answers.name:
            continue
        match = _VAL_NAME.match(name)
        number = int(match[1]) if match else 0
        if not 1 <= number <= len(labels):
            source.leave_out(file.name, "not an image that real.json labels")
            continue
        missing.discard(number)
        if not labels[number - 1]:
            source.leave_out(file.name, "real.json gives it no class: it is not scored")
            continue
        item = file_item(file, key_of(f"val/{name}"), classes=sorted(labels[number - 1]))
        source.add("test", item)
    for number in sorted(missing):
        source.refuse(f"ILSVRC2012_val_{number:08d}", "in real.json, but there is no such file")
    source.image_size = usual_side(source, all_items(source))
    return source


def imagenet_v2_place(folder: Path) -> Path | None:
    """The folder with ImageNetV2's folders 0 to 999."""
    for place in (folder, *sorted(folder.glob("imagenetv2*"))):
        if not place.is_dir():
            continue
        numbers = {entry.name for entry in place.iterdir() if entry.is_dir()}
        whole = len(numbers) == 1000 and all(name.isdecimal() for name in numbers)
        if whole or (numbers and "imagenetv2" in place.name and min(numbers).isdecimal()):
            return place
    return None


def read_imagenet_v2(folder: Path) -> Source:
    """ImageNetV2 (Recht et al. 2019): <class number>/<image>.jpeg."""
    place = imagenet_v2_place(folder) or folder
    source = Source("imagenet-v2", place, classes=imagenet_wnids())
    for file in walk(source):
        parts = file.name.split("/")
        if not is_image(source, file.name):
            continue
        if len(parts) != 2 or not parts[0].isdecimal() or int(parts[0]) >= len(source.classes):
            source.refuse(file.name, "not in a folder named after a class: 0 to 999")
            continue
        source.add("test", file_item(file, key_of(file.name), int(parts[0])))
    source.image_size = usual_side(source, all_items(source))
    return source


def objectnet_place(folder: Path) -> Path | None:
    """The folder with ObjectNet's `images` and `mappings`."""
    for place in (folder, folder / "objectnet-1.0"):
        if (place / "mappings" / "objectnet_to_imagenet_1k.json").is_file():
            return place
    return None


def read_objectnet(folder: Path) -> Source:
    """ObjectNet (Barbu et al. 2019): images/<class>/*.png, mappings/.

    Kept are the 113 of its 313 classes that ImageNet-1k has too, as their authors score them: an
    answer is right if it is any of the ImageNet classes that the object's class corresponds to.
    """
    place = objectnet_place(folder)
    if place is None:
        raise UserError(f"{folder}: no mappings/objectnet_to_imagenet_1k.json; not ObjectNet")
    source = Source("objectnet", place, classes=imagenet_wnids(), crop_border=OBJECTNET_BORDER)
    label_of = read_json_file(place / "mappings" / "folder_to_objectnet_label.json", dict)
    classes_of = _objectnet_classes(place / "mappings")
    if len(classes_of) != OBJECTNET_SHARED:
        source.remarks.append(
            f"{len(classes_of)} classes are mapped to ImageNet's; ObjectNet's own files map"
            f" {OBJECTNET_SHARED}: results are not comparable with published ones"
        )
    others: dict[str, int] = {}
    for file in walk(source, "images"):
        parts = file.name.split("/")
        if not is_image(source, file.name):
            continue
        label = label_of.get(parts[1]) if len(parts) == 3 else None
        if label is None:
            source.refuse(file.name, "its folder is not in folder_to_objectnet_label.json")
        elif label not in classes_of:
            others[parts[1]] = others.get(parts[1], 0) + 1
        else:
            source.add("test", _objectnet_item(file, label, classes_of[label]))
    for name, count in sorted(others.items()):
        source.leave_out(f"images/{name}", f"{count} images: not a class of ImageNet-1k")
    source.image_size = usual_side(source, all_items(source))
    return source


def _objectnet_item(file: File, label: str, classes: list[int]) -> Item:
    return file_item(file, key_of(file.name), classes=classes, objectnet=label)


def _objectnet_classes(mappings: Path) -> dict[str, list[int]]:
    """ImageNet classes by ObjectNet's label.

    objectnet_to_imagenet_1k.json has names joined by "; "; the line of a name (from 0) in
    imagenet_to_label_2012_v2 is what pytorch_to_imagenet_2012_id.json calls the class's 2012 id.
    """
    names = read_json_file(mappings / "objectnet_to_imagenet_1k.json", dict)
    id_of = read_json_file(mappings / "pytorch_to_imagenet_2012_id.json", dict)
    class_of_line = {int(line): int(class_id) for class_id, line in id_of.items()}
    lines = read_lines(mappings / "imagenet_to_label_2012_v2")
    line_of = {name: number for number, name in enumerate(lines)}
    if len(class_of_line) != len(lines):  # a thousand each; a line too many shifts all names
        raise UserError(
            f"{mappings}: imagenet_to_label_2012_v2 has {len(lines)} lines and"
            f" pytorch_to_imagenet_2012_id.json {len(class_of_line)} classes, expected as many,"
            " 1000; unpack ObjectNet again"
        )
    try:
        return {
            label: sorted(class_of_line[line_of[name]] for name in joined.split("; "))
            for label, joined in names.items()
        }
    except KeyError as error:
        raise UserError(f"{mappings}: {error} is in one mapping and not in the other") from None
