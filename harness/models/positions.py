"""Learned or fixed position tables: resized to another grid, compared with 2-D sin-cos.

Shapes: N positions (class token first), D width.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from harness.models.vit import sincos_positions
from harness.study.recipes import Resize


def grid_of(num_positions: int) -> int | None:
    """Patches along a side, None unless the positions are a class token and a square grid."""
    side = math.isqrt(max(0, num_positions - 1))
    return side if side > 0 and side * side + 1 == num_positions else None


def resize_positions(table_1ND: Tensor, grid: int, variant: Resize) -> Tensor:
    """[1, 1 + grid * grid, D]: bicubic, in float32, in the table's type; the class row is kept.

    A table of that grid is returned as it is.
    """
    side = grid_of(table_1ND.shape[1])
    assert side is not None, f"{table_1ND.shape[1]} positions are no class token and square grid"
    if side == grid:
        return table_1ND
    square = table_1ND[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(
        square,
        size=(grid, grid),
        mode="bicubic",
        align_corners=variant == "swag",
        antialias=variant == "timm",
    )
    rows = resized.permute(0, 2, 3, 1).reshape(1, grid * grid, -1).to(table_1ND.dtype)
    table = table_1ND.new_empty(1, 1 + grid * grid, table_1ND.shape[2])
    table[:, :1], table[:, 1:] = table_1ND[:, :1], rows
    return table


def distance_from_sincos(table_1ND: Tensor) -> float | None:
    """Largest absolute difference from `sincos_positions`; None where no such table exists."""
    side, width = grid_of(table_1ND.shape[1]), table_1ND.shape[2]
    if side is None or width % 4:
        return None
    return (table_1ND.float() - sincos_positions(side, width)).abs().max().item()
