"""Protocols that leave the encoder as it is: probes, neighbours, low-shot."""

from __future__ import annotations

from typing import Literal

from harness.study import flops as count_flops
from harness.study.protocols.common import OnFeatures, Task
from harness.study.recipes import Count, Model, Pool, Positive, Resize


class LinearProbe(OnFeatures):
    """Logistic regression on frozen features; the penalty is chosen on a split of the train set."""

    protocol: Literal["linear_probe"] = "linear_probe"
    penalties: tuple[Positive, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    """L2 penalties tried, per image (ours)."""


class SgdProbe(OnFeatures):
    """A linear head trained by SGD on frozen features, batch norm without weights before it."""

    protocol: Literal["sgd_probe"] = "sgd_probe"


class Knn(OnFeatures):
    """The classes of the nearest training images vote."""

    protocol: Literal["knn"] = "knn"


class FewShot(OnFeatures):
    """Logistic regression on K labelled images a class, over several splits (paper sec. 4.4)."""

    protocol: Literal["few_shot"] = "few_shot"
    shots: tuple[Count, ...] = (1, 5, 10)
    splits: Count = 5
    penalty: Positive = 1e-3


class PromptTuning(Task):
    """Visual prompt tuning on K labelled images a class, over several splits (paper sec. 4.4)."""

    protocol: Literal["prompt_tuning"] = "prompt_tuning"
    shots: tuple[Count, ...] = (1, 5, 10)
    splits: Count = 5
    pool: Pool = "cls"
    resize: Resize = "timm"

    def flops(self, model: Model, samples: int, train: int, test: int, outputs: int) -> float:
        """Evaluation only, as yet."""
        runs = len(self.shots) * self.splits
        return runs * count_flops.vit_forward(model, outputs) * test
