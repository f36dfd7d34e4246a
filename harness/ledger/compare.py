"""Two cells side by side: what was asked for differently, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.ledger import store
from harness.ledger.files import read_json
from harness.ledger.states import StageState
from harness.ledger.tree import StageFolder, Tree
from harness.study.identity import field_diff, semantic_fields


@dataclass(frozen=True, kw_only=True)
class StageDiff:
    """One role of two cells, of which each has a stage."""

    role: str
    stages: tuple[str, str]
    states: tuple[str, str]
    fields: list[str]
    """Of the configs, but for what they start from: `recipe.lr: 0.001 -> 0.002`; none where one was
    not written down yet, as nobody has begun it."""
    code: tuple[str | None, str | None]
    """What made the results, by name in ROOT/code; None where there is no result."""
    metrics: dict[str, tuple[float | None, float | None]]
    """By name, of stages that are done."""

    @property
    def is_shared(self) -> bool:
        """True if both cells use one and the same stage."""
        return self.stages[0] == self.stages[1]


def compare(
    tree: Tree, a: Mapping[str, Any], b: Mapping[str, Any], states: Mapping[str, StageState]
) -> list[StageDiff]:
    """Roles that two rows of cells.jsonl have both, in their order."""
    found = []
    for role, stage in a["stages"].items():
        if role not in b["stages"]:
            continue
        ids = (stage, b["stages"][role])
        folders = [tree.stage(row["kinds"][s], s) for row, s in zip((a, b), ids, strict=True)]
        asked = [_asked(folder) for folder in folders]
        results = [
            (read_json(folder.result) or {}) if states[s].state == "done" else {}
            for folder, s in zip(folders, ids, strict=True)
        ]
        told: list[dict[str, Any]] = [result.get("metrics", {}) for result in results]
        names = dict.fromkeys(name for metrics in told for name in metrics)
        found.append(
            StageDiff(
                role=role,
                stages=ids,
                states=(states[ids[0]].state, states[ids[1]].state),
                fields=field_diff(asked[0], asked[1]) if all(asked) else [],
                code=(_code(folders[0], results[0]), _code(folders[1], results[1])),
                metrics={name: (told[0].get(name), told[1].get(name)) for name in names},
            )
        )
    return found


def _asked(folder: StageFolder) -> dict[str, Any]:
    if not folder.stage.exists():
        return {}
    fields = semantic_fields(store.read_stage(folder).config)
    fields.pop("upstream", None)  # a role of its own
    return fields


def _code(folder: StageFolder, result: Mapping[str, Any]) -> str | None:
    git = read_json(folder.attempt(int(result.get("attempts") or 0)) / "git.json") or {}
    return git.get("code")
