"""docs/study_file.md explains every key of a study file, with its default."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from harness.study.schema import (
    CORE_AXES,
    Budget,
    MatchSet,
    ResourceRule,
    Resources,
    Retry,
    Stages,
    Study,
)
from harness.study.tuning import Pruner, Space, Tune

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "study_file.md").read_text()


def section(title: str) -> str:
    """The text below a heading."""
    return re.split(rf"^### {title}\n", PAGE, flags=re.MULTILINE)[1].split("\n## ")[0]


def table(title: str) -> list[tuple[str, str, str]]:
    """(key, default, what it says): the rows of the first table below a heading."""
    own = section(title).split("\n### ")[0]
    return re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", own, re.MULTILINE)


def default(field: object) -> str:
    if field is PydanticUndefined:
        return "none"
    return "{}" if isinstance(field, BaseModel) else str(field)


@pytest.mark.parametrize(
    ("title", "model"),
    [("The study", Study), ("Resources", Resources), ("Retry", Retry), ("Budget", Budget)],
)
def test_every_key_is_explained_with_its_default(title: str, model: type[BaseModel]) -> None:
    rows = table(title)
    wanted = [(name, default(field.default)) for name, field in model.model_fields.items()]
    assert sorted((key, value) for key, value, _ in rows) == sorted(wanted)
    assert all(len(words) > 10 for _, _, words in rows)


def test_what_stands_below_a_key_is_named_with_it() -> None:
    said = {key: words for key, _, words in table("The study")}
    below = {
        "axes": CORE_AXES,
        "overrides": MatchSet.model_fields,
        "stages": Stages.model_fields,
    }
    for key, names in below.items():
        assert {f"`{name}`" for name in names} <= set(re.findall(r"`\w+`", said[key])), key
    # Rules of resources look like those of overrides.
    assert ResourceRule.model_fields.keys() == MatchSet.model_fields.keys()


def test_a_shared_gpu_is_said_to_be_nothing_for_slurm() -> None:
    (said,) = [words for key, _, words in table("Resources") if key == "share"]
    assert "`local`" in said and "`hosts`" in said and "nothing on Slurm" in said


def test_the_page_on_tuning_has_every_key_of_its_section() -> None:
    page = (DOCS / "tuning.md").read_text()
    blocks = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (example,) = [b["tune"] for b in map(yaml.safe_load, blocks) if "tune" in b]
    assert example.keys() == Tune.model_fields.keys()
    assert example["pruner"].keys() == Pruner.model_fields.keys()
    ranges = {key for space in example["params"].values() for key in space}
    assert Space.model_fields.keys() - ranges == {"whole"} and "`whole: true`" in page


def test_the_table_of_failures_has_every_cause_and_how_often_it_is_tried() -> None:
    page = (DOCS / "cluster.md").read_text()
    rows = re.findall(r"^\| .+ \| .+ \| (`.*`) \|$", page, re.MULTILINE)
    found = dict(re.findall(r"`(\w+): (\w+)`", " ".join(rows)))
    wanted = {name: str(value) for name, value in Retry().model_dump().items()}
    patience = wanted.pop("patience")
    assert found == wanted
    assert f"`patience` ({patience}) attempts" in page.replace("\n", " ")
