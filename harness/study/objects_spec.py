"""What the built-in set of *objects* with boxes and masks is made of. No pixels here.

An image shows one to four textured objects that may cover each other; the category is the shape.
`harness.data.objects` draws them, and writes the annotations that packing COCO writes.
"""

from __future__ import annotations

from harness.study.scenes_spec import SHAPES

VERSION = 1
"""Raise it with every change that moves a pixel or an annotation: it enters the fingerprint."""

IMAGE_SIZE = 64
MOST_OBJECTS = 4
RADIUS: tuple[float, float] = (6.0, 14.0)
"""Smallest and largest, in pixels."""
LEAST_VISIBLE = 0.4
"""Share of an object that must be seen; one that is covered more is not drawn at all."""

CLASSES: tuple[str, ...] = tuple(SHAPES)

TRAIN_IMAGES = 2000
SPLITS: tuple[str, ...] = ("train", "test")
"""Order matters: the place of a split enters its random numbers."""


def counts(train: int | None = None) -> dict[str, int]:
    """Images per split."""
    return {"train": TRAIN_IMAGES if train is None else train, "test": 400}
