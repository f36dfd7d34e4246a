"""Which stages share a job array, and what the arrays wait for: arithmetic, no scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.study.stages import StageFile


@dataclass(frozen=True, kw_only=True)
class Array:
    """Stages of one job array, in the order of its tasks."""

    stages: tuple[str, ...]
    after: str = ""
    """A dependency between arrays, before they have numbers: `aftercorr:3,afterok:1_4` names
    array 3 of this plan, and task 4 of array 1."""


def plan_arrays(
    todo: Sequence[StageFile],
    limit: int,
    running: Mapping[str, str] | None = None,
    avoid: Mapping[str, tuple[str, ...]] | None = None,
) -> list[Array]:
    """Cuts stages (in dependency order) into arrays of equal needs, at most `limit` tasks each.

    Tasks of one array have equal resources. Where each waits for the task of equal number of one
    earlier array, one `aftercorr` says so for all; other stages with one and the same set of
    upstream stages share an array behind `afterok`. `running` maps upstream stages that are not
    in `todo` to their jobs, `avoid` stages to nodes that they must not get.
    """
    ids = {s.id for s in todo}
    fan_out: dict[str, int] = {}
    level: dict[str, int] = {}
    for stage in todo:
        upstream = [u for u in stage.config.upstream.values() if u in ids]
        level[stage.id] = 1 + max((level[u] for u in upstream), default=-1)
        for u in upstream:
            fan_out[u] = fan_out.get(u, 0) + 1
    plan = _Plan(limit, running or {})
    for depth in range(max(level.values(), default=-1) + 1):
        groups: dict[tuple[Any, ...], list[StageFile]] = {}
        for stage in todo:
            if level[stage.id] == depth:
                nodes = (avoid or {}).get(stage.id, ())
                groups.setdefault((*needs(stage), nodes), []).append(stage)
        for group in groups.values():
            # Many dependants first: theirs then form arrays that start at task 0 too.
            plan.add(sorted(group, key=lambda s: -fan_out.get(s.id, 0)))
    return plan.arrays


def needs(stage: StageFile) -> tuple[Any, ...]:
    """What a scheduler is asked for of a stage, in short; all else is in the profile."""
    e = stage.execution
    return (stage.kind, e.ranks, e.nodes, e.threads, e.memory_gib, e.time_s)


@dataclass
class _Plan:
    limit: int
    running: Mapping[str, str]
    arrays: list[Array] = field(default_factory=list)
    place: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, group: list[StageFile]) -> None:
        """Arrays for stages of equal needs whose upstream stages all have theirs."""
        rest: dict[tuple[str, ...], list[str]] = {}
        rows: dict[int, dict[int, list[str]]] = {}
        for stage in group:
            upstream = list(dict.fromkeys(stage.config.upstream.values()))
            planned = [u for u in upstream if u in self.place]
            waits = tuple(f"job:{self.running[u]}" for u in upstream if u in self.running)
            if len(planned) == 1 and not waits and len(self._array_of(planned[0]).stages) > 1:
                array, task = self.place[planned[0]]
                rows.setdefault(array, {}).setdefault(task, []).append(stage.id)
            else:
                tasks = (self._task(u) for u in planned)
                rest.setdefault((*tasks, *waits), []).append(stage.id)
        for array, by_task in rows.items():
            while self._is_prefix(by_task):
                layer = [by_task[t].pop(0) for t in range(len(by_task))]
                self._put(layer, f"aftercorr:{array}")
                by_task = {t: found for t, found in by_task.items() if found}
            for task, found in by_task.items():
                rest.setdefault((f"{array}_{task}",), []).extend(found)
        for after, found in rest.items():
            for start in range(0, len(found), self.limit):
                self._put(
                    found[start : start + self.limit], ",".join(f"afterok:{a}" for a in after)
                )

    def _array_of(self, stage: str) -> Array:
        return self.arrays[self.place[stage][0]]

    def _task(self, stage: str) -> str:
        array, task = self.place[stage]
        return f"{array}_{task}"

    def _is_prefix(self, by_task: dict[int, list[str]]) -> bool:
        return len(by_task) > 1 and set(by_task) == set(range(len(by_task)))

    def _put(self, stages: list[str], after: str) -> None:
        for task, stage in enumerate(stages):
            self.place[stage] = (len(self.arrays), task)
        self.arrays.append(Array(stages=tuple(stages), after=after))
