"""A cell once more, for another seed: the same stages, but for what that changes.

Building a cell checks its recipes, counts its FLOPs and writes out its texts. Of thousands of cells
most differ in the seed alone, which has no say in any of that.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.study.chain import Link
from harness.study.identity import HASH_CHARS, is_plain
from harness.study.stage_set import Outline, StageSet


class Step:
    """A link of a chain, taken apart: what is the same whatever the seed."""

    def __init__(self, link: Link) -> None:
        config = link.stage.config
        self.role, self.built = link.role, link.stage.id
        self.like, self.text = link.stage, link.text
        self.kind = link.stage.kind
        self.name = link.stage.name.removesuffix(str(config.seed))
        self.upstream = tuple(config.upstream.values())
        """Of the stage that was built, in the order of its config."""
        self.in_text = tuple(config.upstream[role] for role in link.text.roles)
        """The same in the order of what is hashed."""
        self.begun, self.form = link.text.of_seeds()
        self.is_plain = all(map(is_plain, self.in_text))


Known = dict[int, dict[str, str]]
"""Seed -> id of a stage that was built -> id of the same stage with that seed."""


def repeat(steps: Sequence[Step], seed: int, stages: StageSet, known: Known) -> dict[str, str]:
    """Role -> stage id of the same chain with another seed; its stages are among `stages` then.

    Chains share what is `known`.
    """
    ids = known.setdefault(seed, {})
    roles: dict[str, str] = {}
    # The inner loop of a plan, of ten thousand cells run forty thousand times: no calls.
    make, add = tuple.__new__, stages.add_like
    for step in steps:
        found = ids.get(step.built)
        if found is None:
            start = tuple([ids[i] for i in step.in_text])
            if seed and step.is_plain:
                rest = step.begun.copy()
                rest.update((step.form % (seed, *start)).encode())
                hashed = rest.hexdigest()
            else:
                hashed = step.text.hashed(seed, start)
            found = ids[step.built] = f"{step.name}{seed}-{hashed[:HASH_CHARS]}"
            upstream = start
            if step.upstream != step.in_text:
                upstream = tuple([ids[i] for i in step.upstream])
            add(found, make(Outline, (step.kind, upstream, seed, step.like, hashed)))
        roles[step.role] = found
    return roles
