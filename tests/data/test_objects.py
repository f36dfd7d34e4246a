"""The set of objects with boxes and masks: its bytes, and that annotations say what is seen."""

import hashlib
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from harness.data import objects
from harness.data.dataset import open_dataset
from harness.data.outlines import mask_of
from harness.study import objects_spec as spec

DIGEST = "7c336c7295130141"


def test_the_bytes_are_those_of_every_machine() -> None:
    drawn = objects.draw("train", 7, 40)
    digest = hashlib.sha256(drawn.pixels.tobytes() + drawn.masks.tobytes()).hexdigest()
    assert digest[:16] == DIGEST, "raise objects_spec.VERSION with a change of pixels"


def test_an_image_does_not_depend_on_what_is_drawn_with_it() -> None:
    many = objects.draw("test", 0, 70)
    for place in (0, 31, 32, 69):
        alone = objects.draw("test", place, 1)
        np.testing.assert_array_equal(alone.pixels[0], many.pixels[place])
        np.testing.assert_array_equal(alone.masks[0], many.masks[place])
    assert not np.array_equal(many.pixels[0], objects.draw("train", 0, 1).pixels[0])


def test_masks_do_not_overlap_and_some_objects_hide_others() -> None:
    drawn = objects.draw("train", 0, 300)
    num_objects = drawn.masks.any(axis=(2, 3)).sum(axis=1)
    assert drawn.masks.sum(axis=1).max() == 1
    assert set(num_objects.tolist()) == {1, 2, 3, 4}
    assert np.bincount(drawn.class_ids[drawn.masks.any(axis=(2, 3))]).min() > 40
    # Boxes of what is seen overlap where objects meet.
    boxes = [
        [note["bbox"] for note in sample.fields["annotations"]]
        for sample in objects.samples("train", 0, 300)
    ]
    overlap = [coco_mask.iou(np.array(b, float), np.array(b, float), [0] * len(b)) for b in boxes]
    assert sum((np.triu(iou, 1) > 0.1).any() for iou in overlap) > 30


def test_annotations_are_what_pycocotools_makes_of_the_masks(tmp_path: Path) -> None:
    split = open_dataset("objects-30", tmp_path).split("train")
    drawn = objects.draw("train", 0, 30)
    for row in range(30):
        fields = split.fields(row)
        notes = fields["annotations"]
        seen = drawn.masks[row].any(axis=(1, 2))
        assert [note["class"] for note in notes] == drawn.class_ids[row][seen].tolist()
        assert (fields["width"], fields["height"]) == (spec.IMAGE_SIZE, spec.IMAGE_SIZE)
        for note, mask in zip(notes, drawn.masks[row][seen], strict=True):
            whole = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            outline = note["segmentation"]
            assert coco_mask.frPyObjects(outline, *outline["size"]) == whole
            np.testing.assert_array_equal(mask_of(outline), mask)
            assert note["bbox"] == coco_mask.toBbox(whole).tolist()
            assert note["area"] == coco_mask.area(whole)
