"""The built-in set: drawn equal everywhere, labelled as its words say."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.data import ready
from harness.data.png import encode_png
from harness.data.scenes import GROUP, draw
from harness.study import scenes_spec as spec
from harness.study.builtin import builtin

# Pixels and labels of the first 8 images: a change of either needs a new scenes_spec.VERSION.
GOLDEN = {
    "pretrain": "45339e69d7ada04f",
    "val": "85a59e5e16356145",
    "train": "97678aababc394f5",
    "test": "32f788679519cec5",
}


def digest(split: str) -> str:
    scenes = draw(split, 0, 8)
    labels = repr((scenes.hashtags, scenes.class_ids.tolist())).encode()
    return hashlib.sha256(scenes.pixels.tobytes() + labels).hexdigest()[:16]


@pytest.mark.parametrize("split", spec.SPLITS)
def test_first_images_are_those_of_every_other_machine(split: str) -> None:
    assert digest(split) == GOLDEN[split], f"VERSION {spec.VERSION}: {split}: {digest(split)}"


def test_an_image_depends_on_its_index_only() -> None:
    whole = draw("pretrain", 0, 3 * GROUP)
    for start, num in ((0, 1), (5, 70), (GROUP - 1, 2), (2 * GROUP, GROUP)):
        part = draw("pretrain", start, num)
        np.testing.assert_array_equal(part.pixels, whole.pixels[start : start + num])
        assert part.hashtags == whole.hashtags[start : start + num]


def test_splits_show_different_images() -> None:
    firsts = [draw(split, 0, 4).pixels for split in spec.SPLITS]
    for a in range(4):
        for b in range(a):
            assert (firsts[a] != firsts[b]).mean() > 0.5


def test_weak_labels_are_few_long_tailed_and_from_the_vocabulary() -> None:
    scenes = draw("pretrain", 0, 4000)
    counts = Counter(tag for tags in scenes.hashtags for tag in tags)
    assert all(1 <= len(set(tags)) == len(tags) <= 5 for tags in scenes.hashtags)
    assert set(counts) == set(spec.HASHTAGS)
    ranked = [count for _, count in counts.most_common()]
    assert ranked[0] > 20 * ranked[-1]
    assert (scenes.class_ids == -1).all()


def test_clean_classes_are_balanced_and_none_is_a_hashtag() -> None:
    for split in ("train", "test"):
        scenes = draw(split, 0, 400)
        assert np.bincount(scenes.class_ids).tolist() == [400 // len(spec.CLASSES)] * len(
            spec.CLASSES
        )
        assert scenes.hashtags == [[]] * 400
    words = {tag.lstrip("#") for tag in spec.HASHTAGS}
    for texture, shape in spec.CLASS_PAIRS:
        assert texture + shape not in words and shape + texture not in words


def test_shards_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ready, "SHARD_IMAGES", 50)
    scenes = builtin("scenes-120")
    assert scenes is not None
    one = ready.make(tmp_path / "one", scenes, processes=1)
    tasks = ready._tasks(scenes)
    for rank in (2, 0, 1):  # what three processes do, in any order
        ready._draw_share(tmp_path / "three", scenes, rank, 3)
    for split, entries in one.shards.items():
        for entry in entries:
            other = (tmp_path / "three" / str(entry["file"])).read_bytes()
            assert other == (tmp_path / "one" / str(entry["file"])).read_bytes(), split
    assert len(tasks) == sum(len(entries) for entries in one.shards.values())


@pytest.mark.parametrize("side", [1, 8, 32, 200])
def test_png_reads_back_what_was_written(side: int) -> None:
    pixels = np.random.default_rng(side).integers(0, 256, (side, side + 3, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(encode_png(pixels))) as picture:
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture), pixels)
