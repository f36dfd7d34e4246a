"""Whether the stages of a run tree are still what their ids say."""

from __future__ import annotations

from harness.ledger.files import read_json
from harness.ledger.tree import Tree
from harness.study.cells import Grid
from harness.study.identity import field_diff, semantic_fields
from harness.study.stages import StageConfig


def check_drift(tree: Tree, grid: Grid) -> list[str]:
    """Stages whose stored config differs from the wanted one under the same id, a line each.

    An id stands for its config; a difference means that a default or the meaning of a field
    changed without a new `identity.VERSION`, or that somebody edited stage.json.
    """
    lines = []
    for stage in grid.stages.values():
        stored = read_json(tree.stage(stage.kind, stage.id).stage)
        if stored is None:
            continue
        old = semantic_fields(StageConfig.model_validate(stored["config"]))
        diff = field_diff(old, semantic_fields(stage.config))
        if diff:
            lines.append(f"{stage.id}: stored config differs: {'; '.join(diff)}")
    return lines
