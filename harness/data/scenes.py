"""The built-in set, drawn: image i of a split is a function of (VERSION, split, i) alone.

Bytes are equal on every CPU: array arithmetic keeps to + - * / sqrt and comparisons, which IEEE 754
rounds exactly; the sines of the rotations come from a table that is rounded far above libm's last
bit. Images are drawn in groups because numpy's cost per call would dominate at 32 pixels.
"""

# Shapes: B images of a group, G objects drawn at once, W side of the window they are drawn in.

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from harness.data.hashing import fold, mix, unit
from harness.data.png import encode_png
from harness.data.shapes import SHAPE_FIELDS, TEXTURE_FIELDS
from harness.data.shards import Sample
from harness.study import scenes_spec as spec

GROUP = 64

_SHAPES = list(spec.SHAPES)
_TEXTURES = list(spec.TEXTURES)
_COLOURS = list(spec.COLOURS)
_RGB = np.array([spec.COLOURS[name][0] for name in _COLOURS], dtype=np.float32)
_PLACE = {tag: place for place, tag in enumerate(spec.HASHTAGS)}
_TURNS = 256
_COS = np.array([round(math.cos(2 * math.pi * k / _TURNS), 6) for k in range(_TURNS)], np.float32)
_SIN = np.array([round(math.sin(2 * math.pi * k / _TURNS), 6) for k in range(_TURNS)], np.float32)
_CLASS_TEXTURE = np.array([_TEXTURES.index(texture) for texture, _ in spec.CLASS_PAIRS])
_CLASS_SHAPE = np.array([_SHAPES.index(shape) for _, shape in spec.CLASS_PAIRS])


@dataclass(frozen=True)
class Scenes:
    """Images `start` to `start + len(pixels)` of a split, with their labels."""

    start: int
    pixels: np.ndarray
    """uint8 [n, 32, 32, 3]."""
    hashtags: list[list[str]]
    """1 to 5 per image; empty lists on the clean splits."""
    class_ids: np.ndarray
    """int64 [n]; -1 on the weakly labelled splits."""
    second_ids: np.ndarray | None = None
    """int64 [n], of a `Look`: class of the second object, -1 where there is none."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a set of scenes differs from the built-in one's clean images."""

    number: int
    """Tells the random numbers of one look from those of another."""
    radius: tuple[float, float] = (10.0, 13.0)
    """Of the main object, pixels."""
    margin: float = 14.0
    """Least distance of its centre from the border."""
    turns: int = 6
    """Largest rotation of an object, in 256ths of a circle."""
    has_pair: bool = False
    """The second object is large, in half of the images, and opposite to the main one."""
    strangers: float = 0.0
    """Share of images whose main object is drawn from all shapes and textures, not the classes."""
    levels: tuple[float, float] = (0.2, 0.35)
    """Brightness of backgrounds that are not dark."""
    noise: float = 0.04
    """Largest noise; a quarter of the images have some where it is 0.04."""


@dataclass
class _Objects:
    """One object per image: what it is, where, and whether it is there at all."""

    shape: np.ndarray
    texture: np.ndarray
    colour: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    turn: np.ndarray
    front_rgb: np.ndarray
    back_rgb: np.ndarray
    shown: np.ndarray


class _Draws:
    """Numbers for a group of images; each call is the next column of the images' own streams."""

    def __init__(self, split: str, start: int, num: int, look: Look | None = None) -> None:
        stream = fold(spec.VERSION, spec.SPLITS.index(split), *([look.number] if look else []))
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

    def zipf(self, num: int) -> np.ndarray:
        """int64 [B] in range(num), k with weight 1 / (k + 2)."""
        weight = [1.0 / (k + 2) for k in range(num)]
        bounds = np.cumsum(weight) / sum(weight)
        return np.minimum(np.searchsorted(bounds, self.uniform(), side="right"), num - 1)


def draw(split: str, start: int, num: int, look: Look | None = None) -> Scenes:
    """Images [start, start + num) of `split`; a look is for the clean ones."""
    parts = list(_groups(split, start, num, look))
    second = [part.second_ids for part in parts if part.second_ids is not None]
    return Scenes(
        start=start,
        pixels=np.concatenate([part.pixels for part in parts]),
        hashtags=[tags for part in parts for tags in part.hashtags],
        class_ids=np.concatenate([part.class_ids for part in parts]),
        second_ids=np.concatenate(second) if second else None,
    )


def samples(split: str, first: int, num: int) -> Iterator[Sample]:
    """The same as samples of a shard."""
    scenes = draw(split, first, num)
    for place in range(num):
        class_id = int(scenes.class_ids[place])
        yield Sample(
            key=f"{split}-{first + place:09d}",
            image=encode_png(scenes.pixels[place]),
            image_type="png",
            hashtags=scenes.hashtags[place] or None,
            class_id=class_id if class_id >= 0 else None,
        )


def _groups(split: str, start: int, num: int, look: Look | None) -> Iterator[Scenes]:
    for first in range(start, start + num, GROUP):
        yield _draw_group(split, first, min(GROUP, start + num - first), look)


def _draw_group(split: str, start: int, num: int, look: Look | None = None) -> Scenes:
    draws = _Draws(split, start, num, look)
    look = look or PLAIN
    is_clean = split in ("train", "test")
    # Consecutive images cycle through the classes: every class has as many images as the next.
    class_ids = (np.arange(start, start + num) * 7 + 3) % len(spec.CLASSES)
    main = _objects(draws, num, look.radius, look.margin, look.turns)
    if is_clean:
        shape, texture = _CLASS_SHAPE[class_ids], _CLASS_TEXTURE[class_ids]
        if look.strangers:
            is_strange = draws.uniform() < look.strangers
            shape = np.where(is_strange, main.shape, shape)
            texture = np.where(is_strange, main.texture, texture)
        main.shape, main.texture = shape, texture
        class_ids = _CLASS_OF[main.texture, main.shape]
    if look.has_pair:
        second = _objects(draws, num, look.radius, look.margin, look.turns)
        second.shown = draws.uniform() < 0.5
        # Opposite to the main object, as seen from the middle: they hardly overlap.
        main.x = spec.IMAGE_SIZE / 4 + (main.x - spec.IMAGE_SIZE / 2) * 0.25
        second.x = spec.IMAGE_SIZE * 3 / 4 + (second.x - spec.IMAGE_SIZE / 2) * 0.25
    else:
        second = _objects(draws, num, radius=(2.5, 4.5), margin=3.0)
        second.shown = draws.uniform() < 0.2
    occluder = _objects(draws, num, radius=(2.5, 4.0), margin=0.0)
    occluder.shown = draws.uniform() < 0.2
    # It covers an edge of the main object, not its middle.
    turn = draws.below(_TURNS)
    occluder.x = main.x + _COS[turn] * main.radius * 0.95
    occluder.y = main.y + _SIN[turn] * main.radius * 0.95
    num_small = np.maximum(draws.below(4) - 1, 0)
    small = [_objects(draws, num, radius=(1.5, 3.0), margin=1.0) for _ in range(2)]
    for place, objects in enumerate(small):
        objects.shown = num_small > place

    canvas, is_dark, has_horizon = _background(draws, num, look.levels)
    for objects in small:
        _paint(canvas, objects, window=10)
    _paint(canvas, second, window=20)
    _paint(canvas, main, window=spec.IMAGE_SIZE)
    _paint(canvas, occluder, window=16)
    noise = np.maximum(draws.uniform(-0.12, look.noise), 0.0)  # none in three of four images
    _light_and_noise(canvas, draws, noise)
    pixels = (
        np.minimum(np.maximum(canvas, 0.0), 1.0) * np.float32(255.0) + np.float32(0.5)
    ).astype(np.uint8)
    if is_clean:
        second_ids = np.where(second.shown, _CLASS_OF[second.texture, second.shape], -1)
        return Scenes(start, pixels, [[] for _ in range(num)], class_ids, second_ids)
    words = {
        "#crowded": num_small + second.shown + occluder.shown >= 2,
        "#minimal": num_small + second.shown + occluder.shown == 0,
        "#left": main.x < 15.0,
        "#right": main.x > 17.0,
        "#top": main.y < 15.0,
        "#bottom": main.y > 17.0,
        "#big": main.radius > 12.25,
        "#tiny": main.radius < 10.75,
        "#dark": is_dark,
        "#bright": ~is_dark & (main.colour == _COLOURS.index("white")),
        "#noisy": noise > 0.0,
        "#behind": occluder.shown,
        "#horizon": has_horizon,
        "#pair": second.shown & (second.shape == main.shape),
    }
    hashtags = _hashtags(draws, main, second, words)
    return Scenes(start, pixels, hashtags, np.full(num, -1, dtype=np.int64))


def _objects(
    draws: _Draws, num: int, radius: tuple[float, float], margin: float, turns: int = 6
) -> _Objects:
    colour = draws.zipf(len(_COLOURS))
    rgb = _RGB[colour].astype(np.float64)
    rgb = np.stack([rgb[:, c] + draws.uniform(-0.06, 0.06) for c in range(3)], axis=1)
    # The texture's second colour is the first one darkened, so the colour word holds.
    kin = rgb * draws.uniform(0.2, 0.45)[:, None]
    return _Objects(
        shape=draws.zipf(len(_SHAPES)),
        texture=draws.zipf(len(_TEXTURES)),
        colour=colour,
        x=draws.uniform(margin, spec.IMAGE_SIZE - margin),
        y=draws.uniform(margin, spec.IMAGE_SIZE - margin),
        radius=draws.uniform(*radius),
        # +-8 degrees: more, and a ViT of width 32 learns no shape within 16k images.
        turn=(draws.below(2 * turns + 1) - turns) % _TURNS,
        front_rgb=rgb.astype(np.float32),
        back_rgb=kin.astype(np.float32),
        shown=np.ones(num, dtype=bool),
    )


def _background(
    draws: _Draws, num: int, levels: tuple[float, float] = (0.2, 0.35)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Canvas float32 [B, 32, 32, 3], whether it is dark, whether it has a horizon.

    Flat, a gradient or a horizon of two dull colours, always darker than the objects: with
    backgrounds of any brightness small ViTs learned hardly any shape within a study's budget.
    """
    is_dark = draws.uniform() < 0.4
    level = np.where(is_dark, draws.uniform(0.02, 0.15), draws.uniform(*levels))
    ends = []
    for _ in range(2):
        dull = np.stack([level + draws.uniform(-0.12, 0.12) for _ in range(3)], axis=1)
        ends.append(dull.astype(np.float32))
    turn = draws.below(_TURNS)
    axis = (np.arange(spec.IMAGE_SIZE, dtype=np.float32) - np.float32(15.5)) / np.float32(44)
    slope = _COS[turn][:, None, None] * axis + (_SIN[turn][:, None] * axis)[:, :, None]
    kind = draws.uniform()
    has_horizon = kind < 0.25
    step = np.where(slope > 0, np.float32(0.5), np.float32(-0.5))
    # Two in five are flat: MAE spends its effort on whatever varies within a patch.
    slope = np.where((kind < 0.6)[:, None, None], slope, np.float32(0))
    mixture = np.where(has_horizon[:, None, None], step, slope) + np.float32(0.5)
    # Clutter in a quarter of the images: blocks that no neighbour predicts.
    blocks = np.stack([draws.bits() for _ in range(8)], axis=1)
    blocks = blocks.astype("<u8").view(np.uint8).reshape(num, 8, 8).astype(np.float32)
    strength = np.maximum(draws.uniform(-0.3, 0.1), 0.0).astype(np.float32)[:, None, None]
    blocks = ((blocks / np.float32(255) - np.float32(0.5)) * strength).repeat(4, 1).repeat(4, 2)
    canvas = ends[0][:, None, None] * (1 - mixture[..., None])
    canvas += ends[1][:, None, None] * mixture[..., None]
    canvas += blocks[..., None]
    return canvas, is_dark, has_horizon


def _paint(canvas: np.ndarray, objects: _Objects, window: int) -> None:
    """Draws the shown objects over `canvas`, each inside a window of `window` pixels."""
    shown = np.flatnonzero(objects.shown)
    if not len(shown):
        return
    x, y = objects.x[shown], objects.y[shown]
    left = np.clip((x - window / 2 + 0.5).astype(np.int64), 0, spec.IMAGE_SIZE - window)
    top = np.clip((y - window / 2 + 0.5).astype(np.int64), 0, spec.IMAGE_SIZE - window)
    steps = np.arange(window)
    scale = (1 / objects.radius[shown]).astype(np.float32)[:, None, None]
    dx = ((left[:, None] + steps + 0.5 - x[:, None]).astype(np.float32))[:, None, :] * scale
    dy = ((top[:, None] + steps + 0.5 - y[:, None]).astype(np.float32))[:, :, None] * scale
    cos = _COS[objects.turn[shown]][:, None, None]
    sin = _SIN[objects.turn[shown]][:, None, None]
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    field = _by_kind(SHAPE_FIELDS, objects.shape[shown], u, v)
    # Signed distance in radii -> share of the pixel covered, one pixel wide at the edge.
    cover = np.float32(0.5) - field / scale
    cover = np.minimum(np.maximum(cover, np.float32(0)), np.float32(1))[..., None]
    blend = _by_kind(TEXTURE_FIELDS, objects.texture[shown], u, v, field)[..., None]
    front = objects.front_rgb[shown][:, None, None]
    back = objects.back_rgb[shown][:, None, None]
    paint = front + (back - front) * blend
    rows = (
        shown[:, None, None],
        (top[:, None] + steps)[:, :, None],
        (left[:, None] + steps)[:, None],
    )
    below = canvas[rows]
    canvas[rows] = below + (paint - below) * cover


def _by_kind(
    functions: list[Callable[..., np.ndarray]], kind: np.ndarray, *arguments: np.ndarray
) -> np.ndarray:
    """Row i of the result is functions[kind[i]] of row i of the arguments."""
    result = np.empty_like(arguments[0])
    for code in np.unique(kind):
        rows = np.flatnonzero(kind == code)
        result[rows] = functions[code](*(argument[rows] for argument in arguments))
    return result


def _light_and_noise(canvas: np.ndarray, draws: _Draws, noise: np.ndarray) -> None:
    """A tint and a gain per image, then triangular noise per pixel and channel; in place."""
    side = canvas.shape[1]
    gain = np.stack([draws.uniform(0.9, 1.1) for _ in range(3)], axis=1).astype(np.float32)
    canvas *= gain[:, None, None]
    words = side * side * 3 // 8
    counter = draws.bits()[:, None] + np.arange(words, dtype=np.uint64)
    first = mix(counter).astype("<u8").view(np.uint8).reshape(canvas.shape)
    second = np.roll(first, 1, axis=3)[:, ::-1]
    grain = first.astype(np.float32) - second.astype(np.float32)
    canvas += grain * (noise.astype(np.float32) / np.float32(255) * 2)[:, None, None, None]


def _hashtags(
    draws: _Draws, main: _Objects, second: _Objects, words: dict[str, np.ndarray]
) -> list[list[str]]:
    """What people would write: some of what is true, in their own words, and some nonsense."""
    num = len(main.shape)
    ids: list[np.ndarray] = []
    chance: list[np.ndarray] = []

    def offer(tag_ids: np.ndarray, probability: np.ndarray | float) -> None:
        ids.append(tag_ids)
        chance.append(np.broadcast_to(probability, (num,)))

    for objects, visible, weights in (
        (main, True, (0.9, 0.9, 0.5)),
        (second, second.shown, (0.1, 0.1, 0.1)),
    ):
        for kind, table, weight in zip(
            (objects.shape, objects.texture, objects.colour),
            (_SHAPE_TAGS, _TEXTURE_TAGS, _COLOUR_TAGS),
            weights,
            strict=True,
        ):
            offer(table[kind, (draws.uniform() < 0.15).astype(np.int64)], visible * weight)
    pair = _PAIR_TAGS[main.colour, main.shape]
    offer(np.maximum(pair, 0), (pair >= 0) * 0.15)
    for tag, is_true in words.items():
        offer(np.full(num, _PLACE[tag]), is_true * 0.03)
    offer(draws.zipf(len(spec.CHATTER)) + _PLACE[spec.CHATTER[0]], 0.1)
    offer(draws.below(len(spec.HASHTAGS)), 0.1)

    said = np.stack([draws.uniform() < p for p in chance], axis=1)
    rank = np.where(said, np.stack([draws.uniform() for _ in chance], axis=1), 2.0)
    most = np.array([1, 2, 3, 3, 4, 4, 5, 5])[draws.below(8)]
    order = np.argsort(rank, axis=1, kind="stable")
    columns = np.stack(ids, axis=1)
    result: list[list[str]] = []
    for row in range(num):
        chosen: dict[int, None] = {}
        for column in order[row, : most[row]]:
            if said[row, column]:
                chosen[int(columns[row, column])] = None
        # Nobody posts without a tag: the main shape's is the last resort.
        result.append([spec.HASHTAGS[tag] for tag in chosen or {int(columns[row, 0]): None}])
    return result


def _pairs() -> np.ndarray:
    table = np.full((len(_COLOURS), len(_SHAPES)), -1, dtype=np.int64)
    for colour, shape in spec.CONJUNCTIONS:
        table[_COLOURS.index(colour), _SHAPES.index(shape)] = _PLACE[f"#{colour}{shape}"]
    return table


PLAIN = Look(number=0)
"""The built-in set's own."""

_CLASS_OF = np.full((len(_TEXTURES), len(_SHAPES)), -1, dtype=np.int64)
_CLASS_OF[_CLASS_TEXTURE, _CLASS_SHAPE] = np.arange(len(spec.CLASSES))
_SHAPE_TAGS = np.array([[_PLACE[tag] for tag in spec.SHAPES[name]] for name in _SHAPES])
_TEXTURE_TAGS = np.array([[_PLACE[tag] for tag in spec.TEXTURES[name]] for name in _TEXTURES])
_COLOUR_TAGS = np.array([[_PLACE[tag] for tag in spec.COLOURS[name][1:]] for name in _COLOURS])
_PAIR_TAGS = _pairs()
