"""Objects with boxes and masks, drawn: image i of a split is a function of (VERSION, split, i).

Bytes are equal on every CPU, by the rules of `harness.data.scenes`. Annotations are those that
packing COCO writes; an object's box and mask are of the part of it that is seen.
"""

# Shapes: B images of a group, G objects an image, S side of an image.

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.data.hashing import fold, mix, unit
from harness.data.outlines import run_lengths
from harness.data.png import encode_png
from harness.data.shapes import SHAPE_FIELDS, TEXTURE_FIELDS
from harness.data.shards import Sample
from harness.study import objects_spec as spec
from harness.study.scenes_spec import COLOURS

GROUP = 32

_RGB = np.array([rgb for rgb, *_ in COLOURS.values()])


@dataclass(frozen=True)
class Pictures:
    """Images of a split with what is seen in them."""

    pixels: np.ndarray
    """uint8 [B, S, S, 3]."""
    masks: np.ndarray
    """bool [B, G, S, S]: where object g is seen, nearest first; all False of one that is not."""
    class_ids: np.ndarray
    """int64 [B, G]."""


class _Draws:
    """Numbers for a group of images; each call is the next column of the images' own streams."""

    def __init__(self, split: str, start: int, num: int) -> None:
        stream = fold(0x0B1EC7, spec.VERSION, spec.SPLITS.index(split))
        self._base = mix(np.arange(start, start + num, dtype=np.uint64) ^ np.uint64(stream))
        self._column = 0

    def bits(self) -> np.ndarray:
        """uint64 [B]."""
        self._column += 1
        return mix(self._base + np.uint64(self._column))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """float64 [B] in [low, high)."""
        return low + (high - low) * unit(self.bits())

    def below(self, num: int) -> np.ndarray:
        """int64 [B] in range(num)."""
        return (self.uniform() * num).astype(np.int64)


def draw(split: str, start: int, num: int) -> Pictures:
    """Images [start, start + num) of `split`."""
    parts = [
        _draw_group(split, first, min(GROUP, start + num - first))
        for first in range(start, start + num, GROUP)
    ]
    return Pictures(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.masks for part in parts]),
        np.concatenate([part.class_ids for part in parts]),
    )


def samples(split: str, first: int, num: int) -> Iterator[Sample]:
    """The same as samples of a shard."""
    for start in range(first, first + num, GROUP):
        group = _draw_group(split, start, min(GROUP, first + num - start))
        for place, pixels in enumerate(group.pixels):
            notes = [
                _note(mask, int(class_id))
                for mask, class_id in zip(group.masks[place], group.class_ids[place], strict=True)
                if mask.any()
            ]
            yield Sample(
                key=f"{split}-{start + place:09d}",
                image=encode_png(pixels),
                image_type="png",
                fields={
                    "classes": sorted({note["class"] for note in notes}),
                    "annotations": notes,
                    "image_id": start + place,
                    "width": spec.IMAGE_SIZE,
                    "height": spec.IMAGE_SIZE,
                },
            )


def _note(mask: np.ndarray, class_id: int) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "class": class_id,
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(mask.shape), "counts": run_lengths(mask)},
    }


def _draw_group(split: str, start: int, num: int) -> Pictures:
    draws, side = _Draws(split, start, num), spec.IMAGE_SIZE
    wanted = draws.below(spec.MOST_OBJECTS) + 1
    canvas = _background(draws, num)
    covered = np.zeros((num, side, side), dtype=bool)
    layers: list[tuple[np.ndarray, np.ndarray]] = []
    masks, class_ids = [], []
    # Nearest first: whether an object is seen depends on those before it alone.
    for place in range(spec.MOST_OBJECTS):
        shape, cover, paint = _object(draws, num)
        whole = cover > np.float32(0.5)
        seen = whole & ~covered
        enough = seen.sum(axis=(1, 2)) >= spec.LEAST_VISIBLE * whole.sum(axis=(1, 2))
        is_there = (enough & (wanted > place))[:, None, None]
        masks.append(seen & is_there)
        covered |= whole & is_there
        class_ids.append(shape)
        layers.append((cover * is_there, paint))
    for cover, paint in reversed(layers):
        canvas += (paint - canvas) * cover[..., None]
    _add_noise(canvas, draws)
    pixels = np.minimum(np.maximum(canvas, 0.0), 1.0) * np.float32(255.0) + np.float32(0.5)
    return Pictures(pixels.astype(np.uint8), np.stack(masks, axis=1), np.stack(class_ids, axis=1))


def _object(draws: _Draws, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shape [B], share of each pixel that is covered [B, S, S], colours [B, S, S, 3]."""
    side = spec.IMAGE_SIZE
    shape, texture = draws.below(len(SHAPE_FIELDS)), draws.below(len(TEXTURE_FIELDS))
    front = _RGB[draws.below(len(_RGB))] + np.stack(
        [draws.uniform(-0.06, 0.06) for _ in range(3)], axis=1
    )
    back = front * draws.uniform(0.2, 0.45)[:, None]
    radius = draws.uniform(*spec.RADIUS)
    # Whole in the image: a shape that the edge cuts cannot be told from some others.
    x, y = (radius + draws.uniform() * (side - 2 * radius) for _ in range(2))
    steps = np.arange(side) + 0.5
    gap_x = ((steps - x[:, None]) / radius[:, None]).astype(np.float32)
    gap_y = ((steps - y[:, None]) / radius[:, None]).astype(np.float32)
    u = np.broadcast_to(gap_x[:, None, :], (num, side, side))
    v = np.broadcast_to(gap_y[:, :, None], (num, side, side))
    field = _by_kind(SHAPE_FIELDS, shape, u, v)
    # Signed distance in radii -> share of the pixel covered, one pixel wide at the edge.
    cover = np.float32(0.5) - field * radius.astype(np.float32)[:, None, None]
    cover = np.minimum(np.maximum(cover, np.float32(0)), np.float32(1))
    blend = _by_kind(TEXTURE_FIELDS, texture, u, v, field)[..., None]
    front, back = (rgb.astype(np.float32)[:, None, None] for rgb in (front, back))
    return shape, cover, front + (back - front) * blend


def _by_kind(
    functions: list[Callable[..., np.ndarray]], kind: np.ndarray, *arguments: np.ndarray
) -> np.ndarray:
    """Row i of the result is functions[kind[i]] of row i of the arguments."""
    result = np.empty(arguments[0].shape, dtype=np.float32)
    for code in np.unique(kind):
        rows = np.flatnonzero(kind == code)
        result[rows] = functions[code](*(argument[rows] for argument in arguments))
    return result


def _background(draws: _Draws, num: int) -> np.ndarray:
    """float32 [B, S, S, 3]: a gradient between two dull colours."""
    ends = [np.stack([draws.uniform(0.02, 0.4) for _ in range(3)], axis=1) for _ in range(2)]
    axis = (np.arange(spec.IMAGE_SIZE) - (spec.IMAGE_SIZE - 1) / 2) / (2 * spec.IMAGE_SIZE)
    across, down = draws.uniform(-1, 1), draws.uniform(-1, 1)
    share = 0.5 + across[:, None, None] * axis + (down[:, None] * axis)[:, :, None]
    canvas = ends[0][:, None, None] * (1 - share[..., None])
    canvas += ends[1][:, None, None] * share[..., None]
    return canvas.astype(np.float32)


def _add_noise(canvas: np.ndarray, draws: _Draws) -> None:
    """Of a strength of its own in every image; in place."""
    words = canvas[0].size // 8
    bits = mix(draws.bits()[:, None] + np.arange(words, dtype=np.uint64))
    grain = bits.astype("<u8").view(np.uint8).reshape(canvas.shape).astype(np.float32)
    strength = np.maximum(draws.uniform(-0.1, 0.1), 0.0).astype(np.float32)
    canvas += (grain / np.float32(255) - np.float32(0.5)) * strength.reshape(-1, 1, 1, 1)
