"""One real cluster for all tests of this folder, and a study small enough for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from harness.ledger.files import read_json, read_jsonl
from harness.ledger.tree import StageFolder
from tests.slurm.cluster import PATIENCE_S, Cluster, missing

STUDY = """\
name: tiny
axes:
  init: %(init)s
  seed: %(seed)s
defaults:
  data: 500
  size: d16x2
  dataset: scenes-2k
  image_size: 24
stages:
  mae: {duration: {steps: 30}, batch: 64, decoder_width: 16, decoder_depth: 1, decoder_heads: 2}
  wsp: {duration: {steps: %(steps)d}, batch: 60, lr: %(lr)s}
  transfer:
    tune: {protocol: fine_tune, duration: {steps: 10}, batch: 64, train_images: 500}
resources: {checkpoint_every: 0.5%(resources)s}
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
    cwd: Path | None = None
    """Where commands are given; the folder by default."""

    @property
    def root(self) -> Path:
        """The run root."""
        return self.folder / "runs"

    def study(self, **changes: object) -> Path:
        """Writes a study file."""
        known: dict[str, object] = {"init": "[random]", "seed": "[0]", "lr": "1e-3"}
        known |= {"steps": 40, "resources": ""}
        file = self.folder / "tiny.yaml"
        file.write_text(STUDY % (known | changes))
        return file

    def profile(self, **changes: str) -> None:
        """Writes the settings, with changed or further lines of the profile."""
        lines = [s for s in PROFILE.splitlines() if s.split(":")[0].strip() not in changes]
        lines += [f"    {k}: {v}" for k, v in changes.items()]
        (self.folder / "settings.yaml").write_text("\n".join(lines) + "\n")

    def without_training(self) -> None:
        """From now on stages sleep instead of training: see `light_worker`."""
        here, copy = Path(__file__).resolve().parents[2], self.folder / "checkout"
        for name in ("harness", "analysis", "ds_configs", "grids"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(here / name, copy / name, ignore=ignored)
        shutil.copy(here / "tests/slurm/light_worker.py", copy / "harness/worker.py")
        self.extra["PYTHONPATH"] = str(copy)

    def numbers(self) -> dict[str, list[dict[str, Any]]]:
        """Everything the study measured, wall times aside."""
        found: dict[str, list[dict[str, Any]]] = {}
        for folder in sorted(self.root.glob("stages/*/*")):
            rows = read_jsonl(folder / "metrics.jsonl")
            found[folder.name] = [{k: v for k, v in r.items() if k != "wall_s"} for r in rows]
            found[folder.name].append((read_json(folder / "result.json") or {})["metrics"])
        return found

    def states(self) -> dict[str, str]:
        """State of every stage, as `status` tells it."""
        found = json.loads(self.harness("status", "tiny", "--json").stdout)
        return {s["id"]: s["state"] for s in found["studies"][0]["stages"]}

    def folder_of(self, kind: str) -> StageFolder:
        """The one stage of a kind."""
        (path,) = self.root.glob(f"stages/{kind}/*")
        return StageFolder(path)

    def submit(self, file: Path, *words: str, check: int = 0) -> str:
        """Submits a study; what was printed."""
        return self.harness("grid", str(file), "--submit", *words, check=check).stdout

    def wait_done(self, seconds: float = PATIENCE_S) -> None:
        """Waits for an empty queue; every stage must be done then."""
        self.cluster.wait_empty(seconds)
        states = self.states()
        assert set(states.values()) == {"done"}, "\n".join([str(states), *self._logs()])

    def _logs(self) -> list[str]:
        logs = [*self.root.glob("slurm/*/jobs/*_log.*")]
        logs += self.root.glob("stages/*/*/attempts/*/stderr.log")
        return [f"--- {log}\n{log.read_text()[-1500:]}" for log in sorted(logs)]

    def wait_until(
        self, is_true: Callable[[], object], what: str, seconds: float = PATIENCE_S
    ) -> None:
        """Waits for something to become true."""
        deadline = time.monotonic() + seconds
        while not is_true():
            late = time.monotonic() > deadline
            assert not late, "\n".join([what, str(self.states()), *self._logs()])
            time.sleep(0.1)

    def wait_training(self, kind: str = "wsp", attempt: int = 1) -> str:
        """Waits until a stage of the kind has saved a checkpoint; its job."""
        folders = [StageFolder(p) for p in self.root.glob(f"stages/{kind}/*")]

        def job() -> str | None:
            for folder in folders:
                status = read_json(folder.status) or {}
                saved = any(folder.checkpoints.glob("*/COMPLETE"))
                if status.get("state") == "running" and status["attempt"] >= attempt and saved:
                    return str(status["job"])
            return None

        self.wait_until(job, f"{kind} does not train")
        return job() or ""

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
        # Away from the checkout around these tests, whose code would come before PYTHONPATH's.
        where = self.cwd or self.folder
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, check=False, cwd=where
        )
        if check is not None:
            assert done.returncode == check, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> Iterator[Site]:
    """A site of one test; its jobs are gone afterwards."""
    yield Site(cluster, tmp_path)
    cluster.command("scancel", "--user=root")
    cluster.wait_empty()
