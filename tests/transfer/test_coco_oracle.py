"""AP of packed COCO against pycocotools on the files that were packed: crowds, several polygons of
one object, an image without objects, gaps in all ids.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from harness.data.dataset import open_dataset
from harness.data.pack import pack
from harness.transfer.average_precision import coco_precision, ground_truth

WIDTH, HEIGHT = 64, 48
IMAGES = [7, 12, 30, 45, 46]  # 30 has no object
CATEGORIES = [3, 17]


def rectangle(left: float, top: float, right: float, bottom: float) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def crowd_counts(left: int, top: int, right: int, bottom: int) -> list[int]:
    """Run lengths, column by column, of a rectangle."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top:bottom, left:right] = True
    flat = mask.flatten(order="F")
    borders = np.flatnonzero(np.diff(flat.astype(int))) + 1
    return np.diff([0, *borders.tolist(), flat.size]).tolist()


NOTES: list[dict[str, Any]] = [
    {
        "image_id": 7,
        "category_id": 3,
        # One object in two parts, as when something stands before it.
        "segmentation": [rectangle(4, 4, 14, 24), rectangle(20, 4, 30, 24)],
        "bbox": [4, 4, 26, 20],
        "area": 400,
        "iscrowd": 0,
    },
    {
        "image_id": 12,
        "category_id": 3,
        "segmentation": {"size": [HEIGHT, WIDTH], "counts": crowd_counts(20, 10, 60, 40)},
        "bbox": [20, 10, 40, 30],
        "area": 1200,
        "iscrowd": 1,
    },
    *(
        {
            "image_id": image,
            "category_id": category,
            "segmentation": [rectangle(left, 8, left + 12, 28)],
            "bbox": [left, 8, 12, 20],
            "area": 240,
            "iscrowd": 0,
        }
        for image, category, left in ((12, 3, 2), (45, 17, 10), (45, 3, 40), (46, 17, 20))
    ),
]


def write_coco(src: Path) -> None:
    for split in ("train", "val"):
        (src / f"{split}2017").mkdir(parents=True)
        images = []
        for number in IMAGES:
            name = f"{number:012d}.jpg"
            pixels = np.random.default_rng(number).integers(0, 255, (HEIGHT, WIDTH, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(src / f"{split}2017" / name)
            images.append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})
        whole = {
            "images": images,
            "annotations": [{**note, "id": 10 + 2 * k} for k, note in enumerate(NOTES)],
            "categories": [
                {"id": k, "name": f"thing {k}", "supercategory": ""} for k in CATEGORIES
            ],
        }
        (src / "annotations").mkdir(exist_ok=True)
        (src / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(whole))


def detection(image: int, category: int, score: float, parts: list[list[int]]) -> dict[str, Any]:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    for left, top, right, bottom in parts:
        mask[top:bottom, left:right] = 1
    rle: Any = coco_mask.encode(np.asfortranarray(mask))
    return {
        "image_id": image,
        "category_id": category,
        "score": score,
        "bbox": coco_mask.toBbox(rle).tolist(),
        "segmentation": {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()},
    }


FOUND = [
    detection(7, 3, 0.95, [[4, 4, 14, 24], [20, 4, 30, 24]]),
    detection(12, 3, 0.9, [[25, 12, 40, 30]]),  # in the crowd: neither right nor wrong
    detection(12, 3, 0.85, [[44, 12, 58, 30]]),  # and another one
    detection(12, 3, 0.6, [[2, 8, 14, 26]]),
    detection(30, 17, 0.8, [[5, 5, 20, 20]]),  # there is nothing
    detection(45, 17, 0.7, [[10, 8, 22, 28]]),
    detection(45, 3, 0.65, [[41, 10, 52, 28]]),
    detection(46, 17, 0.5, [[20, 8, 28, 28]]),
]


def oracle(file: Path, kind: Any) -> tuple[float, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        found = [dict(note) for note in FOUND]
        if kind == "segm":
            for note in found:
                del note["bbox"]
        evaluated = COCOeval(truth, truth.loadRes(found), kind)  # type: ignore[arg-type]  # a list will do
        evaluated.evaluate()
        evaluated.accumulate()
        evaluated.summarize()
    return float(evaluated.stats[0]), float(evaluated.stats[1])


def test_packed_coco_is_judged_as_the_files_that_were_packed(tmp_path: Path) -> None:
    write_coco(tmp_path / "src")
    meta = pack(str(tmp_path / "src"), tmp_path / "set").meta
    assert meta.splits == {"train": 5, "test": 5}
    split = open_dataset(str(tmp_path / "set"), tmp_path).split("test")
    rows = np.argsort([str(key) for key in split.keys])
    fields = [split.fields(int(row)) for row in rows]
    assert [len(own["annotations"]) for own in fields] == [1, 2, 0, 2, 1]
    truth = ground_truth(fields, [{"name": name} for name in meta.classes])
    found = [
        {
            **note,
            "image_id": IMAGES.index(note["image_id"]) + 1,
            "category_id": CATEGORIES.index(note["category_id"]) + 1,
        }
        for note in FOUND
    ]
    got = coco_precision(truth, found).metrics
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        wanted = oracle(tmp_path / "src" / "annotations" / "instances_val2017.json", kind)
        assert 0.3 < wanted[0] < wanted[1] < 1
        assert (got[f"{name}_ap"], got[f"{name}_ap50"]) == pytest.approx(wanted, abs=1e-9)
