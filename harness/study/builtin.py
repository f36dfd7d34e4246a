"""Built-in datasets: drawn on first use, so that a study runs where there are no images.

Named `scenes` or, with another number of training samples, `scenes-16k`. What they hold is said
here; `harness.data.ready` has the functions that draw them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from harness.study import captions_spec, motion_spec, objects_spec, scene_variants_spec, scenes_spec
from harness.units import format_count, parse_count


@dataclass(frozen=True, kw_only=True)
class Builtin:
    """One built-in set of one number of training samples."""

    kind: str
    """Its name without the number."""
    name: str
    version: int
    """Raised with every change that moves a pixel or a label."""
    image_size: int
    splits: dict[str, int]
    count: int
    """Samples of the split that grows with the number in the name."""
    hashtags: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Class -> what it is called, for zero-shot classification."""

    @property
    def fingerprint(self) -> str:
        """Stands for the content."""
        spec = json.dumps({"version": self.version, "splits": self.splits}, sort_keys=True)
        return f"{self.kind}-{hashlib.sha256(spec.encode()).hexdigest()[:16]}"


def _scenes(count: int | None) -> Builtin:
    splits = scenes_spec.counts(count)
    return Builtin(
        kind="scenes",
        name="scenes" if count is None else f"scenes-{format_count(count)}",
        version=scenes_spec.VERSION,
        image_size=scenes_spec.IMAGE_SIZE,
        splits=splits,
        count=splits["pretrain"],
        hashtags=scenes_spec.HASHTAGS,
        classes=scenes_spec.CLASSES,
        class_names=captions_spec.CLASS_NAMES,
    )


def _captions(count: int | None) -> Builtin:
    splits = captions_spec.counts(count)
    return Builtin(
        kind="captions",
        name="captions" if count is None else f"captions-{format_count(count)}",
        version=captions_spec.VERSION,
        image_size=captions_spec.IMAGE_SIZE,
        splits=splits,
        count=splits["train"],
    )


def _motion(count: int | None) -> Builtin:
    splits = motion_spec.counts(count)
    return Builtin(
        kind="motion",
        name="motion" if count is None else f"motion-{format_count(count)}",
        version=motion_spec.VERSION,
        image_size=motion_spec.IMAGE_SIZE,
        splits=splits,
        count=splits["train"],
        classes=motion_spec.CLASSES,
    )


def _variant(kind: str, classes: tuple[str, ...]) -> Callable[[int | None], Builtin]:
    """A further test set of the scenes' classes; the number in its name is that of test images."""

    def found(count: int | None) -> Builtin:
        images = scene_variants_spec.TEST_IMAGES if count is None else count
        return Builtin(
            kind=kind,
            name=kind if count is None else f"{kind}-{format_count(count)}",
            version=scene_variants_spec.VERSION,
            image_size=scenes_spec.IMAGE_SIZE,
            splits={"test": images},
            count=images,
            classes=classes,
        )

    return found


def _objects(count: int | None) -> Builtin:
    splits = objects_spec.counts(count)
    return Builtin(
        kind="objects",
        name="objects" if count is None else f"objects-{format_count(count)}",
        version=objects_spec.VERSION,
        image_size=objects_spec.IMAGE_SIZE,
        splits=splits,
        count=splits["train"],
        classes=objects_spec.CLASSES,
    )


BUILTIN: dict[str, Callable[[int | None], Builtin]] = {
    "scenes": _scenes,
    "captions": _captions,
    "motion": _motion,
    "scenes_real": _variant("scenes_real", scenes_spec.CLASSES),
    "scenes_v2": _variant("scenes_v2", scenes_spec.CLASSES),
    "scenes_shift": _variant(
        "scenes_shift", tuple(name for name, _ in scene_variants_spec.SHIFTED_CLASSES)
    ),
    "objects": _objects,
}
"""Name -> the set with so many training samples, or as many as it has by default."""


@functools.cache
def builtin(spec: str) -> Builtin | None:
    """The built-in set that a dataset spec names; None if it names none."""
    match = re.fullmatch(r"([a-z][a-z0-9_]*)(?:-(\d\w*))?", spec)
    if match is None or match[1] not in BUILTIN:
        return None
    return BUILTIN[match[1]](parse_count(match[2]) if match[2] else None)
