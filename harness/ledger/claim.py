"""Who may start a stage, and who asked it to end: exact however many commands ask at a time.

A claim is a compare-and-swap on status.json under a lock: of all commands that saw the same state,
one gets the next attempt. The lease of `harness.ledger.lease` then belongs to the worker itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from harness.ledger import store
from harness.ledger.files import read_json, write_json
from harness.ledger.lease import exclusive, process_started, this_host
from harness.ledger.states import StageState
from harness.ledger.tree import StageFolder, Tree
from harness.study.stages import StageFile


def claim(tree: Tree, stage: StageFile, seen: StageState, owner: Mapping[str, Any]) -> int | None:
    """The number of a new attempt, or None if the stage is no longer as it was `seen`.

    `owner` goes into status.json: `cluster` and, under a scheduler, `job` or `token`.
    """
    folder = tree.stage(stage.kind, stage.id)
    folder.path.mkdir(parents=True, exist_ok=True)
    with exclusive(folder.path / "claim"):
        status, result = read_json(folder.status) or {}, read_json(folder.result)
        if dict(seen.status) != status or (seen.result or {}).get("uid") != (result or {}).get(
            "uid"
        ):
            return None
        store.write_stage(tree, stage)
        attempt = folder.new_attempt()
        write_json(folder.status, submitted(attempt, owner))
    store.add_event(folder, "submitted", attempt=attempt, **owner)
    return attempt


def submitted(attempt: int, owner: Mapping[str, Any]) -> dict[str, Any]:
    """status.json of a stage that waits for its worker to start."""
    return {
        "schema": 1,
        "state": "submitted",
        "attempt": attempt,
        "host": this_host(),
        "pid": os.getpid(),
        "pid_started": process_started(os.getpid()),
        "submitted": time.time(),
        **owner,
    }


def ask_to_stop(folder: StageFolder, why: str) -> None:
    """Leaves a note that the worker, wherever it runs, obeys at its next heartbeat."""
    write_json(folder.stop, {"schema": 1, "reason": why, "time": time.time()})


def stop_asked(folder: StageFolder) -> str | None:
    """Why the stage is to stop, or None."""
    note = read_json(folder.stop)
    return None if note is None else str(note["reason"])


def clear_stop(folder: StageFolder) -> None:
    """Takes the note away: the stage may run again."""
    folder.stop.unlink(missing_ok=True)
