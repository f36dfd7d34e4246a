"""How good a vocabulary is: what was kept, what was dropped and why, how long the tail is."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

Fate = Literal["kept", "rare", "unmapped", "blocked", "empty"]
FATES: dict[Fate, str] = {
    "kept": "kept",
    "rare": "their targets are on fewer images than the minimum",
    "unmapped": "not in the mapping file",
    "blocked": "in the file of blocked tags",
    "empty": "nothing but punctuation",
}
_EXAMPLES = 20
_MOST_LABELS = 10
_RANKS = [digit * 10**power for power in range(7) for digit in (1, 2, 5)]


@dataclass(frozen=True, kw_only=True)
class TagCount:
    """One fate of raw tags."""

    distinct: int
    """Different folded tags."""
    occurrences: int
    """Pairs of an image and a raw tag on it."""
    examples: dict[str, int]
    """The most frequent ones, with their occurrences."""


@dataclass(frozen=True, kw_only=True)
class LabelReport:
    """Numbers over the images of the counted split, before images without a label are left out."""

    images: int
    raw_distinct: int
    folded_distinct: int
    occurrences: int
    fates: dict[Fate, TagCount]
    classes: int
    """Size of the vocabulary."""
    labelled_images: int
    labels: int
    """Pairs of an image and a label of it."""
    images_by_labels: dict[str, int]
    """Number of labels -> images; '10+' stands for all from 10."""
    top_share: dict[str, float]
    """Share of `labels` that the most frequent 1 % and 10 % of the classes have (at least one)."""
    classes_below_10: int
    """Classes on fewer than 10 images."""
    by_rank: dict[int, int]
    """Images of the class of rank 1, 2, 5, 10 ... and of the last one."""

    @property
    def coverage(self) -> float:
        """Share of images with a label."""
        return self.labelled_images / self.images

    @property
    def kept_share(self) -> float:
        """Share of tag occurrences that became a label."""
        return self.fates["kept"].occurrences / max(1, self.occurrences)

    def as_json(self) -> dict[str, object]:
        """All numbers, the derived ones too."""
        return {**asdict(self), "coverage": self.coverage, "kept_share": self.kept_share}


def make_report(
    folded: Sequence[str],
    raw: Sequence[str],
    fates: Sequence[Fate],
    occurrences: np.ndarray,
    labels_per_image: np.ndarray,
    class_images: np.ndarray,
) -> LabelReport:
    """`folded`, `raw`, `fates` and `occurrences` are of raw tags; `class_images` falls."""
    many: dict[Fate, Counter[str]] = defaultdict(Counter)
    used = np.flatnonzero(occurrences)
    for place in used.tolist():
        many[fates[place]][folded[place] or raw[place]] += int(occurrences[place])
    total = int(class_images.sum())
    num = len(class_images)
    capped = np.bincount(np.minimum(labels_per_image, _MOST_LABELS), minlength=_MOST_LABELS + 1)
    return LabelReport(
        images=len(labels_per_image),
        raw_distinct=len(used),
        folded_distinct=len({folded[place] for place in used.tolist()} - {""}),
        occurrences=int(occurrences.sum()),
        fates={fate: _tag_count(many[fate]) for fate in FATES},
        classes=num,
        labelled_images=int((labels_per_image > 0).sum()),
        labels=total,
        images_by_labels={
            f"{labels}+" if labels == _MOST_LABELS else str(labels): int(images)
            for labels, images in enumerate(capped)
            if images
        },
        top_share={
            f"{percent} %": float(class_images[: max(1, round(num * percent / 100))].sum() / total)
            for percent in (1, 10)
        },
        classes_below_10=int((class_images < 10).sum()),
        by_rank={r: int(class_images[r - 1]) for r in sorted({*_RANKS, num}) if r <= num},
    )


def _tag_count(tags: Counter[str]) -> TagCount:
    first = sorted(tags.items(), key=lambda item: (-item[1], item[0]))[:_EXAMPLES]
    return TagCount(distinct=len(tags), occurrences=tags.total(), examples=dict(first))


def summary(report: LabelReport) -> list[str]:
    """A few lines for the command line."""
    dropped = [
        f"{fate} {count.distinct} ({_first(count)})"
        for fate, count in report.fates.items()
        if fate != "kept" and count.distinct
    ]
    lines = [
        f"{report.raw_distinct} raw tags, {report.folded_distinct} after folding,"
        f" {report.classes} classes",
        f"coverage: {report.coverage:.1%} of {report.images} images have a label,"
        f" {report.labels / max(1, report.labelled_images):.2f} on average;"
        f" {report.kept_share:.1%} of {report.occurrences} tag occurrences kept",
        f"tail: the top 1 % of the classes have {report.top_share['1 %']:.1%} of the labels, the"
        f" top 10 % {report.top_share['10 %']:.1%}; {report.classes_below_10} classes have fewer"
        " than 10 images",
    ]
    return [*lines, f"dropped: {'; '.join(dropped)}"] if dropped else lines


def _first(count: TagCount) -> str:
    return ", ".join(f"{tag} {number}" for tag, number in list(count.examples.items())[:3])


def markdown(name: str, report: LabelReport, vocabulary: Mapping[str, int]) -> str:
    """labels.md. `vocabulary`: class -> images, in the order of the classes' ids."""
    rows = [
        f"| {fate} | {count.distinct} | {count.occurrences} | {FATES[fate]} |"
        for fate, count in report.fates.items()
    ]
    examples = [
        f"- {fate}: " + ", ".join(f"{_code(tag)} {many}" for tag, many in count.examples.items())
        for fate, count in report.fates.items()
        if count.examples
    ]
    first = [f"| {k} | {_code(tag)} | {many} |" for k, (tag, many) in _head(vocabulary, 50)]
    return "\n".join(
        [
            f"# Labels of {name}",
            "",
            *(f"- {line}" for line in summary(report)[:3]),
            "",
            "| raw tags | different | occurrences | |",
            "|---|---|---|---|",
            *rows,
            "",
            "The most frequent of each, with their occurrences:",
            "",
            *examples,
            "",
            "| labels of an image | images |",
            "|---|---|",
            *(f"| {labels} | {many} |" for labels, many in report.images_by_labels.items()),
            "",
            "| rank of a class | images with it |",
            "|---|---|",
            *(f"| {rank} | {many} |" for rank, many in report.by_rank.items()),
            "",
            f"The first of {report.classes} classes:",
            "",
            "| id | class | images |",
            "|---|---|---|",
            *first,
            "",
        ]
    )


def _head(vocabulary: Mapping[str, int], most: int) -> list[tuple[int, tuple[str, int]]]:
    return list(enumerate(vocabulary.items()))[:most]


def _code(tag: str) -> str:
    return "`" + tag.replace("`", "'").replace("|", "/") + "`"
