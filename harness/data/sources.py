"""Readers of the formats that `harness data pack` takes: each gives samples split by split."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from harness.data.hashing import key_hash
from harness.data.png import encode_png
from harness.data.shards import IMAGE_TYPES, Sample, list_shard
from harness.errors import DataError, NotFoundError, UserError

ACCEPTED = (
    "expected IDX files (train-images-idx3-ubyte[.gz] and its three companions),"
    " an image folder (SRC/<class>/*.jpg or SRC/<split>/<class>/*.jpg),"
    " webdataset shards (SRC/*.tar or SRC/<split>/*.tar), or `digits`"
)
SPLITS = ("pretrain", "val", "train", "test")
_SPLIT_NAMES = {name: name for name in SPLITS} | {"validation": "val", "valid": "val"}
TEST_SHARE = 5
"""One in this many samples is a test sample where the source has no splits."""
_IMAGE_FILES = {f".{kind}" for kind in IMAGE_TYPES} | {".bmp", ".gif", ".tif", ".tiff", ".ppm"}
_FASHION = [
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]
# MNIST and Fashion-MNIST have the same file names; the first labels tell them apart.
_FASHION_FIRST = bytes([9, 0, 0, 3, 0, 2, 7, 2, 5, 5])


@dataclass(frozen=True)
class Refused:
    """A file that is not in the packed set, and why."""

    name: str
    reason: str


@dataclass
class Source:
    """What a reader found. `splits` is read once, in order; `refused` grows meanwhile."""

    splits: dict[str, Iterable[Sample]]
    classes: list[str]
    image_size: int
    refused: list[Refused] = field(default_factory=list)


def find_source(src: str) -> Source:
    """The reader for `src`. Raises NotFoundError or UserError that say what is accepted."""
    if src == "digits" and not Path(src).exists():
        return _digits()
    folder = Path(src).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise NotFoundError(f"{folder}: {what}; {ACCEPTED}")
    for place in (folder, folder / "raw", *sorted(folder.glob("*/raw"))):
        if _idx_file(place, "train-images-idx3-ubyte") is not None:
            return _idx(place)
    if any(folder.glob("*.tar")) or any(folder.glob("*/*.tar")):
        return _webdataset(folder)
    source = _image_folder(folder)
    if source is None:
        raise UserError(f"{folder}: nothing to pack was found in it; {ACCEPTED}")
    return source


def _is_test(key: str) -> bool:
    return key_hash(key) % TEST_SHARE == 0


# --- IDX ---------------------------------------------------------------------------------------


def _idx(folder: Path) -> Source:
    splits: dict[str, Iterable[Sample]] = {}
    classes: list[str] = []
    side = 0
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", 3)
        labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise UserError(
                f"{folder}: {prefix}: found {len(images)} images and {len(labels)} labels;"
                " expected as many of each; fetch the files again"
            )
        if not classes:
            is_fashion = labels[:10].tobytes() == _FASHION_FIRST
            classes = _FASHION if is_fashion else [str(k) for k in range(int(labels.max()) + 1)]
        side = images.shape[1]
        splits[split] = _grey_samples(split, images, labels)
    return Source(splits, classes, side)


def _grey_samples(split: str, images: np.ndarray, labels: np.ndarray) -> Iterator[Sample]:
    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield Sample(
            key=f"{split}-{place:06d}",
            image=encode_png(np.repeat(image[:, :, None], 3, axis=2)),
            image_type="png",
            class_id=int(label),
        )


def _idx_file(folder: Path, name: str) -> Path | None:
    # torchvision and some mirrors write "idx3.ubyte" or drop the .gz.
    names = (name, f"{name}.gz", name.replace("-idx", ".idx"), f"{name.replace('-idx', '.idx')}.gz")
    return next((folder / found for found in names if (folder / found).is_file()), None)


def _read_idx(folder: Path, name: str, dims: int) -> np.ndarray:
    """uint8 array of an IDX file (http://yann.lecun.com/exdb/mnist: big-endian header, data)."""
    path = _idx_file(folder, name)
    if path is None:
        raise NotFoundError(f"{folder}: no {name}[.gz]; expected the four IDX files together")
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: not a whole gzip file ({error}); fetch it again") from None
    header = 4 + 4 * dims
    if len(raw) < header or raw[:4] != bytes([0, 0, 8, dims]):
        raise UserError(
            f"{path}: not an IDX file of unsigned bytes in {dims} dimensions: it begins with"
            f" {raw[:4].hex() or 'nothing'}, expected {bytes([0, 0, 8, dims]).hex()}"
        )
    shape = struct.unpack(f">{dims}I", raw[4:header])
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(raw) != expected:
        raise UserError(
            f"{path}: found {len(raw)} bytes, expected {expected} for {shape}; fetch it again"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


# --- scikit-learn's digits ---------------------------------------------------------------------


def _digits() -> Source:
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    bunch: Any = load_digits()
    # Values are 0..16.
    pixels = (np.asarray(bunch.images) * 255 / 16).round().astype(np.uint8)
    labels = np.asarray(bunch.target).astype(np.uint8)
    keys = [f"digit-{place:06d}" for place in range(len(pixels))]
    split_of = ["test" if _is_test(key) else "train" for key in keys]

    def samples(split: str) -> Iterator[Sample]:
        for key, of_split, image, label in zip(keys, split_of, pixels, labels, strict=True):
            if of_split == split:
                grey = np.repeat(image[:, :, None], 3, axis=2)
                yield Sample(key=key, image=encode_png(grey), image_type="png", class_id=int(label))

    names = [str(name) for name in bunch.target_names]
    return Source({"train": samples("train"), "test": samples("test")}, names, 8)


# --- image folders -----------------------------------------------------------------------------


def _image_folder(folder: Path) -> Source | None:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part[0] == "." for part in path.relative_to(folder).parts)
    )
    known: list[tuple[str, str, Path]] = []
    refused: list[Refused] = []
    top = {path.relative_to(folder).parts[0] for path in files if path.parent != folder}
    has_splits = bool(top) and all(name.lower() in _SPLIT_NAMES for name in top)
    for path in files:
        relative = path.relative_to(folder)
        name = relative.as_posix()
        if path.suffix.lower() not in _IMAGE_FILES:
            refused.append(Refused(name, f"not an image type: '{path.suffix or 'no suffix'}'"))
        elif len(relative.parts) < 2 + has_splits:
            refused.append(Refused(name, "not in a folder named after its class"))
        elif has_splits:
            known.append((_SPLIT_NAMES[relative.parts[0].lower()], relative.parts[1], path))
        else:
            known.append(("test" if _is_test(name) else "train", relative.parts[0], path))
    if not known:
        return None
    classes = sorted({label for _, label, _ in known})
    named = {split for split, _, _ in known}
    # ImageNet's layout: what it calls val is the labelled test set.
    if "val" in named and "test" not in named:
        known = [("test" if split == "val" else split, name, path) for split, name, path in known]
    source = Source({}, classes, 0, refused)
    source.image_size = _usual_side([path for _, _, path in known])
    for split in dict.fromkeys(("train", "test", *(split for split, _, _ in known))):
        chosen = [(label, path) for of_split, label, path in known if of_split == split]
        if chosen:
            source.splits[split] = _file_samples(source, folder, chosen)
    return source


def _usual_side(paths: list[Path]) -> int:
    """Median of the shorter sides of some images, from their headers."""
    sides: list[int] = []
    for path in paths[:: max(1, len(paths) // 200)]:
        try:
            with Image.open(path) as picture:
                sides.append(min(picture.size))
        except Exception:
            continue  # refused with its reason when its turn comes
    return int(np.median(sides)) if sides else 1


def _file_samples(source: Source, folder: Path, chosen: list[tuple[str, Path]]) -> Iterator[Sample]:
    for label, path in chosen:
        name = path.relative_to(folder).as_posix()
        try:
            image, kind = _stored(path.read_bytes())
        except Exception as error:  # Pillow raises many kinds for files that are no image
            source.refused.append(Refused(name, f"not a readable image: {error}"))
            continue
        # webdataset cuts keys at the first dot and takes "/" for folders.
        key = name.rsplit(".", 1)[0].replace(".", "_") + path.suffix.lower().replace(".", "_")
        yield Sample(key=key, image=image, image_type=kind, class_id=source.classes.index(label))


def _stored(raw: bytes) -> tuple[bytes, str]:
    """The bytes to store and their type: as they are where a shard can hold them."""
    with Image.open(io.BytesIO(raw)) as picture:
        picture.load()
        kinds = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
        kind = kinds.get(picture.format or "")
        if kind is not None:
            return raw, kind
        return encode_png(np.asarray(picture.convert("RGB"))), "png"


# --- shards that webdataset wrote --------------------------------------------------------------


def _webdataset(folder: Path) -> Source:
    by_split: dict[str, list[Path]] = {}
    for path in sorted({*folder.glob("*.tar"), *folder.glob("*/*.tar")}):
        name = (path.parent.name if path.parent != folder else path.name).lower()
        split = next((to for word, to in _SPLIT_NAMES.items() if name.startswith(word)), "")
        by_split.setdefault(split, []).append(path)
    unnamed = by_split.pop("", [])
    if unnamed and by_split:
        raise UserError(
            f"{unnamed[0]}: belongs to no split; expected files or folders named"
            f" {', '.join(SPLITS)}"
        )
    try:
        listed = {
            path: list_shard(path) for paths in (*by_split.values(), unnamed) for path in paths
        }
    except DataError as error:
        raise UserError(str(error)) from None
    found = {sample.cls for part in listed.values() for sample in part if sample.cls is not None}
    if all(name.isdecimal() for name in found):
        classes = [str(k) for k in range(1 + max(map(int, found)))] if found else []
    else:
        classes = sorted(found)
    place = {name: k for k, name in enumerate(classes)}

    def samples(paths: list[Path], part: bool | None) -> Iterator[Sample]:
        for path in paths:
            with open(path, "rb") as file:
                for sample in listed[path]:
                    if part is not None and _is_test(sample.key) != part:
                        continue
                    file.seek(sample.offset)
                    raw = file.read(sample.size)
                    try:
                        image, kind = _stored(raw)
                    except Exception as error:  # as for image folders
                        name = f"{path.name}: byte offset {sample.offset}: {sample.key}"
                        source.refused.append(Refused(name, f"not a readable image: {error}"))
                        continue
                    yield Sample(
                        key=sample.key,
                        image=image,
                        image_type=kind,
                        hashtags=list(sample.hashtags) or None,
                        class_id=None if sample.cls is None else place[sample.cls],
                    )

    source = Source({}, classes, 1)
    for split, paths in by_split.items():
        source.splits[split] = samples(paths, None)
    if unnamed:
        held_out = ("train", "test") if classes else ("pretrain", "val")
        for split, part in zip(held_out, (False, True), strict=True):
            source.splits[split] = samples(unnamed, part)
    for path, part in listed.items():
        if part:
            with open(path, "rb") as file:
                file.seek(part[0].offset)
                with Image.open(io.BytesIO(file.read(part[0].size))) as picture:
                    source.image_size = min(picture.size)
            break
    return source
