"""Why a stage would run: what of it is new, and against which stage that is there already."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.errors import UserError
from harness.ledger.files import read_json
from harness.ledger.states import StageState
from harness.ledger.tree import Tree
from harness.study.identity import field_diff, semantic_fields
from harness.study.stages import StageConfig, StageFile


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
) -> Iterator[Why]:
    """Of those of the stages, in dependency order, that are not done."""
    known: dict[tuple[str, str], _Stored] = {}
    new: set[str] = set()
    for stage_id, stage in stages.items():
        state = states[stage_id]
        if state.state == "done":
            continue
        about: dict[str, Any] = {"stage": stage_id, "kind": stage.kind, "state": state.state}
        if tree.stage(stage.kind, stage_id).stage.exists():
            yield Why(**about, text=_of_begun(state))
            continue
        size = stage.config.size
        if (stage.kind, size) not in known:
            known[stage.kind, size] = _Stored(tree, stage.kind, size)
        behind = [u for u in stage.config.upstream.values() if u in new]
        new.add(stage_id)
        text = f"new: it starts from {behind[0]}, which is new" if behind else "new"
        nearest, diff = known[stage.kind, size].nearest(stage.config, is_behind=bool(behind))
        # Without a difference all there is to say is said of its upstream.
        yield Why(**about, text=text, nearest=nearest if diff else None, diff=diff)


class _Stored:
    """Stages of a kind and size that were written down, those that differ in the seed together."""

    def __init__(self, tree: Tree, kind: str, size: str) -> None:
        self._families: dict[frozenset[tuple[str, str]], dict[int, tuple[str, dict[str, Any]]]] = {}
        self._nearest: dict[frozenset[tuple[str, str]], frozenset[tuple[str, str]]] = {}
        for stage_id in sorted(s for s in tree.begun(kind) if s.startswith(f"{size}-")):
            # What an older version wrote, or somebody edited, is nothing to compare with.
            with contextlib.suppress(UserError, ValueError, KeyError, TypeError):
                raw = read_json(tree.stage(kind, stage_id).stage)
                if raw is not None:
                    config = StageConfig.model_validate(raw["config"])
                    fields = semantic_fields(config)
                    family = self._families.setdefault(_family(fields), {})
                    family.setdefault(config.seed, (stage_id, fields))

    def nearest(self, config: StageConfig, is_behind: bool) -> tuple[str | None, list[str]]:
        """The stage that differs in the fewest fields, and these.

        `is_behind`: that it starts from a stage that is new itself is said of that one.
        """
        own = semantic_fields(config)
        mine = _family(own)
        if not self._families:
            return None, []
        if mine not in self._nearest:
            self._nearest[mine] = min(self._families, key=lambda theirs: len(mine ^ theirs))
        family = self._families[self._nearest[mine]]
        stage_id, old = family.get(config.seed) or next(iter(family.values()))
        if is_behind:
            old, own = ({k: v for k, v in one.items() if k != "upstream"} for one in (old, own))
        return stage_id, field_diff(old, own)


def _family(fields: dict[str, Any]) -> frozenset[tuple[str, str]]:
    """All fields but seed and upstream, as pairs of path and value."""
    return frozenset(_flat({k: v for k, v in fields.items() if k not in ("seed", "upstream")}))


def _flat(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)


def _of_begun(state: StageState) -> str:
    if state.reason == "stale":
        return f"would run again: {state.message}"
    said = ": ".join(str(part) for part in (state.reason, state.message) if part)
    return said or "is there, and has not run to its end"
