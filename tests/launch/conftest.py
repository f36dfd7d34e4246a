"""A Slurm of scripts on PATH; a finished study for the tests of a module to look at."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.launch import commands, queue
from harness.ledger.tree import Tree
from harness.study.cells import Grid, build_grid
from harness.study.schema import load_study
from tests.launch.fake_slurm import FakeSlurm
from tests.launch.small_study import TINY, submit


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSlurm]:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{fake.folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(commands, "_known_config", None)
    monkeypatch.setattr(queue, "_last", None)
    monkeypatch.setattr(queue, "_silent_since", None)
    yield fake


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "runs")


@pytest.fixture
def grid(study_file: Callable[..., Path]) -> Grid:
    return build_grid(load_study(study_file()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run root, study file) of the finished tiny study."""
    folder = tmp_path_factory.mktemp("tiny")
    file = folder / "tiny.yaml"
    file.write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_TENSORBOARD", "1")
        submit(folder / "runs", file)
    return folder / "runs", file


@pytest.fixture
def copied(finished: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    root = tmp_path / "runs"
    shutil.copytree(finished[0], root)
    return root, finished[1]
