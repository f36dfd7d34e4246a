"""Object detection and instance segmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from harness.study.flops_detection import detector_train
from harness.study.protocols.common import Task
from harness.study.protocols.heads import Heads
from harness.study.recipes import Count, Fraction, Model, Optimization, Positive, Resize


class Detection(Optimization, Task):
    """Cascade Mask R-CNN (Cai & Vasconcelos 2018, arXiv 1712.00726; He et al. 2017) on a plain ViT
    (ViTDet: Li et al. 2022, arXiv 2203.16527), every weight trained.
    """

    protocol: Literal["detection"] = "detection"
    train_images: Count | None = None
    """Use at most this many training images; none means all."""
    lr: Positive = 1e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.7
    drop_path: Fraction = 0.0
    resize: Resize = "timm"
    patch: Count | None = None
    """Patch of the detector's encoder, to which the patch projection is resampled (FlexiViT: Beyer
    et al. 2023, arXiv 2212.08013), as the paper goes from 14 to 16; none means the cell's."""
    window: Count = 14
    """Patches along a side of a window that most blocks attend in."""
    global_blocks: Count = 4
    """Blocks, evenly spaced, that attend over the whole image."""
    relative_positions: bool = True
    """Decomposed relative positions in every block, zero at the start."""
    heads: Heads = Heads()
    jitter: tuple[Positive, Positive] = (0.1, 2.0)
    """Large-scale jitter: the longer side of a training image, as a multiple of `image_size`, is
    uniform in this range; what sticks out is cut, what lacks is padded."""
    flip: bool = True
    loss: Literal["softmax", "federated"] = "softmax"
    """Of the classes. `federated`: a sigmoid each, in an image only for its own classes and some
    drawn by frequency (Zhou et al. 2021, arXiv 2103.07461), for LVIS."""
    federated_classes: Count = 50
    """Classes of a batch that `federated` looks at."""
    metric: Literal["coco", "lvis"] = "coco"
    score: Fraction = 0.05
    """Least score of a detection."""
    detections: Count = 100
    """Most of an image."""

    @model_validator(mode="after")
    def _ordered(self) -> Detection:
        if self.jitter[0] > self.jitter[1]:
            raise ValueError(f"jitter {self.jitter}: the first number must not be the larger")
        return self

    def flops(self, model: Model, samples: int, train: int, test: int, outputs: int) -> float:
        """Training; the one evaluation at the end is not counted."""
        one = detector_train(
            model, self.heads, outputs, self.window, self.global_blocks, self.relative_positions
        )
        return one * samples
