"""A cell once more, for another seed: the same stages, but for what that changes.

Building a cell checks its recipes, counts its FLOPs and writes out its texts. Of thousands of cells
most differ in the seed alone, which has no say in any of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.study.chain import Link
from harness.study.identity import HASH_CHARS
from harness.study.stage_set import Outline, StageSet


class Step:
    """A link of a chain, taken apart: what is the same whatever the seed."""

    def __init__(self, link: Link) -> None:
        config = link.stage.config
        self.role, self.built = link.role, link.stage.id
        self._kind, self._like = link.stage.kind, link.stage
        self._hashed = link.text.hashed
        self._name = link.stage.name.removesuffix(str(config.seed))
        self._upstream = tuple(config.upstream.values())
        self._in_text = tuple(config.upstream[role] for role in link.text.roles)

    def of(self, seed: int, ids: Mapping[str, str], stages: StageSet) -> str:
        """The id of the stage with this seed, which is among the `stages` then.

        `ids`: of the stages that it starts from, by those of the chain that was built.
        """
        hashed = self._hashed(seed, [ids[i] for i in self._in_text])
        stage_id = f"{self._name}{seed}-{hashed[:HASH_CHARS]}"
        if stages.is_new(stage_id, hashed):
            upstream = tuple([ids[i] for i in self._upstream])
            stages.add_like(stage_id, Outline(self._kind, upstream, seed, self._like))
        return stage_id


Known = dict[int, dict[str, str]]
"""Seed -> id of a stage that was built -> id of the same stage with that seed."""


def repeat(steps: Sequence[Step], seed: int, stages: StageSet, known: Known) -> dict[str, str]:
    """Role -> stage id of the same chain with another seed. Chains share what is `known`."""
    ids = known.setdefault(seed, {})
    roles: dict[str, str] = {}
    for step in steps:
        found = ids.get(step.built)
        if found is None:
            found = ids[step.built] = step.of(seed, ids, stages)
        roles[step.role] = found
    return roles
