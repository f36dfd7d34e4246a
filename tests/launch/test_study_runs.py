"""A study runs and is looked at: the real pool, workers and DeepSpeed on a CPU.

Its cost matters: one finished study is made once; tests that change it work on a copy.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness.ledger.files import read_json, read_jsonl
from tests.conftest import Harness
from tests.launch.small_study import (
    environment,
    numbers,
    stages,
    submit,
)

pytestmark = pytest.mark.slow


def test_every_cell_is_done_and_leaves_its_files(finished: tuple[Path, Path]) -> None:
    root, _ = finished
    cells = read_jsonl(root / "studies/tiny/cells.jsonl")
    assert len(cells) == 4
    for cell in cells:
        for stage, kind in cell["kinds"].items():
            folder = root / "stages" / kind / stage
            assert read_json(folder / "result.json") is not None
            assert (read_json(folder / "status.json") or {})["state"] == "done"
            assert not (folder / "lease").exists()
            attempt = folder / "attempts/1"
            for name in ("attempt.json", "stdout.log", "stderr.log", "env.json", "git.json"):
                assert (attempt / name).exists(), attempt / name
            # Of the worker, not of the command that started it; it ran the copy of the code.
            seen = read_json(attempt / "env.json") or {}
            assert (seen["by"], seen["env"]["HARNESS_STAGE"]) == ("worker", stage)
            assert seen["env"]["PYTHONPATH"].startswith(f"{root}/code/")
            assert {"torch", "deepspeed", "timm", "numpy", "python"} <= set(seen["versions"])
    # Three of four cells would share: one MAE run feeds both data sizes.
    assert len(list(root.glob("stages/mae/*"))) == 1


def test_rows_have_the_promised_names_and_flops_add_up(finished: tuple[Path, Path]) -> None:
    root, _ = finished
    for kind in ("mae", "wsp"):
        for folder in root.glob(f"stages/{kind}/*"):
            stage = read_json(folder / "stage.json") or {}
            rows = read_jsonl(folder / "metrics.jsonl")
            assert all({"step", "samples", "flops", "loss"} <= set(r) for r in rows)
            assert rows[-1]["step"] == stage["config"]["steps"]
            assert rows[-1]["samples"] == rows[-1]["step"] * 64
            assert rows[-1]["flops"] == pytest.approx(stage["flops"])
            assert "val_loss" in rows[-1]
            assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_finished_study_has_nothing_to_do_after_gc(copied: tuple[Path, Path]) -> None:
    root, file = copied
    before = numbers(root)
    for folder in root.glob("stages/wsp/*"):
        (folder / "checkpoints/step_30").mkdir(parents=True)
        (folder / "checkpoints/step_30/COMPLETE").touch()
    command = [sys.executable, "-m", "harness.cli.main", "gc", "tiny", "--yes"]
    subprocess.run(command, env=environment(root), check=True)
    assert not list(root.glob("stages/*/*/checkpoints"))
    submit(root, file)
    assert {p.name for p in root.glob("stages/*/*/attempts/*")} == {"1"}
    assert numbers(root) == before


def test_each_attempt_is_a_sacred_run_with_config_and_scalars(finished: tuple[Path, Path]) -> None:
    root, _ = finished
    for name, folder in stages(root).items():
        record = root / "sacred" / f"{name}-a1"
        run = json.loads((record / "run.json").read_text())
        assert run["status"] == "COMPLETED"
        assert run["result"] == (read_json(folder / "result.json") or {})["metrics"]
        config = json.loads((record / "config.json").read_text())
        assert config["stage"]["id"] == name
        assert config["attempt"]["git"] == read_json(folder / "attempts/1/git.json")
    wsp = next(root.glob("sacred/*random-s0-*"))
    scalars = json.loads((wsp / "metrics.json").read_text())
    assert scalars["loss"]["values"][-1] > 0


def test_tensorboard_shows_the_rows(finished: tuple[Path, Path]) -> None:
    root, _ = finished
    for name, folder in stages(root).items():
        rows = read_jsonl(folder / "metrics.jsonl")
        events = EventAccumulator(str(root / "tensorboard" / name)).Reload() if rows else None
        for key in {k for row in rows for k in row} - {"step", "samples", "wall_s"}:
            assert events is not None
            found = [(e.step, e.value) for e in events.Scalars(key)]
            wanted = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            assert [step for step, _ in found] == [step for step, _ in wanted]
            assert [v for _, v in found] == pytest.approx([v for _, v in wanted], rel=1e-6)


def test_submitting_again_runs_nothing_and_says_so(finished: tuple[Path, Path]) -> None:
    root, file = finished
    before = {p: p.stat().st_mtime_ns for p in root.glob("stages/*/*/*")}
    done = submit(root, file)
    assert "nothing to do, all" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in root.glob("stages/*/*/*")} == before


def test_removing_a_stage_reruns_it_and_its_dependants_only(copied: tuple[Path, Path]) -> None:
    root, file = copied
    before = numbers(root)
    mae = next(root.glob("stages/mae/*"))
    shutil.rmtree(mae)
    submit(root, file)
    attempts = {n: len(list((p / "attempts").iterdir())) for n, p in stages(root).items()}
    cells = read_jsonl(root / "studies/tiny/cells.jsonl")
    below = {s for c in cells if "mae" in c["stages"] for s in c["stages"].values()} - {mae.name}
    assert {n for n, count in attempts.items() if count == 2} == below
    assert attempts[mae.name] == 1
    assert numbers(root) == before  # the same study gives the same bits


def test_status_logs_and_run(copied: tuple[Path, Path], harness: Harness) -> None:
    root, _ = copied
    text = harness("status", "--root", root).stdout
    assert "cells: 4 done" in text and "outside training and evaluation" in text
    found = json.loads(harness("status", "tiny", "--json", "--root", root).stdout)
    assert found["studies"][0]["cells"] == {"done": 4}
    logs = harness("logs", "d16x2-2k-mae-s0", "--stage", "wsp", "--root", root).stdout
    assert "== wsp: d16x2-2k-mae-s0" in logs and "attempt 1: done" in logs
    missing = harness("logs", "d16x2-2k-mae-s0", "--stage", "wps", "--root", root, check=4)
    assert "it has: mae, wsp" in missing.stderr

    # An ablation reuses the MAE stage and remembers its parent.
    mae = next(root.glob("stages/mae/*/result.json")).stat().st_mtime_ns
    command = ("run", "d16x2-2k-mae-s0", "--set", "wsp.lr=3e-4", "--tag", "low-lr")
    first = harness(*command, "--root", root, env={"HARNESS_CORES": "2"})
    assert "4 run now" in first.stdout  # wsp, features, probe, tune
    assert next(root.glob("stages/mae/*/result.json")).stat().st_mtime_ns == mae
    rows = read_jsonl(root / "studies/tiny/cells.jsonl")
    child = next(r for r in rows if r["tag"] == "low-lr")
    parent = next(r for r in rows if r["name"] == "d16x2-2k-mae-s0")
    assert child["parent"] == parent["id"] and child["set"] == {"wsp.lr": 3e-4}
    again = harness(*command, "--root", root)
    assert "nothing to do" in again.stdout
    # It stays a cell of the study when the file is submitted again.
    submit(root, copied[1])
    assert len(read_jsonl(root / "studies/tiny/cells.jsonl")) == 5
    bad = harness("run", "d16x2-2k-mae-s0", "--set", "wsp.lrr=1", "--root", root, check=2)
    assert bad.stderr.strip() == "--set: wsp.lrr: unknown key; did you mean 'lr'?"


def test_read_only_runs_and_writes_nothing(copied: tuple[Path, Path], tmp_path: Path) -> None:
    root, file = copied
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    submit(root, file, "--mode", "read-only")
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    empty = tmp_path / "empty"
    done = submit(empty, file, "--mode", "read-only", check=1)
    assert "17 stages are not done" in done.stdout
    assert not empty.exists()


def test_watching_ends_when_nothing_runs(copied: tuple[Path, Path], harness: Harness) -> None:
    text = harness("status", "tiny", "--watch", "--root", copied[0]).stdout
    assert "cells: 4 done" in text


# -- things that go wrong ---------------------------------------------------------------------
