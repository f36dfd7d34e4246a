"""Images that come as bare pixels: IDX files (MNIST's format) and scikit-learn's digits."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from harness.data.sources.listing import Item, Source, is_test
from harness.errors import NotFoundError, UserError

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


def array_items(
    source: Source, split: str, keys: list[str], pixels: np.ndarray, labels: np.ndarray
) -> None:
    """Adds a split of images that are in memory: uint8 [n, H, W] or [n, H, W, 3]."""
    source.arrays[split] = pixels
    size = pixels[0].nbytes if len(pixels) else 0
    for row, (key, label) in enumerate(zip(keys, labels.tolist(), strict=True)):
        source.add(split, Item(key=key, file="", offset=row, size=size, class_id=int(label)))


def idx_place(folder: Path) -> Path | None:
    """The folder that holds the IDX files: this one, or one that torchvision made."""
    places = (folder, folder / "raw", *sorted(folder.glob("*/raw")))
    return next((p for p in places if _idx_file(p, "train-images-idx3-ubyte") is not None), None)


def read_idx(folder: Path) -> Source:
    """MNIST, Fashion-MNIST and their like: four files."""
    place = idx_place(folder)
    if place is None:
        raise NotFoundError(f"{folder}: no train-images-idx3-ubyte[.gz]; expected four IDX files")
    source = Source("idx", place)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = _read_idx(place, f"{prefix}-images-idx3-ubyte", 3)
        labels = _read_idx(place, f"{prefix}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise UserError(
                f"{place}: {prefix}: found {len(images)} images and {len(labels)} labels;"
                " expected as many of each; fetch the files again"
            )
        if not source.classes:
            is_fashion = labels[:10].tobytes() == _FASHION_FIRST
            names = [str(k) for k in range(int(labels.max(initial=0)) + 1)]
            source.classes = _FASHION if is_fashion else names
        source.image_size = images.shape[1]
        keys = [f"{split}-{row:06d}" for row in range(len(images))]
        array_items(source, split, keys, images, labels)
    return source


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


def read_digits() -> Source:
    """The 1,797 digits that come with scikit-learn, split by key."""
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    bunch: Any = load_digits()
    # Values are 0..16.
    pixels = (np.asarray(bunch.images) * 255 / 16).round().astype(np.uint8)
    labels = np.asarray(bunch.target)
    names = [str(name) for name in bunch.target_names]
    source = Source("digits", Path(), classes=names, image_size=8)
    keys = [f"digit-{place:06d}" for place in range(len(pixels))]
    is_held_out = np.array([is_test(key) for key in keys])
    for split, chosen in (("train", ~is_held_out), ("test", is_held_out)):
        rows = np.flatnonzero(chosen)
        array_items(source, split, [keys[row] for row in rows], pixels[rows], labels[rows])
    return source
