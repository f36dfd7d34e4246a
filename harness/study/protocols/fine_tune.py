"""Fine-tuning, and the fine-tuned model judged on further sets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from harness.study import flops as count_flops
from harness.study.datasets import DatasetMeta
from harness.study.protocols.common import OfTask, Task
from harness.study.recipes import (
    Augmentation,
    Count,
    Fraction,
    Model,
    Optimization,
    Pool,
    Positive,
    Resize,
)


class FineTune(Optimization, Task):
    """Every weight trained on the labelled set, with layer-wise learning-rate decay."""

    protocol: Literal["fine_tune"] = "fine_tune"
    train_images: Count | None = None
    lr: Positive = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    drop_path: Fraction = 0.0
    label_smoothing: Fraction = 0.1
    pool: Pool = "cls"
    resize: Resize = "timm"
    augment: Augmentation = Augmentation(crop_scale=(0.4, 1.0))

    def flops(self, model: Model, samples: int, train: int, test: int, outputs: int) -> float:
        """Training; the one evaluation at the end is not counted."""
        return count_flops.vit_train(model, outputs) * samples


class Evaluate(OfTask):
    """A fine-tuned model on the test split of another set."""

    of_kinds = ("fine_tune",)

    protocol: Literal["evaluate"] = "evaluate"

    def outputs(self, meta: DatasetMeta) -> int:
        """Those of the fine-tuned model: the set may have other classes, or several an image."""
        return 0

    def flops(self, model: Model, samples: int, train: int, test: int, outputs: int) -> float:
        """Forward passes."""
        return count_flops.vit_forward(model, outputs) * test
