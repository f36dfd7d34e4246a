"""What the built-in set, *hashtag scenes*, is made of: words, classes and counts. No pixels here.

A scene is a main object (shape x texture x colour) with a second object, distractors, an occluder,
a background and noise. Its weak labels are hashtags; the clean classes of the transfer split are
pairs (texture, shape) of the main object, for which no single hashtag exists.
`harness.data.scenes` draws them.
"""

from __future__ import annotations

VERSION = 2
"""Raise it with every change that moves a pixel or a label: it enters the fingerprint."""

IMAGE_SIZE = 32

# Order is frequency: object i of a list is drawn with weight 1 / (i + 2), a Zipf-like tail.
SHAPES: dict[str, tuple[str, str]] = {
    "ring": ("#ring", "#donut"),
    "square": ("#square", "#box"),
    "star": ("#star", "#sparkle"),
    "bar": ("#bar", "#brick"),
    "triangle": ("#triangle", "#pyramid"),
    "circle": ("#circle", "#round"),
    "cross": ("#cross", "#plus"),
    "dome": ("#dome", "#igloo"),
    "diamond": ("#diamond", "#gem"),
    "crescent": ("#crescent", "#banana"),
}
"""Shape -> its hashtag and a rarer synonym."""

TEXTURES: dict[str, tuple[str, str]] = {
    "solid": ("#solid", "#plain"),
    "striped": ("#striped", "#zebra"),
    "checkered": ("#checkered", "#chess"),
    "outlined": ("#outlined", "#hollow"),
    "dotted": ("#dotted", "#polka"),
    "split": ("#split", "#twotone"),
}
"""Texture -> its hashtag and a rarer synonym."""

COLOURS: dict[str, tuple[tuple[float, float, float], str, str]] = {
    "red": ((1.00, 0.40, 0.40), "#red", "#cherry"),
    "blue": ((0.40, 0.53, 1.00), "#blue", "#ocean"),
    "green": ((0.40, 1.00, 0.46), "#green", "#lime"),
    "yellow": ((1.00, 0.95, 0.40), "#yellow", "#sunny"),
    "white": ((0.97, 0.97, 0.97), "#white", "#snow"),
    "purple": ((0.78, 0.40, 1.00), "#purple", "#grape"),
    "orange": ((1.00, 0.70, 0.40), "#orange", "#tangerine"),
    "cyan": ((0.40, 0.96, 1.00), "#cyan", "#aqua"),
}
"""Colour -> red, green, blue in 0..1, its hashtag and a rarer synonym."""

CONJUNCTIONS: tuple[tuple[str, str], ...] = tuple(
    (colour, shape)
    for place, colour in enumerate(("red", "blue", "green", "yellow", "white", "purple"))
    for shape in ("ring", "square", "star", "bar", "triangle", "circle", "cross")[: 7 - place]
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
    (texture, shape) for shape in list(SHAPES)[:5] for texture in list(TEXTURES)[:4]
)
"""(texture, shape) of each clean class: every pair of five shapes and four textures."""

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
