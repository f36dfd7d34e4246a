"""Protocols that leave the encoder as it is: probes, neighbours, low-shot."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import Field, model_validator

from harness.study import flops as count_flops
from harness.study.protocols.common import OnFeatures, Task
from harness.study.recipes import Count, Fraction, Model, Pool, Positive, Resize


class LinearProbe(OnFeatures):
    """Logistic regression on frozen features; the penalty is chosen on a split of the train set."""

    protocol: Literal["linear_probe"] = "linear_probe"
    penalties: tuple[Positive, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    """L2 penalties tried, per image (ours)."""


class SgdProbe(OnFeatures):
    """A linear head trained by SGD on frozen features, batch norm without weights before it.

    MAE's recipe (He et al. 2022, app. A.1) but for optimizer and batch: LARS moves weights by a
    thousandth of their norm, for which small sets have too few steps. Theirs is {optimizer: lars,
    batch: 16384}. It also crops and flips; here every image has one feature (ours).
    """

    protocol: Literal["sgd_probe"] = "sgd_probe"
    optimizer: Literal["sgd", "lars"] = "sgd"
    epochs: Count = 90
    """90 for ViT-B and 50 for larger ones in MAE's."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 10
    batch: Count = 1024
    """Images of a step, or all if there are fewer."""
    base_lr: Positive = 0.1
    """Peak learning rate for 256 images a step; it grows with the batch."""
    momentum: Fraction = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _warmup_fits(self) -> SgdProbe:
        return _check_warmup(self)


class Knn(OnFeatures):
    """The classes of the nearest training images vote, as in DINO (Caron et al. 2021)."""

    protocol: Literal["knn"] = "knn"
    k: Count = 20
    """Neighbours."""
    temperature: Positive = 0.07
    """A neighbour's vote is exp(cosine / temperature)."""


class FewShot(OnFeatures):
    """Logistic regression on K labelled images a class, over several splits (paper sec. 4.4)."""

    protocol: Literal["few_shot"] = "few_shot"
    shots: tuple[Count, ...] = (1, 5, 10)
    splits: Count = 5
    penalty: Positive = 1e-3


class PromptTuning(Task):
    """Deep visual prompt tuning on K labelled images a class, over several splits (paper sec. 4.4).

    The images are those of `few_shot`. The paper's prompts and rates are not known: those are ours.
    """

    protocol: Literal["prompt_tuning"] = "prompt_tuning"
    train_images: Count | None = None
    """Choose among at most this many labelled training images; none means all."""
    shots: tuple[Count, ...] = (1, 5, 10)
    splits: Count = 5
    prompts: Count = 8
    """Learned tokens of every block."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    epochs: Count = 100
    """Passes over the chosen images."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 10
    batch: Count = 32
    """Images of a step, or all if there are fewer."""
    lr: Positive = 1e-2
    """Peak learning rate, as it is: not scaled by the batch."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    pool: Pool = "cls"
    resize: Resize = "timm"

    @model_validator(mode="after")
    def _warmup_fits(self) -> PromptTuning:
        return _check_warmup(self)

    def flops(self, model: Model, samples: int, train: int, test: int, outputs: int) -> float:
        """Training of every split, as if all classes had K images; and its evaluation."""
        tuned = sum(min(shots * outputs, train) for shots in self.shots) * self.epochs
        train_flops = tuned * count_flops.prompted_train(model, self.prompts, outputs)
        test_flops = test * count_flops.prompted_forward(model, self.prompts, outputs)
        return self.splits * (train_flops + len(self.shots) * test_flops)


Warm = TypeVar("Warm", SgdProbe, PromptTuning)


def _check_warmup(recipe: Warm) -> Warm:
    if recipe.warmup_epochs >= recipe.epochs:
        raise ValueError(
            f"warmup_epochs {recipe.warmup_epochs} must be fewer than epochs {recipe.epochs}"
        )
    return recipe
