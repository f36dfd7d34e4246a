"""Made run trees: one whole, one with every kind of hole, and how to make others."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import runtree
from runtree import Spec, Truth, write_tree

from analysis.load import StudyData, load

Make = Callable[[Spec], StudyData]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a run tree from a spec and loads it."""

    def build(spec: Spec) -> StudyData:
        write_tree(tmp_path / "runs", spec)
        return load(tmp_path / "runs", spec.name)

    return build


def holes(axes: dict[str, Any], role: str) -> str:
    """One diverged, one failed, one blocked and one planned corner."""
    key = (axes["size"], axes["data"], axes["init"])
    if key == ("l", 64_000, "mae") and role != "mae":
        return "diverged" if role == "wsp" else "planned"
    if key == ("xs", 4_000, "random") and role == "probe":
        return "failed"
    if key[:2] == ("m", 1_000) and role != "mae":
        return "planned"
    return "done"


@pytest.fixture
def holed(make: Make) -> StudyData:
    """A study with failed, diverged, blocked and missing cells."""
    return make(Spec(state_of=holes, truth=Truth(noise=0.01)))


@pytest.fixture(scope="session")
def trees() -> Any:
    """The module that writes run trees."""
    return runtree
