"""Datasets that torchvision knows and that lie on disk in its layout. Nothing is downloaded."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from harness.data.sources.arrays import array_items, read_idx
from harness.data.sources.folders import read_food101
from harness.data.sources.listing import (
    Source,
    all_items,
    file_item,
    find_file,
    is_test,
    key_of,
    usual_side,
)
from harness.errors import UserError

_TRAIN_TEST = {"train": {"train": True}, "test": {"train": False}}


def _splits(train: str, *test: str) -> dict[str, dict[str, Any]]:
    return {"train": {"split": train}} | {role: {"split": role} for role in test}


SETS: dict[str, dict[str, dict[str, Any]]] = {
    "CIFAR10": _TRAIN_TEST,
    "CIFAR100": _TRAIN_TEST,
    "Country211": {**_splits("train", "test"), "val": {"split": "valid"}},
    "DTD": _splits("train", "val", "test"),
    "EuroSAT": {"": {}},
    "FGVCAircraft": _splits("train", "val", "test"),
    "Flowers102": _splits("train", "val", "test"),
    "GTSRB": _splits("train", "test"),
    "OxfordIIITPet": _splits("trainval", "test"),
    "RenderedSST2": _splits("train", "val", "test"),
    "STL10": {**_splits("train", "test"), "pretrain": {"split": "unlabeled"}},
    "SUN397": {"": {}},
    "SVHN": _splits("train", "test"),
    "StanfordCars": _splits("train", "test"),
    "USPS": _TRAIN_TEST,
}
"""What to pass for each of our splits; "" where the set has none and is split by key."""
_OWN: dict[str, Callable[[Path], Source]] = {
    "Food101": read_food101,
    "MNIST": lambda folder: read_idx(folder / "MNIST"),
    "FashionMNIST": lambda folder: read_idx(folder / "FashionMNIST"),
    "KMNIST": lambda folder: read_idx(folder / "KMNIST"),
}
"""Sets that have readers of their own."""


def known_sets() -> list[str]:
    """Names that `torchvision:NAME` takes."""
    return sorted((*SETS, *_OWN))


def read_torchvision(folder: Path, name: str) -> Source:
    """A set below `folder`, which is what torchvision calls its root.

    Raises UserError if the name is unknown or torchvision finds the files absent or damaged.
    """
    if name not in known_sets():
        by_lower = {known.lower(): known for known in known_sets()}
        near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
        hint = f"did you mean torchvision:{by_lower[near[0]]}? " if near else ""
        raise UserError(f"torchvision:{name}: unknown; {hint}known: {', '.join(known_sets())}")
    if name in _OWN:
        return _OWN[name](folder)
    from torchvision import datasets  # imports torch, and is only needed here

    source = Source(f"torchvision:{name}", folder)
    for split, options in SETS[name].items():
        try:
            made: Any = getattr(datasets, name)(str(folder), download=False, **options)
        except (RuntimeError, OSError, ValueError) as error:
            text = str(error).splitlines()[0].split(" You can use")[0]
            raise UserError(f"{folder}: torchvision's {name}: {text}") from None
        _add(source, made, split)
    _name_classes(source)
    if not source.arrays:
        source.image_size = usual_side(source, all_items(source))
    return source


def _add(source: Source, made: Any, split: str) -> None:
    source.classes = source.classes or [str(name) for name in getattr(made, "classes", [])]
    if hasattr(made, "data"):
        pixels = np.asarray(made.data)
        if pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.shape[3] != 3:
            pixels = pixels.transpose(0, 2, 3, 1)
        labels = np.asarray(made.labels if hasattr(made, "labels") else made.targets)
        keys = [f"{split}-{row:06d}" for row in range(len(pixels))]
        array_items(source, split, keys, np.ascontiguousarray(pixels), labels)
        source.image_size = pixels.shape[1]
        return
    for path, label in sorted(_paths_and_labels(made), key=lambda pair: str(pair[0])):
        name = Path(os.path.relpath(path, source.base)).as_posix()
        file = find_file(source, name)
        if file is None:
            source.refuse(name, "torchvision lists it, but there is no such file")
            continue
        key = key_of(name)
        of_split = split or ("test" if is_test(key) else "train")
        source.add(of_split, file_item(file, key, int(label)))


def _paths_and_labels(made: Any) -> list[tuple[Any, int]]:
    # torchvision has no common name for them.
    for name in ("samples", "_samples"):
        if hasattr(made, name):
            return list(getattr(made, name))
    files = made._images if hasattr(made, "_images") else made._image_files
    return list(zip(files, made._labels, strict=True))


def _name_classes(source: Source) -> None:
    """Numbers for the classes of sets that do not name them."""
    largest = max((item.class_id for item in all_items(source)), default=-1)
    if len(source.classes) <= largest:
        source.classes = [str(k) for k in range(largest + 1)]
