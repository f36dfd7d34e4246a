"""Video classification with an image encoder inflated in time."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from harness.study import flops as count_flops
from harness.study.protocols.common import Task
from harness.study.recipes import Count, Fraction, Model, Optimization, Resize


class Video(Optimization, Task):
    """Fine-tuning on clips."""

    protocol: Literal["video"] = "video"
    train_images: Count | None = None
    """Use at most this many training clips; none means all."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    drop_path: Fraction = 0.0
    resize: Resize = "timm"

    def flops(self, model: Model, samples: int, train: int, test: int, outputs: int) -> float:
        """Frame by frame, as yet."""
        return count_flops.vit_train(model, outputs) * samples
