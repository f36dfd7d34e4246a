"""Stands where `harness.worker` does where only what is around it matters: sleeps, does not train.

A step takes 0.05 s, and every one leaves a checkpoint. It imports no torch, so a job takes seconds.
In the attempt that LIGHT_RANK_DIES_IN names, other ranks than rank 0 are killed while that works.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
import uuid
from pathlib import Path

from harness.errors import EXIT_REQUEUE
from harness.ledger import attempts, store
from harness.ledger.files import read_json, write_json
from harness.ledger.lease import Lease, process_started, this_host
from harness.ledger.tree import Tree
from harness.stop import Stop


def main(arguments: list[str]) -> int:
    """Runs one rank; rank 0 does the work."""
    parser = argparse.ArgumentParser()
    for name in ("root", "kind", "stage", "attempt"):
        parser.add_argument(f"--{name}")
    given = parser.parse_args(arguments)
    tree, number = Tree(Path(given.root)), int(given.attempt)
    folder = tree.stage(given.kind, given.stage)
    stop = Stop(folder)
    if os.environ["RANK"] != "0":
        while given.attempt == os.environ.get("LIGHT_RANK_DIES_IN"):
            time.sleep(0.1)
            if any(folder.checkpoints.glob("*/COMPLETE")):
                os.kill(os.getpid(), signal.SIGKILL)
        return 0
    stage = store.read_stage(folder)
    lease = Lease.acquire(folder.lease)
    lease.start_beating()
    try:
        about = {**(read_json(folder.status) or {}), "state": "running", "host": this_host()}
        about |= {"pid": os.getpid(), "pid_started": process_started(os.getpid())}
        write_json(folder.status, about)
        for step in range(attempts.progress_of(folder) + 1, (stage.config.steps or 0) + 1):
            time.sleep(0.05)
            checkpoint = folder.checkpoints / f"step_{step}"
            # A worker killed between the two lines leaves the folder.
            checkpoint.mkdir(parents=True, exist_ok=True)
            (checkpoint / "COMPLETE").touch()
            stop.look()
            if stop.asked:
                attempts.close(folder, number, *stop.end, "asked to stop")
                return EXIT_REQUEUE
        uids = {
            u: (read_json(tree.stage(kind, u).result) or {})["uid"]
            for u, kind in stage.upstream_kinds.items()
        }
        result = {"schema": 1, "uid": uuid.uuid4().hex, "upstream_uids": uids, "metrics": {}}
        result |= {"kind": given.kind, "size": stage.config.size, "flops": 0, "attempts": number}
        result["wall_s"] = {"total": 1.0, "harness": 0.0}
        write_json(folder.result, result)
        attempts.close(folder, number, "done", "done", "")
        return 0
    finally:
        lease.release()
