"""Image folders, <class>/... or <split>/<class>/..., and Food-101's folders with its lists."""

from __future__ import annotations

from pathlib import Path

from harness.data.sources.listing import (
    SPLIT_NAMES,
    Item,
    Source,
    file_item,
    find_file,
    is_image,
    is_test,
    key_of,
    read_lines,
    usual_side,
    walk,
)
from harness.errors import UserError


def read_image_folder(folder: Path, split: str | None = None) -> Source:
    """Each image in a folder named after its class; above that perhaps one named after its split.

    Without splits one image in five, by its name, is for testing, or all are for `split`.
    """
    source = Source("image-folder", folder)
    files = walk(source)
    top = {file.name.split("/")[0] for file in files if "/" in file.name}
    has_splits = bool(top) and all(name.lower() in SPLIT_NAMES for name in top)
    if split and has_splits:
        raise UserError(f"{folder}: has folders for splits ({', '.join(sorted(top))}): no --split")
    known: list[tuple[str, str, Item]] = []
    for file in files:
        parts = file.name.split("/")
        if not is_image(source, file.name):
            continue
        if len(parts) < 2 + has_splits:
            source.refuse(file.name, "not in a folder named after its class")
            continue
        if has_splits:
            of_split, label = SPLIT_NAMES[parts[0].lower()], parts[1]
        else:
            of_split, label = split or ("test" if is_test(file.name) else "train"), parts[0]
        known.append((of_split, label, file_item(file, key_of(file.name))))
    add_classes(source, known)
    return source


def add_classes(source: Source, known: list[tuple[str, str, Item]]) -> None:
    """Adds items of which split and class name are known; the classes are those found, sorted."""
    source.classes = sorted({label for _, label, _ in known})
    place = {name: k for k, name in enumerate(source.classes)}
    named = {split for split, _, _ in known}
    # ImageNet's layout: what it calls val is the labelled test set.
    val_is_test = "val" in named and "test" not in named
    for split, label, item in known:
        to = "test" if val_is_test and split == "val" else split
        source.add(to, item._replace(class_id=place[label]))
    source.image_size = usual_side(source, [item for _, _, item in known])


def food101_place(folder: Path) -> Path | None:
    """The folder with Food-101's `images` and `meta`."""
    for place in (folder, folder / "food-101"):
        if (place / "meta" / "train.txt").is_file() and (place / "images").is_dir():
            return place
    return None


def read_food101(folder: Path) -> Source:
    """Food-101 (Bossard et al. 2014): images/<class>/<id>.jpg, meta/{train,test,classes}.txt."""
    place = food101_place(folder)
    if place is None:
        raise UserError(f"{folder}: not Food-101: expected images/ and meta/train.txt")
    source = Source("food-101", place)
    source.classes = read_lines(place / "meta" / "classes.txt")
    human = place / "meta" / "labels.txt"
    labels = read_lines(human) if human.is_file() else source.classes
    source.files["categories.json"] = [
        {"name": name, "label": label} for name, label in zip(source.classes, labels, strict=False)
    ]
    class_ids = {name: k for k, name in enumerate(source.classes)}
    files = {file.name: file for file in walk(source, "images")}
    for split in ("train", "test"):
        for line in read_lines(place / "meta" / f"{split}.txt"):
            name = f"images/{line}.jpg"
            file = files.pop(name, None)
            class_id = class_ids.get(line.split("/")[0])
            if file is None:
                again = find_file(source, name) is not None
                listed = "listed twice" if again else "there is no such file"
                source.refuse(name, f"meta/{split}.txt: {listed}")
            elif class_id is None:
                source.refuse(name, f"meta/{split}.txt: its class is not in meta/classes.txt")
            else:
                source.add(split, file_item(file, key_of(name), class_id))
    for name in files:
        source.leave_out(name, "in neither meta/train.txt nor meta/test.txt")
    source.image_size = usual_side(source, (i for items in source.splits.values() for i in items))
    return source
