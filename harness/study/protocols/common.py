"""What all transfer tasks have, and the pass of a frozen encoder that several of them share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

from harness.errors import UserError
from harness.study import flops as count_flops
from harness.study.datasets import DatasetMeta
from harness.study.recipes import Count, Frozen, Model, Pool, Resize


class Task(Frozen):
    """A transfer task on labelled samples of its own; it starts from the encoder."""

    dataset: str | None = None
    """A dataset as in a study's `dataset`; none means the pretraining set's own labelled split."""
    image_size: Count | None = None
    """Side of the images that the encoder gets, positions resized to it; none means the cell's."""

    def num_train(self, meta: DatasetMeta) -> int:
        """Samples of the training split that are used; 0 for a task that trains nothing."""
        available, wanted = meta.count("train"), vars(self).get("train_images")
        return min(available, wanted) if wanted else available

    def num_test(self, meta: DatasetMeta) -> int:
        """Samples that the task is judged on."""
        return meta.count("test")

    def outputs(self, meta: DatasetMeta) -> int:
        """Outputs of the head. Raises UserError where the dataset has no classes."""
        if not meta.num_classes:
            raise UserError(f"dataset {meta.name} has no class labels; set `dataset`")
        return meta.num_classes

    def resolved(self, bases: Sequence[Path], meta: DatasetMeta) -> Self:
        """The recipe with what the files hold that it names, relative ones below `bases`."""
        return self

    def flops(self, model: Model, samples: int, train: int, test: int, outputs: int) -> float:
        """FLOPs of the stage: `samples` are shown in training, `train` and `test` are different
        ones. Solvers on features count nothing.
        """
        raise NotImplementedError


class Features(Frozen):
    """One pass of the frozen encoder over the training and the test images of a task."""

    protocol: Literal["features"] = "features"
    dataset: str | None = None
    pool: Pool = "cls"
    resize: Resize = "timm"

    def flops(self, model: Model, images: int) -> float:
        """FLOPs of the forward passes."""
        return count_flops.vit_forward(model) * images


class OnFeatures(Task):
    """A task that is solved on the features of a frozen encoder, which others share."""

    train_images: Count | None = None
    """Use at most this many labelled training images; none means all."""
    pool: Pool = "cls"
    resize: Resize = "timm"

    def flops(self, model: Model, samples: int, train: int, test: int, outputs: int) -> float:
        """0: the features have a stage of their own."""
        return 0.0


class OfTask(Task):
    """A task that judges the outcome of another one further; nothing is trained."""

    of_kinds: ClassVar[tuple[str, ...]]
    """Protocols of the tasks that `of` may name."""
    uses_encoder: ClassVar[bool] = False
    """Whether it needs the encoder too."""

    of: str
    """The task whose outcome is judged."""

    def num_train(self, meta: DatasetMeta) -> int:
        """Nothing is trained."""
        return 0
