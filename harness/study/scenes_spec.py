"""What the built-in set, *hashtag scenes*, is made of: words, classes and counts. No pixels here.

A scene is a main object (shape x texture x colour) with a second object, distractors, an occluder,
a background and noise. Its weak labels are hashtags; the clean classes of the transfer split are
pairs (texture, shape) of the main object, for which no single hashtag exists.
`harness.data.scenes` draws them.
"""

from __future__ import annotations

VERSION = 1
"""Raise it with every change that moves a pixel or a label: it enters the fingerprint."""

IMAGE_SIZE = 32

# Order is frequency: object i of a list is drawn with weight 1 / (i + 2), a Zipf-like tail.
SHAPES: dict[str, tuple[str, str]] = {
    "circle": ("#circle", "#round"),
    "square": ("#square", "#box"),
    "triangle": ("#triangle", "#pyramid"),
    "ring": ("#ring", "#donut"),
    "star": ("#star", "#sparkle"),
    "cross": ("#cross", "#plus"),
    "bar": ("#bar", "#brick"),
    "dome": ("#dome", "#igloo"),
    "diamond": ("#diamond", "#gem"),
    "crescent": ("#crescent", "#banana"),
    "hexagon": ("#hexagon", "#honeycomb"),
    "chevron": ("#chevron", "#boomerang"),
}
"""Shape -> its hashtag and a rarer synonym."""

TEXTURES: dict[str, tuple[str, str]] = {
    "solid": ("#solid", "#plain"),
    "striped": ("#striped", "#zebra"),
    "dotted": ("#dotted", "#polka"),
    "checkered": ("#checkered", "#chess"),
    "outlined": ("#outlined", "#hollow"),
    "shaded": ("#shaded", "#ombre"),
    "split": ("#split", "#twotone"),
    "banded": ("#banded", "#target"),
}
"""Texture -> its hashtag and a rarer synonym."""

COLOURS: dict[str, tuple[tuple[float, float, float], str, str]] = {
    "red": ((0.85, 0.15, 0.15), "#red", "#cherry"),
    "blue": ((0.15, 0.30, 0.85), "#blue", "#ocean"),
    "green": ((0.15, 0.65, 0.20), "#green", "#lime"),
    "yellow": ((0.92, 0.85, 0.15), "#yellow", "#sunny"),
    "white": ((0.92, 0.92, 0.92), "#white", "#snow"),
    "purple": ((0.55, 0.20, 0.75), "#purple", "#grape"),
    "orange": ((0.95, 0.52, 0.10), "#orange", "#tangerine"),
    "cyan": ((0.15, 0.80, 0.85), "#cyan", "#aqua"),
    "pink": ((0.95, 0.50, 0.70), "#pink", "#bubblegum"),
    "brown": ((0.45, 0.28, 0.12), "#brown", "#chocolate"),
}
"""Colour -> red, green, blue in 0..1, its hashtag and a rarer synonym."""

CONJUNCTIONS: tuple[tuple[str, str], ...] = tuple(
    (colour, shape)
    for place, colour in enumerate(("red", "blue", "green", "yellow", "white", "purple"))
    for shape in ("circle", "square", "triangle", "ring", "star", "cross", "bar")[: 7 - place]
)
"""Pairs (colour, shape) common enough to have a hashtag of their own, such as #redstar."""

SCENE_WORDS: tuple[str, ...] = (
    "#crowded",
    "#minimal",
    "#left",
    "#right",
    "#top",
    "#bottom",
    "#big",
    "#tiny",
    "#dark",
    "#bright",
    "#noisy",
    "#behind",
    "#horizon",
    "#pair",
)
CHATTER: tuple[str, ...] = (
    "#instapic",
    "#nofilter",
    "#art",
    "#mood",
    "#monday",
    "#daily",
    "#love",
    "#wow",
    "#shapes",
    "#design",
    "#repost",
    "#weekend",
)
"""Hashtags that say nothing about the picture."""

HASHTAGS: tuple[str, ...] = (
    *(tag for tags in SHAPES.values() for tag in tags),
    *(tag for tags in TEXTURES.values() for tag in tags),
    *(tag for _, *tags in COLOURS.values() for tag in tags),
    *(f"#{colour}{shape}" for colour, shape in CONJUNCTIONS),
    *SCENE_WORDS,
    *CHATTER,
)

CLASS_PAIRS: tuple[tuple[str, str], ...] = tuple(
    (list(TEXTURES)[(3 * place + turn * 5) % 7 + 1], shape)
    for place, shape in enumerate(list(SHAPES)[:10])
    for turn in (0, 1)
)
"""(texture, shape) of each clean class: ten shapes, each with two textures, so both must be seen."""

CLASSES: tuple[str, ...] = tuple(f"{texture} {shape}" for texture, shape in CLASS_PAIRS)

PRETRAIN_IMAGES = 64_000
SPLITS: tuple[str, ...] = ("pretrain", "val", "train", "test")
"""Order matters: the place of a split enters its random numbers."""


def counts(pretrain: int | None = None) -> dict[str, int]:
    """Images per split: weakly labelled `pretrain` and `val`, clean `train` and `test`."""
    return {
        "pretrain": PRETRAIN_IMAGES if pretrain is None else pretrain,
        "val": 2048,
        "train": 4000,
        "test": 4000,
    }
