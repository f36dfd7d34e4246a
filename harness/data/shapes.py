"""Shapes as signed distances and textures as blends, in an object's own frame of radius 1.

A shape field takes u (right) and v (down), float32 [G, W, W], and is below 0 inside; distances are
in radii and only need to be right near the edge. A texture takes u, v and the shape's field and
says how much of the second colour to mix in, 0 to 1. Only + - * / sqrt, abs, floor, min, max and
comparisons: see `harness.data.scenes`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Field = np.ndarray


def _length(u: Field, v: Field) -> Field:
    return np.sqrt(u * u + v * v)


def _box(u: Field, v: Field, half_width: float, half_height: float) -> Field:
    return np.maximum(np.abs(u) - np.float32(half_width), np.abs(v) - np.float32(half_height))


def _circle(u: Field, v: Field) -> Field:
    return _length(u, v) - np.float32(0.95)


def _square(u: Field, v: Field) -> Field:
    return _box(u, v, 0.82, 0.82)


def _triangle(u: Field, v: Field) -> Field:
    # Apex up: v runs downwards.
    sides = np.abs(u) * np.float32(0.894) + (-v) * np.float32(0.447) - np.float32(0.42)
    return np.maximum(sides, v - np.float32(0.8))


def _ring(u: Field, v: Field) -> Field:
    return np.abs(_length(u, v) - np.float32(0.72)) - np.float32(0.25)


def _star(u: Field, v: Field) -> Field:
    # An astroid, |u|^(1/2) + |v|^(1/2) = 1, fattened: four thin points.
    return (np.sqrt(np.abs(u)) + np.sqrt(np.abs(v)) - np.float32(1.13)) * np.float32(0.6)


def _cross(u: Field, v: Field) -> Field:
    return np.minimum(_box(u, v, 0.95, 0.31), _box(u, v, 0.31, 0.95))


def _bar(u: Field, v: Field) -> Field:
    return _box(u, v, 1.0, 0.42)


def _dome(u: Field, v: Field) -> Field:
    return np.maximum(_length(u, v - np.float32(0.45)) - np.float32(0.98), v - np.float32(0.45))


def _diamond(u: Field, v: Field) -> Field:
    return (np.abs(u) * np.float32(1.5) + np.abs(v) - np.float32(1)) * np.float32(0.555)


def _crescent(u: Field, v: Field) -> Field:
    bite = np.float32(0.75) - _length(u - np.float32(0.48), v)
    return np.maximum(_length(u, v) - np.float32(0.98), bite)


def _wave(phase: Field) -> Field:
    """0 or 1 in alternation, one period per unit of phase."""
    return (phase - np.floor(phase) < np.float32(0.5)).astype(np.float32)


def _solid(u: Field, v: Field, field: Field) -> Field:
    return np.zeros_like(u)


def _striped(u: Field, v: Field, field: Field) -> Field:
    return _wave(u * np.float32(2.4) + np.float32(0.25))


def _dotted(u: Field, v: Field, field: Field) -> Field:
    a, b = u * np.float32(2.0), v * np.float32(2.0)
    a, b = a - np.floor(a) - np.float32(0.5), b - np.floor(b) - np.float32(0.5)
    return (a * a + b * b < np.float32(0.1)).astype(np.float32)


def _checkered(u: Field, v: Field, field: Field) -> Field:
    return np.abs(_wave(u * np.float32(1.5)) - _wave(v * np.float32(1.5)))


def _outlined(u: Field, v: Field, field: Field) -> Field:
    return (field < np.float32(-0.2)).astype(np.float32)


def _split(u: Field, v: Field, field: Field) -> Field:
    return (u > 0).astype(np.float32)


# In the order of scenes_spec.SHAPES and scenes_spec.TEXTURES.
SHAPE_FIELDS: list[Callable[..., Field]] = [
    _ring,
    _square,
    _star,
    _bar,
    _triangle,
    _circle,
    _cross,
    _dome,
    _diamond,
    _crescent,
]
TEXTURE_FIELDS: list[Callable[..., Field]] = [
    _solid,
    _striped,
    _checkered,
    _outlined,
    _dotted,
    _split,
]
