"""Fine-tuning, and the fine-tuned model judged on further sets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from harness.study import flops as count_flops
from harness.study.datasets import DatasetMeta
from harness.study.protocols.common import OfTask, Task
from harness.study.recipes import (
    LABELLED_VIEWS,
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
from harness.study.words import check_known, listed, read_names

# Sections of timm's RandAugment: magnitude, layers, chance, noise, its bound, increasing, set.
_RAND_AUGMENT = r"rand(-(m\d+|n\d+|p\d*\.?\d+|mstd\d*\.?\d+|mmax\d+|inc[01]|t(weights|3aw|3a)))*"

Crop = Literal["squash", "centre"]
"""How a test image becomes a square: squashed to it, or scaled by its shorter side and its middle
taken."""
Scale = Annotated[float, Field(gt=0, le=1)]


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
    augment: Annotated[Augmentation, over(LABELLED_VIEWS)] = LABELLED_VIEWS
    rand_augment: str | None = None
    """RandAugment as timm writes it, such as rand-m9-mstd0.5-inc1 (MAE); none draws nothing."""
    erase: Fraction = 0.0
    """Chance that a rectangle of a training image is replaced by noise (MAE: 0.25)."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Beta parameter of mixup (MAE: 0.8), on images 2i and 2i + 1 of a batch."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """Beta parameter of cutmix (MAE: 1.0); with mixup, each pair gets one of them at even odds."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights, which is then judged and saved; none keeps none."""
    ema_warmup: bool = False
    """Let the decay rise to `ema` as timm's ModelEmaV3 does, for short runs."""
    crop: Crop = "squash"
    crop_fraction: Scale = 0.875
    """Of `centre`: side of the middle by the shorter side."""

    @field_validator("rand_augment")
    @classmethod
    def _is_spec(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(_RAND_AUGMENT, value):
            raise ValueError(f"{value!r}: expected a RandAugment such as rand-m9-mstd0.5-inc1")
        return value

    @model_validator(mode="after")
    def _averages(self) -> Self:
        if self.ema_warmup and self.ema is None:
            raise ValueError("ema_warmup is of no use without ema")
        return self

    @property
    def mixes(self) -> bool:
        """Whether images of a pair are mixed: forward passes are then of even size."""
        return bool(self.mixup or self.cutmix)

    def flops(self, model: Model, samples: int, train: int, test: int, outputs: int) -> float:
        """Training; the one evaluation at the end is not counted."""
        return count_flops.vit_train(model, outputs) * samples


class Evaluate(OfTask):
    """A fine-tuned model on the test split of another set of its classes.

    An answer is right if it is among the image's classes; see `harness.transfer.evaluate`.
    """

    of_kinds = ("fine_tune",)

    protocol: Literal["evaluate"] = "evaluate"
    among: Literal["all", "present"] = "all"
    """Whether the model answers with any of its classes , so that
    an answer beyond the set's is wrong, or only with those that are right for some image of it
    (ours: the paper does not say which it used on ObjectNet)."""
    names: dict[str, Annotated[tuple[str, ...], BeforeValidator(listed)]] | str = {}
    """Class of the set -> what the model calls it, one class or several; or a file (YAML, JSON)
    that says so. Classes of the same name need none."""

    crop: Crop | None = None
    """None: as the model was judged in fine-tuning; so with its fraction."""
    crop_fraction: Scale | None = None

    @model_validator(mode="after")
    def _resolution_is_the_models(self) -> Evaluate:
        if self.image_size is not None:
            raise ValueError("image_size is that of the fine-tuned model; leave it out")
        return self

    def resolved(self, bases: Sequence[Path], meta: DatasetMeta) -> Self:
        """With the content of its file. Raises UserError for names of classes there are not."""
        names = read_names(self.names, bases) if isinstance(self.names, str) else self.names
        check_known(names, meta)
        return self.model_copy(update={"names": names})

    def outputs(self, meta: DatasetMeta) -> int:
        """Those of the fine-tuned model: the set may have other classes, or several an image."""
        return 0

    def flops(self, model: Model, samples: int, train: int, test: int, outputs: int) -> float:
        """Forward passes."""
        return count_flops.vit_forward(model, outputs) * test
