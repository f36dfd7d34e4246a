"""Moving objects, drawn: clip i of a split is a function of (VERSION, split, i) alone.

Bytes are equal on every CPU, by the rules of `harness.data.scenes`. A clip is stored as a strip:
one PNG with its frames below each other, see `harness.data.video`.
"""

# Shapes: B clips of a group, T frames, S side of a frame.

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from harness.data.hashing import fold, mix, unit
from harness.data.png import encode_png
from harness.data.shapes import SHAPE_FIELDS, TEXTURE_FIELDS
from harness.data.shards import Sample
from harness.study import motion_spec as spec
from harness.study.scenes_spec import COLOURS

GROUP = 32
NUM_SMALL = 1
"""Objects that move otherwise than the class says. With two, and faster ones, a ViT of width 48
learned little from 8,000 views."""

_RGB = np.array([rgb for rgb, *_ in COLOURS.values()])
_DIRECTIONS = np.array(list(spec.DIRECTIONS.values()))


@dataclass(frozen=True)
class Clips:
    """Clips of a split with their classes."""

    pixels: np.ndarray
    """uint8 [B, T, S, S, 3]."""
    class_ids: np.ndarray
    """int64 [B]."""


class _Draws:
    """Numbers for a group of clips; each call is the next column of the clips' own streams."""

    def __init__(self, split: str, start: int, num: int) -> None:
        stream = fold(0x40710, spec.VERSION, spec.SPLITS.index(split))
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


def draw(split: str, start: int, num: int) -> Clips:
    """Clips [start, start + num) of `split`."""
    parts = [
        _draw_group(split, first, min(GROUP, start + num - first))
        for first in range(start, start + num, GROUP)
    ]
    return Clips(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.class_ids for part in parts]),
    )


def samples(split: str, first: int, num: int) -> Iterator[Sample]:
    """The same as samples of a shard."""
    for start in range(first, first + num, GROUP):
        clips = _draw_group(split, start, min(GROUP, first + num - start))
        for place, class_id in enumerate(clips.class_ids.tolist()):
            yield Sample(
                key=f"{split}-{start + place:09d}",
                image=encode_png(clips.pixels[place].reshape(-1, spec.IMAGE_SIZE, 3)),
                image_type="png",
                class_id=class_id,
            )


def _draw_group(split: str, start: int, num: int) -> Clips:
    draws = _Draws(split, start, num)
    num_classes = len(spec.CLASSES)
    # Consecutive clips cycle through the classes: every class has as many clips as the next.
    class_ids = (np.arange(start, start + num) * 5 + 3) % num_classes
    canvas = np.repeat(_background(draws, num)[:, None], spec.FRAMES, axis=1)
    for _ in range(NUM_SMALL):
        other = (class_ids + 1 + draws.below(num_classes - 1)) % num_classes
        _paint(canvas, draws, other, radius=(1.8, 3.0), speed=(0.8, 1.6))
    _paint(canvas, draws, class_ids, radius=(6.0, 8.0), speed=(0.8, 1.6))
    _add_noise(canvas, draws)
    pixels = np.minimum(np.maximum(canvas, 0.0), 1.0) * np.float32(255.0) + np.float32(0.5)
    return Clips(pixels.astype(np.uint8), class_ids)


def _background(draws: _Draws, num: int) -> np.ndarray:
    """float32 [B, S, S, 3]: a gradient between two dull colours; it stands still."""
    ends = [np.stack([draws.uniform(0.02, 0.4) for _ in range(3)], axis=1) for _ in range(2)]
    axis = (np.arange(spec.IMAGE_SIZE) - (spec.IMAGE_SIZE - 1) / 2) / (2 * spec.IMAGE_SIZE)
    across, down = draws.uniform(-1, 1), draws.uniform(-1, 1)
    share = 0.5 + across[:, None, None] * axis + (down[:, None] * axis)[:, :, None]
    canvas = ends[0][:, None, None] * (1 - share[..., None])
    canvas += ends[1][:, None, None] * share[..., None]
    return canvas.astype(np.float32)


def _paint(
    canvas: np.ndarray,
    draws: _Draws,
    direction: np.ndarray,
    radius: tuple[float, float],
    speed: tuple[float, float],
) -> None:
    """Draws an object a clip over [B, T, S, S, 3], moving along `direction` on a torus."""
    num, side = len(canvas), spec.IMAGE_SIZE
    shape, texture = draws.below(len(SHAPE_FIELDS)), draws.below(len(TEXTURE_FIELDS))
    front = _RGB[draws.below(len(_RGB))] + np.stack(
        [draws.uniform(-0.06, 0.06) for _ in range(3)], axis=1
    )
    back = front * draws.uniform(0.2, 0.45)[:, None]
    size = draws.uniform(*radius)
    steps = np.arange(spec.FRAMES) * draws.uniform(*speed)[:, None]
    start = np.stack([draws.uniform(0, side), draws.uniform(0, side)], axis=1)
    place = start[:, None] + steps[..., None] * _DIRECTIONS[direction][:, None]
    gap = (np.arange(side) + 0.5) - place[..., None]
    gap -= side * np.floor(gap / side + 0.5)  # the nearer way around the torus
    gap = (gap / size[:, None, None, None]).astype(np.float32)
    u = np.broadcast_to(gap[:, :, 0, None, :], canvas.shape[:4])
    v = np.broadcast_to(gap[:, :, 1, :, None], canvas.shape[:4])
    field = _by_kind(SHAPE_FIELDS, shape, u, v)
    # Signed distance in radii -> share of the pixel covered, one pixel wide at the edge.
    cover = np.float32(0.5) - field * size.astype(np.float32).reshape(num, 1, 1, 1)
    cover = np.minimum(np.maximum(cover, np.float32(0)), np.float32(1))[..., None]
    blend = _by_kind(TEXTURE_FIELDS, texture, u, v, field)[..., None]
    front, back = (rgb.astype(np.float32)[:, None, None, None] for rgb in (front, back))
    canvas += (front + (back - front) * blend - canvas) * cover


def _by_kind(
    functions: list[Callable[..., np.ndarray]], kind: np.ndarray, *arguments: np.ndarray
) -> np.ndarray:
    """Row i of the result is functions[kind[i]] of row i of the arguments."""
    result = np.empty(arguments[0].shape, dtype=np.float32)
    for code in np.unique(kind):
        rows = np.flatnonzero(kind == code)
        # The functions take [G, S, S]: frames are further objects.
        flat = [argument[rows].reshape(-1, *argument.shape[2:]) for argument in arguments]
        result[rows] = functions[code](*flat).reshape(result[rows].shape)
    return result


def _add_noise(canvas: np.ndarray, draws: _Draws) -> None:
    """Noise of its own in every frame, of a strength of its own in every clip; in place."""
    num = len(canvas)
    words = canvas[0].size // 8
    bits = mix(draws.bits()[:, None] + np.arange(words, dtype=np.uint64))
    grain = bits.astype("<u8").view(np.uint8).reshape(canvas.shape).astype(np.float32)
    strength = np.maximum(draws.uniform(-0.1, 0.1), 0.0).astype(np.float32)
    canvas += (grain / np.float32(255) - np.float32(0.5)) * strength.reshape(num, 1, 1, 1, 1)
