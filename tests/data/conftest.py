"""A small built-in set, made once for all tests of this room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.data.dataset import Dataset, open_dataset
from harness.study import builtin, scenes_spec


@contextmanager
def few_images() -> Iterator[None]:
    """The splits besides `pretrain` with few images: drawing 10,000 would take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            scenes_spec,
            "counts",
            lambda n=None: {"pretrain": n or 64_000, "val": 100, "train": 120, "test": 80},
        )
        builtin.builtin.cache_clear()
        yield
    builtin.builtin.cache_clear()  # or the small counts would be other rooms' too


@pytest.fixture(scope="module", autouse=True)
def small_counts() -> Iterator[None]:
    """Only for this room's tests: counts are part of a dataset's fingerprint, so of every id."""
    with few_images():
        yield


@pytest.fixture(scope="session")
def scenes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A HARNESS_ROOT in which scenes-600 is ready."""
    root = tmp_path_factory.mktemp("root")
    with few_images():
        open_dataset("scenes-600", root)
    return root


@pytest.fixture
def scenes(scenes_root: Path) -> Dataset:
    """scenes-600, opened anew."""
    return open_dataset("scenes-600", scenes_root)
