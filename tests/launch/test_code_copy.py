"""What runs is the code as it was at submission, and its record says which that was."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import harness
from harness.launch import provenance
from harness.launch.machine import this_machine
from harness.launch.pool import Pool
from harness.ledger.environment import environment
from harness.ledger.tree import Tree
from harness.study.stages import Execution
from harness.study.zero_files import read_config
from tests.launch.made import poll_until, stage, start

WORKER = """
import os, signal
def main(args):
    if os.environ["HARNESS_STAGE"] == "die":
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()
    return 0
"""


def test_a_zygote_that_is_started_again_runs_the_copy_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout, copy = tmp_path / "checkout", tmp_path / "copy"
    checkout.mkdir()
    (checkout / "copied_worker.py").write_text(WORKER)
    shutil.copytree(checkout, copy)
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("PYTHONPATH", f"{checkout}:{Path(harness.__file__).parents[1]}")
    pool = Pool(this_machine("cpu", 1), Tree(tmp_path / "runs"), worker="copied_worker", code=copy)
    try:
        start(pool, stage("first"))
        assert poll_until(pool, lambda: not pool.running)["first"].code == 0
        (checkout / "copied_worker.py").write_text("raise RuntimeError('edited since')\n")
        start(pool, stage("die"))
        assert poll_until(pool, lambda: not pool.running)["die"].code != 0
        start(pool, stage("again"))
        assert poll_until(pool, lambda: not pool.running)["again"].code == 0
    finally:
        pool.close()


def test_the_diff_has_the_files_that_git_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "harness"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    about = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*about, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(harness, "__file__", str(package / "__init__.py"))
    assert provenance.git_state().diff == b""
    (package / "data" / "new.py").write_text("answer = 42\n")
    (tmp_path / "notes.txt").write_text("not of the package\n")
    state = provenance.git_state()
    assert b"+answer = 42" in state.diff
    assert b"notes" not in state.diff
    # It makes the file again.
    shutil.rmtree(package / "data")
    subprocess.run(["git", "apply", "-"], input=state.diff, cwd=tmp_path, check=True)
    assert (package / "data" / "new.py").read_text() == "answer = 42\n"


def test_the_environment_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "HARNESS_API_KEY": "hidden",
        "HARNESS_MONGO_URL": "mongodb://a:hidden@b",
        "HARNESS_ROOT": "s3://ann:hidden@store/runs",
        "AWS_SECRET_ACCESS_KEY": "hidden",
        "CUDA_VISIBLE_DEVICES": "3,5",
        "PYTHONPATH": "/a/copy",
    }.items():
        monkeypatch.setenv(name, value)
    found = environment("worker")
    assert "hidden" not in str(found)
    assert found["env"]["HARNESS_ROOT"] == "s3://***@store/runs"
    assert found["env"]["CUDA_VISIBLE_DEVICES"] == "3,5"
    assert found["env"]["PYTHONPATH"] == "/a/copy"


def test_a_deepspeed_config_of_the_users_own_stays_as_it_was_at_submission(tmp_path: Path) -> None:
    path, tree = tmp_path / "zero.json", Tree(tmp_path / "runs")
    path.write_text('{"zero_optimization": {"stage": 2}}')
    own = Execution(dataset_path="", zero_config=str(path))
    first = provenance.kept(tree, own)
    path.write_text('{"zero_optimization": {"stage": 3}}')
    second = provenance.kept(tree, own)
    found = [read_config(Path(str(e.zero_config))) for e in (first, second)]
    assert [c["zero_optimization"]["stage"] for c in found] == [2, 3]
    assert provenance.kept(tree, first) == first  # of a stage that a caretaker submits again
    path.unlink()  # of a stage that is done: who submits the others need not have it
    assert provenance.kept(tree, own) == own
    named = Execution(dataset_path="", zero_config="zero2_bf16")
    assert provenance.kept(tree, named) is named  # the copy of the code has it


def test_a_copy_that_a_power_cut_left_empty_is_mended(tmp_path: Path) -> None:
    """The names of files may reach a disk before what is in them."""
    tree, git = Tree(tmp_path), provenance.GitState(sha=None, diff=b"")
    copy = provenance.snapshot(tree, git)
    worker, whole = copy / "harness" / "worker.py", Path(harness.__file__).with_name("worker.py")
    worker.write_bytes(b"")
    (copy / "harness" / "errors.py").unlink()
    assert provenance.snapshot(tree, git) == copy
    assert worker.read_bytes() == whole.read_bytes()
    assert (copy / "harness" / "errors.py").exists()
