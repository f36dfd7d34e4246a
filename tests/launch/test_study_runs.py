"""A study runs, stops, goes on, fails in part: the real pool, workers and DeepSpeed on CPU.

The order of the module matters little, its cost a lot: one finished study is made once and looked
at by several tests; those that change it work on a copy.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness.ledger.files import read_json, read_jsonl
from harness.ledger.lease import owner_is_dead, read_lease
from tests.conftest import Harness

pytestmark = pytest.mark.slow

TINY = """\
name: tiny
axes:
  data: [500, 2k]
  init: [random, mae]
defaults:
  size: d16x2
  dataset: scenes-2k
  image_size: 24
stages:
  mae:
    duration: {steps: 30}
    batch: 64
    decoder_width: 16
    decoder_depth: 1
    decoder_heads: 2
  wsp:
    duration: {steps: 40}
    batch: 64
  transfer:
    probe: {protocol: linear_probe, train_images: 500}
    tune: {protocol: fine_tune, duration: {steps: 10}, batch: 64, train_images: 500}
"""


def submit(
    root: Path, file: Path, *arguments: str, check: int | None = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "harness.cli.main", "grid", str(file), "--submit", *arguments],
        capture_output=True,
        text=True,
        env=environment(root),
        check=False,
    )
    if check is not None:
        assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def environment(root: Path) -> dict[str, str]:
    return {**os.environ, "HARNESS_ROOT": str(root), "HARNESS_DEVICE": "cpu", "HARNESS_CORES": "2"}


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


def stages(root: Path) -> dict[str, Path]:
    return {p.name: p for p in sorted(root.glob("stages/*/*"))}


def numbers(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Everything the study measured, wall times aside."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, folder in stages(root).items():
        found = read_jsonl(folder / "metrics.jsonl")
        rows[name] = [{k: v for k, v in r.items() if k != "wall_s"} for r in found]
        result = read_json(folder / "result.json")
        assert result is not None, f"{name} has no result"
        rows[name].append(result["metrics"])
    return rows


@pytest.fixture
def copied(finished: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    root = tmp_path / "runs"
    shutil.copytree(finished[0], root)
    return root, finished[1]


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


@pytest.mark.long
def test_two_ranks_train_the_same_stage(finished: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY + "resources: {ranks: 2}\n")
    root = tmp_path / "runs"
    (root / "datasets").parent.mkdir()
    shutil.copytree(finished[0] / "datasets", root / "datasets")
    submit(root, file, "--only", "data=2k,init=mae")
    one, two = numbers(finished[0]), numbers(root)
    assert set(two) < set(one)
    for name, rows in two.items():
        for a, b in zip(one[name], rows, strict=True):
            for key, value in a.items():
                if key in ("loss", "val_loss"):
                    assert b[key] == pytest.approx(value, rel=1e-4), (name, key)


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


@pytest.mark.long
def test_force_runs_the_selected_stages_anew_and_finds_the_same(
    copied: tuple[Path, Path],
) -> None:
    root, file = copied
    before = numbers(root)
    uids = {n: (read_json(p / "result.json") or {})["uid"] for n, p in stages(root).items()}
    submit(root, file, "--mode", "force", "--only", "data=500,init=random")
    after = {n: (read_json(p / "result.json") or {})["uid"] for n, p in stages(root).items()}
    assert {n.rpartition("-")[0] for n in uids if uids[n] != after[n]} == {
        "d16x2-500-random-s0",
        "d16x2-500-random-scenes-2k_features_500-s0",
        "d16x2-500-random-probe-s0",
        "d16x2-500-random-tune-s0",
    }
    assert numbers(root) == before


def test_watching_ends_when_nothing_runs(copied: tuple[Path, Path], harness: Harness) -> None:
    text = harness("status", "tiny", "--watch", "--root", copied[0]).stdout
    assert "cells: 4 done" in text


# -- things that go wrong ---------------------------------------------------------------------


@pytest.mark.long
def test_a_diverged_cell_is_a_result_and_the_rest_finishes(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    file, root = tmp_path / "tiny.yaml", tmp_path / "runs"
    text = TINY + "overrides:\n- match: {data: 500}\n  set: {wsp.lr: 1.0e+30, wsp.clip: 0}\n"
    file.write_text(text)
    root.mkdir()
    shutil.copytree(finished[0] / "datasets", root / "datasets")
    done = submit(root, file, check=1)
    found = {n: (read_json(p / "status.json") or {}) for n, p in stages(root).items()}
    bad = {n: s for n, s in found.items() if s["state"] != "done"}
    assert {s["state"] for s in bad.values()} == {"diverged"} and len(bad) == 2
    for name, status in bad.items():
        assert "at step" in status["message"]
        assert name in done.stdout and status["message"] in done.stdout
        assert not (root / "stages/wsp" / name / "result.json").exists()
    # The other data size finished whole: mae, wsp, features and tasks of both inits.
    assert sum(s["state"] == "done" for s in found.values()) == 1 + 2 * 4
    assert "6 stages are blocked" in done.stdout
    again = submit(root, file, check=1)
    assert "--mode retry" in again.stdout
    assert {
        n: len(list((p / "attempts").iterdir())) for n, p in stages(root).items()
    } == dict.fromkeys(found, 1)
    # Retry runs the diverged stages again, and no other.
    submit(root, file, "--mode", "retry", check=1)
    attempts = {n: len(list((p / "attempts").iterdir())) for n, p in stages(root).items()}
    assert attempts == {n: 2 if n in bad else 1 for n in found}


@pytest.mark.long
def test_a_truncated_shard_fails_its_stages_with_name_and_offset_and_the_rest_finishes(
    finished: tuple[Path, Path], tmp_path: Path, harness: Harness
) -> None:
    source = tmp_path / "digits"
    harness("data", "pack", "digits", "--out", source)
    shard = max(source.glob("train/*.tar"))
    size = shard.stat().st_size
    with open(shard, "r+b") as file_:
        file_.truncate(size // 2)
    text = TINY.replace(
        "  data: [500, 2k]", f"  dataset: [{source}, scenes-2k]\n  image_size: [8, 24]"
    )
    text = text.replace("  dataset: scenes-2k\n  image_size: 24", "  data: 500")
    text += "zip: [[dataset, image_size]]\n"
    file, root = tmp_path / "tiny.yaml", tmp_path / "runs"
    file.write_text(text)
    root.mkdir()
    shutil.copytree(finished[0] / "datasets", root / "datasets")
    done = submit(root, file, check=1)
    cells = read_jsonl(root / "studies/tiny/cells.jsonl")
    for cell in cells:
        found = [
            read_json(root / "stages" / kind / stage / "status.json") or {}
            for stage, kind in cell["kinds"].items()
        ]
        if cell["axes"]["dataset"] == "scenes-2k":
            assert all(s["state"] == "done" for s in found)
            continue
        failed = [s for s in found if s.get("state") == "failed"]
        assert failed and all(s["reason"] == "data" for s in failed)
        assert all(f"{shard}: byte offset {size // 2}" in s["message"] for s in failed), failed
    assert str(shard) in done.stdout.replace("\n", "")


def kill_group(process: subprocess.Popen[str]) -> None:
    """kill -9 of the command, of the pool's process and of the workers, as a power cut would."""
    children = subprocess.run(
        ["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True
    ).stdout.split("\n")[1:]
    parents = {int(a): int(b) for a, b in (line.split() for line in children if line.strip())}

    def below(pid: int) -> list[int]:
        return [c for p, q in parents.items() if q == pid for c in (p, *below(p))]

    for pid in (process.pid, *below(process.pid)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def start(root: Path, file: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "harness.cli.main", "grid", str(file), "--submit", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(root),
    )


def wait_for(condition: Callable[[], bool], timeout_s: float = 120) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def num_attempts(root: Path) -> int:
    return len(list(root.glob("stages/*/*/attempts/*/attempt.json")))


CHECKPOINTING = TINY + "resources: {checkpoint_every: 0.2}\n"


@pytest.mark.long
def test_killed_at_random_moments_the_study_ends_with_the_same_bits(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    file, root = tmp_path / "tiny.yaml", tmp_path / "runs"
    file.write_text(CHECKPOINTING)
    root.mkdir()
    shutil.copytree(finished[0] / "datasets", root / "datasets")
    rng = random.Random(0)
    kills = 0
    for _ in range(4):
        process = start(root, file)
        # The moment is counted from the first sign of training, not of imports.
        known = num_attempts(root)
        while num_attempts(root) == known and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.2, 3.0))
        if process.poll() is None:
            kills += 1
        kill_group(process)
        process.wait()
    assert kills >= 2
    submit(root, file)
    assert numbers(root) == numbers(finished[0])
    for folder in stages(root).values():
        assert not (folder / "lease").exists()
        assert sum(1 for e in read_jsonl(folder / "events.jsonl") if e["event"] == "done") == 1
        spent = read_json(folder / "result.json")["wall_s"]  # by all attempts
        assert spent["total"] > spent["train"] + spent["eval"]
        assert spent["harness"] == pytest.approx(spent["total"] - spent["train"] - spent["eval"])


def test_workers_do_not_outlive_a_killed_command(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    file, root = tmp_path / "tiny.yaml", tmp_path / "runs"
    file.write_text(TINY.replace("steps: 30", "steps: 3000").replace("steps: 40", "steps: 4000"))
    root.mkdir()
    shutil.copytree(finished[0] / "datasets", root / "datasets")
    process = start(root, file)
    assert wait_for(lambda: any(root.glob("stages/*/*/lease")))
    pids = [json.loads(p.read_text())["pid"] for p in root.glob("stages/*/*/lease")]
    process.kill()  # the command only: nobody tells the workers
    process.wait()
    assert wait_for(lambda: not any(Path(f"/proc/{p}").exists() for p in pids), 60)


@pytest.mark.long
def test_weights_from_elsewhere_start_a_cell_as_the_mae_stage_itself_would(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    """The encoder of the study's own MAE run, taken out as a .pth of timm and brought back in."""
    root = tmp_path / "runs"
    shutil.copytree(finished[0] / "datasets", root / "datasets")
    (mae,) = (finished[0] / "stages/mae").iterdir()
    command = [sys.executable, "-m", "harness.cli.main", "weights", "convert"]
    taken = [str(mae / "weights.safetensors"), str(tmp_path / "mae.pth"), "--to", "timm"]
    subprocess.run([*command, *taken], check=True, capture_output=True)
    file = tmp_path / "tiny.yaml"
    text = TINY.replace("[random, mae]", "['checkpoint:mae.pth']").replace("[500, 2k]", "[2k]")
    file.write_text(text)
    submit(root, file)
    for kind in ("wsp", "linear_probe", "fine_tune"):
        (found,) = (root / "stages" / kind).iterdir()
        (own,) = (finished[0] / "stages" / kind).glob("d16x2-2k-mae-*")
        results = [read_json(folder / "result.json") or {} for folder in (found, own)]
        assert results[0]["metrics"] == results[1]["metrics"]
    # Other content under the same name is another starting point, noticed before it is used.
    (tmp_path / "mae.pth").write_bytes(b"no weights")
    done = submit(root, file, check=1)
    assert "mae.pth: " in done.stdout and "Traceback" not in done.stdout + done.stderr


@pytest.mark.long
def test_ctrl_c_saves_and_the_next_call_goes_on_from_there(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    file, root = tmp_path / "tiny.yaml", tmp_path / "runs"
    file.write_text(TINY.replace("steps: 40", "steps: 200"))
    root.mkdir()
    shutil.copytree(finished[0] / "datasets", root / "datasets")
    only = ("--only", "data=500")
    process = start(root, file, *only)

    def training() -> bool:
        found = [read_json(p) or {} for p in root.glob("stages/wsp/*/status.json")]
        return any(s.get("step", 0) > 5 for s in found)

    assert wait_for(training)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 130 and "goes on from the last checkpoints" in output
    saved = [
        int(p.parent.name.split("_")[1]) for p in root.glob("stages/wsp/*/checkpoints/*/COMPLETE")
    ]
    assert saved and all(step > 5 for step in saved)
    for folder in stages(root).values():
        lease = read_lease(folder / "lease")
        assert lease is None or owner_is_dead(lease)
    submit(root, file, *only)
    resumed = [
        e
        for folder in root.glob("stages/wsp/*")
        for e in read_jsonl(folder / "events.jsonl")
        if e["event"] == "preempted"
    ]
    assert resumed
    steps = [r["step"] for p in root.glob("stages/wsp/*/metrics.jsonl") for r in read_jsonl(p)]
    assert steps.count(200) == len(list(root.glob("stages/wsp/*")))


@pytest.mark.long
def test_a_study_stopped_with_one_rank_goes_on_with_two(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    file = tmp_path / "tiny.yaml"
    text = TINY.replace("steps: 40", "steps: 120")
    only = ("--only", "data=500,init=random")
    for name in ("stopped", "undisturbed"):
        (tmp_path / name).mkdir()
        shutil.copytree(finished[0] / "datasets", tmp_path / name / "datasets")
    file.write_text(text)
    submit(tmp_path / "undisturbed", file, *only)
    root = tmp_path / "stopped"
    process = start(root, file, *only)

    def training() -> bool:
        found = [read_json(p) or {} for p in root.glob("stages/wsp/*/status.json")]
        return any(s.get("step", 0) > 5 for s in found)

    assert wait_for(training)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=90)
    (saved,) = root.glob("stages/wsp/*/checkpoints/*/COMPLETE")
    assert 5 < int(saved.parent.name.split("_")[1]) < 120
    file.write_text(text + "resources: {ranks: 2}\n")
    submit(root, file, *only)
    (folder,) = root.glob("stages/wsp/*")
    ranks = [(read_json(folder / f"attempts/{n}/attempt.json") or {})["ranks"] for n in (1, 2)]
    assert ranks == [1, 2]
    one, two = numbers(tmp_path / "undisturbed"), numbers(root)
    assert set(one) == set(two)  # the identities are the same
    for a, b in zip(one[folder.name], two[folder.name], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)


@pytest.mark.long
def test_two_submissions_at_once_run_each_stage_once(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    file, root = tmp_path / "tiny.yaml", tmp_path / "runs"
    file.write_text(TINY)
    root.mkdir()
    shutil.copytree(finished[0] / "datasets", root / "datasets")
    both = [start(root, file), start(root, file)]
    for process in both:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    for folder in stages(root).values():
        events = [e["event"] for e in read_jsonl(folder / "events.jsonl")]
        assert events.count("started") == 1 and events.count("done") == 1, events
    assert numbers(root) == numbers(finished[0])


@pytest.mark.long
def test_a_study_survives_the_death_of_the_pools_process(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    file, root = tmp_path / "tiny.yaml", tmp_path / "runs"
    file.write_text(CHECKPOINTING)
    root.mkdir()
    shutil.copytree(finished[0] / "datasets", root / "datasets")
    process = start(root, file)
    assert wait_for(lambda: any(root.glob("stages/wsp/*/lease")))
    lease = next(root.glob("stages/wsp/*/lease"))
    worker = json.loads(lease.read_text())["pid"]
    zygote = int(Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill(zygote, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert numbers(root) == numbers(finished[0])
    killed = [
        e
        for path in root.glob("stages/*/*/events.jsonl")
        for e in read_jsonl(path)
        if e["event"] == "failed"
    ]
    assert killed and all("the pool's process is gone" in e["message"] for e in killed)
