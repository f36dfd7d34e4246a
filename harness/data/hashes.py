"""What tells images apart, for every image of a split: perceptual hashes and digests, cached."""

from __future__ import annotations

import hashlib
import io
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from harness.data.dataset import Split
from harness.data.phash import grey_reduction, hash_reductions
from harness.errors import DataError

_VERSION = 1
_CHUNK = 128
Progress = Callable[[int, int], None]
"""Called with the number of images decoded so far, and of all."""


@dataclass(frozen=True, eq=False)
class ImageHashes:
    """Of the n images of a split, in the order of its rows."""

    plain: np.ndarray
    """uint64 [n]: perceptual hash."""
    mirrored: np.ndarray
    """uint64 [n]: of the image flipped left to right."""
    clear_bits: np.ndarray
    """uint8 [n]: bits of the hash that rounding cannot have decided."""
    content: np.ndarray
    """uint64 [n]: of the stored bytes."""
    pixels: np.ndarray
    """uint64 [n]: of the decoded pixels."""


def image_hashes(split: Split, progress: Progress | None = None) -> ImageHashes:
    """Read from the cache, or made by decoding every image. Raises DataError for a damaged one."""
    path = split.cache / f"hashes-{split.name}-{_digest(split)}.safetensors"
    known = _read(path, split.num_samples)
    if known is not None:
        return known
    made = _make(split, progress or (lambda done, total: None))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    save_file({field.name: getattr(made, field.name) for field in fields(made)}, temporary)
    os.replace(temporary, path)
    return made


def reductions(split: Split, rows: np.ndarray) -> dict[int, np.ndarray]:
    """uint8 [32, 32] by row: small grey versions of some images."""
    with _pool() as pool:
        small = pool.map(lambda row: grey_reduction(_decoded(split, row, split.read(row))), rows)
        return dict(zip(rows.tolist(), small, strict=True))


def _digest(split: Split) -> str:
    """Stands for the rows and what is in them; the fingerprint does not tell their order."""
    digest = hashlib.sha256(f"{_VERSION}".encode())
    for column in (split.index.key_hashes, split.index.crcs, split.index.image_sizes):
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()[:16]


def _read(path: Path, num: int) -> ImageHashes | None:
    try:
        columns = load_file(path)
        found = ImageHashes(**columns)
    except (OSError, SafetensorError, TypeError, ValueError):
        return None  # absent or damaged: made again
    return found if all(len(column) == num for column in columns.values()) else None


def _make(split: Split, progress: Progress) -> ImageHashes:
    parts: list[ImageHashes] = []
    with _pool() as pool:
        for part in _ahead(pool, split):
            parts.append(part)
            progress(min(len(parts) * _CHUNK, split.num_samples), split.num_samples)
    return ImageHashes(
        *(np.concatenate([getattr(p, field.name) for p in parts]) for field in fields(ImageHashes))
    )


def _ahead(pool: ThreadPoolExecutor, split: Split) -> Iterator[ImageHashes]:
    starts = range(0, split.num_samples, _CHUNK)
    return pool.map(
        lambda start: _of_rows(split, range(start, min(start + _CHUNK, split.num_samples))), starts
    )


def _pool() -> ThreadPoolExecutor:
    # Decoding, reducing and hashing run outside of the interpreter's lock.
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="hash")


def _of_rows(split: Split, rows: range) -> ImageHashes:
    small: list[np.ndarray] = []
    digests = np.empty((2, len(rows)), dtype=np.uint64)
    for place, row in enumerate(rows):
        raw = split.read(row)
        image = _decoded(split, row, raw)
        small.append(grey_reduction(image))
        digests[0, place] = _first_bits(hashlib.sha256(raw))
        digests[1, place] = _first_bits(hashlib.sha256(f"{image.shape}".encode() + image.tobytes()))
    hashes = hash_reductions(np.stack(small))
    return ImageHashes(hashes.plain, hashes.mirrored, hashes.clear_bits, *digests)


def _first_bits(digest: hashlib._Hash) -> int:
    # 64 bits: among 1e9 x 1e5 images a wrong match is expected in 1 of 200,000 comparisons.
    return int.from_bytes(digest.digest()[:8], "big")


def _decoded(split: Split, row: int, raw: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(raw)) as picture:
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds for bytes that are no image
        raise DataError(f"{split.where(row)}: not a readable image ({error})") from None
