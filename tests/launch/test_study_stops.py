"""A study is stopped, killed, diverges and fails in part, and ends as an undisturbed one.

The real pool, workers and DeepSpeed on a CPU.
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
from pathlib import Path

import pytest

from harness.ledger.files import read_json, read_jsonl
from harness.ledger.lease import owner_is_dead, read_lease
from tests.conftest import Harness
from tests.launch.small_study import (
    CHECKPOINTING,
    TINY,
    fresh,
    kill_group,
    num_attempts,
    numbers,
    stages,
    start,
    submit,
    wait_for,
)

pytestmark = pytest.mark.long


def test_two_ranks_train_the_same_stage(finished: tuple[Path, Path], tmp_path: Path) -> None:
    root, file = fresh(finished, tmp_path, TINY + "resources: {ranks: 2}\n")
    submit(root, file, "--only", "data=2k,init=mae")
    one, two = numbers(finished[0]), numbers(root)
    assert set(two) < set(one)
    for name, rows in two.items():
        for a, b in zip(one[name], rows, strict=True):
            for key, value in a.items():
                if key in ("loss", "val_loss"):
                    assert b[key] == pytest.approx(value, rel=1e-4), (name, key)


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


def test_a_diverged_cell_is_a_result_and_the_rest_finishes(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    text = TINY + "overrides:\n- match: {data: 500}\n  set: {wsp.lr: 1.0e+30, wsp.clip: 0}\n"
    root, file = fresh(finished, tmp_path, text)
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
    root, file = fresh(finished, tmp_path, text)
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


def test_killed_at_random_moments_the_study_ends_with_the_same_bits(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    root, file = fresh(finished, tmp_path, CHECKPOINTING)
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
    text = TINY.replace("steps: 30", "steps: 3000").replace("steps: 40", "steps: 4000")
    root, file = fresh(finished, tmp_path, text)
    process = start(root, file)
    assert wait_for(lambda: any(root.glob("stages/*/*/lease")))
    pids = [json.loads(p.read_text())["pid"] for p in root.glob("stages/*/*/lease")]
    process.kill()  # the command only: nobody tells the workers
    process.wait()
    assert wait_for(lambda: not any(Path(f"/proc/{p}").exists() for p in pids), 60)


def test_weights_from_elsewhere_start_a_cell_as_the_mae_stage_itself_would(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    """The encoder of the study's own MAE run, taken out as a .pth of timm and brought back in."""
    text = TINY.replace("[random, mae]", "['checkpoint:mae.pth']").replace("[500, 2k]", "[2k]")
    root, file = fresh(finished, tmp_path, text)
    (mae,) = (finished[0] / "stages/mae").iterdir()
    command = [sys.executable, "-m", "harness.cli.main", "weights", "convert"]
    taken = [str(mae / "weights.safetensors"), str(tmp_path / "mae.pth"), "--to", "timm"]
    subprocess.run([*command, *taken], check=True, capture_output=True)
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


def test_ctrl_c_saves_and_the_next_call_goes_on_from_there(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    root, file = fresh(finished, tmp_path, TINY.replace("steps: 40", "steps: 200"))
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


def test_two_submissions_at_once_run_each_stage_once(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    root, file = fresh(finished, tmp_path)
    both = [start(root, file), start(root, file)]
    for process in both:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    for folder in stages(root).values():
        events = [e["event"] for e in read_jsonl(folder / "events.jsonl")]
        assert events.count("started") == 1 and events.count("done") == 1, events
    assert numbers(root) == numbers(finished[0])


def test_a_study_survives_the_death_of_the_pools_process(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    root, file = fresh(finished, tmp_path, CHECKPOINTING)
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
