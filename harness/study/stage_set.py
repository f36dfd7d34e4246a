"""The stages of a study. Of tens of thousands most differ in the seed alone: those are written out
when somebody asks for one.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from harness.study.again import renewed
from harness.study.identity import HASH_CHARS
from harness.study.stages import StageFile

T = TypeVar("T")


class Outline(NamedTuple):
    """What a stage is, in short."""

    kind: str
    upstream: tuple[str, ...]
    """Ids of the stages it starts from, in the order of `like.config.upstream`."""
    seed: int
    like: StageFile
    """Itself, or one that differs in id, name, seed and what it starts from alone."""
    hashed: str = ""
    """The whole of its hash, where it is known: ids show how it begins."""


class StageSet(Mapping[str, StageFile]):
    """Stages by id, in dependency order."""

    def __init__(self) -> None:
        self._outlines: dict[str, Outline] = {}
        self._whole: dict[str, StageFile] = {}

    def add(self, stage: StageFile, hashed: str) -> None:
        """Keeps a stage, once. `hashed` is the whole of its hash."""
        config = stage.config
        upstream = tuple(config.upstream.values())
        outline = Outline(stage.kind, upstream, config.seed, stage, hashed)
        if self.add_like(stage.id, outline) is outline:
            self._whole[stage.id] = stage

    def add_like(self, stage_id: str, outline: Outline) -> Outline:
        """Keeps a stage that is like another, once: what is kept under its id."""
        known = self._outlines.setdefault(stage_id, outline)
        if known.hashed != outline.hashed:  # they would silently be one
            raise RuntimeError(f"two different stages have the id {stage_id}")
        return known

    def __getitem__(self, stage_id: str) -> StageFile:
        outline = self._outlines[stage_id]
        stage = self._whole.get(stage_id)
        if stage is None:
            stage = self._whole[stage_id] = _written_out(stage_id, outline)
        return stage

    def __iter__(self) -> Iterator[str]:
        return iter(self._outlines)

    def __len__(self) -> int:
        return len(self._outlines)

    def __contains__(self, stage_id: object) -> bool:
        return stage_id in self._outlines

    @property
    def outlines(self) -> Mapping[str, Outline]:
        """Of all stages: what needs no more writes none of them out."""
        return self._outlines

    def only(self, wanted: Collection[str]) -> StageSet:
        """These of its stages, in its order."""
        found = StageSet()
        found._outlines = {i: outline for i, outline in self._outlines.items() if i in wanted}
        found._whole = self._whole
        return found


def outlines(stages: Mapping[str, StageFile]) -> Mapping[str, Outline]:
    """Of any stages."""
    if isinstance(stages, StageSet):
        return stages.outlines
    return {i: _outline(stage) for i, stage in stages.items()}


def outline_of(stages: Mapping[str, StageFile], stage_id: str) -> Outline:
    """Of one of them."""
    if isinstance(stages, StageSet):
        return stages.outlines[stage_id]
    return _outline(stages[stage_id])


class OfFamilies(Mapping[str, T]):
    """What stages that differ in the seed alone have in common, by stage id; measured once."""

    def __init__(self, known: Mapping[str, Outline], measure: Callable[[StageFile], T]) -> None:
        self._known, self._measure = known, measure
        self._values: dict[int, T] = {}

    def of(self, like: StageFile) -> T:
        """Of a family."""
        value = self._values.get(id(like))
        if value is None:
            value = self._values[id(like)] = self._measure(like)
        return value

    def of_each(self) -> dict[str, T]:
        """The whole of it at once, for those who ask of tens of thousands of stages."""
        likes = list(map(operator.attrgetter("like"), self._known.values()))
        values = {
            id(like): self.of(like)
            for like in dict(zip(map(id, likes), likes, strict=True)).values()
        }
        return dict(zip(self._known, map(values.__getitem__, map(id, likes)), strict=True))

    def __getitem__(self, stage_id: str) -> T:
        return self.of(self._known[stage_id].like)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def families(stages: Iterable[Outline]) -> list[tuple[StageFile, int]]:
    """One stage of each family among them, and how many of it there are."""
    likes = list(map(operator.attrgetter("like"), stages))
    by_id = dict(zip(map(id, likes), likes, strict=True))
    return [(by_id[key], number) for key, number in Counter(map(id, likes)).items()]


def _outline(stage: StageFile) -> Outline:
    config = stage.config
    return Outline(stage.kind, tuple(config.upstream.values()), config.seed, stage)


def _written_out(stage_id: str, outline: Outline) -> StageFile:
    old = outline.like
    ids = dict(zip(old.config.upstream.values(), outline.upstream, strict=True))
    upstream = {role: ids[i] for role, i in old.config.upstream.items()}
    fields = {
        "id": stage_id,
        "name": stage_id[: -HASH_CHARS - 1],
        "config": renewed(old.config, {"seed": outline.seed, "upstream": upstream}),
        "upstream_kinds": {ids[i]: kind for i, kind in old.upstream_kinds.items()},
    }
    return renewed(old, fields)
