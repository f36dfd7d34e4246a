"""Further test sets of the scenes' classes: image i is a function of (VERSION, i) alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from harness.data.png import encode_png
from harness.data.scenes import Look, draw
from harness.data.shards import Sample
from harness.study import scenes_spec
from harness.study.scene_variants_spec import SHIFTED_CLASSES

REAL = Look(number=1, radius=(7.0, 8.5), margin=9.0, has_pair=True, strangers=0.3)
"""Two small objects in half of the images: both are right. Of some images none is a class."""
V2 = Look(number=2, radius=(9.0, 12.0), margin=13.0, turns=10, noise=0.08)
"""Drawn anew, and somewhat harder."""
SHIFT = Look(number=3, radius=(7.0, 13.0), margin=11.0, turns=40, levels=(0.3, 0.5))
"""Objects turned by up to 56 degrees, of many sizes, before lighter backgrounds."""

_SHIFTED = [scenes_spec.CLASSES.index(name) for _, name in SHIFTED_CLASSES]


def real(split: str, first: int, num: int) -> Iterator[Sample]:
    """Images with no, one or two classes."""
    scenes = draw(split, first, num, REAL)
    assert scenes.second_ids is not None, "a look has a second object"
    pairs = np.stack([scenes.class_ids, scenes.second_ids], axis=1)
    for place, own in enumerate(pairs):
        classes = sorted({int(class_id) for class_id in own if class_id >= 0})
        yield Sample(
            key=f"{split}-{first + place:09d}",
            image=encode_png(scenes.pixels[place]),
            image_type="png",
            fields={"classes": classes},
        )


def v2(split: str, first: int, num: int) -> Iterator[Sample]:
    """The same classes, drawn anew."""
    scenes = draw(split, first, num, V2)
    for place, class_id in enumerate(scenes.class_ids.tolist()):
        yield _single(split, first + place, scenes.pixels[place], class_id)


def shift(split: str, first: int, num: int) -> Iterator[Sample]:
    """Half of the classes; the other images are not drawn."""
    per_cycle = len(_SHIFTED)
    # The classes of consecutive images cycle: of every cycle the images of these classes stay.
    cycles = range(first // per_cycle, -(-(first + num) // per_cycle))
    size = len(scenes_spec.CLASSES)
    for cycle in cycles:
        scenes = draw(split, cycle * size, size, SHIFT)
        kept = [place for place, own in enumerate(scenes.class_ids.tolist()) if own in _SHIFTED]
        for number, place in enumerate(kept, start=cycle * per_cycle):
            if first <= number < first + num:
                class_id = _SHIFTED.index(int(scenes.class_ids[place]))
                yield _single(split, number, scenes.pixels[place], class_id)


def _single(split: str, number: int, pixels: np.ndarray, class_id: int) -> Sample:
    key, image = f"{split}-{number:09d}", encode_png(pixels)
    return Sample(key=key, image=image, image_type="png", class_id=class_id)
