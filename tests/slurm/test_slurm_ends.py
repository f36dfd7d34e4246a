"""Ends no job tells of itself: nodes that come back, preemption, jobs cancelled while they wait."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest

from harness.ledger.attempts import read_attempts
from harness.ledger.files import read_json, read_jsonl
from tests.slurm.conftest import Site

pytestmark = pytest.mark.slurm


@pytest.fixture(autouse=True)
def light(site: Site) -> None:
    """What is looked at happens around the worker: it need not train."""
    site.without_training()


def node_of(site: Site, job: str) -> str:
    return site.cluster.command("squeue", "--job", job, "--noheader", "--format", "%N").strip()


def job_of(site: Site, kind: str) -> str:
    return str((read_json(site.folder_of(kind).status) or {})["job"])


def stand_still(site: Site) -> str:
    """Waits until the stage trains, and stops its worker: it can neither end nor hear; its job."""
    job = site.wait_training()
    os.kill(int((read_json(site.folder_of("wsp").status) or {})["pid"]), signal.SIGSTOP)
    return job


def test_a_node_that_is_back_at_once_is_avoided(site: Site) -> None:
    site.submit(site.study(steps=400))
    node = node_of(site, stand_still(site))
    site.cluster.kill_node(node)
    site.cluster.wait_state(node, "down")
    site.cluster.start_node(node)
    site.wait_done()
    first, last = read_attempts(site.folder_of("wsp"))
    assert (first.end, last.end, last.progress > 0) == ("node_fail", "done", True)
    assert (first.host, last.host != node) == (node, True)


def test_the_only_node_is_taken_again_after_it_was_lost(site: Site) -> None:
    site.profile(partition="alone")
    site.submit(site.study(steps=400))
    node = node_of(site, stand_still(site))
    site.cluster.kill_node(node)
    site.cluster.wait_state(node, "down")
    site.cluster.start_node(node)
    site.wait_done()
    assert [a.end for a in read_attempts(site.folder_of("wsp"))] == ["node_fail", "done"]
    assert {a.host for a in read_attempts(site.folder_of("wsp"))} == {node}


def test_without_requeue_the_caretaker_avoids_the_lost_node(site: Site) -> None:
    site.profile(requeue="false")
    site.submit(site.study(steps=400))
    node = node_of(site, stand_still(site))
    site.cluster.kill_node(node)
    site.cluster.wait_state(node, "down")
    site.cluster.start_node(node)
    site.wait_done()
    first, last = read_attempts(site.folder_of("wsp"))
    assert (first.end, last.end, last.host != node) == ("node_fail", "done", True)


def test_a_job_requeued_and_killed_before_it_could_save_was_preempted(site: Site) -> None:
    """Its worker stands still and hears no TERM; Slurm kills it after KillWait."""
    site.submit(site.study(steps=400))
    job = stand_still(site)
    folder = site.folder_of("wsp")
    site.cluster.command("scontrol", "requeue", job, check=True)
    site.wait_done()
    first, last = read_attempts(folder)
    assert (first.end, last.end, last.progress > 0) == ("preempted", "done", True)


def test_a_time_limit_is_only_a_pause(site: Site) -> None:
    """Of two minutes for a stage of 80 s, told to stop 50 s before, or up to a minute earlier."""
    site.profile(time="2m", signal_s="50")
    site.submit(site.study(steps=1600))
    job, folder = site.wait_training(), site.folder_of("wsp")
    site.wait_until(lambda: read_attempts(folder)[0].end, "no end before the limit")
    site.cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=60", check=True)
    site.wait_done()
    first, last = read_attempts(folder)
    assert (first.end, last.end, last.progress > 0) == ("timeout", "done", True)


def test_preemption_that_cancels_the_job_is_no_scancel(site: Site) -> None:
    site.profile(partition="cheap")
    site.submit(site.study(steps=400))
    site.wait_training()
    urgent = ["--partition=urgent", "--ntasks=4", "--wrap", "sleep 5"]
    site.cluster.command("sbatch", *urgent, "--output=/dev/null", check=True)
    site.wait_done()
    first, last = read_attempts(site.folder_of("wsp"))
    assert (first.end, last.end, last.progress > 0) == ("preempted", "done", True)


def test_a_job_cancelled_before_it_began_stays_cancelled(site: Site) -> None:
    file = site.study()
    site.submit(file)
    site.cluster.command("scancel", job_of(site, "fine_tune"), check=True)
    site.cluster.wait_empty()
    assert sorted(site.states().values()) == ["cancelled", "done"]
    (attempt,) = read_attempts(site.folder_of("fine_tune"))
    assert attempt.end == "cancelled"
    site.submit(file)
    site.wait_done()


def refusing(site: Site, after: int, how: str) -> Path:
    """A folder for PATH with an sbatch that takes so many jobs; then `how`, where SBATCH is the
    real one."""
    folder, count = site.folder / "bin", site.folder / "count"
    folder.mkdir(exist_ok=True)
    count.write_text("0")
    real = site.cluster.command("sh", "-c", "command -v sbatch").strip()
    script = folder / "sbatch"
    script.write_text(
        f"#!/bin/sh\nn=$(cat {count}); echo $((n + 1)) >{count}\n"
        f'if [ "$n" -ge {after} ]; then {how}; fi\nexec SBATCH\n'.replace("SBATCH", f'{real} "$@"')
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return folder


def test_what_sbatch_has_no_room_for_the_caretaker_submits(site: Site) -> None:
    """Room for three jobs, of which the caretaker is the first."""
    error = "sbatch: error: Batch job submission failed: Job violates QOSMaxSubmitJobPerUserLimit"
    is_later = "grep -q caretaker /proc/$PPID/cmdline"
    bin_ = refusing(site, 3, f'{is_later} || {{ echo "{error}" >&2; exit 1; }}')
    site.extra["PATH"] = f"{bin_}:{os.environ['PATH']}"
    said = site.submit(site.study(init="[random, mae]"))
    assert "3 stages were not taken; the caretaker submits them" in said
    site.wait_done()
    tries = [p for p in site.root.glob("stages/*/*/attempts/*") if p.is_dir()]
    ends = [(read_json(p / "attempt.json") or {})["end"] for p in tries]
    assert sorted(set(ends)) == ["done", "dropped"]
    assert ends.count("done") == 5


def test_a_submission_killed_between_arrays_is_seen_and_the_next_one_goes_on(site: Site) -> None:
    file = site.study(init="[random, mae]")
    bin_ = refusing(site, 2, "kill -9 $PPID; sleep 1; exit 1")
    site.extra["PATH"] = f"{bin_}:{os.environ['PATH']}"
    site.profile(sbatch="{hold: true}", caretaker="false")
    site.harness("grid", str(file), "--submit", check=-9)
    del site.extra["PATH"]
    states = site.states()
    assert sorted(states.values()).count("submitted") == 2
    assert set(states.values()) <= {"submitted", "lost"}
    site.profile()
    said = site.submit(file)
    assert "3 stages submitted" in said
    jobs = {j.partition("_")[0] for j in site.cluster.queue()}
    site.cluster.command("scontrol", "release", *sorted(jobs))
    site.wait_done()
    for path in site.root.glob("stages/*/*"):
        assert sum(e["event"] == "done" for e in read_jsonl(path / "events.jsonl")) == 1


@pytest.mark.parametrize("first", [":", "SBATCH"], ids=["before sbatch", "before its answer"])
def test_a_submission_killed_between_arrays_is_finished_by_its_caretaker(
    site: Site, first: str
) -> None:
    """It starts while the jobs that were submitted are under way, and before anybody looks.

    The lock of submissions is that of a login node, of whose processes it sees none.
    """
    site.profile(caretaker_s="3")
    site.extra |= {"HARNESS_HOST": "login-2", "HARNESS_LEASE_EXPIRY_S": "5"}
    bin_ = refusing(site, 3, f'[ "$n" -ge 4 ] || {{ {first}; kill -9 $PPID; sleep 1; exit 1; }}')
    site.extra["PATH"] = f"{bin_}:{os.environ['PATH']}"
    file = site.study(init="[random, mae]", steps=400)
    site.harness("grid", str(file), "--submit", check=-9)
    site.wait_done()
    for path in site.root.glob("stages/*/*"):
        assert sum(e["event"] == "done" for e in read_jsonl(path / "events.jsonl")) == 1
    assert len(list(site.root.glob("slurm/*/submission.json"))) >= 2


def test_one_rank_that_dies_ends_the_others_and_the_stage_goes_on(site: Site) -> None:
    """Of two tasks of a step: the one left would work on for nothing. It hears that it is to stop,
    and says so; what the stage is charged with is the death of the other."""
    site.profile(env='{HARNESS_DEVICE: cpu, LIGHT_RANK_DIES_IN: "1"}')
    site.submit(site.study(steps=400, resources=", ranks: 2, nodes: 2"))
    site.wait_done()
    folder = site.folder_of("wsp")
    first, last = read_attempts(folder)
    assert (first.end, last.end, 0 < last.progress < 400) == ("killed", "done", True)
    assert (read_json(folder.attempt(1) / "attempt.json") or {})["nodes"] == list(
        site.cluster.nodes
    )


def test_nobody_else_concludes_from_a_queue_that_shows_only_ones_own_jobs(site: Site) -> None:
    site.profile(sbatch="{hold: true}")
    file = site.study()
    site.submit(file)
    jobs = site.cluster.queue()
    for path in site.root.glob("stages/*/*/status.json"):
        path.write_text(path.read_text().replace('"user": "', '"user": "somebody-'))
    site.cluster.command("scancel", *jobs, check=True)
    site.cluster.wait_empty()
    assert set(site.states().values()) == {"submitted"}
    assert "nothing to submit" in site.submit(file)
    for path in site.root.glob("stages/*/*/status.json"):
        path.write_text(path.read_text().replace("somebody-", ""))
    assert set(site.states().values()) == {"lost"}


def test_waiting_jobs_are_named_and_arrays_cut_at_the_sites_limit(site: Site) -> None:
    site.profile(sbatch="{hold: true}")
    site.submit(site.study(seed=str(list(range(10)))))
    rows = site.cluster.command("squeue", "--array", "--noheader", "--format", "%i %j").split("\n")
    names = [row.split()[1] for row in rows if row]
    counts = {name: names.count(name) for name in names}
    assert counts == {"tiny.wsp": 10, "tiny.fine_tune": 10, "tiny.caretaker": 1}
    arrays = [row.split("_")[0] for row in rows if "_" in row.split(" ")[0]]
    assert sorted(arrays.count(a) for a in set(arrays)) == [9, 9]  # and a job of one each


def test_cancel_resume_and_retry_reach_stages_in_the_queue(site: Site) -> None:
    file = site.study(seed="[0, 1]", steps=1200)  # a minute: commands take seconds
    site.submit(file)
    site.wait_training()
    site.harness("cancel", "seed=1")
    site.cluster.wait_empty()
    by_seed = {s: {v for k, v in site.states().items() if f"-s{s}-" in k} for s in (0, 1)}
    assert by_seed == {0: {"done"}, 1: {"cancelled"}}
    assert "nothing to submit" in site.submit(file)
    site.harness("resume", "state=cancelled")
    site.wait_done()
    assert "nothing to retry" in site.harness("retry", "seed=1").stdout
    site.harness("retry", "--from-scratch", "stage=tune,seed=1")
    site.wait_done()
    (tune,) = site.root.glob("stages/fine_tune/*-s1-*")
    assert sum(e["event"] == "done" for e in read_jsonl(tune / "events.jsonl")) == 2
