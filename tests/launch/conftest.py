"""A Slurm of scripts on PATH."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.launch import queue
from tests.launch.fake_slurm import FakeSlurm


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSlurm]:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{fake.folder / 'bin'}:{os.environ['PATH']}")
    queue._config.cache_clear()
    monkeypatch.setattr(queue, "_last", None)
    yield fake
    queue._config.cache_clear()
