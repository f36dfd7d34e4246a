"""Closed-form FLOPs of the detector, by the rules of `harness.study.flops`.

Left out: pooling, matching, non-maximum suppression, pasting. The heads are counted as if every
image gave as many boxes as its sample may have, and a quarter of them were positive and had masks.
"""

from __future__ import annotations

from harness.study.protocols.heads import Heads
from harness.study.recipes import Model

_BOX_SIDE, _MASK_SIDE, _STAGES, _ASPECTS = 7, 14, 3, 3


def backbone_forward(model: Model, window: int, num_global: int, relative: bool) -> float:
    """One image through the blocks; windows that stick out of the grid are computed whole."""
    d, grid = model.width, model.image_size // model.patch
    num_global = min(num_global, model.depth)
    embed = 2.0 * grid**2 * 3 * model.patch**2 * d
    whole = _attention(grid, grid, d, relative)
    windowed = _attention(grid, min(window, grid), d, relative)
    mlp = 16.0 * grid**2 * d * d
    parts = num_global * whole + (model.depth - num_global) * windowed
    return embed + parts + model.depth * mlp


def _attention(grid: int, window: int, d: int, relative: bool) -> float:
    parts = -(-grid // window)
    tokens, num = window**2, parts**2
    positions = 4.0 * tokens * window * d if relative else 0.0
    return num * (8.0 * tokens * d * d + 4.0 * tokens**2 * d + positions)


def _conv(inputs: int, outputs: int, kernel: int, side: int) -> float:
    return 2.0 * inputs * outputs * kernel**2 * side**2


def pyramid_forward(model: Model, heads: Heads) -> float:
    """All maps of one image."""
    grid, total, c = model.image_size // model.patch, 0.0, heads.channels
    for scale in heads.scales:
        d = model.width
        if scale == 4.0:
            total += _conv(d, d // 2, 2, grid) + _conv(d // 2, d // 4, 2, 2 * grid)
            d //= 4
        elif scale == 2.0:
            total += _conv(d, d // 2, 2, grid)
            d //= 2
        side = int(grid * scale)
        total += _conv(d, c, 1, side) + _conv(c, c, 3, side)
    return total


def proposals_forward(model: Model, heads: Heads) -> float:
    """The head of the proposal network on all maps of one image."""
    grid, c = model.image_size // model.patch, heads.channels
    sides = [int(grid * scale) for scale in heads.scales]
    sides.append(-(-sides[-1] // 2))
    return sum(
        heads.rpn_convs * _conv(c, c, 3, side) + _conv(c, 5 * _ASPECTS, 1, side) for side in sides
    )


def box_head_forward(heads: Heads, num_classes: int) -> float:
    """One box through the head of one stage."""
    c, width = heads.channels, heads.box_width
    convs = heads.box_convs * _conv(c, c, 3, _BOX_SIDE)
    return convs + 2.0 * width * (c * _BOX_SIDE**2 + 1 + num_classes + 4)


def mask_head_forward(heads: Heads, num_classes: int) -> float:
    """One box through the mask head."""
    c = heads.channels
    convs = heads.mask_convs * _conv(c, c, 3, _MASK_SIDE) + _conv(c, c, 2, _MASK_SIDE)
    return convs + _conv(c, 1 + num_classes, 1, 2 * _MASK_SIDE)


def detector_train(
    model: Model, heads: Heads, num_classes: int, window: int, num_global: int, relative: bool
) -> float:
    """One image in training: three forward passes, less the input gradient of the patches."""
    forward = backbone_forward(model, window, num_global, relative)
    forward += pyramid_forward(model, heads) + proposals_forward(model, heads)
    forward += _STAGES * heads.rois * box_head_forward(heads, num_classes)
    forward += heads.rois / 4 * mask_head_forward(heads, num_classes)
    return 3.0 * forward - 2.0 * model.num_patches * 3 * model.patch**2 * model.width
