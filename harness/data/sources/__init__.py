"""Readers of the sources that `harness data pack` takes, and which of them fits a folder."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from harness.data.sources.arrays import idx_place, read_digits, read_idx
from harness.data.sources.coco import (
    coco_files,
    inaturalist_files,
    lvis_files,
    read_coco,
    read_inaturalist,
    read_lvis,
)
from harness.data.sources.folders import food101_place, read_food101, read_image_folder
from harness.data.sources.imagenet import (
    imagenet_v2_place,
    is_imagenet,
    objectnet_place,
    read_imagenet,
    read_imagenet_v2,
    read_objectnet,
    read_real,
)
from harness.data.sources.listing import SPLITS, Source, is_utf8
from harness.data.sources.manifest import SUFFIXES, read_manifest
from harness.data.sources.tars import has_tars, read_webdataset
from harness.data.sources.torchvision_sets import read_torchvision
from harness.data.sources.videos import kinetics_files, read_kinetics, read_ssv2, ssv2_files
from harness.errors import NotFoundError, UserError

_GENERAL = {
    "idx": "train-images-idx3-ubyte[.gz] and its three companions",
    "webdataset": "SRC/*.tar or SRC/<split>/*.tar",
    "image-folder": "SRC/<class>/*.jpg or SRC/<split>/<class>/*.jpg",
    "manifest": f"a table with a column of paths ({', '.join(SUFFIXES)})",
}
ACCEPTED = (
    f"expected IDX files ({_GENERAL['idx']}), an image folder ({_GENERAL['image-folder']}),"
    f" webdataset shards ({_GENERAL['webdataset']}), {_GENERAL['manifest']}, `digits`, or a"
    " dataset's own folders (--layout)"
)
TORCHVISION = "torchvision:"


class Layout(NamedTuple):
    """The folders of one published dataset."""

    fits: Callable[[Path], object]
    """Something true if a folder looks like this."""
    read: Callable[[Path], Source]


PUBLISHED: dict[str, Layout] = {
    "imagenet-1k": Layout(is_imagenet, read_imagenet),
    "imagenet-real": Layout(lambda folder: (folder / "real.json").is_file(), read_real),
    "imagenet-v2": Layout(imagenet_v2_place, read_imagenet_v2),
    "objectnet": Layout(objectnet_place, read_objectnet),
    "inaturalist-2018": Layout(inaturalist_files, read_inaturalist),
    "food-101": Layout(food101_place, read_food101),
    "coco": Layout(coco_files, read_coco),
    "lvis": Layout(lvis_files, read_lvis),
    "kinetics-400": Layout(kinetics_files, read_kinetics),
    "something-something-v2": Layout(ssv2_files, read_ssv2),
}
LAYOUTS = ("auto", *_GENERAL, *PUBLISHED, f"{TORCHVISION}NAME")


def find_source(src: str, layout: str = "auto", split: str | None = None) -> Source:
    """What `src` holds, listed by the reader of its layout.

    `split`: of all samples, where the layout has no splits of its own. Raises NotFoundError or
    UserError that say what is accepted.
    """
    _check_layout(layout)
    source = _read(src, layout, split)
    source.splits = {name: source.splits[name] for name in SPLITS if name in source.splits}
    odd = [name for name in source.classes if not is_utf8(name)]
    if odd:
        raise UserError(f"{src}: the class {odd[0]!r} is not UTF-8; rename it")
    if not source.splits and not source.refused:
        raise UserError(f"{src}: nothing to pack was found in it; {ACCEPTED}")
    return source


def _read(src: str, layout: str, split: str | None) -> Source:
    if src == "digits" and layout == "auto" and not Path(src).exists():
        return _without_split("digits", split, read_digits)
    path = Path(src).expanduser()
    if path.is_file() and path.suffix.lower() in SUFFIXES and layout in ("auto", "manifest"):
        return read_manifest(path, split)
    if not path.is_dir() or layout == "manifest":
        if not path.exists() and (src in PUBLISHED or src.startswith(TORCHVISION)):
            raise NotFoundError(
                f"{src}: is a layout, not a folder; give the folder that holds it:"
                f" harness data pack FOLDER --layout {src}"
            )
        what = "does not exist"
        if path.exists():
            what = "is a folder, not a manifest" if path.is_dir() else "is a file"
        raise NotFoundError(f"{path}: {what}; {ACCEPTED}")
    if layout == "auto":
        layout = _fitting(path)
    if layout == "image-folder":
        return read_image_folder(path, split)
    if layout == "webdataset":
        return read_webdataset(path, split)
    if layout == "idx":
        return _without_split(layout, split, lambda: read_idx(path))
    if layout.startswith(TORCHVISION):
        name = layout.removeprefix(TORCHVISION)
        return _without_split(layout, split, lambda: read_torchvision(path, name))
    return _without_split(layout, split, lambda: PUBLISHED[layout].read(path))


def _check_layout(layout: str) -> None:
    if layout in LAYOUTS[:-1] or layout.startswith(TORCHVISION):
        return
    near = difflib.get_close_matches(layout, LAYOUTS, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise UserError(f"--layout {layout}: unknown; {hint}known: {', '.join(LAYOUTS)}")


def _fitting(folder: Path) -> str:
    """The one layout that a folder has; an image folder if it has none of the others."""
    found = [name for name, layout in PUBLISHED.items() if layout.fits(folder)]
    found += ["idx"] if idx_place(folder) is not None else []
    found += ["webdataset"] if has_tars(folder) else []
    if len(found) > 1:
        raise UserError(f"{folder}: could be {' or '.join(found)}; say which: --layout {found[0]}")
    return found[0] if found else "image-folder"


def _without_split(layout: str, split: str | None, read: Callable[[], Source]) -> Source:
    if split is not None:
        raise UserError(f"--split {split}: layout {layout} has splits of its own; leave it out")
    return read()
