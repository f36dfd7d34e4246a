"""A small built-in set, made once for all tests of this room."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.data.dataset import Dataset, open_dataset
from harness.study import scenes_spec


@pytest.fixture(scope="session", autouse=True)
def small_counts() -> object:
    """The splits besides `pretrain` with few images: drawing 10,000 would take seconds."""
    patch = pytest.MonkeyPatch()
    patch.setattr(
        scenes_spec,
        "counts",
        lambda n=None: {"pretrain": n or 64_000, "val": 100, "train": 120, "test": 80},
    )
    yield
    patch.undo()


@pytest.fixture(scope="session")
def scenes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A HARNESS_ROOT in which scenes-600 is ready."""
    root = tmp_path_factory.mktemp("root")
    open_dataset("scenes-600", root)
    return root


@pytest.fixture
def scenes(scenes_root: Path) -> Dataset:
    """scenes-600, opened anew."""
    return open_dataset("scenes-600", scenes_root)
