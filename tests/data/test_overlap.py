"""Leaks: planted duplicates are found, unrelated pictures are not, and the search is complete."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn
from sklearn.datasets import load_sample_images

from harness.data import near, overlap
from harness.data.dataset import Dataset, Split, open_dataset
from harness.data.hashes import image_hashes
from harness.data.near import MAX_DISTANCE, near_pairs, popcount
from harness.data.overlap import Overlap
from harness.data.pack import pack
from harness.data.phash import MIN_CLEAR_BITS, grey_reduction, hash_reductions
from tests.conftest import Harness

SIDE = 140
Change = Callable[[np.ndarray], np.ndarray]


def patches() -> list[np.ndarray]:
    """24 different pieces of two photographs that scikit-learn brings."""
    photos: Any = load_sample_images()
    return [
        np.ascontiguousarray(photo[y : y + SIDE, x : x + SIDE])
        for photo in photos.images
        for y in range(0, photo.shape[0] - SIDE + 1, SIDE)
        for x in range(0, photo.shape[1] - SIDE + 1, SIDE)
    ]


def make_split(folder: Path, images: list[np.ndarray], kind: str = "png") -> Split:
    """A packed split of these images."""
    (folder / "src" / "a").mkdir(parents=True)
    for place, image in enumerate(images):
        Image.fromarray(image).save(folder / "src" / "a" / f"{place:03d}.{kind}")
    pack(str(folder / "src"), folder / "set", split="test")
    return open_dataset(str(folder / "set"), folder.parent / "root").split("test")


def pairs_of(found: Overlap) -> dict[str, str]:
    """Key in B -> key in A of the pairs that count."""
    return {
        found.b.keys[b]: found.a.keys[a]
        for a, b in zip(found.rows_a[found.is_near], found.rows_b[found.is_near], strict=True)
    }


# --- the hash ------------------------------------------------------------------------------------


def test_the_hash_is_the_sign_of_the_lowest_cosines_about_their_median() -> None:
    grey = np.stack([grey_reduction(image) for image in patches()])
    low = np.asarray(dctn(grey.astype(float), axes=(1, 2)))[:, :8, :8] / 64
    low = low.reshape(-1, 64)
    bits = low > np.median(low, axis=1, keepdims=True)
    expected = [int("".join(str(int(bit)) for bit in row), 2) for row in bits]
    hashes = hash_reductions(grey)
    assert hashes.plain.tolist() == expected
    clear = (np.abs(low - np.median(low, axis=1, keepdims=True)) > 1).sum(axis=1)
    np.testing.assert_array_equal(hashes.clear_bits, clear)


def test_the_mirrored_hash_is_that_of_the_mirrored_picture() -> None:
    images = patches()
    hashes, flipped = (
        hash_reductions(np.stack([grey_reduction(np.ascontiguousarray(i)) for i in kind]))
        for kind in (images, [image[:, ::-1] for image in images])
    )
    np.testing.assert_array_equal(hashes.mirrored, flipped.plain)
    np.testing.assert_array_equal(hashes.plain, flipped.mirrored)


def test_plain_pictures_are_known_by_their_few_clear_bits() -> None:
    y, x = np.mgrid[:64, :64]
    plain = [
        np.zeros((64, 64)),
        np.full((64, 64), 200),
        4 * y,
        4 * x,
        200 * ((x - 31.5) ** 2 + (y - 31.5) ** 2 < 400),
    ]
    grey = [grey_reduction(np.repeat(p.astype(np.uint8)[..., None], 3, axis=2)) for p in plain]
    assert (hash_reductions(np.stack(grey)).clear_bits < MIN_CLEAR_BITS).all()
    photos = hash_reductions(np.stack([grey_reduction(image) for image in patches()]))
    assert (photos.clear_bits >= MIN_CLEAR_BITS).all()


# --- the search ----------------------------------------------------------------------------------


def codes(num: int, seed: int) -> np.ndarray:
    """Random codes, and crowds of them around a few: those of real images are not uniform."""
    rng = np.random.default_rng(seed)
    uniform = rng.integers(0, 2**64, num, dtype=np.uint64)
    centres = np.random.default_rng(0).integers(0, 2**64, 5, dtype=np.uint64)
    crowd = centres[rng.integers(0, 5, num)]
    for _ in range(7):
        crowd = crowd ^ (np.uint64(1) << rng.integers(0, 64, num).astype(np.uint64))
    return np.concatenate([uniform, crowd])


def test_popcount_counts_ones() -> None:
    values = [0, 1, 2**63, 2**64 - 1, *codes(100, 1).tolist()]
    assert popcount(np.array(values, np.uint64)).tolist() == [bin(v).count("1") for v in values]


@pytest.mark.parametrize("distance", range(MAX_DISTANCE + 1))
@pytest.mark.parametrize("chunk", [1 << 22, 97])
def test_the_search_finds_what_comparing_everything_finds_each_pair_once(
    distance: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near, "_CHUNK_PAIRS", chunk)
    monkeypatch.setattr(near, "_CHUNK_CODES", 10 * chunk)
    a, b = codes(400, 2), codes(60, 3)
    b[:20] = a[:20]
    everything = popcount(a[:, None] ^ b[None, :])
    expected = {
        (int(i), int(j)): int(everything[i, j]) for i, j in np.argwhere(everything <= distance)
    }
    found = [pair for part in near_pairs(a, b, distance) for pair in zip(*part, strict=True)]
    assert len(found) == len(expected)
    assert {(int(i), int(j)): int(d) for i, j, d in found} == expected
    assert len(expected) >= 20


def test_a_distance_that_the_bands_do_not_cover_is_refused(scenes: Dataset) -> None:
    with pytest.raises(ValueError, match="distance 12; expected 0 to 11"):
        next(near_pairs(codes(2, 0), codes(2, 1), 12))


def test_no_code_matches_none() -> None:
    none = np.zeros(0, np.uint64)
    assert [len(part[0]) for part in near_pairs(none, codes(5, 0), 3)] == []
    assert sum(len(part[0]) for part in near_pairs(codes(5, 0), none, 3)) == 0


# --- planted duplicates --------------------------------------------------------------------------


def resized(width: float, height: float) -> Change:
    def change(image: np.ndarray) -> np.ndarray:
        size = (round(image.shape[1] * width), round(image.shape[0] * height))
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))

    return change


def jpeg(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=50)
    return np.asarray(Image.open(file).convert("RGB"))


def grey(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))


def scaled(factor: float, shift: float) -> Change:
    return lambda image: np.clip(image.astype(float) * factor + shift, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return make_split(tmp_path_factory.mktemp("photos") / "a", patches())


@pytest.mark.parametrize(
    ("change", "least"),
    [
        (lambda image: image, 24),
        (resized(0.5, 0.5), 24),
        (resized(2, 2), 24),
        (lambda image: image[:, ::-1], 24),
        (grey, 24),
        # One of the patches is sky, in which little but noise is left to compare.
        (resized(1.5, 0.75), 23),
        (jpeg, 23),
        (lambda image: jpeg(resized(0.5, 0.5)(image)), 23),
        (scaled(0.8, 0), 23),
        (scaled(0.8, 25), 23),
        (scaled(1, 20), 23),
    ],
    ids="same half double mirrored grey squashed q50 half-q50 darker flatter brighter".split(),
)
def test_planted_duplicates_are_found(
    originals: Split, tmp_path: Path, change: Change, least: int
) -> None:
    planted = make_split(tmp_path / "b", [np.ascontiguousarray(change(i)) for i in patches()])
    pairs = pairs_of(overlap.overlap(originals, planted, 6, 0.9))
    assert all(ours == theirs for ours, theirs in pairs.items()), "each with its own original"
    assert len(pairs) >= least


def test_crops_of_a_tenth_are_not_covered(originals: Split, tmp_path: Path) -> None:
    planted = make_split(tmp_path / "b", [image[7:-7, 7:-7] for image in patches()])
    assert overlap.overlap(originals, planted, 6, 0.9).num_near < 12


def test_unrelated_photographs_are_not_flagged(originals: Split, tmp_path: Path) -> None:
    half = patches()[:12]
    a, b = make_split(tmp_path / "a", half[::2]), make_split(tmp_path / "b", half[1::2])
    found = overlap.overlap(a, b, 11, 0.0)
    assert found.num_near == 0 and len(found.rows_a) == 0


def test_scenes_alike_by_hash_are_told_apart_by_their_pixels(scenes: Dataset) -> None:
    found = overlap.overlap(scenes.split("pretrain"), scenes.split("test"), 6, 0.9)
    by_hash = found.images(~found.is_plain)
    assert found.num_near < by_hash / 2, "drawn shapes share hashes by chance"
    assert (found.same == 0).all()


def test_bytes_and_pixels_are_told_apart(tmp_path: Path) -> None:
    images = patches()[:6]
    a = make_split(tmp_path / "a", images)
    # A TIFF becomes a PNG of ours: other bytes, the same pixels.
    b = make_split(tmp_path / "b", images[:3], "tif")
    c = make_split(tmp_path / "c", images[3:])
    other, same = overlap.overlap(a, b, 0, 0.9), overlap.overlap(a, c, 0, 0.9)
    assert other.same.tolist() == [1, 1, 1] and same.same.tolist() == [2, 2, 2]
    assert other.as_json()["same_bytes"] == 0 and other.as_json()["same_pixels"] == 3
    assert other.share == 1.0 and set(other.similarities) == {1.0}


def test_blank_images_are_reported_apart_and_are_no_duplicates(tmp_path: Path) -> None:
    blank = [np.full((40, 40, 3), grey, np.uint8) for grey in (0, 90, 255)]
    a = make_split(tmp_path / "a", [*patches()[:2], *blank])
    b = make_split(tmp_path / "b", [*patches()[1:3], *blank[:1], blank[1] + np.uint8(1)])
    found = overlap.overlap(a, b, 11, 0.0)
    numbers = found.as_json()
    assert numbers["near_duplicates"] == 1 and numbers["share"] == 1 / 4
    assert (numbers["too_plain_a"], numbers["too_plain_b"]) == (3, 2)
    assert numbers["too_plain_b_same_pixels"] == 1
    assert any("too plain" in line for line in overlap.summary(found))


def test_a_crowd_of_equal_images_is_cut_to_the_closest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "PAIRS_PER_IMAGE", 3)
    monkeypatch.setattr(overlap, "_PRUNE_AT", 4)
    first, second = patches()[:2]
    crowd = [first, *[(first * (1 - k / 100)).astype(np.uint8) for k in range(1, 9)], second]
    a, b = make_split(tmp_path / "a", crowd), make_split(tmp_path / "b", [first, second])
    found = overlap.overlap(a, b, 6, 0.9)
    # The pair of equal bytes comes on top.
    assert found.num_near == 2 and np.bincount(found.rows_b).max() == 4
    assert found.same[0] == 2 and found.similarities.min() > 0.99


def test_hashes_are_kept_and_made_anew_when_the_images_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = make_split(tmp_path / "a", patches()[:5])
    first = image_hashes(split)
    with monkeypatch.context() as patch:
        patch.setattr(Split, "read", lambda self, row: pytest.fail("decoded again"))
        again = image_hashes(split)
    np.testing.assert_array_equal(again.plain, first.plain)
    np.testing.assert_array_equal(again.content, first.content)
    (file,) = split.cache.glob("hashes-*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    np.testing.assert_array_equal(image_hashes(split).pixels, first.pixels)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def two_sets(tmp_path: Path) -> None:
    images = patches()
    make_split(tmp_path / "a", images[:10])
    b = [images[9], images[0][:, ::-1], images[20], images[21]]
    make_split(tmp_path / "b", [np.ascontiguousarray(image) for image in b])


def test_pairs_are_written_with_the_places_of_both_images(
    harness: Harness, two_sets: None, tmp_path: Path
) -> None:
    split = ("--split-a", "test")
    done = harness(
        *("data", "overlap", "a/set", "b/set", *split, "--out", "x/p.csv", "--sheet", "x/p.png")
    )
    assert "near duplicates (distance <= 6, confirmed)" in done.stdout
    assert " 2   50.000%" in done.stdout
    rows = list(csv.DictReader((tmp_path / "x" / "p.csv").open()))
    assert ",".join(rows[0]) == overlap.COLUMNS
    assert [
        (r["near"], r["same"], r["distance"], r["mirrored"], r["key_b"], r["key_a"]) for r in rows
    ] == [
        ("yes", "bytes", "0", "no", "a/000_png", "a/009_png"),
        ("yes", "", "0", "yes", "a/001_png", "a/000_png"),
    ]
    for row in rows:
        stored = []
        for side in "ab":
            with open(row[f"shard_{side}"], "rb") as file:
                file.seek(int(row[f"offset_{side}"]))
                stored.append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
        ours, theirs = stored
        np.testing.assert_array_equal(ours, theirs[:, ::-1] if row["mirrored"] == "yes" else theirs)
    with Image.open(tmp_path / "x" / "p.png") as picture:
        assert picture.format == "PNG" and picture.width < picture.height


def test_a_share_above_the_bound_is_a_failure(here: Harness, two_sets: None) -> None:
    command = ("data", "overlap", "a/set", "b/set", "--split-a", "test", "--json")
    numbers = json.loads(here(*command, "--fail-above", "0.5").stdout)["splits"][0]
    assert numbers["near_duplicates"] == 2 and numbers["images_b"] == 4
    assert numbers["by_distance"]["0"] == 2
    done = here(*command, "--fail-above", "0.4", check=1)
    assert done.stderr == "more than 40.00% of a split are duplicates\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["a/set", "nowhere", "--split-a", "test"], 4, "nowhere': no"),
        (["a/set", "b/set", "--split-a", "dev"], 4, "no split 'dev'; it has: test"),
        (["a/set", "a/set", "--split-a", "test"], 2, "split test is compared with itself"),
        (["a/set", "b/set"], 2, "no split for 'pretrain'; it has: test"),
        (["a/set", "b/set", "--split-a", "test", "--sheet", "x.jpg"], 2, "x.jpg: expected a name"),
        (
            ["a/set", "b/set", "--split-a", "test", "--distance", "12"],
            2,
            "--distance 12: expected 0 to 11",
        ),
    ],
)
def test_mistakes_are_named(
    here: Harness, two_sets: None, arguments: list[str], code: int, message: str
) -> None:
    assert message in here("data", "overlap", *arguments, check=code).stderr
