"""Stage identity: a readable name and a hash over what changes the numbers, nothing else."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from harness.study.recipes import MaeRecipe, Optimization
from harness.study.stages import StageConfig
from harness.units import format_count

VERSION = 1
"""Part of every hash. Bump it when the meaning of existing fields or a default changes."""

HASH_CHARS = 12


def semantic_fields(config: StageConfig) -> dict[str, Any]:
    """The fields that enter the hash: those not at their default, readable names left out.

    A duration is represented by the steps it came to, so `epochs: 2` of 4k images and
    `samples: 8k` are one stage.
    """
    fields = config.model_dump(mode="json", exclude_defaults=True, exclude={"size"})
    fields["images"].pop("dataset")
    recipe = fields["recipe"]
    # Discriminators are at their default in their own class, but they say which class it is.
    recipe.pop("duration", None)
    recipe.pop("dataset", None)  # its fingerprint is in `images`
    recipe.pop("image_size", None)  # it is in `model`
    recipe.pop("of", None)  # its stage is in `upstream`
    if isinstance(recipe.get("text"), dict):
        recipe["text"].pop("folder", None)  # its content's hash stands beside it
    if isinstance(config.recipe, MaeRecipe):
        # `full`, `same` and N only select images; what they selected is in `images`.
        recipe.pop("data", None)
    if isinstance(config.recipe, Optimization) and config.recipe.schedule != "wsd":
        recipe.pop("cooldown", None)
    return {"version": VERSION, **fields}


def canonical(fields: dict[str, Any]) -> str:
    """One spelling per value: sorted keys, no spaces, floats as repr."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(fields: dict[str, Any]) -> str:
    """The hash part of an id."""
    return hashlib.sha256(canonical(fields).encode()).hexdigest()[:HASH_CHARS]


def stage_name(config: StageConfig) -> str:
    """Readable part of a stage id, such as `d64x4-4k-from-mae-s0`."""
    parts = [config.size]
    if config.kind in ("mae", "wsp"):
        parts.append(format_count(config.images.images))
    parts.append(f"s{config.seed}")
    return "-".join(parts)


def stage_id(config: StageConfig, readable: str | None = None) -> str:
    """`<readable>-<hash>`; equal configs have equal ids."""
    return f"{readable or stage_name(config)}-{digest(semantic_fields(config))}"


def field_diff(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two semantic-field dictionaries, a line a field: `a.b: 1 -> 2`."""
    lines: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += field_diff(before, after, f"{prefix}{key}.")
        elif before != after:
            shown = ["(default)" if v is None else json.dumps(v) for v in (before, after)]
            lines.append(f"{prefix}{key}: {shown[0]} -> {shown[1]}")
    return lines
