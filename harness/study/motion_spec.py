"""What the built-in set of moving objects, *motion*, is made of. No pixels here.

A clip shows a textured object and a smaller one, each moving straight ahead on a torus: what leaves
at one edge enters at the other. The class is the direction of the larger object. At every moment
its place is uniform, whatever the class: a single frame says nothing about it.
`harness.data.motion` draws the clips.
"""

from __future__ import annotations

VERSION = 1
"""Raise it with every change that moves a pixel or a label: it enters the fingerprint."""

IMAGE_SIZE = 32
FRAMES = 8
"""Of a clip."""

# cos and sin of 45 degrees, as a decimal: equal on every machine.
_DIAGONAL = 0.70710678

DIRECTIONS: dict[str, tuple[float, float]] = {
    "right": (1.0, 0.0),
    "down_right": (_DIAGONAL, _DIAGONAL),
    "down": (0.0, 1.0),
    "down_left": (-_DIAGONAL, _DIAGONAL),
    "left": (-1.0, 0.0),
    "up_left": (-_DIAGONAL, -_DIAGONAL),
    "up": (0.0, -1.0),
    "up_right": (_DIAGONAL, -_DIAGONAL),
}
"""Class -> unit vector; y runs downwards."""

CLASSES: tuple[str, ...] = tuple(DIRECTIONS)

TRAIN_CLIPS = 2000
SPLITS: tuple[str, ...] = ("train", "test")
"""Order matters: the place of a split enters its random numbers."""


def counts(train: int | None = None) -> dict[str, int]:
    """Clips per split."""
    return {"train": TRAIN_CLIPS if train is None else train, "test": 800}
