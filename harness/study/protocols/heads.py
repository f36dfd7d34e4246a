"""What stands on the backbone of a detector."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from harness.study.recipes import Count, Frozen, Positive

SCALES = (4.0, 2.0, 1.0, 0.5)


class Heads(Frozen):
    """What stands on the backbone; the defaults are ViTDet's."""

    channels: Count = 256
    """Of the pyramid."""
    scales: tuple[float, ...] = SCALES
    """Maps of the pyramid as multiples of the encoder's grid, finest first; of patch 16 these are
    strides 4, 8, 16 and 32."""
    anchor: Positive = 8.0
    """Side of a map's anchors in its own pixels; the three aspects are 1/2, 1 and 2."""
    rpn_convs: Count = 2
    proposals: Count = 1000
    """Kept of an image after non-maximum suppression, in training and testing; twice as many a map
    before it."""
    rpn_samples: Count = 256
    """Anchors of an image in the loss, half of them positive at most."""
    rois: Count = 512
    """Boxes of an image that the heads are trained on, a quarter of them positive at most."""
    box_convs: Annotated[int, Field(ge=0)] = 4
    box_width: Count = 1024
    """Of the fully connected layer."""
    mask_convs: Count = 4

    @model_validator(mode="after")
    def _known_scales(self) -> Heads:
        if not self.scales or list(self.scales) != [k for k in SCALES if k in self.scales]:
            raise ValueError(f"scales {self.scales}: expected some of {SCALES}, in this order")
        return self
