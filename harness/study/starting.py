"""Weights from elsewhere as a starting point: the value `checkpoint:PATH` of the axis `init`."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from harness.errors import NotFoundError

PREFIX = "checkpoint:"
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")


def is_checkpoint(init: str) -> bool:
    """Whether an init names a file of weights, or a folder of them."""
    return init.startswith(PREFIX)


def label_of(init: str) -> str:
    """An init as part of a name: 'checkpoint:../vit_b.safetensors' -> 'vit_b'."""
    return Path(init.removeprefix(PREFIX)).stem if is_checkpoint(init) else init


def find(init: str, bases: Sequence[Path]) -> Path:
    """The file or folder of `checkpoint:PATH`, looked for in `bases`. Raises NotFoundError."""
    wanted = Path(init.removeprefix(PREFIX)).expanduser()
    places = [wanted] if wanted.is_absolute() else [base / wanted for base in bases]
    for place in places:
        if place.exists():
            return place.resolve()
    looked = ", ".join(str(place) for place in dict.fromkeys(places))
    raise NotFoundError(f"no such file or folder of weights; looked for {looked}")


def content_hash(path: Path, beside: Sequence[str] = ()) -> str:
    """sha256 of a file of weights; of a folder, over its weights and config.json with their names.

    `beside`: patterns of further files of a folder that count. Raises NotFoundError for a folder
    without weights.
    """
    if not path.is_dir():
        return _hash_of(path, *_version(path))
    patterns = ("config.json", *beside)
    files = sorted(
        file
        for file in path.iterdir()
        if file.suffix in _WEIGHTS or any(fnmatch(file.name, pattern) for pattern in patterns)
    )
    if not any(file.suffix in _WEIGHTS for file in files):
        kinds = ", ".join(_WEIGHTS)
        raise NotFoundError(f"{path}: holds no weights; expected files that end in {kinds}")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{_hash_of(file, *_version(file))}\n".encode())
    return digest.hexdigest()


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@functools.cache
def _hash_of(path: Path, size: int, changed: int) -> str:
    """Once per process and version: every cell of a grid asks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
