"""Object detection and instance segmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from harness.study import flops as count_flops
from harness.study.protocols.common import Task
from harness.study.recipes import Count, Fraction, Model, Optimization, Resize


class Detection(Optimization, Task):
    """Cascade Mask R-CNN on a plain ViT (Li et al. 2022, arXiv 2203.16527)."""

    protocol: Literal["detection"] = "detection"
    train_images: Count | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.7
    drop_path: Fraction = 0.0
    resize: Resize = "timm"

    def flops(self, model: Model, samples: int, train: int, test: int, outputs: int) -> float:
        """The backbone in training, as yet."""
        return count_flops.vit_train(model, 0) * samples
