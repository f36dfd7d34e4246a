"""grids/maws.yaml resolves, size by size, to the numbers that its sources publish.

Sources: Singh et al. 2023 (arXiv 2303.13496), sec. 3 and 4, for resolutions and epochs of
pretraining, and its release for the shared spaces of image and text; He et al. 2022 (arXiv
2111.06377) with the fine-tuning page of its repository; Li et al. 2022 (ViTDet, arXiv 2203.16527)
with its configurations; Feichtenhofer et al. 2022 (MAE for video, arXiv 2205.09113); Zhai et al.
2022 (LiT, arXiv 2111.07991). Where a source gives no number for a size, the grid's is ours and
not here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.study.cells import Grid, build_grid
from harness.study.schema import load_study

FINE_TUNE = {
    "batch": 1024,
    "lr_min": 1e-6,
    "warmup.samples": 5 * 1_281_167,  # five epochs
    "clip": 0.0,
    "weight_decay": 0.05,
    "betas": (0.9, 0.999),
    "label_smoothing": 0.1,
    "augment.crop_scale": (0.08, 1.0),
    "augment.flip": True,
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "erase": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
}
COCO = {
    "batch": 64,
    "lr": 1e-4,
    "weight_decay": 0.1,
    "warmup.samples": 250 * 64,
    "image_size": 1024,
}
LVIS = {
    **{"batch": 64, "weight_decay": 0.1, "warmup.samples": 250 * 64, "image_size": 1024},
    **{"duration.epochs": 100, "loss": "federated", "score": 0.02, "detections": 300},
}
VIDEO = {
    **{"frames": 16, "stride": 4, "repeats": 2, "layer_decay": 0.75, "drop_path": 0.2},
    **{"dropout": 0.3, "clip": 5.0, "duration.epochs": 50, "batch": 256, "lr": 2.4e-3},
    "augment.flip": True,
}


def row(names: str, *values: Any) -> dict[str, Any]:
    return dict(zip(names.split(), values, strict=True))


TUNED = "image_size duration.epochs lr layer_decay drop_path"
DETECTED = "duration.epochs layer_decay drop_path"
PUBLISHED = {
    ("b", "mae"): row("duration.epochs batch lr mask_ratio", 1, 4096, 2.4e-3, 0.75),
    ("6.5b", "mae"): row("duration.epochs batch lr mask_ratio", 1, 4096, 2.4e-3, 0.75),
    ("b", "in1k_fine_tune"): FINE_TUNE | row(TUNED, 512, 100, 2e-3, 0.65, 0.1),
    ("l", "in1k_fine_tune"): FINE_TUNE | row(TUNED, 512, 50, 4e-3, 0.75, 0.2),
    ("h", "in1k_fine_tune"): FINE_TUNE | row(TUNED, 518, 50, 4e-3, 0.75, 0.3),
    ("2b", "in1k_fine_tune"): {"image_size": 518},
    ("6.5b", "in1k_fine_tune"): {"image_size": 518},
    ("b", "coco"): COCO | row(DETECTED, 100, 0.7, 0.1),
    ("l", "coco"): COCO | row(DETECTED, 100, 0.8, 0.4),
    ("h", "coco"): COCO | row(DETECTED, 75, 0.9, 0.5),
    ("b", "lvis"): LVIS | row("lr layer_decay drop_path", 2e-4, 0.7, 0.1),
    ("l", "lvis"): LVIS | row("lr layer_decay drop_path", 2e-4, 0.8, 0.4),
    ("h", "lvis"): LVIS | row("lr layer_decay drop_path", 1e-4, 0.9, 0.4),
    ("l", "k400"): VIDEO,
    # Direction is the class of 174 labels: no flips (they would exchange left and right).
    ("l", "ssv2"): {
        "augment.flip": False,
        "augment.crop_scale": (0.4, 1.0),
        "sampling": "segments",
    },
    # XLM-R Base beside B, Large beside the others: width and depth.
    ("b", "lit"): row("embed text.width text.depth", 768, 768, 12),
    ("l", "lit"): row("embed text.width text.depth", 1024, 1024, 24),
    ("h", "lit"): row("embed text.width text.depth", 1024, 1024, 24),
    ("2b", "lit"): row("embed text.width text.depth", 2048, 1024, 24),
}
LIT = row(
    "batch lr weight_decay clip warmup context temperature", 4096, 1e-3, 0.01, 1.0, 0.03, 100, 0.07
)


@pytest.fixture(scope="module")
def maws() -> Grid:
    return build_grid(load_study(Path(__file__).parents[2] / "grids" / "maws.yaml"))


@pytest.mark.parametrize(("size", "task"), list(PUBLISHED))
def test_a_size_has_the_published_values(maws: Grid, size: str, task: str) -> None:
    (cell,) = [c for c in maws.cells if (c.axes["size"], c.axes["init"]) == (size, "mae")]
    recipe = maws.stages[cell.stages[task]].config.recipe.model_dump()
    wanted = PUBLISHED[size, task] | (LIT if task == "lit" else {})
    found = {}
    for name in wanted:
        value: Any = recipe
        for part in name.split("."):
            value = value[part]
        found[name] = value
    assert found == wanted
