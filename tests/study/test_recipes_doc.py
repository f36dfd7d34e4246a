"""docs/recipes.md names every field of every recipe, with its default."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from harness.study.protocols import (
    Detection,
    Evaluate,
    FewShot,
    FineTune,
    Knn,
    LinearProbe,
    Lit,
    PromptTuning,
    Retrieval,
    SgdProbe,
    Video,
    ZeroShot,
)
from harness.study.recipes import MaeRecipe, WspRecipe

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
SOURCES = {"paper", "MAE", "LiT", "CLIP", "ours"}


def documented(section: str) -> dict[str, tuple[str, str]]:
    """Field -> (default, whose) of the table below a heading that begins with `section`."""
    text = re.split(rf"^## {section}\b.*\n", PAGE, flags=re.MULTILINE)[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| (.+?) \| (\w+) \|", text, re.MULTILINE)
    return {field: (default.strip("`"), whose) for field, default, whose in rows}


def defaults(recipe: type[BaseModel]) -> dict[str, str]:
    found = {}
    for name, field in recipe.model_fields.items():
        if name in ("kind", "protocol"):
            continue
        if isinstance(field.default, BaseModel):
            inner = field.default.model_dump()
            found |= {f"{name}.{key}": str(value) for key, value in inner.items()}
        else:
            found[name] = "none" if field.default is PydanticUndefined else str(field.default)
    return found


@pytest.mark.parametrize(
    ("section", "recipe"),
    [
        ("mae", MaeRecipe),
        ("wsp", WspRecipe),
        ("fine_tune", FineTune),
        ("evaluate", Evaluate),
        ("linear_probe", LinearProbe),
        ("sgd_probe", SgdProbe),
        ("knn", Knn),
        ("few_shot", FewShot),
        ("prompt_tuning", PromptTuning),
        ("lit", Lit),
        ("zero_shot", ZeroShot),
        ("retrieval", Retrieval),
        ("video", Video),
        ("detection", Detection),
    ],
)
def test_every_default_is_documented_with_its_source(section: str, recipe: type[BaseModel]) -> None:
    table = documented(section)
    assert {field: default for field, (default, _) in table.items()} == defaults(recipe)
    assert {whose for _, whose in table.values()} <= SOURCES
