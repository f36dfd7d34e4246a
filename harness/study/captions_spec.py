"""What the built-in set *captions* is made of: counts and words. No pixels here.

Its pictures are scenes like those of `harness.study.scenes_spec`, others than these; each comes
with a sentence about its main object and, now and then, what is around it. One thing has several
names (ring, donut), one fact several wordings. `harness.data.captions` draws and writes them.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.study import scenes_spec

VERSION = 1
"""Raise it with every change that moves a pixel or a letter: it enters the fingerprint."""

IMAGE_SIZE = scenes_spec.IMAGE_SIZE
TRAIN_IMAGES = 8_000
TEST_CAPTIONS = 2
"""Wordings of each test image; a training image has one."""

SPLITS: tuple[str, ...] = ("train", "test")
"""Order matters: the place of a split enters its random numbers."""


def counts(train: int | None = None) -> dict[str, int]:
    """Images per split; `test` is for retrieval."""
    return {"train": TRAIN_IMAGES if train is None else train, "test": 1000}


def _words(tags: Sequence[str]) -> tuple[str, ...]:
    return tuple(tag.removeprefix("#") for tag in tags)


SHAPES = {name: _words(tags) for name, tags in scenes_spec.SHAPES.items()}
TEXTURES = {name: _words(tags) for name, tags in scenes_spec.TEXTURES.items()}
COLOURS = {name: _words(tags) for name, (_, *tags) in scenes_spec.COLOURS.items()}
"""Name -> the words for it, the usual one first."""

SUBJECTS: tuple[str, ...] = (
    "{size} {texture} {colour} {shape}",
    "{size} {colour} {texture} {shape}",
    "{size} {texture} {shape} in {colour}",
    "{size} {colour} {shape} that is {texture}",
)
"""The main object in words; what is not said is left out with its spaces."""

FRAMES: tuple[str, ...] = (
    "{}",
    "a picture of {}",
    "a photo of {}",
    "this is {}",
    "an image showing {}",
    "look, {}",
    "here you see {}",
)
BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "dark": ("on a dark background", "in the dark", "at night"),
    "light": ("on a grey background", "in daylight", "by day"),
    "horizon": ("in front of a horizon", "with a horizon behind it", "under a wide sky"),
}
SECONDS: tuple[str, ...] = ("next to {}", "with {} beside it", "and {}")
PLACES: dict[str, tuple[str, ...]] = {
    "left": ("to the left", "left of the middle"),
    "right": ("to the right", "right of the middle"),
    "top": ("near the top", "above the middle"),
    "bottom": ("near the bottom", "below the middle"),
}
SIZES: dict[str, tuple[str, ...]] = {"big": ("big", "large"), "small": ("small", "little")}

CLASS_NAMES: dict[str, tuple[str, ...]] = {
    f"{texture} {shape}": tuple(f"{a} {b}" for b in SHAPES[shape] for a in TEXTURES[texture])
    for texture, shape in scenes_spec.CLASS_PAIRS
}
"""The clean classes of `scenes`: what else each is called."""
