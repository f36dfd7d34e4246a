"""Studies on a real Slurm: submitted once, finished by themselves, whatever happens to the jobs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.ledger.attempts import read_attempts
from harness.ledger.files import read_json, read_jsonl
from tests.slurm.conftest import Site

pytestmark = pytest.mark.slurm


def test_a_study_finishes_by_itself_and_a_second_submit_does_nothing(site: Site) -> None:
    file = site.study(init="[random, mae]", seed="[0, 1]")
    # mae, random wsp; wsp after mae; fine-tuning after each: five arrays of two tasks.
    assert "10 stages submitted to test in 5 jobs" in site.submit(file)
    assert "nothing to submit" in site.submit(file)
    site.wait_done()
    assert "nothing to do, all 10 stages are done" in site.submit(file)
    assert site.cluster.queue() == []
    for path in site.root.glob("stages/*/*"):
        assert [p.name for p in (path / "attempts").iterdir()] == ["1"]
        attempt = read_json(path / "attempts/1/attempt.json") or {}
        assert (attempt["end"], "_" in attempt["job"]) == ("done", True)
        assert read_json(path / "attempts/1/git.json")
        assert (path / "attempts/1/stderr.log").exists()
        assert sum(e["event"] == "done" for e in read_jsonl(path / "events.jsonl")) == 1
        assert not (path / "lease").exists()


def test_two_ranks_on_two_nodes_train_as_one_rank_does(site: Site, tmp_path: Path) -> None:
    site.submit(site.study())
    site.wait_done()
    alone = site.numbers()
    shutil.rmtree(site.root)
    site.submit(site.study(resources=", ranks: 2, nodes: 2"))
    site.wait_done()
    assert (read_json(site.folder_of("wsp").attempt(1) / "attempt.json") or {})["ranks"] == 2
    assert (site.folder_of("wsp").attempt(1) / "stderr.rank1.log").exists()
    for stage, rows in site.numbers().items():
        for row, same in zip(rows, alone[stage], strict=True):
            assert row == pytest.approx(same, rel=2e-4, abs=1e-5)


def test_two_ranks_on_two_nodes_that_are_preempted_save_and_go_on(site: Site) -> None:
    """All hear it, and none is taken for dead by those that are through first."""
    site.profile(partition="cheap")
    site.submit(site.study(steps=600, resources=", ranks: 2, nodes: 2"))
    site.wait_training()
    urgent = ["--partition=urgent", "--ntasks=4", "--wrap", "sleep 5"]
    site.cluster.command("sbatch", *urgent, "--output=/dev/null", check=True)
    site.wait_done()
    first, last = read_attempts(site.folder_of("wsp"))
    assert (first.end, last.end, last.progress > 0) == ("preempted", "done", True)


def test_a_requeued_job_goes_on_from_its_checkpoint_with_the_same_numbers(site: Site) -> None:
    file = site.study(steps=900)
    site.submit(file)
    job = site.wait_training()
    site.cluster.command("scontrol", "requeue", job, check=True)
    site.wait_done()
    first, *_, last = read_attempts(site.folder_of("wsp"))
    assert (first.end, last.end, last.progress > 0) == ("preempted", "done", True)
    disturbed = site.numbers()
    shutil.rmtree(site.root)
    site.submit(file)
    site.wait_done()
    assert site.numbers() == disturbed


def test_a_more_important_job_takes_the_node_and_gives_it_back(site: Site) -> None:
    file = site.study(steps=900)
    site.submit(file)
    job = site.wait_training()
    urgent = ["--partition=urgent", "--ntasks=4", "--wrap", "sleep 5"]
    site.cluster.command("sbatch", *urgent, "--output=/dev/null", check=True)
    site.wait_until(lambda: len(read_attempts(site.folder_of("wsp"))) > 1, f"{job} runs on")
    site.wait_done()
    assert [a.end for a in read_attempts(site.folder_of("wsp"))] == ["preempted", "done"]


def test_scancel_ends_the_stage_until_the_study_is_submitted_again(site: Site) -> None:
    site.without_training()
    file = site.study(steps=400)
    site.submit(file)
    job = site.wait_training()
    site.cluster.command("scancel", job, check=True)
    site.cluster.wait_empty()
    states = site.states()
    assert sorted(states.values()) == ["cancelled", "waiting"]
    site.submit(file)
    site.wait_done()
    assert read_attempts(site.folder_of("wsp"))[-1].progress > 0


def test_a_time_limit_is_only_a_pause(site: Site) -> None:
    """Two minutes less 30 s are too short for the stage; then the limit is lifted.

    Slurm looks at limits twice a minute: of one minute little or nothing would be left to train.
    """
    site.profile(time="2m", signal_s="30")
    site.submit(site.study(steps=4000))
    job = site.wait_training()
    folder = site.folder_of("wsp")
    site.wait_until(lambda: read_attempts(folder)[0].end, "no end before the limit")
    site.cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=60", check=True)
    site.wait_done()
    ends = [a.end for a in read_attempts(folder)]
    assert ends[0] == "timeout"
    assert ends[-1] == "done"
    assert read_attempts(folder)[1].progress > 0


def test_a_lost_node_is_avoided_by_the_next_try(site: Site) -> None:
    site.without_training()
    site.submit(site.study(steps=400))
    job = site.wait_training()
    node = site.cluster.command("squeue", "--job", job, "--noheader", "--format", "%N").strip()
    site.cluster.kill_node(node)
    try:
        site.wait_done()
    finally:
        site.cluster.start_node(node)
    tries = read_attempts(site.folder_of("wsp"))
    assert [a.end for a in tries] == ["node_fail", "done"]
    assert tries[-1].progress > 0


def test_a_stage_that_fails_ends_what_depends_on_it_and_nothing_is_submitted_for_ever(
    site: Site,
) -> None:
    file = site.study(lr="1e30", init="[random, mae]")
    site.submit(file)
    site.cluster.wait_empty()
    states = site.states()
    kinds = {s: p.parent.name for p in site.root.glob("stages/*/*") for s in [p.name]}
    by_kind = sorted((kinds[s], state) for s, state in states.items())
    assert by_kind == [
        *[("fine_tune", "blocked")] * 2,
        ("mae", "done"),
        *[("wsp", "diverged")] * 2,
    ]
    assert len(read_attempts(site.folder_of("mae"))) == 1
    assert "--mode retry" in site.submit(file, check=1)
    assert site.cluster.queue() == []


def test_a_job_that_submits_hands_nothing_of_its_own_on(site: Site) -> None:
    """From inside of an allocation of two tasks: a stage still gets one."""
    file = site.study()
    site.profile()
    os.environ.update(SLURM_NTASKS="2", SLURM_JOB_ID="7", SBATCH_PARTITION="nowhere")
    try:
        site.submit(file)
    finally:
        for name in ("SLURM_NTASKS", "SLURM_JOB_ID", "SBATCH_PARTITION"):
            del os.environ[name]
    site.wait_done()
    assert (read_json(site.folder_of("wsp").attempt(1) / "attempt.json") or {})["ranks"] == 1


def test_queued_jobs_run_the_code_they_were_submitted_with(site: Site) -> None:
    site.without_training()
    copy = Path(site.extra["PYTHONPATH"])
    site.cwd = copy  # as most people submit: Python looks there first
    site.profile(sbatch="{hold: true}")
    site.submit(site.study())
    (copy / "harness/worker.py").write_text("raise RuntimeError('edited since')\n")
    (copy / "harness/launch/job.py").write_text("raise RuntimeError('edited since')\n")
    del site.extra["PYTHONPATH"]
    site.cwd = None
    jobs = {j.partition("_")[0] for j in site.cluster.queue()}
    site.cluster.command("scontrol", "release", *sorted(jobs), check=True)
    site.wait_done()


def test_twenty_submissions_at_once_run_every_stage_once(site: Site) -> None:
    site.without_training()
    file = site.study(init="[random, mae]")
    site.profile()
    command = [sys.executable, "-m", "harness.cli.main", "grid", str(file), "--submit"]
    env = {
        **os.environ,
        **site.cluster.env,
        "HARNESS_ROOT": str(site.root),
        "HARNESS_SETTINGS": str(site.folder / "settings.yaml"),
        "HARNESS_CLUSTER": "test",
        **site.extra,
    }
    # In a folder of its own, or the code of this checkout would come before PYTHONPATH's.
    about: dict[str, Any] = {"env": env, "cwd": site.folder, "text": True}
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, **about) for _ in range(20)]
    said = [process.communicate()[0] for process in running]
    assert sum("5 stages submitted" in text for text in said) == 1
    assert sum("nothing to submit" in text for text in said) == 19
    site.wait_done()
    tries = [p for p in site.root.glob("stages/*/*/attempts/*") if p.is_dir()]
    assert len(tries) == 5


def test_a_root_with_shell_characters_in_its_name_is_only_a_name(site: Site) -> None:
    strange = Site(site.cluster, site.folder / "a b; $(touch pwned) 'q' & `touch pwned`")
    strange.folder.mkdir()
    strange.submit(strange.study())
    strange.wait_done()
    assert not list(site.folder.rglob("pwned"))
    assert not Path("pwned").exists()
