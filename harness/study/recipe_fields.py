"""Recipes changed before they are checked: fields set by their dotted names, stages left out."""

from __future__ import annotations

from typing import Any

from harness.study.schema import Stages


def cut(recipes: Stages, until: str) -> Stages:
    """The recipes that a cell needs to come to the stage of this role."""
    wanted = [until]
    while (before := getattr(recipes.transfer.get(wanted[-1]), "of", None)) not in (None, *wanted):
        wanted.append(before)
    kept = {task: recipe for task, recipe in recipes.transfer.items() if task in wanted}
    wsp = None if until == "mae" else recipes.wsp
    return recipes.model_copy(update={"wsp": wsp, "transfer": kept})


def assign(raw: dict[str, Any], parts: tuple[str, ...], value: Any) -> bool:
    """Sets raw[a][b][c] = value. False if the first part is no stage of the study."""
    if len(parts) < 2 or not isinstance(raw.get(parts[0]), dict):
        return False
    node = raw
    for part in parts[:-1]:
        child = node.get(part)
        if not isinstance(child, dict):
            child = node[part] = {}
        if part in ("duration", "warmup", "cooldown"):
            # A duration has one unit: setting another replaces it.
            child.clear()
        node = child
    node[parts[-1]] = value
    return True
