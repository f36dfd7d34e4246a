"""A grid with the state of its stages: what is there, what is left, what it will cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.errors import UserError
from harness.study.cell_states import cell_state
from harness.study.cells import Grid
from harness.study.cost import Speeds, checkpoint_bytes, makespan
from harness.study.identity import HASH_CHARS
from harness.study.stage_set import OfFamilies, families, outlines
from harness.units import format_count, format_seconds, format_si


@dataclass(frozen=True, kw_only=True)
class Totals:
    """FLOPs of the study, and the time and disk that are still to be spent."""

    flops_naive: float
    """Every cell paying for all its stages."""
    flops_shared: float
    """Every stage once."""
    flops_remaining: float
    """Less what is done."""
    seconds_remaining: float
    """Wall time on this machine's slots, if every stage ran as estimated."""
    process_hours_remaining: float
    disk_bytes: float
    measured_share: float
    """Part of the remaining FLOPs whose speed was measured, not guessed."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `harness grid FILE` shows."""

    grid: Grid
    states: Mapping[str, str]
    totals: Totals
    speeds: Speeds
    seconds: OfFamilies[float]
    """Stage id -> its wall time, as estimated."""

    def cell_state(self, stages: Mapping[str, str]) -> str:
        """State of a cell, from its stages' states."""
        return cell_state([self.states[s] for s in stages.values()])

    def remaining(self) -> list[str]:
        """Stages that are not done, in dependency order."""
        return [s for s in self.grid.stages if self.states[s] != "done"]

    def to_json(self) -> dict[str, Any]:
        """The machine-readable plan (`--json`)."""
        known = outlines(self.grid.stages)
        common = OfFamilies(
            known,
            lambda stage: {
                "kind": stage.kind,
                "samples": stage.config.samples,
                "flops": stage.flops,
                "params": stage.params,
                "seconds": self.seconds.of(stage),
            },
        ).of_each()
        cells = [
            {
                "id": c.id,
                "name": c.name,
                "axes": c.axes,
                "stages": c.stages,
                "state": self.cell_state(c.stages),
                "params": c.params,
                "images": c.images,
                "samples": sum([common[s]["samples"] for s in c.stages.values()]),
                "flops": c.flops,
                "seconds": sum([common[s]["seconds"] for s in c.stages.values()]),
                "tag": c.tag,
                "parent": c.parent,
            }
            for c in self.grid.cells
        ]
        feeds, states = self.grid.feeds, self.states
        cut = -HASH_CHARS - 1
        stages = [
            {"id": s, "name": s[:cut], "feeds": feeds[s], "state": states[s], **common[s]}
            for s in known
        ]
        totals = self.totals
        return {
            "schema": 1,
            "study": self.grid.loaded.study.name,
            "notes": unseen_images(self.grid),
            "cells": cells,
            "stages": stages,
            "totals": {
                "flops_naive": totals.flops_naive,
                "flops_shared": totals.flops_shared,
                "flops_remaining": totals.flops_remaining,
                "seconds_remaining": totals.seconds_remaining,
                "process_hours_remaining": totals.process_hours_remaining,
                "disk_bytes": totals.disk_bytes,
                "measured_share": totals.measured_share,
            },
        }


def make_plan(grid: Grid, states: Mapping[str, str], speeds: Speeds, slots: int) -> Plan:
    """Adds up what is shared, done and left."""
    known = outlines(grid.stages)
    seconds = OfFamilies(known, speeds.seconds)
    shared = remaining = measured = disk = hours = 0.0
    work: list[tuple[float, int]] = []
    for like, number in families(known.values()):
        shared += number * like.flops
        disk += number * checkpoint_bytes(like)
    for like, number in families([o for s, o in known.items() if states[s] != "done"]):
        remaining += number * like.flops
        measured += number * like.flops if speeds.is_measured(like) else 0.0
        each, ranks = seconds.of(like), like.execution.ranks
        hours += number * each * ranks / 3600
        work += [(each, ranks)] * number
    totals = Totals(
        flops_naive=sum(c.flops for c in grid.cells),
        flops_shared=shared,
        flops_remaining=remaining,
        seconds_remaining=makespan(work, slots),
        process_hours_remaining=hours,
        disk_bytes=disk,
        measured_share=measured / remaining if remaining else 1.0,
    )
    return Plan(grid=grid, states=states, totals=totals, speeds=speeds, seconds=seconds)


def unseen_images(grid: Grid) -> list[str]:
    """A line for every data size of which WSP does not get to see all: it is no larger then."""
    found: dict[tuple[int, int], int] = {}
    known = outlines(grid.stages)
    stages = [known[cell.stages["wsp"]] for cell in grid.cells if "wsp" in cell.stages]
    for like, cells in families(stages):
        images, samples = like.config.images.images, like.config.samples
        if samples < images:
            found[images, samples] = found.get((images, samples), 0) + cells
    return [
        f"{cells} cells of {format_count(images)} images see {format_count(samples)} of them at"
        " most, the samples of their wsp stage: train longer, or do not read them as more data"
        for (images, samples), cells in sorted(found.items())
    ]


def check_budget(plan: Plan) -> None:
    """Raises UserError if the remaining work exceeds the study's budget."""
    budget, totals = plan.grid.loaded.study.budget, plan.totals
    path = plan.grid.loaded.source.path
    if budget.flops is not None and totals.flops_remaining > budget.flops:
        raise UserError(
            f"{path}: {format_si(totals.flops_remaining, 'FLOPs')} still to run, budget.flops is"
            f" {format_si(budget.flops, 'FLOPs')}; raise it, or submit part with --only"
        )
    if budget.hours is not None and totals.process_hours_remaining > budget.hours:
        raise UserError(
            f"{path}: about {format_seconds(totals.process_hours_remaining * 3600)} of process time"
            f" still to run, budget.hours is {budget.hours:g}; raise it, or submit part with --only"
        )
