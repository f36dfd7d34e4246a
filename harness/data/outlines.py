"""Where an object is: polygons and run lengths as COCO's JSON has them, without pycocotools."""

from __future__ import annotations

from typing import Any

import numpy as np

Outline = list[list[float]] | dict[str, Any]
"""Polygons [x, y, x, y ...], or {"size": [height, width], "counts": run lengths}."""


def run_lengths(mask_HW: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths: column by column, first the number of pixels outside."""
    flat = mask_HW.T.ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [len(flat)]])).tolist()
    return [0, *runs] if flat[0] else runs


def mask_of(outline: dict[str, Any]) -> np.ndarray:
    """bool [H, W] of uncompressed run lengths. Raises ValueError if they do not fill the image."""
    height, width = outline["size"]
    runs = np.asarray(outline["counts"], dtype=np.int64)
    if runs.sum() != height * width:
        raise ValueError(f"run lengths add up to {runs.sum()}, expected {height} x {width}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def scaled_outline(outline: Outline, x: float, y: float, size: tuple[int, int]) -> Outline:
    """The outline in an image that is x times as wide and y times as high: `size` (width, height).

    Of run lengths, each pixel takes the value of the nearest one.
    """
    if not isinstance(outline, dict):
        return [
            [round(v * (y if place % 2 else x), 3) for place, v in enumerate(polygon)]
            for polygon in outline
        ]
    mask, (width, height) = mask_of(outline), size
    rows = np.minimum(((np.arange(height) + 0.5) / y).astype(np.int64), mask.shape[0] - 1)
    columns = np.minimum(((np.arange(width) + 0.5) / x).astype(np.int64), mask.shape[1] - 1)
    counts = run_lengths(mask[rows][:, columns])
    return {"size": [height, width], "counts": counts}
