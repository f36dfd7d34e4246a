"""Published datasets, in miniature but in the folders and files they really come in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset.compat import WebDataset

from harness.data.dataset import Split, open_dataset
from harness.data.pack import PackReport, pack

RNG = np.random.default_rng(0)


def image(path: Path, size: tuple[int, int] = (24, 20)) -> Path:
    """A picture of this width and height that no other file has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def dump(path: Path, value: object) -> None:
    text(path, json.dumps(value))


class Read:
    """A packed set, read back by stock webdataset."""

    def __init__(self, src: Path, work: Path, **options: Any) -> None:
        self.report: PackReport = pack(str(src), work / "out", **options)
        self.meta, self._out, self._root = self.report.meta, work / "out", work / "root"

    def samples(self, split: str) -> dict[str, dict[str, Any]]:
        urls = [str(self._out / str(entry["file"])) for entry in self.meta.shards[split]]
        read = WebDataset(urls, shardshuffle=False)
        samples = {sample["__key__"]: sample for sample in read}
        assert len(samples) == self.meta.splits[split]
        return samples

    def classes(self, split: str) -> dict[str, str]:
        """Class name by key."""
        samples = self.samples(split)
        return {key: self.meta.classes[int(s["cls"])] for key, s in samples.items()}

    def fields(self, split: str) -> dict[str, dict[str, Any]]:
        """Content of .json by key."""
        return {key: json.loads(sample["json"]) for key, sample in self.samples(split).items()}

    def split(self, name: str) -> Split:
        return open_dataset(str(self._out), self._root).split(name)

    def notes(self, name: str) -> dict[str, str]:
        """Lines of refused.txt and its like."""
        path = self._out / f"{name}.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return dict(line.split("\t") for line in lines)


def coco(folder: Path, under: str = "") -> None:
    # As in COCO, category ids have gaps, and some images have no objects.
    categories = [
        {"id": 18, "name": "dog", "supercategory": "animal"},
        {"id": 1, "name": "person", "supercategory": "person"},
        {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
    ]
    for split, first in (("train", 1), ("val", 101)):
        images = [
            {"id": first + k, "file_name": f"{first + k:012d}.jpg", "width": 80, "height": 60}
            for k in range(3)
        ]
        for entry in images:
            image(folder / under / f"{split}2017" / entry["file_name"], (80, 60))
        annotations = [
            {
                "id": 7,
                "image_id": first,
                "category_id": 18,
                "bbox": [10.5, 20, 30, 12.25],
                "area": 300.5,
                "iscrowd": 0,
                "segmentation": [[1, 2, 3, 4, 5, 6]],
            },
            {
                "id": 8,
                "image_id": first,
                "category_id": 1,
                "bbox": [0, 0, 80, 60],
                "area": 4800,
                "iscrowd": 1,
                "segmentation": {"counts": [0, 2400, 2400], "size": [60, 80]},
            },
            {
                "id": 9,
                "image_id": first + 1,
                "category_id": 90,
                "bbox": [1, 2, 3, 4],
                "area": 12,
                "iscrowd": 0,
                "segmentation": [],
            },
        ]
        whole = {"images": images, "annotations": annotations, "categories": categories}
        dump(folder / "annotations" / f"instances_{split}2017.json", whole)
        dump(folder / "annotations" / f"captions_{split}2017.json", {"images": images})
