"""Further test sets of the built-in scenes' classes, as ReaL, ImageNetV2 and ObjectNet are of
ImageNet's: what is in them. No pixels here.
"""

from __future__ import annotations

from harness.study import scenes_spec

VERSION = 1
TEST_IMAGES = 2000

SHIFTED_CLASSES: tuple[tuple[str, str], ...] = tuple(
    (f"{texture} {scenes_spec.SHAPES[shape][1].lstrip('#')}", f"{texture} {shape}")
    for place, (texture, shape) in enumerate(scenes_spec.CLASS_PAIRS)
    if place % 2 == 0
)
"""(name in `scenes_shift`, name in `scenes`): half of the classes, the shapes called otherwise."""
