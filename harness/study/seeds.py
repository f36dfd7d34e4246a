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
        hashed = self._text.hashed(seed, [ids[i] for i in self._hashed])
        stage_id = f"{self._name}{seed}-{hashed[: identity.HASH_CHARS]}"
        if stage_id not in stages.outlines:
            upstream = tuple([ids[i] for i in self._upstream])
            stages.add_like(stage_id, Outline(self.stage.kind, upstream, seed, self.stage), hashed)
        return stage_id


Known = dict[tuple[str, int], str]
"""(id of a stage that was built, seed) -> id of the same stage with that seed."""


def repeat(steps: Sequence[Step], seed: int, stages: StageSet, known: Known) -> dict[str, str]:
    """Role -> stage id of the same chain with another seed. Chains share what is `known`."""
    ids: dict[str, str] = {}
    roles: dict[str, str] = {}
    for step in steps:
        built = step.stage.id
        found = known.get((built, seed))
        if found is None:
            found = known[built, seed] = step.of(seed, ids, stages)
        ids[built] = roles[step.role] = found
    return roles
