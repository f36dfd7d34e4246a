"""One real cluster for all tests of this folder, and a study small enough for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing

STUDY = """\
name: tiny
axes:
  init: [random, mae]
defaults:
  data: 500
  size: d16x2
  dataset: scenes-2k
  image_size: 24
stages:
  mae: {duration: {steps: 30}, batch: 64, decoder_width: 16, decoder_depth: 1, decoder_heads: 2}
  wsp: {duration: {steps: %(steps)d}, batch: 60}
  transfer:
    tune: {protocol: fine_tune, duration: {steps: 10}, batch: 64, train_images: 500}
resources: {checkpoint_every: 1, ranks: %(ranks)d}
"""

PROFILE = """\
profiles:
  test:
    kind: slurm
    device: cpu
    partition: work
    signal_s: 10
    time: 10m
    env: {OMP_NUM_THREADS: "1", HARNESS_DEVICE: cpu}
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running cluster of two nodes."""
    why = missing()
    if why is not None:
        pytest.skip(why)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


@dataclass
class Site:
    """A user's folder on the cluster: run root, settings, study file."""

    cluster: Cluster
    folder: Path
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The run root."""
        return self.folder / "runs"

    def study(self, text: str = STUDY, steps: int = 40, ranks: int = 1) -> Path:
        """Writes a study file."""
        file = self.folder / "tiny.yaml"
        file.write_text(text % {"steps": steps, "ranks": ranks} if "%(" in text else text)
        return file

    def profile(self, **changes: str) -> None:
        """Writes the settings, with changed or further lines of the profile."""
        lines = [s for s in PROFILE.splitlines() if s.split(":")[0].strip() not in changes]
        lines += [f"    {k}: {v}" for k, v in changes.items()]
        (self.folder / "settings.yaml").write_text("\n".join(lines) + "\n")

    def harness(self, *words: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Runs a command of ours as on a login node."""
        if not (self.folder / "settings.yaml").exists():
            self.profile()
        env = {
            **os.environ,
            **self.cluster.env,
            "HARNESS_ROOT": str(self.root),
            "HARNESS_SETTINGS": str(self.folder / "settings.yaml"),
            "HARNESS_CLUSTER": "test",
            **self.extra,
        }
        command = [sys.executable, "-m", "harness.cli.main", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        if check is not None:
            assert done.returncode == check, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> Iterator[Site]:
    """A site of one test; its jobs are gone afterwards."""
    yield Site(cluster, tmp_path)
    cluster.command("scancel", "--user=root")
    cluster.wait_empty(60)
