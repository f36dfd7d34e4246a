"""A cell once more, for another seed: the same stages, but for what that changes.

Building a cell checks its recipes, counts its FLOPs and writes out its texts. Of thousands of cells
most differ in the seed alone, which has no say in any of that.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.study import identity
from harness.study.chain import Link
from harness.study.stage_set import Outline, StageSet


class Step:
    """A link of a chain, taken apart: what is the same whatever the seed."""

    def __init__(self, link: Link) -> None:
        config = link.stage.config
        self.role, self.stage = link.role, link.stage
        self._text = link.text
        self._name = link.stage.name.removesuffix(str(config.seed))
        self._upstream = tuple(config.upstream.values())
        self._hashed = tuple(config.upstream[role] for role in link.text.roles)

    def of(self, seed: int, ids: dict[str, str], stages: StageSet) -> str:
        """The id of the stage with this seed, which is among the `stages` then.

        `ids`: of the stages that it starts from, by those of the chain that was built.
        """
        text = self._text.at(seed, [ids[i] for i in self._hashed])
        stage_id = f"{self._name}{seed}-{identity.digest(text)}"
        if stage_id not in stages.outlines:
            upstream = tuple([ids[i] for i in self._upstream])
            stages.add_like(stage_id, Outline(self.stage.kind, upstream, seed, self.stage), text)
        return stage_id


def repeat(steps: Sequence[Step], seed: int, stages: StageSet) -> dict[str, str]:
    """Role -> stage id of the same chain with another seed."""
    ids: dict[str, str] = {}
    roles: dict[str, str] = {}
    for step in steps:
        ids[step.stage.id] = roles[step.role] = step.of(seed, ids, stages)
    return roles
