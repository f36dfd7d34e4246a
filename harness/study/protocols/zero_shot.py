"""Zero-shot: a text tower trained to a frozen image tower (LiT), then judged by words alone."""

from __future__ import annotations

from typing import Literal

from harness.study import flops as count_flops
from harness.study.datasets import DatasetMeta
from harness.study.protocols.common import OfTask, OnFeatures
from harness.study.recipes import Model, Optimization


class Lit(Optimization, OnFeatures):
    """A text tower trained on image-caption pairs, the image tower frozen."""

    protocol: Literal["lit"] = "lit"

    def outputs(self, meta: DatasetMeta) -> int:
        """No classes."""
        return 0


class ZeroShot(OfTask):
    """Classification by the text embeddings of class names in prompts."""

    of_kinds = ("lit",)
    uses_encoder = True

    protocol: Literal["zero_shot"] = "zero_shot"

    def flops(self, model: Model, samples: int, train: int, test: int, outputs: int) -> float:
        """Images through the encoder; prompts are not counted."""
        return count_flops.vit_forward(model) * test


class Retrieval(OfTask):
    """Finding an image by its caption, and a caption by its image."""

    of_kinds = ("lit",)
    uses_encoder = True

    protocol: Literal["retrieval"] = "retrieval"

    def outputs(self, meta: DatasetMeta) -> int:
        """No classes."""
        return 0

    def flops(self, model: Model, samples: int, train: int, test: int, outputs: int) -> float:
        """Images through the encoder; captions are not counted."""
        return count_flops.vit_forward(model) * test
