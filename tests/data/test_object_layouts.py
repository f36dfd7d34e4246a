"""COCO and LVIS: boxes, crowds and classes stay as they were published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.data.images import ImageOptions
from harness.data.pack import pack
from harness.errors import UserError
from tests.data.layouts import Read, coco, dump, image


@pytest.mark.parametrize("under", ["", "images"])
def test_coco_keeps_boxes_and_all_classes(tmp_path: Path, under: str) -> None:
    coco(tmp_path / "src", under)
    read = Read(tmp_path / "src", tmp_path)
    assert read.meta.classes == ["person", "dog", "toothbrush"]
    assert read.meta.splits == {"train": 3, "test": 3}
    fields = read.fields("test")
    assert fields["val2017/000000000101_jpg"] == {
        "classes": [0, 1],
        "annotations": [
            {
                "bbox": [10.5, 20, 30, 12.25],
                "class": 1,
                "area": 300.5,
                "iscrowd": 0,
                "segmentation": [[1, 2, 3, 4, 5, 6]],
            },
            {
                "bbox": [0, 0, 80, 60],
                "class": 0,
                "area": 4800,
                "iscrowd": 1,
                "segmentation": {"counts": [0, 2400, 2400], "size": [60, 80]},
            },
        ],
        "image_id": 101,
        "width": 80,
        "height": 60,
    }
    assert fields["val2017/000000000103_jpg"]["annotations"] == []
    split = read.split("test")
    row = list(split.keys).index("val2017/000000000101_jpg")
    ids = split.label_ids[split.label_offsets[row] : split.label_offsets[row + 1]]
    assert ids.tolist() == [0, 1]
    categories = json.loads((tmp_path / "out" / "categories.json").read_text())
    assert [c["id"] for c in categories] == [1, 18, 90]


def test_boxes_shrink_with_their_image(tmp_path: Path) -> None:
    coco(tmp_path / "src")
    read = Read(tmp_path / "src", tmp_path, options=ImageOptions(resize=30))
    fields = read.fields("train")["train2017/000000000001_jpg"]
    assert (fields["width"], fields["height"]) == (40, 30)
    assert fields["annotations"][0]["bbox"] == [5.25, 10, 15, 6.125]
    assert fields["annotations"][0]["area"] == 75.125
    assert fields["annotations"][0]["segmentation"] == [[0.5, 1, 1.5, 2, 2.5, 3]]
    # The left half, as before.
    assert fields["annotations"][1]["segmentation"] == {"size": [30, 40], "counts": [0, 600, 600]}
    assert read.meta.image_size == 30


def test_other_boxes_are_another_fingerprint(tmp_path: Path) -> None:
    coco(tmp_path / "src")
    one = pack(str(tmp_path / "src"), tmp_path / "a").meta
    path = tmp_path / "src" / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace("10.5", "10.6"))
    assert pack(str(tmp_path / "src"), tmp_path / "b").meta.fingerprint != one.fingerprint


def test_lvis_finds_its_images_among_those_of_coco(tmp_path: Path) -> None:
    src = tmp_path / "src"
    categories = [
        {
            "id": k + 1,
            "name": name,
            "synset": f"{name}.n.01",
            "synonyms": [name],
            "def": "a thing",
            "frequency": frequency,
            "image_count": 3,
            "instance_count": 5,
        }
        for k, (name, frequency) in enumerate((("aerosol_can", "c"), ("air_conditioner", "f")))
    ]
    # Some of LVIS' validation images are COCO's training images.
    for split, of_coco, number in (("train", "train", 3), ("val", "train", 4), ("val", "val", 5)):
        image(src / f"{of_coco}2017" / f"{number:012d}.jpg", (50, 40))
        path = src / f"lvis_v1_{split}.json"
        empty: dict[str, Any] = {"images": [], "annotations": []}
        whole = json.loads(path.read_text()) if path.exists() else empty
        whole["categories"] = categories if split == "train" else categories[::-1]
        whole["images"].append(
            {
                "id": number,
                "coco_url": f"http://images.cocodataset.org/{of_coco}2017/{number:012d}.jpg",
                "width": 50,
                "height": 40,
                "neg_category_ids": [1],
                "not_exhaustive_category_ids": [2],
            }
        )
        note = {"id": number, "image_id": number, "category_id": 2, "area": 9.5}
        whole["annotations"].append({**note, "bbox": [1, 2, 3, 4], "segmentation": [[1, 2]]})
        dump(path, whole)
    read = Read(src, tmp_path)
    assert set(read.fields("test")) == {
        "train2017/000000000004_jpg",
        "val2017/000000000005_jpg",
    }
    assert read.fields("train")["train2017/000000000003_jpg"] == {
        "classes": [1],
        "annotations": [
            {
                "bbox": [1, 2, 3, 4],
                "class": 1,
                "area": 9.5,
                "iscrowd": 0,
                "segmentation": [[1, 2]],
            }
        ],
        "image_id": 3,
        "width": 50,
        "height": 40,
        "negative": [0],
        "not_exhaustive": [1],
    }
    categories = json.loads((tmp_path / "out" / "categories.json").read_text())
    assert [c["frequency"] for c in categories] == ["c", "f"]


def test_annotations_that_are_no_annotations_name_their_file(tmp_path: Path) -> None:
    coco(tmp_path / "src")
    path = tmp_path / "src" / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text().replace('"bbox"', '"box"'))
    with pytest.raises(UserError, match=r"instances_train2017\.json: not as its layout says"):
        pack(str(tmp_path / "src"), tmp_path / "out")
    path.write_text("{")
    with pytest.raises(UserError, match=r"instances_train2017\.json: not a readable JSON file"):
        pack(str(tmp_path / "src"), tmp_path / "out")
