"""A small detector for tests: stages of it on objects, and on packed sets."""

from __future__ import annotations

from typing import Any

import tiny

from harness.study.objects_spec import CLASSES
from harness.study.protocols import Detection
from harness.study.protocols.heads import Heads
from harness.study.recipes import Duration, Model
from harness.study.stages import Images, StageFile

HEADS = Heads(
    channels=32,
    scales=(1.0, 0.5),
    anchor=4.0,
    rpn_convs=1,
    proposals=50,
    rpn_samples=64,
    rois=32,
    box_convs=0,
    box_width=128,
    mask_convs=1,
)
MODEL = Model(width=64, depth=4, heads=4, patch=4, image_size=64)


def recipe(steps: int, batch: int = 16, **fields: Any) -> Detection:
    settings: dict[str, Any] = {
        "lr": 2e-3,
        "weight_decay": 0.05,
        "window": 8,
        "global_blocks": 2,
        "relative_positions": False,
        "heads": HEADS,
        "jitter": (0.8, 1.25),
        "layer_decay": 0.8,
    }
    return Detection(duration=Duration(steps=steps), batch=batch, **settings | fields)


def stage(
    found: Detection,
    *,
    images: int,
    dataset: str = "",
    num_classes: int = len(CLASSES),
    model: Model = MODEL,
    **execution: Any,
) -> StageFile:
    file = tiny.stage(found)
    own = Images(dataset="objects", fingerprint="", split="train", images=images)
    update = {"model": model, "images": own, "num_classes": num_classes}
    config = file.config.model_copy(update=update)
    where = {"dataset_path": dataset or f"objects-{images}", **execution}
    settings = file.execution.model_copy(update=where)
    return file.model_copy(update={"config": config, "execution": settings})
