"""A study that is killed again and again ends with the bits of one that was not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.ledger.files import read_jsonl
from tests.chaos.kills import STUDY, command, numbers, torment

pytestmark = pytest.mark.long


def test_kills_at_random_and_chosen_moments_change_no_bit(tmp_path: Path) -> None:
    done = torment(tmp_path, kills=4, seed=3)
    assert done.total() == 4


def test_submissions_at_once_run_every_stage_once(tmp_path: Path) -> None:
    file, root = tmp_path / "chaos.yaml", tmp_path / "runs"
    file.write_text(STUDY)
    running = [command(file, root) for _ in range(int(os.environ.get("HARNESS_SUBMITTERS", "4")))]
    for process in running:
        said, _ = process.communicate()
        assert process.returncode == 0, said
    assert len(numbers(root)) >= 5
    for folder in root.glob("stages/*/*"):
        events = [e["event"] for e in read_jsonl(folder / "events.jsonl")]
        assert [e for e in events if e != "retry"] == ["submitted", "started", "done"]
        assert [p.name for p in (folder / "attempts").iterdir()] == ["1"]
