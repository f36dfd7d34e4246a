"""A cell once more, for another seed: the same stages, but for what that changes.

Building a cell checks its recipes, counts its FLOPs and writes out its texts. Of thousands of cells
most differ in the seed alone, which has no say in any of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel

from harness.study import identity
from harness.study.chain import Link
from harness.study.stages import StageFile

T = TypeVar("T", bound=BaseModel)


class Step:
    """A link of a chain, taken apart: what is the same whatever the seed."""

    def __init__(self, link: Link) -> None:
        self.role, self.stage = link.role, link.stage
        config = link.stage.config
        self._text = link.text
        self._name = link.stage.name.removesuffix(str(config.seed))
        self._upstream = tuple(config.upstream.items())
        self._kinds = tuple(link.stage.upstream_kinds.items())
        self.flops = link.stage.flops

    def of(
        self,
        seed: int,
        ids: dict[str, str],
        known: dict[str, StageFile],
        put: Callable[[StageFile, str], str],
    ) -> str:
        """The id of the stage with this seed, which is `put` where it is not `known`.

        `ids`: of the stages that it starts from, by those of the chain that was built.
        """
        old = self.stage
        upstream = {role: ids[i] for role, i in self._upstream}
        text = self._text.of(seed, upstream)
        name = f"{self._name}{seed}"
        stage_id = f"{name}-{identity.digest(text)}"
        if stage_id not in known:
            config = renewed(old.config, {"seed": seed, "upstream": upstream})
            kinds = {ids[i]: kind for i, kind in self._kinds}
            fields = {"id": stage_id, "name": name, "config": config, "upstream_kinds": kinds}
            put(renewed(old, fields), text)
        return stage_id


def repeat(
    steps: Sequence[Step],
    seed: int,
    known: dict[str, StageFile],
    put: Callable[[StageFile, str], str],
) -> dict[str, str]:
    """Role -> stage id of the same chain with another seed."""
    ids: dict[str, str] = {}
    roles: dict[str, str] = {}
    for step in steps:
        ids[step.stage.id] = roles[step.role] = step.of(seed, ids, known, put)
    return roles


def renewed(model: T, fields: dict[str, Any]) -> T:
    """`model.model_copy(update=fields)`, of a model without private or extra fields.

    Set up as pydantic's own `model_construct` does it; its general copy takes ten times as long.
    """
    made = model.__class__.__new__(model.__class__)
    put = object.__setattr__
    put(made, "__dict__", {**model.__dict__, **fields})
    told = model.__pydantic_fields_set__
    put(made, "__pydantic_fields_set__", told if fields.keys() <= told else {*told, *fields})
    put(made, "__pydantic_extra__", None)
    put(made, "__pydantic_private__", None)
    return made
