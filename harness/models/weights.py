"""Encoder weights of a stage: one safetensors file, timm's names, float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from harness.errors import UserError
from harness.models.convert import encoder_tensors_for
from harness.models.vit import VisionEncoder
from harness.models.weight_files import read_weights, write_safetensors
from harness.study.recipes import Model, Pool
from harness.study.stages import StageConfig


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


def start_of(config: StageConfig, path: Path, encoder: VisionEncoder) -> dict[str, Tensor]:
    """What the encoder of a stage starts from: an upstream stage's file, or one from elsewhere.

    `encoder` may be on the meta device. UserError with everything that does not fit.
    """
    recipe: Any = config.recipe
    if not config.weights and not _is_resized(path, encoder):
        return read_encoder(encoder, path)
    try:
        return encoder_tensors_for(read_weights(path), config.model, recipe.resize, recipe.pool)
    except UserError as error:
        lines = (line.removeprefix(f"{path}: ") for line in error.problems)
        raise UserError(*(f"{path}: {line}" for line in lines)) from None


def _is_resized(path: Path, encoder: VisionEncoder) -> bool:
    """Whether our own weights are for images of another size: a task's, not the cell's."""
    try:
        with safe_open(path, framework="pt") as file:
            found = file.get_slice("pos_embed").get_shape()
    except (OSError, SafetensorError):
        return False  # read_encoder says what is wrong
    return list(found) != list(encoder.pos_embed.shape)


def read_encoder(encoder: VisionEncoder, path: Path) -> dict[str, Tensor]:
    """The weights of `path`, mapped, not read: a tensor costs memory when it is looked at.

    UserError unless names and shapes are those of `encoder`, which may be on the meta device.
    """
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
    return tensors
