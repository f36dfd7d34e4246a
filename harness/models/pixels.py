"""Pixels: bytes to network input and back, images to patches and back.

Shapes: B images, C channels, H height, W width, L patches of an image, p patch side,
P = C * p * p numbers of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
"""Channel means of ImageNet; used for every data set, so that weights move between them."""
STD = (0.229, 0.224, 0.225)


def standardise(images_BCHW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Network input from uint8 pixels, on the device the pixels are on.

    The arithmetic is float32 whatever `dtype` is: bfloat16 holds 256 levels only near zero. The
    result is contiguous whatever the order in memory of the pixels.
    """
    mean = torch.tensor(MEAN, device=images_BCHW.device).view(1, -1, 1, 1)
    std = torch.tensor(STD, device=images_BCHW.device).view(1, -1, 1, 1)
    plain = images_BCHW.contiguous().float()
    return ((plain / 255 - mean) / std).to(dtype)


def to_bytes(images_BCHW: Tensor) -> Tensor:
    """uint8 pixels from network input: the inverse of `standardise`, clamped."""
    mean = torch.tensor(MEAN, device=images_BCHW.device).view(1, -1, 1, 1)
    std = torch.tensor(STD, device=images_BCHW.device).view(1, -1, 1, 1)
    return ((images_BCHW.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def patchify(images_BCHW: Tensor, patch: int) -> Tensor:
    """[B, L, P], patches row by row; inside a patch row, column, channel (channel last)."""
    batch, channels, height, width = images_BCHW.shape
    grid = images_BCHW.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(patches_BLP: Tensor, patch: int, channels: int = 3) -> Tensor:
    """Square images [B, C, H, W] from `patchify`'s output."""
    batch, num_patches, _ = patches_BLP.shape
    side = round(num_patches**0.5)
    assert side * side == num_patches, f"{num_patches} patches do not make a square"
    grid = patches_BLP.reshape(batch, side, side, patch, patch, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, side * patch, side * patch)
