"""A fine-tuned model as one file: encoder and head, and what its outputs mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from harness.errors import DataError
from harness.models.heads import Classifier
from harness.models.vit import VisionEncoder
from harness.models.weight_files import METADATA_KEY, write_safetensors
from harness.study.recipes import Model, Pool

FILE = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A classifier on the CPU in evaluation mode, and its classes in the order of its outputs."""

    model: Classifier
    shape: Model
    classes: list[str]
    crop: str
    """How test images became squares in fine-tuning: `squash` or `centre`."""
    crop_fraction: float


def save_classifier(
    folder: Path,
    tensors: Mapping[str, Tensor],
    model: Model,
    pool: Pool,
    classes: Sequence[str],
    fingerprint: str,
    crop: tuple[str, float] = ("squash", 1.0),
) -> None:
    """model.safetensors: tensors `encoder.*` and `head.*` in float32, with what they mean.

    `fingerprint`: of the dataset that it was trained on. `crop`: how test images became squares,
    and the fraction of their shorter side in it.
    """
    said: dict[str, Any] = {"model": model.model_dump(), "pool": pool, "classes": list(classes)}
    said |= {"fingerprint": fingerprint, "crop": crop[0], "crop_fraction": crop[1]}
    write_safetensors(folder / FILE, {name: value.float() for name, value in tensors.items()}, said)


def read_classifier(folder: Path) -> Judge:
    """What `save_classifier` wrote. Raises DataError for a file that is not such a one."""
    path = folder / FILE
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {})[METADATA_KEY])
        shape, classes = Model.model_validate(said["model"]), list(said["classes"])
        model = Classifier(VisionEncoder(shape), len(classes), said["pool"])
        model.load_state_dict(load_file(path))
        crop, fraction = str(said["crop"]), float(said["crop_fraction"])
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise DataError(
            f"{path}: not a fine-tuned model ({first}); run its stage again with --mode force"
        ) from None
    return Judge(
        model=model.eval(), shape=shape, classes=classes, crop=crop, crop_fraction=fraction
    )
