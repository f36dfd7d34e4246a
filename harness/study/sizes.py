"""The model-size table: the paper's ViTs and the small ones that fit two CPU cores.

Width, depth, heads and patch of b, l, h, 2b and 6.5b are those of Singh et al. 2023 (arXiv
2303.13496, sec. 3); ti and s are the usual DeiT shapes. A name such as d64x4 says width 64,
depth 4; these are ours, made for images of 24 to 64 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Size:
    """Shape of one ViT encoder; the MLP is four times as wide as the model."""

    width: int
    depth: int
    heads: int
    patch: int


SIZES: dict[str, Size] = {
    "d8x2": Size(width=8, depth=2, heads=2, patch=4),
    "d16x2": Size(width=16, depth=2, heads=2, patch=4),
    "d24x2": Size(width=24, depth=2, heads=2, patch=4),
    "d32x3": Size(width=32, depth=3, heads=2, patch=4),
    "d48x4": Size(width=48, depth=4, heads=3, patch=4),
    "d64x4": Size(width=64, depth=4, heads=4, patch=4),
    "d96x6": Size(width=96, depth=6, heads=6, patch=4),
    "d128x6": Size(width=128, depth=6, heads=4, patch=4),
    "ti": Size(width=192, depth=12, heads=3, patch=16),
    "s": Size(width=384, depth=12, heads=6, patch=16),
    "b": Size(width=768, depth=12, heads=12, patch=16),
    "l": Size(width=1024, depth=24, heads=16, patch=16),
    "h": Size(width=1280, depth=32, heads=16, patch=14),
    "2b": Size(width=2560, depth=24, heads=32, patch=14),
    "6.5b": Size(width=4096, depth=32, heads=32, patch=14),
}
