"""Further test sets of the scenes' classes: what they hold, and that scenes stay as they are."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from harness.data import scene_variants
from harness.data.dataset import open_dataset
from harness.data.scenes import draw
from harness.data.shards import Sample
from harness.study.scene_variants_spec import SHIFTED_CLASSES
from harness.study.scenes_spec import CLASS_PAIRS, CLASSES, SHAPES

DRAW = {
    "scenes_real": scene_variants.real,
    "scenes_v2": scene_variants.v2,
    "scenes_shift": scene_variants.shift,
}


@pytest.mark.parametrize("name", DRAW)
def test_a_sample_does_not_depend_on_what_is_drawn_with_it(name: str) -> None:
    whole = list(DRAW[name]("test", 0, 75))
    parts: list[Sample] = []
    for first, num in ((0, 13), (13, 40), (53, 22)):
        parts += DRAW[name]("test", first, num)
    assert parts == whole
    assert len({sample.key for sample in whole}) == 75


def test_real_has_images_with_two_classes_one_and_none() -> None:
    counts = Counter(len(s.fields["classes"]) for s in scene_variants.real("test", 0, 2000))
    assert all(counts[num] > 100 for num in (0, 1, 2)) and set(counts) == {0, 1, 2}


def test_real_says_the_classes_of_both_objects() -> None:
    scenes = draw("test", 0, 500, scene_variants.REAL)
    assert scenes.second_ids is not None
    for place, sample in enumerate(scene_variants.real("test", 0, 500)):
        own = {int(scenes.class_ids[place]), int(scenes.second_ids[place])} - {-1}
        assert set(sample.fields["classes"]) == own


def test_v2_has_every_class_as_often_and_other_pixels_than_the_test_split() -> None:
    ours = list(scene_variants.v2("test", 0, 100))
    assert set(Counter(s.class_id for s in ours).values()) == {100 // len(CLASSES)}
    plain = draw("test", 0, 100)
    other = draw("test", 0, 100, scene_variants.V2)
    same = (plain.pixels == other.pixels).all(axis=(1, 2, 3))
    assert not same.any()
    assert np.array_equal(plain.class_ids, other.class_ids)


def test_shifted_names_are_synonyms_of_half_of_the_classes() -> None:
    assert len(SHIFTED_CLASSES) == len(CLASSES) // 2
    for other, name in SHIFTED_CLASSES:
        texture, shape = CLASS_PAIRS[CLASSES.index(name)]
        assert other == f"{texture} {SHAPES[shape][1].lstrip('#')}"
        assert other not in CLASSES


def test_shift_has_its_classes_as_often_as_each_other() -> None:
    counts = Counter(s.class_id for s in scene_variants.shift("test", 0, 200))
    assert counts == {place: 20 for place in range(len(SHIFTED_CLASSES))}


def test_the_sets_are_opened_by_name(tmp_path: Path) -> None:
    data = open_dataset("scenes_real-100", tmp_path)
    split = data.split("test")
    assert split.num_samples == 100 and data.meta.classes == list(CLASSES)
    for row in range(100):
        start, stop = split.label_offsets[row], split.label_offsets[row + 1]
        assert split.label_ids[start:stop].tolist() == split.fields(row)["classes"]
    shift = open_dataset("scenes_shift-100", tmp_path)
    assert shift.meta.classes == [name for name, _ in SHIFTED_CLASSES]


def test_looks_leave_the_plain_scenes_as_they_were() -> None:
    """The digest is of before looks existed: all finished runs rest on these pixels."""
    found = hashlib.sha256()
    for split in ("pretrain", "val", "train", "test"):
        scenes = draw(split, 0, 200)
        found.update(scenes.pixels.tobytes())
        found.update(json.dumps(scenes.hashtags).encode())
        found.update(scenes.class_ids.tobytes())
    assert found.hexdigest() == PLAIN


PLAIN = "d9659c84485945da252d233e8f7517d4fffada9b028e8c77bab31ea72f1cccf1"
