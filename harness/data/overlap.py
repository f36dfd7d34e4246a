"""`harness data overlap`: which evaluation images are also among the pretraining images.

Three kinds of the same: stored bytes, decoded pixels, and near duplicates. These are found by a
perceptual hash and its mirror image, completely up to the stated distance, and confirmed by the
correlation of the two grey pictures, since plain or procedural images share hashes by chance.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.data.dataset import Split
from harness.data.hashes import ImageHashes, Progress, image_hashes, reductions
from harness.data.near import MAX_DISTANCE, near_pairs
from harness.data.phash import MIN_CLEAR_BITS
from harness.errors import UserError
from harness.ledger.files import write_bytes

PAIRS_PER_IMAGE = 20
"""Of an evaluation image, the closest: one is enough to tell that it is known."""
_PRUNE_AT = 4 << 20
COLUMNS = (
    "near,same,distance,mirrored,similarity,"
    "split_b,key_b,shard_b,offset_b,split_a,key_a,shard_a,offset_a"
)


@dataclass(frozen=True, eq=False)
class Overlap:
    """Pairs of an image of B (evaluation) and one of A (pretraining), the most alike first."""

    a: Split
    b: Split
    distance: int
    similarity: float
    rows_a: np.ndarray
    """int64 [p]."""
    rows_b: np.ndarray
    """int64 [p]."""
    distances: np.ndarray
    """uint8 [p]: bits by which the hashes differ."""
    is_mirrored: np.ndarray
    """bool [p]: the image of B flipped left to right is what is like the image of A."""
    similarities: np.ndarray
    """float64 [p]: correlation of the grey 32 x 32 reductions."""
    same: np.ndarray
    """uint8 [p]: 2 the same bytes, 1 the same pixels, 0 neither."""
    is_plain: np.ndarray
    """bool [p]: the image of B is too plain to be compared by its hash."""
    plain_a: int
    """Images of A that are too plain to be compared by their hash."""
    plain_b: int

    @property
    def is_near(self) -> np.ndarray:
        """bool [p]: the pairs that count as duplicates, which blank images never are."""
        return ~self.is_plain & ((self.same > 0) | (self.similarities >= self.similarity))

    def images(self, chosen: np.ndarray) -> int:
        """Images of B in some of the pairs."""
        return len(np.unique(self.rows_b[chosen]))

    @property
    def num_near(self) -> int:
        """Images of B that have a duplicate, of any kind, in A."""
        return self.images(self.is_near)

    @property
    def share(self) -> float:
        """Of the images of B."""
        return self.num_near / self.b.num_samples

    def by_distance(self, chosen: np.ndarray) -> dict[int, int]:
        """Images of B by the smallest distance in some of the pairs."""
        smallest = np.full(self.b.num_samples, MAX_DISTANCE + 1)
        np.minimum.at(smallest, self.rows_b[chosen], self.distances[chosen])
        counts = np.bincount(smallest, minlength=MAX_DISTANCE + 2)[: self.distance + 1]
        return dict(enumerate(counts.tolist()))

    def as_json(self) -> dict[str, object]:
        """The numbers, without the pairs."""
        everything = ~self.is_plain
        return {
            "split_a": self.a.name,
            "split_b": self.b.name,
            "images_a": self.a.num_samples,
            "images_b": self.b.num_samples,
            "distance": self.distance,
            "similarity": self.similarity,
            "same_bytes": self.images(~self.is_plain & (self.same == 2)),
            "same_pixels": self.images(~self.is_plain & (self.same > 0)),
            "near_duplicates": self.num_near,
            "share": self.share,
            "alike_by_hash": self.images(everything),
            "by_distance": self.by_distance(self.is_near),
            "by_distance_of_hash": self.by_distance(everything),
            "too_plain_a": self.plain_a,
            "too_plain_b": self.plain_b,
            "too_plain_b_same_pixels": self.images(self.is_plain),
        }


def overlap(
    a: Split, b: Split, distance: int, similarity: float, progress: Progress | None = None
) -> Overlap:
    """Images of `b` that are also in `a`.

    Complete for images that are not too plain and whose hashes differ in at most `distance` bits.
    Raises UserError for a distance that the search does not cover.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise UserError(f"--distance {distance}: expected 0 to {MAX_DISTANCE}, of 64 bits")
    of_a, of_b = image_hashes(a, progress), image_hashes(b, progress)
    rows_a, rows_b, distances, is_mirrored = _joined(
        _exact(of_a, of_b), _alike(of_a, of_b, distance)
    )
    same = (of_a.pixels[rows_a] == of_b.pixels[rows_b]).astype(np.uint8)
    same[of_a.content[rows_a] == of_b.content[rows_b]] = 2
    similarities = _similarities(a, b, rows_a, rows_b, is_mirrored, same)
    order = np.lexsort((rows_a, rows_b, distances, -similarities, -same.astype(np.int64)))
    return Overlap(
        a,
        b,
        distance,
        similarity,
        rows_a[order],
        rows_b[order],
        distances[order],
        is_mirrored[order],
        similarities[order],
        same[order],
        (of_b.clear_bits < MIN_CLEAR_BITS)[rows_b[order]],
        int((of_a.clear_bits < MIN_CLEAR_BITS).sum()),
        int((of_b.clear_bits < MIN_CLEAR_BITS).sum()),
    )


_Found = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Rows of A, rows of B, distances, whether mirrored."""


def _alike(of_a: ImageHashes, of_b: ImageHashes, distance: int) -> _Found:
    """Pairs within the distance, of each image of B the closest."""
    clear_a = np.flatnonzero(of_a.clear_bits >= MIN_CLEAR_BITS)
    clear_b = np.flatnonzero(of_b.clear_bits >= MIN_CLEAR_BITS)
    # Equal hashes are searched for once; of a crowd of equal images the first ones are enough.
    codes, group_of = np.unique(of_a.plain[clear_a], return_inverse=True)
    members = clear_a[np.argsort(group_of, kind="stable")]
    sizes = np.bincount(group_of, minlength=len(codes))
    firsts = np.cumsum(sizes) - sizes
    sizes = np.minimum(sizes, PAIRS_PER_IMAGE)
    queries = np.concatenate([of_b.plain[clear_b], of_b.mirrored[clear_b]])
    found = _none()
    for code, query, differ in near_pairs(codes, queries, distance):
        many = sizes[code]
        ends = np.cumsum(many)
        ramp = np.arange(many.sum()) - np.repeat(ends - many, many)
        part = (
            members[np.repeat(firsts[code], many) + ramp],
            np.repeat(clear_b[query % len(clear_b)], many),
            np.repeat(differ, many),
            np.repeat(query >= len(clear_b), many),
        )
        found = _joined(found, part)
        if len(found[0]) > _PRUNE_AT:
            found = _closest(found)
    return _closest(found)


def _exact(of_a: ImageHashes, of_b: ImageHashes) -> _Found:
    """One pair for every image of B whose bytes or pixels are in A, however plain it is."""
    found = _none()
    for digests_a, digests_b in ((of_a.content, of_b.content), (of_a.pixels, of_b.pixels)):
        order = np.argsort(digests_a, kind="stable")
        place = np.searchsorted(digests_a, digests_b, sorter=order)
        rows_a = order[np.minimum(place, len(order) - 1)]
        rows_b = np.flatnonzero(digests_a[rows_a] == digests_b)
        zeros = np.zeros(len(rows_b), dtype=np.uint8)
        found = _joined(found, (rows_a[rows_b], rows_b, zeros, zeros.astype(bool)))
    return found


def _none() -> _Found:
    rows = np.zeros(0, dtype=np.int64)
    return rows, rows, np.zeros(0, dtype=np.uint8), np.zeros(0, dtype=bool)


def _joined(one: _Found, other: _Found) -> _Found:
    """Both, each pair of images once: at its smallest distance, not mirrored if that is as good."""
    a, b, distances, mirrored = (np.concatenate(both) for both in zip(one, other, strict=True))
    order = np.lexsort((mirrored, distances, a, b))
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = (np.diff(a[order]) != 0) | (np.diff(b[order]) != 0)
    order = order[is_new]
    return a[order], b[order], distances[order], mirrored[order]


def _closest(found: _Found) -> _Found:
    rows_a, rows_b, distances, _ = found
    order = np.lexsort((rows_a, distances, rows_b))
    ordered = rows_b[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    order = order[rank < PAIRS_PER_IMAGE]
    return tuple(column[order] for column in found)  # type: ignore[return-value]  # of four


def _similarities(
    a: Split,
    b: Split,
    rows_a: np.ndarray,
    rows_b: np.ndarray,
    is_mirrored: np.ndarray,
    same: np.ndarray,
) -> np.ndarray:
    similar = np.ones(len(rows_a))
    unsure = np.flatnonzero(same == 0)
    small_a = reductions(a, np.unique(rows_a[unsure]))
    small_b = reductions(b, np.unique(rows_b[unsure]))
    for place in unsure.tolist():
        of_a, of_b = small_a[int(rows_a[place])], small_b[int(rows_b[place])]
        similar[place] = _correlation(of_a, of_b[:, ::-1] if is_mirrored[place] else of_b)
    return similar


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's; brightness and contrast do not change it. 0 if one is flat."""
    one, other = one - one.mean(), other - other.mean()
    scale = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / scale) if scale else 0.0


# --- what is written -----------------------------------------------------------------------------


def write_pairs(path: Path, found: list[Overlap]) -> int:
    """CSV of all pairs that the hash or the bytes bring together; their number."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS.split(","))
    rows = [row for part in found for row in _csv_rows(part)]
    writer.writerows(rows)
    write_bytes(path, file.getvalue().encode())
    return len(rows)


def _csv_rows(found: Overlap) -> Iterator[tuple[object, ...]]:
    is_near = found.is_near
    for place, (row_a, row_b) in enumerate(zip(found.rows_a, found.rows_b, strict=True)):
        yield (
            "yes" if is_near[place] else "no",
            ("", "pixels", "bytes")[found.same[place]],
            found.distances[place],
            "yes" if found.is_mirrored[place] else "no",
            f"{found.similarities[place]:.4f}",
            *_place(found.b, int(row_b)),
            *_place(found.a, int(row_a)),
        )


def _place(split: Split, row: int) -> tuple[str, str, str, int]:
    return (split.name, split.keys[row], *split.place(row))


def summary(found: Overlap) -> list[str]:
    """A few lines for the command line."""
    numbers = found.as_json()
    total = found.b.num_samples
    lines = [f"{found.b.name} ({total} images) against {found.a.name} ({found.a.num_samples}):"]
    for name, what in (
        ("near_duplicates", f"near duplicates (distance <= {found.distance}, confirmed)"),
        ("same_bytes", "of these with the same bytes"),
        ("same_pixels", "of these with the same pixels"),
        ("alike_by_hash", "alike by hash, confirmed or not"),
    ):
        count = int(str(numbers[name]))
        lines.append(f"  {what:<46}{count:>8}  {count / total:8.3%}")
    near = found.by_distance(found.is_near)
    shown = "  ".join(f"{distance}: {count}" for distance, count in near.items() if count)
    lines.append(f"  near duplicates by distance: {shown or 'none'}")
    if found.plain_a or found.plain_b:
        lines.append(
            f"  too plain to be compared by hash: {found.plain_b} of {found.b.name} (of which"
            f" {found.images(found.is_plain)} have the same pixels as an image of {found.a.name}),"
            f" {found.plain_a} of {found.a.name}"
        )
    return lines
