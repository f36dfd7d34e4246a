"""Encoder weights of a stage: one safetensors file, timm's names, float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from harness.errors import UserError
from harness.models.heads import Pool
from harness.models.vit import VisionEncoder
from harness.models.weight_files import write_safetensors
from harness.study.recipes import Model


def save_encoder(
    path: Path,
    tensors: Mapping[str, Tensor],
    model: Model | None = None,
    pool: Pool | None = None,
) -> None:
    """Write `tensors` (timm name -> value) as float32; readers see the old file or the new.

    With `model`, the header says what the tensors do not: heads, image size, pooling.
    """
    said = {}
    if model is not None:
        said = {"layout": "harness", **model.model_dump(), "pool": pool}
    write_safetensors(path, {name: value.float() for name, value in tensors.items()}, said)


def load_encoder(encoder: VisionEncoder, path: Path) -> None:
    """Copy the weights of `path` into `encoder`. UserError unless names and shapes agree."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors weights: {error}") from error
    wanted = encoder.state_dict()
    problems = []
    for title, names in (
        ("missing", wanted.keys() - tensors.keys()),
        ("unexpected", tensors.keys() - wanted.keys()),
    ):
        if names:
            problems.append(f"{path}: {title}: {', '.join(sorted(names))}")
    for name in sorted(wanted.keys() & tensors.keys()):
        if wanted[name].shape != tensors[name].shape:
            found, expected = tuple(tensors[name].shape), tuple(wanted[name].shape)
            problems.append(f"{path}: {name} is {found}, the model has {expected}")
    if problems:
        raise UserError(*problems)
    encoder.load_state_dict(tensors)
