"""Encoder weights on disk: one safetensors file, timm's names, float32."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.errors import UserError
from harness.models.vit import VisionEncoder


def save_encoder(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` (timm name -> value) as float32; readers see the old file or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    save_file(
        {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()},
        temporary,
    )
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def load_encoder(encoder: VisionEncoder, path: Path) -> None:
    """Copy the weights of `path` into `encoder`. UserError unless names and shapes agree."""
    encoder.load_state_dict(read_encoder(encoder, path))


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
