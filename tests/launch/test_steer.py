"""`harness cancel`, `resume` and `retry`, on a study that runs and one that is done."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.ledger.attempts import read_attempts
from harness.ledger.tree import StageFolder
from tests.launch.small_study import environment

pytestmark = pytest.mark.long

STUDY = """\
name: tiny
axes: {init: [random], seed: [0, 1]}
defaults: {data: 500, size: d16x2, dataset: scenes-2k, image_size: 24}
stages:
  wsp: {duration: {steps: 900}, batch: 16}
  transfer:
    tune: {protocol: fine_tune, duration: {steps: 5}, batch: 64, train_images: 500}
resources: {checkpoint_every: 1}
"""


def harness(root: Path, *words: str, check: int = 0) -> str:
    command = [sys.executable, "-m", "harness.cli.main", *words]
    env = environment(root)
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def states(root: Path) -> dict[str, str]:
    found = json.loads(harness(root, "status", "tiny", "--json"))
    return {s["id"]: s["state"] for s in found["studies"][0]["stages"]}


def test_cancel_holds_until_resume_and_from_scratch_is_another_thing(tmp_path: Path) -> None:
    root, file = tmp_path / "runs", tmp_path / "tiny.yaml"
    file.write_text(STUDY)
    command = [sys.executable, "-m", "harness.cli.main", "grid", str(file), "--submit"]
    driver = subprocess.Popen(command, env=environment(root), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(root.glob("stages/wsp/*-s1-*/checkpoints/*/COMPLETE")):
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.05)
    assert "would cancel" in harness(root, "cancel", "seed=1", "--dry-run")
    assert harness(root, "cancel", "seed=1").count("\ncancel") + 1 == 2
    said, _ = driver.communicate(timeout=300)
    assert driver.returncode == 1
    assert "resume" in said
    by_seed = {s: {v for k, v in states(root).items() if f"-s{s}-" in k} for s in (0, 1)}
    assert by_seed == {0: {"done"}, 1: {"cancelled"}}

    # It sticks: submitting again runs nothing of it.
    assert "2 stages are cancelled" in harness(root, "grid", str(file), "--submit", check=1)
    (held,) = (StageFolder(p) for p in root.glob("stages/wsp/*-s1-*"))
    assert [a.end for a in read_attempts(held)] == ["cancelled"]

    harness(root, "resume", "state=cancelled")
    assert set(states(root).values()) == {"done"}
    assert read_attempts(held)[1].progress > 0

    # Finished stages are not retried; from scratch they are, and what rests on them.
    assert "nothing to retry" in harness(root, "retry", "seed=1")
    (tune,) = (StageFolder(p) for p in root.glob("stages/fine_tune/*-s1-*"))
    before = tune.result.read_bytes(), held.result.read_bytes()
    assert "1 stages rest on these" in harness(root, "retry", "--from-scratch", "stage=wsp,seed=1")
    assert set(states(root).values()) == {"done"}
    assert tune.result.read_bytes() != before[0]
    assert held.result.read_bytes() != before[1]
    assert read_attempts(held)[0].progress == 0
