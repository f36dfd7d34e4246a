"""`harness tune` for real: the pool, optuna's storage, kills, two processes at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from harness.ledger.files import read_json, read_jsonl
from harness.study.cells import build_grid
from harness.study.schema import load_study

pytestmark = pytest.mark.long

STUDY = """\
name: rates
axes:
  init: [random, mae]
defaults:
  size: d8x2
  data: 250
  dataset: scenes-250
  image_size: 24
stages:
  mae:
    duration: {steps: 10}
    batch: 32
    decoder_width: 16
    decoder_depth: 1
    decoder_heads: 2
    val_images: 50
  wsp:
    duration: {steps: STEPS}
    batch: 32
    val_images: 100
  transfer:
    probe: {protocol: linear_probe, train_images: 100}
tune:
"""
# 1e-3, 1e-1, 1e1, 1e3: the last two are hopeless.
GRID = """\
  params: {wsp.lr: {low: 1e-3, high: 1e3, log: true}}
  for_each: [size, init]
  trials: 4
  sampler: grid
  pruner: {kind: median, startup: 2, warmup: 1}
"""
RANDOM = """\
  params: {wsp.lr: {low: 1e-3, high: 1e-2, log: true}}
  for_each: [size, init]
  trials: 3
  sampler: random
  pruner: {kind: none}
"""


def write(folder: Path, tune: str, steps: int) -> Path:
    file = folder / "rates.yaml"
    file.write_text(STUDY.replace("STEPS", str(steps)) + tune)
    return file


def start(folder: Path, *arguments: object, cores: int = 2) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "HARNESS_ROOT": str(folder / "runs"),
        "HARNESS_DEVICE": "cpu",
        "HARNESS_CORES": str(cores),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "harness.cli.main", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate()
    assert process.returncode == 0, f"exit {process.returncode}\n{out}\n{error}"
    return out


def groups(folder: Path) -> dict[str, Any]:
    content = read_json(folder / "runs/tune/rates.json")
    assert content is not None
    return {g["match"]["init"]: g for g in content["groups"]}


def starts(folder: Path) -> dict[str, int]:
    """How often each stage was started."""
    return {
        path.parent.name: sum(e["event"] == "started" for e in read_jsonl(path))
        for path in folder.glob("runs/stages/*/*/events.jsonl")
    }


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished search over a range with hopeless rates."""
    folder = tmp_path_factory.mktemp("searched")
    file = write(folder, GRID, steps=160)
    finish(start(folder, "tune", file))
    return folder


def test_both_arms_get_the_same_budget_and_the_same_rates(searched: Path) -> None:
    content = read_json(searched / "runs/tune/rates.json")
    assert content is not None and content["budget_used"] == {"random": 4, "mae": 4}
    for group in groups(searched).values():
        assert [t["number"] for t in group["trials"]] == [0, 1, 2, 3]
        assert [t["set"]["wsp.lr"] for t in group["trials"]] == pytest.approx([1e-3, 0.1, 10, 1e3])
        assert [t["outcome"] for t in group["trials"]][2:] == ["pruned", "diverged"]
        assert group["best"]["set"]["wsp.lr"] <= 0.1
    # One MAE stage feeds all trials of its arm, which stop before the probe.
    assert len(list(searched.glob("runs/stages/mae/*"))) == 1
    assert not list(searched.glob("runs/stages/linear_probe/*"))


def test_optuna_hears_of_every_end(searched: Path) -> None:
    journal = JournalFileBackend(str(searched / "runs/tune/rates.journal"))
    storage = JournalStorage(journal)
    for name in optuna.get_all_study_names(storage):
        trials = optuna.load_study(study_name=name, storage=storage).trials
        assert [t.state.name for t in trials] == ["COMPLETE", "COMPLETE", "PRUNED", "FAIL"]
        assert trials[2].intermediate_values and len(trials[0].intermediate_values) == 8


def test_a_hopeless_rate_is_stopped_at_a_checkpoint_and_keeps_its_rows(searched: Path) -> None:
    pruned = [t for g in groups(searched).values() for t in g["trials"] if t["outcome"] == "pruned"]
    assert pruned
    for trial in pruned:
        assert trial["set"]["wsp.lr"] > 1 and trial["value"] is None and trial["points"]
        folder = searched / "runs/stages/wsp" / trial["stage"]
        status = read_json(folder / "status.json") or {}
        assert (status["state"], status["reason"]) == ("cancelled", "pruned")
        rows = read_jsonl(folder / "metrics.jsonl")
        assert 0 < rows[-1]["step"] < 160 and "val_loss" in str(rows)
        assert not (folder / "result.json").exists()
        assert list(folder.glob("checkpoints/*/COMPLETE"))
    finished = [t for g in groups(searched).values() for t in g["trials"] if t["value"]]
    assert all(t["outcome"] == "finished" for t in finished)


def test_the_grid_leaves_trials_alone_and_a_second_call_does_nothing(searched: Path) -> None:
    file, before = searched / "rates.yaml", starts(searched)
    finish(start(searched, "tune", file))
    assert starts(searched) == before
    plan = json.loads(finish(start(searched, "grid", file, "--json")))
    assert len(plan["cells"]) == 2
    cells = read_jsonl(searched / "runs/studies/rates/cells.jsonl")
    assert sum(c["tag"] == "tune" for c in cells) == 8


def test_the_fragment_sets_the_best_rates_of_a_study(searched: Path, tmp_path: Path) -> None:
    study = yaml.safe_load((searched / "rates.yaml").read_text())
    study |= yaml.safe_load((searched / "runs/tune/rates.yaml").read_text())
    file = tmp_path / "tuned.yaml"
    file.write_text(yaml.safe_dump(study))
    grid = build_grid(load_study(file))
    for cell in grid.cells:
        recipe: Any = grid.stages[cell.stages["wsp"]].config.recipe
        assert recipe.lr == groups(searched)[cell.axes["init"]]["best"]["set"]["wsp.lr"]


def test_killed_in_the_middle_it_goes_on_to_the_exact_budget(tmp_path: Path) -> None:
    file = write(tmp_path, RANDOM, steps=30)
    process = start(tmp_path, "tune", file)
    deadline = time.monotonic() + 120
    # Some trial is done and another one is on its way.
    while len(list(tmp_path.glob("runs/stages/wsp/*/result.json"))) < 1:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finish(start(tmp_path, "tune", file))
    found = groups(tmp_path)
    for group in found.values():
        assert [t["number"] for t in group["trials"]] == [0, 1, 2]
        assert group["counts"] == {"finished": 3}
    # A trial's rate depends on its number alone: the kill changed none, and the arms agree.
    rates = [[t["set"] for t in g["trials"]] for g in found.values()]
    assert rates[0] == rates[1]
    assert len(list(tmp_path.glob("runs/stages/wsp/*"))) == 6


def test_two_processes_share_one_budget(tmp_path: Path) -> None:
    file = write(tmp_path, RANDOM, steps=30)
    both = [start(tmp_path, "tune", file, cores=1) for _ in range(2)]
    for process in both:
        finish(process)
    for group in groups(tmp_path).values():
        assert [t["number"] for t in group["trials"]] == [0, 1, 2]
        assert group["counts"] == {"finished": 3}
    assert set(starts(tmp_path).values()) == {1}
    cells = read_jsonl(tmp_path / "runs/studies/rates/cells.jsonl")
    assert sum(c["tag"] == "tune" for c in cells) == 6


def test_a_database_holds_the_trials(tmp_path: Path) -> None:
    file, url = write(tmp_path, RANDOM, steps=20), f"sqlite:///{tmp_path}/optuna.db"
    finish(start(tmp_path, "tune", file, "--storage", url, "--trials", 1, "--only", "init=random"))
    (name,) = [n for n in optuna.get_all_study_names(url) if "init=random" in n]
    study = optuna.load_study(study_name=name, storage=url)
    assert study.best_value == groups(tmp_path)["random"]["best"]["value"]
    assert groups(tmp_path)["mae"]["trials"] == []
    assert not (tmp_path / "runs/tune/rates.journal").exists()
