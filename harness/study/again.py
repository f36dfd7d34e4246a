"""A cell's chain once more, for another seed: the same stages, but for what that changes.

Building a chain checks its recipes, counts its FLOPs and writes out its texts. Of thousands of
cells most differ in the seed alone, which has no say in any of that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from harness.study import identity
from harness.study.chain import Chain, Link
from harness.study.schema import Stages
from harness.study.stages import StageFile


@dataclass(frozen=True, kw_only=True)
class Built:
    """A chain that was built, and the recipes whose id() stands in the key it is kept by."""

    recipes: Stages
    links: tuple[Link, ...]


def built(chain: Chain, recipes: Stages) -> Built:
    """What `repeat` needs of a chain."""
    return Built(recipes=recipes, links=tuple(chain.links))


def repeat(
    known: Built, seed: int, stages: dict[str, StageFile], put: Callable[[StageFile, str], str]
) -> dict[str, str]:
    """Role -> stage id of the same chain with another seed; each stage is `put` where it is new."""
    new_ids: dict[str, str] = {}
    ids: dict[str, str] = {}
    for link in known.links:
        old = link.stage
        upstream = {role: new_ids[i] for role, i in old.config.upstream.items()}
        text = link.text.of(seed, upstream)
        name = old.name.removesuffix(f"-s{old.config.seed}") + f"-s{seed}"
        new_id = f"{name}-{identity.digest(text)}"
        if new_id not in stages:
            config = old.config.model_copy(update={"seed": seed, "upstream": upstream})
            kinds = {i: stages[i].kind for i in upstream.values()}
            fields = {"id": new_id, "name": name, "config": config, "upstream_kinds": kinds}
            put(old.model_copy(update=fields), text)
        new_ids[old.id] = ids[link.role] = new_id
    return ids
