"""Average precision: a case worked out by hand, perfect detections, and images drawn again."""

import sys
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from harness.data import objects
from harness.data.outlines import run_lengths
from harness.transfer import average_precision
from harness.transfer.average_precision import (
    Precision,
    coco_precision,
    ground_truth,
    lvis_precision,
)
from harness.transfer.samples import resample

CATEGORIES: list[dict[str, Any]] = [
    {"name": name, "frequency": "rcf"[k % 3]} for k, name in enumerate(objects.spec.CLASSES)
]


def rectangle(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((40, 40), dtype=np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def as_rle(outline: Any) -> dict[str, Any]:
    found: Any = coco_mask.frPyObjects(outline, *outline["size"])
    return {**found, "counts": found["counts"].decode()}


def detection(image: int, category: int, score: float, mask: np.ndarray) -> dict[str, Any]:
    rle: Any = coco_mask.encode(np.asfortranarray(mask))
    return {
        "image_id": image,
        "category_id": category,
        "score": score,
        "bbox": coco_mask.toBbox(rle).tolist(),
        "segmentation": {"size": [40, 40], "counts": rle["counts"].decode()},
    }


def test_ap_of_a_case_worked_out_by_hand() -> None:
    """Two objects, three detections: right, wrong, right with an IoU of 0.6.

    At IoU 0.5, 0.55 and 0.6 precision is 1 up to recall 1/2 (51 of the 101 recalls) and 2/3 beyond
    (50); at the seven others only the first is right, and recall stays at 1/2.
    """
    big = rectangle(0, 0, 10, 10)
    note = {"class": 0, "area": 100, "iscrowd": 0, "bbox": [0, 0, 10, 10]}
    outline = {"size": [40, 40], "counts": run_lengths(big.astype(bool))}
    fields = {"width": 40, "height": 40, "annotations": [{**note, "segmentation": outline}]}
    truth = ground_truth([fields, fields], [{"name": "a"}])
    found = [
        detection(1, 1, 0.9, big),
        detection(1, 1, 0.8, rectangle(20, 20, 30, 30)),
        detection(2, 1, 0.7, rectangle(0, 0, 10, 6)),  # 60 of 100 pixels
    ]
    got = coco_precision(truth, found).metrics
    ap50 = (51 + 50 * 2 / 3) / 101
    # 0.6 is reached exactly: COCOeval counts an IoU of the threshold as a match.
    ap = (3 * ap50 + 7 * 51 / 101) / 10
    for what in ("box", "mask"):
        assert got[f"{what}_ap50"] == pytest.approx(ap50, abs=1e-9)
        assert got[f"{what}_ap"] == pytest.approx(ap, abs=1e-9)


def scene(num: int = 60) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Objects of the built-in set; detections are theirs, moved, of wrong classes, and doubled."""
    rng = np.random.default_rng(0)
    fields = [{**sample.fields} for sample in objects.samples("test", 0, num)]
    for own in fields:
        own["negative"] = list(range(10))
    truth = ground_truth(fields, CATEGORIES, with_ids_of="lvis")
    found = []
    for note in truth["annotations"]:
        outline = as_rle(note["segmentation"])
        encoded: Any = {**outline, "counts": outline["counts"].encode()}
        mask = coco_mask.decode(encoded)
        for _ in range(2):
            moved = np.roll(mask, tuple(rng.integers(-2, 3, 2)), (0, 1))
            category = note["category_id"] if rng.random() < 0.7 else int(rng.integers(1, 11))
            rle: Any = coco_mask.encode(np.asfortranarray(moved))
            found.append(
                {
                    "image_id": note["image_id"],
                    "category_id": category,
                    "score": float(rng.random()),
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "segmentation": {"size": [64, 64], "counts": rle["counts"].decode()},
                }
            )
    return truth, found


def perfect(truth: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "image_id": note["image_id"],
            "category_id": note["category_id"],
            "score": 0.9,
            "bbox": note["bbox"],
            "segmentation": as_rle(note["segmentation"]),
        }
        for note in truth["annotations"]
    ]


@pytest.mark.parametrize("measure", [coco_precision, lvis_precision])
def test_perfect_detections_have_ap_1_in_every_replicate(measure: Any) -> None:
    truth, _ = scene()
    got: Precision = measure(truth, perfect(truth))
    assert all(value == pytest.approx(1, abs=1e-9) for value in got.metrics.values())
    assert {"box_ap", "box_ap50", "mask_ap", "mask_ap50"} <= got.metrics.keys()
    for values in got.replicates.values():
        np.testing.assert_allclose(values, 1, atol=1e-9)


@pytest.mark.parametrize("measure", [coco_precision, lvis_precision])
def test_a_replicate_of_every_image_once_is_the_ap_itself(
    measure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(average_precision, "resample", lambda num, r: np.arange(num))
    monkeypatch.setattr(average_precision, "REPLICATES", 1)
    truth, found = scene()
    got: Precision = measure(truth, found)
    assert 0.1 < got.metrics["mask_ap"] < 0.9
    for name in ("box_ap", "box_ap50", "mask_ap", "mask_ap50"):
        assert got.replicates[name][0] == pytest.approx(got.metrics[name], abs=1e-9)


def test_a_replicate_is_pycocotools_on_the_images_drawn() -> None:
    """Images drawn twice stand in the set twice, with their objects and detections."""
    truth, found = scene()
    got = coco_precision(truth, found)
    for replicate in (0, 7):
        drawn = resample(len(truth["images"]), replicate)
        again: dict[str, Any] = {**truth, "images": [], "annotations": []}
        detections = []
        for place, old in enumerate(drawn.tolist()):
            again["images"].append({**truth["images"][old], "id": place + 1})
            for note in truth["annotations"]:
                if note["image_id"] == old + 1:
                    own = {"image_id": place + 1, "id": len(again["annotations"]) + 1}
                    again["annotations"].append({**note, **own})
            for note in found:
                if note["image_id"] == old + 1:
                    detections.append({**note, "image_id": place + 1})
        oracle = coco_precision(again, detections).metrics
        for name, value in oracle.items():
            assert got.replicates[name][replicate] == pytest.approx(value, abs=1e-9)


def test_no_detection_at_all_is_0() -> None:
    truth, _ = scene(3)
    for measure in (coco_precision, lvis_precision):
        got = measure(truth, [])
        assert set(got.metrics.values()) == {0.0} and not got.replicates["box_ap"].any()


def test_lvis_is_imported_where_opencv_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lvis"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cv2", None)  # an import of it fails
    assert average_precision._lvis_package().LVISEval.__name__ == "LVISEval"
