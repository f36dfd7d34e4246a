"""The built-in set of image-caption pairs: pair i of a split is a function of (VERSION, split, i).

The pictures are drawn by the parts of `harness.data.scenes`, with random numbers of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harness.data import scenes
from harness.data.hashing import fold, mix
from harness.data.png import encode_png
from harness.data.shards import Sample
from harness.study import captions_spec as spec
from harness.study.scenes_spec import COLOURS, SHAPES, TEXTURES

_STREAM = 0xCA9710
"""Tells the random numbers of this set from those of `scenes`."""
_SYNONYM = 0.25
"""How often a thing is called by its rarer name."""


@dataclass(frozen=True)
class Captioned:
    """Pictures with what is said of them."""

    pixels: np.ndarray
    """uint8 [n, 32, 32, 3]."""
    captions: list[list[str]]


class _Draws(scenes._Draws):
    def __init__(self, split: str, start: int, num: int) -> None:
        stream = fold(_STREAM, spec.VERSION, spec.SPLITS.index(split))
        self._base = mix(np.arange(start, start + num, dtype=np.uint64) ^ np.uint64(stream))
        self._column = 0


def draw(split: str, start: int, num: int) -> Captioned:
    """Pairs [start, start + num) of `split`."""
    starts = range(start, start + num, scenes.GROUP)
    parts = [_draw_group(split, s, min(scenes.GROUP, start + num - s)) for s in starts]
    return Captioned(
        np.concatenate([part.pixels for part in parts]),
        [captions for part in parts for captions in part.captions],
    )


def samples(split: str, first: int, num: int) -> Iterator[Sample]:
    """The same as samples of a shard: `caption` of a training image, `captions` of a test image."""
    drawn = draw(split, first, num)
    for place, captions in enumerate(drawn.captions):
        yield Sample(
            key=f"{split}-{first + place:09d}",
            image=encode_png(drawn.pixels[place]),
            image_type="png",
            fields={"caption": captions[0]} if split == "train" else {"captions": captions},
        )


def _draw_group(split: str, start: int, num: int) -> Captioned:
    draws = _Draws(split, start, num)
    main = scenes._objects(draws, num, radius=(10.0, 13.0), margin=14.0)
    second = scenes._objects(draws, num, radius=(3.5, 5.0), margin=4.0)
    second.shown = draws.uniform() < 0.5
    canvas, is_dark, has_horizon = scenes._background(draws, num)
    scenes._paint(canvas, main, window=spec.IMAGE_SIZE)
    # Over the main object: what a caption speaks of can be seen.
    scenes._paint(canvas, second, window=20)
    scenes._light_and_noise(canvas, draws, np.maximum(draws.uniform(-0.12, 0.04), 0.0))
    canvas = np.minimum(np.maximum(canvas, 0.0), 1.0)
    facts = _facts(main, second, is_dark, has_horizon)
    wordings = 1 if split == "train" else spec.TEST_CAPTIONS
    said = [_captions(draws, facts, says_all=split == "test") for _ in range(wordings)]
    pixels = (canvas * np.float32(255.0) + np.float32(0.5)).astype(np.uint8)
    return Captioned(pixels, [list(own) for own in zip(*said, strict=True)])


def _facts(
    main: scenes._Objects, second: scenes._Objects, is_dark: np.ndarray, has_horizon: np.ndarray
) -> list[dict[str, str]]:
    """What is true of each picture: kind of fact -> name."""
    shapes, textures, colours = list(SHAPES), list(TEXTURES), list(COLOURS)
    facts = []
    for i in range(len(main.shape)):
        fact = {
            "shape": shapes[main.shape[i]],
            "texture": textures[main.texture[i]],
            "colour": colours[main.colour[i]],
        }
        if main.radius[i] > 12.25 or main.radius[i] < 10.75:
            fact["size"] = "big" if main.radius[i] > 12.25 else "small"
        # The coordinate that is further from the middle, if it is far enough.
        x, y = main.x[i] - 16.0, main.y[i] - 16.0
        if max(abs(x), abs(y)) > 1.0:
            sideways = abs(x) > abs(y)
            name = ("right" if x > 0 else "left") if sideways else ("bottom" if y > 0 else "top")
            fact["place"] = name
        fact["background"] = "horizon" if has_horizon[i] else "dark" if is_dark[i] else "light"
        if second.shown[i]:
            fact["second shape"] = shapes[second.shape[i]]
            fact["second colour"] = colours[second.colour[i]]
        facts.append(fact)
    return facts


_SAID = {
    "texture": 0.9,
    "colour": 0.7,
    "size": 0.3,
    "background": 0.4,
    "place": 0.3,
    "second": 0.7,
}
"""How often a training caption says what is true; a test caption says everything."""


def _captions(draws: _Draws, facts: Sequence[Mapping[str, str]], says_all: bool) -> list[str]:
    """One sentence a picture."""
    says = {name: (draws.uniform() < share) | says_all for name, share in _SAID.items()}
    # One number a choice, drawn whether it is needed or not: a picture's words are its own.
    chance = {name: draws.uniform() for name in (*_CHOICES, *(f"{n}?" for n in _NAMED))}
    sentences = []
    for i, fact in enumerate(facts):
        own = {name: float(values[i]) for name, values in chance.items()}
        told = {name for name, values in says.items() if values[i]}
        sentences.append(_sentence(fact, told, own))
    return sentences


_NAMED = {
    "shape": spec.SHAPES,
    "texture": spec.TEXTURES,
    "colour": spec.COLOURS,
    "second shape": spec.SHAPES,
    "second colour": spec.COLOURS,
}
_CHOICES = ("subject", "frame", "size", "background", "place", "second", "order")


def _sentence(fact: Mapping[str, str], told: set[str], chance: Mapping[str, float]) -> str:
    def pick(name: str, options: Sequence[str]) -> str:
        return options[int(chance[name] * len(options))]

    def word(name: str) -> str:
        usual, rare = _NAMED[name][fact[name]]
        return rare if chance[f"{name}?"] < _SYNONYM else usual

    words = {name: word(name) if name in told else "" for name in ("texture", "colour")}
    words["shape"] = word("shape")
    is_sized = "size" in told and "size" in fact
    words["size"] = pick("size", spec.SIZES[fact["size"]]) if is_sized else ""
    # Wordings with "in" or "that is" need the word that follows.
    subjects = [s for s in spec.SUBJECTS if _is_whole(s, words)]
    subject = " ".join(pick("subject", subjects).format(**words).split())
    around = []
    if "background" in told:
        around.append(pick("background", spec.BACKGROUNDS[fact["background"]]))
    if "place" in told and "place" in fact:
        around.append(pick("place", spec.PLACES[fact["place"]]))
    if chance["order"] < 0.5:
        around.reverse()
    if "second" in told and "second shape" in fact:
        small = with_article(f"{word('second colour')} {word('second shape')}")
        around.insert(0, pick("second", spec.SECONDS).format(small))
    frame = pick("frame", spec.FRAMES)
    return frame.format(" ".join([with_article(subject), *around]))


def _is_whole(subject: str, words: Mapping[str, str]) -> bool:
    needed = re.findall(r"(?:in|that is) \{(\w+)\}", subject)
    return all(words[name] for name in needed)


def with_article(noun: str) -> str:
    """'ring' -> 'a ring', 'orange ring' -> 'an orange ring'."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
