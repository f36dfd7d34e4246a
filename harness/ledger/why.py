"""Why a stage would run: what of it is new, and against which stage that is there already."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.errors import UserError
from harness.ledger.files import read_json
from harness.ledger.states import StageState
from harness.ledger.tree import Tree
from harness.study.identity import field_diff, semantic_fields
from harness.study.stages import StageConfig, StageFile

_MOST_COMPARED = 500
"""Stages of a kind and size that a new one is compared with: each is a file to read."""


@dataclass(frozen=True, kw_only=True)
class Why:
    """Of a stage that is not done."""

    stage: str
    kind: str
    state: str
    text: str
    nearest: str | None = None
    """The stage of its kind and size in the run tree that differs least."""
    diff: list[str] = field(default_factory=list)
    """Fields in which that one is another, a line each: `recipe.lr: 0.001 -> 0.002`."""


def reasons(
    tree: Tree, stages: Mapping[str, StageFile], states: Mapping[str, StageState]
) -> list[Why]:
    """Of those of the stages, in dependency order, that are not done."""
    known: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    new: set[str] = set()
    found: list[Why] = []
    for stage_id, stage in stages.items():
        state = states[stage_id]
        if state.state == "done":
            continue
        about: dict[str, Any] = {"stage": stage_id, "kind": stage.kind, "state": state.state}
        if tree.stage(stage.kind, stage_id).stage.exists():
            found.append(Why(**about, text=_of_begun(state)))
            continue
        size = stage.config.size
        if (stage.kind, size) not in known:
            known[stage.kind, size] = dict(_stored(tree, stage.kind, size))
        own = semantic_fields(stage.config)
        behind = [u for u in stage.config.upstream.values() if u in new]
        new.add(stage_id)
        text = f"new: it starts from {behind[0]}, which is new" if behind else "new"
        diffs = {s: _diff(old, own, behind) for s, old in known[stage.kind, size].items()}
        nearest = min(diffs, key=lambda s: (len(diffs[s]), s), default=None)
        if nearest is None or not diffs[nearest]:  # all there is to say is said of its upstream
            found.append(Why(**about, text=text))
        else:
            found.append(Why(**about, text=text, nearest=nearest, diff=diffs[nearest]))
    return found


def _of_begun(state: StageState) -> str:
    if state.reason == "stale":
        return f"would run again: {state.message}"
    said = ": ".join(str(part) for part in (state.reason, state.message) if part)
    return said or "is there, and has not run to its end"


def _stored(tree: Tree, kind: str, size: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Fields of the stages of a kind and size that were written down, by id."""
    ids = sorted(s for s in tree.begun(kind) if s.startswith(f"{size}-"))
    for stage_id in ids[:_MOST_COMPARED]:
        # What an older version wrote, or somebody edited, is nothing to compare with.
        with contextlib.suppress(UserError, ValueError, KeyError, TypeError):
            raw = read_json(tree.stage(kind, stage_id).stage)
            if raw is not None:
                yield stage_id, semantic_fields(StageConfig.model_validate(raw["config"]))


def _diff(old: dict[str, Any], own: dict[str, Any], behind: list[str]) -> list[str]:
    """What differs; that it starts from a stage that is new itself is said of that one."""
    if behind:
        old, own = ({k: v for k, v in one.items() if k != "upstream"} for one in (old, own))
    return field_diff(old, own)
