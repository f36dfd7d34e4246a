"""Video classification with an image encoder inflated in time."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from harness.study import flops as count_flops
from harness.study.protocols.common import Task
from harness.study.recipes import (
    Augmentation,
    Count,
    Fraction,
    Model,
    Optimization,
    Pool,
    Positive,
    Resize,
    over,
)

_VIEWS = Augmentation(crop_scale=(0.4, 1.0), flip=False)


class Video(Optimization, Task):
    """Fine-tuning on clips (paper sec. 4.4), judged on several views of each test clip.

    `batch`, and a duration in samples, count the views that are shown: with `repeats`, every clip
    makes that many.
    """

    protocol: Literal["video"] = "video"
    train_images: Count | None = None
    """Use at most this many training clips; none means all."""
    lr: Positive = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    drop_path: Fraction = 0.0
    dropout: Fraction = 0.0
    """Of the pooled features, before the head."""
    label_smoothing: Fraction = 0.1
    pool: Pool = "cls"
    resize: Resize = "timm"
    augment: Annotated[Augmentation, over(_VIEWS)] = _VIEWS
    """One crop and flip for all frames of a clip. No flips: where direction is the class they would
    change it."""

    frames: Count = 16
    """Of a clip that the model sees at once."""
    stride: Count = 4
    """Frames of the video from one of the clip to the next, in `dense` sampling."""
    sampling: Literal["dense", "segments"] = "dense"
    """`dense`: frames `stride` apart, from a random time on. `segments`: one frame of each of
    `frames` equal parts of the video (Wang et al. 2016, arXiv 1608.00859)."""
    tube: Count = 2
    """Frames of a token."""
    inflation: Literal["central", "mean"] = "central"
    """How an image's patch projection becomes a tube's: at the middle frame alone, or spread over
    all (Arnab et al. 2021, arXiv 2103.15691, sec. 3.4)."""
    relative_bias: Literal["none", "shared", "per_block"] = "shared"
    """A learned bias of attention's scores for every offset in time and space (paper: relative
    position embeddings), one table for all blocks or one a block; zero at the start."""
    repeats: Count = 2
    """Views of a clip, augmented anew, that stand side by side in a batch (Hoffer et al. 2020,
    arXiv 1901.09335)."""
    temporal_views: Count = 5
    """Clips of a test video, evenly spread; class probabilities of all views are averaged."""
    spatial_views: Count = 3
    """Square crops of a test clip along its longer side."""

    @model_validator(mode="after")
    def _whole_tubes(self) -> Video:
        if self.frames % self.tube:
            raise ValueError(f"frames {self.frames} is not a multiple of tube {self.tube}")
        return self

    def flops(self, model: Model, samples: int, train: int, test: int, outputs: int) -> float:
        """Training; the one evaluation at the end is not counted."""
        return count_flops.video_train(model, self.frames, self.tube, outputs) * samples
