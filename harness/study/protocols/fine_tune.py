"""Fine-tuning, and the fine-tuned model judged on further sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

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
from harness.study.words import check_known, listed, read_names


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
    """A fine-tuned model on the test split of another set of its classes.

    An answer is right if it is among the image's classes; see `harness.transfer.evaluate`.
    """

    of_kinds = ("fine_tune",)

    protocol: Literal["evaluate"] = "evaluate"
    among: Literal["all", "present"] = "all"
    """Whether the model answers with any of its classes (as ReaL's, ImageNetV2's and ObjectNet's
    authors score), or only with those that are right for some image of the set."""
    names: dict[str, Annotated[tuple[str, ...], BeforeValidator(listed)]] | str = {}
    """Class of the set -> what the model calls it, one class or several; or a file (YAML, JSON)
    that says so. Classes of the same name need none."""

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
