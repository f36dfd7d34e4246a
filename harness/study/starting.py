"""Weights from elsewhere as a starting point: the value `checkpoint:PATH` of the axis `init`."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from harness.errors import NotFoundError, UserError

PREFIX = "checkpoint:"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
"""Of files of weights that can be read."""
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "weights.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Of a folder of weights, the first that is there is read."""
_WEIGHTS = (*SUFFIXES, ".ckpt")  # What counts in the hash of a folder, which is part of old ids.
# Names of the tensor that turns patches into tokens, [width, 3, patch, patch].
_PATCHES = ("patch_embed.proj.weight", "patch_embeddings.projection.weight")


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


def check_file(path: Path, width: int) -> None:
    """Raises UserError for what no encoder of this width can start from, as far as the name and the
    header of a safetensors file tell. Reading the weights finds the rest."""
    if path.is_dir():
        names = {file.name for file in path.iterdir() if file.suffix in _WEIGHTS}
        if names and not any((path / name).is_file() for name in FOLDER_FILES):
            raise UserError(
                f"{path}: holds {min(names)}, expected one of {', '.join(FOLDER_FILES)}; give the"
                " file itself"
            )
        return
    if path.name.endswith(".index.json"):
        raise UserError(f"{path}: names the files beside it; give their folder: {path.parent}")
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{path}: not a file of weights; expected a name that ends in {', '.join(SUFFIXES)}"
        )
    if path.suffix != ".safetensors":
        return
    for name, entry in _header_of(path, *_version(path)).items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if name.endswith(_PATCHES) and shape and shape[0] != width:
            raise UserError(f"{path}: width is {shape[0]}, the model has {width}")


@functools.cache
def _header_of(path: Path, size: int, changed: int) -> dict[str, object]:
    """https://huggingface.co/docs/safetensors: length of the header, header, tensors."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, size)))
        if not isinstance(header, dict):
            raise ValueError
    except ValueError:
        raise UserError(f"{path}: cannot be read as safetensors; copy it again") from None
    return header


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
