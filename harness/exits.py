"""How a worker ends: every way becomes a state, a reason and an exit code."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from harness.attempt import is_finite
from harness.errors import (
    EXIT_BUSY,
    EXIT_FAILED,
    EXIT_LOST_RANK,
    EXIT_REQUEUE,
    EXIT_STORAGE,
    DataError,
    DivergedError,
    HarnessError,
    LeaseLostError,
    OutOfMemoryError,
    PreemptedError,
    StorageError,
    UpstreamGoneError,
    UserError,
    storage_error,
)
from harness.ledger import store
from harness.ledger.files import write_json
from harness.ledger.lease import AttemptGuard
from harness.ledger.tree import StageFolder
from harness.rank_zero import RankZero
from harness.stage_run import say, tell
from harness.stop import Stop

_PATIENCE_S = 10.0


def guarded(
    run: Callable[[], int],
    folder: StageFolder,
    attempt: int,
    stop: Stop,
    job: RankZero | None = None,
) -> int:
    """Runs and turns every way to end into a state, a reason and an exit code."""
    try:
        return run()
    except LeaseLostError as error:
        print(error, file=sys.stderr)
        return EXIT_BUSY
    except PreemptedError as error:
        code = _end(folder, attempt, job, *stop.end, error, EXIT_REQUEUE)
        return _after_rank_zero(code, folder, job)
    except DivergedError as error:
        code = _end(folder, attempt, job, "diverged", "diverged", error, EXIT_FAILED)
        return _after_rank_zero(code, folder, job)
    except DataError as error:
        return _end(folder, attempt, job, "failed", "data", error, EXIT_FAILED)
    except StorageError as error:
        return _end(folder, attempt, job, "failed", "storage", error, EXIT_STORAGE)
    except UpstreamGoneError as error:  # not a try of the stage: it waits again
        return _end(folder, attempt, job, "planned", "dropped", error, EXIT_FAILED)
    except UserError as error:
        return _end(folder, attempt, job, "failed", "config", error, EXIT_FAILED)
    except OutOfMemoryError as error:
        return _out_of_memory(folder, attempt, job, error)
    except torch.OutOfMemoryError as error:  # outside of a step, where a smaller one is no help
        return _end(folder, attempt, job, "failed", "too_large", error, EXIT_FAILED)
    except HarnessError as error:
        return _end(folder, attempt, job, "failed", "code", error, EXIT_FAILED)
    except Exception as error:
        if is_lost_rank(error):
            say(f"lost another rank: {error}")
            return EXIT_LOST_RANK
        disk = storage_error(error, folder.path)
        if disk is not None:
            return _end(folder, attempt, job, "failed", "storage", disk, EXIT_STORAGE)
        # The one place where everything is caught: the process ends here, and its reason must
        # reach the status file; the traceback goes to the attempt's stderr.log.
        traceback.print_exc()
        return _end(folder, attempt, job, "failed", "code", error, EXIT_FAILED)


def _after_rank_zero(code: int, folder: StageFolder, job: RankZero | None) -> int:
    """The code, once rank 0 is through: an end that all ranks see is its to tell, and the first
    process that is gone takes the others with it."""
    deadline = time.monotonic() + _PATIENCE_S
    while job is None and folder.lease.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return code


def is_lost_rank(error: Exception) -> bool:
    """True if a collective failed: the cause is another rank's, and whoever sees that one says
    it."""
    is_gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return is_gloo or isinstance(error, torch.distributed.DistError)


def _out_of_memory(
    folder: StageFolder, attempt: int, job: RankZero | None, error: OutOfMemoryError
) -> int:
    """Leaves the next micro-batch to try in the stage's folder; any rank may find out first."""
    stage = store.read_stage(folder)
    if error.smaller is None:
        return _end(folder, attempt, job, "failed", "too_large", error, EXIT_FAILED)
    asked = {"ranks": stage.execution.ranks, "micro_batch": stage.execution.micro_batch}
    row = {"schema": 1, "asked": asked, "micro_batch": error.smaller, "failed": error.micro_batch}
    guard = job.lease.check if job else AttemptGuard(folder, attempt).guard
    try:
        write_json(folder.memory, row, guard)
    except LeaseLostError as lost:
        say(lost)
        return EXIT_BUSY
    return _end(folder, attempt, job, "failed", "oom", error, EXIT_FAILED)


def _end(
    folder: StageFolder,
    attempt: int,
    job: RankZero | None,
    state: str,
    reason: str,
    error: BaseException,
    code: int,
) -> int:
    lines = str(error).strip().splitlines()
    message = lines[0] if lines else type(error).__name__
    if reason == "code":
        message = f"{type(error).__name__}: {message}"
    say(f"{state} ({reason}): {message}")
    if job is not None:
        try:
            job.finish(state, reason, message, _details(error))
        except LeaseLostError as lost:
            print(lost, file=sys.stderr)
            return EXIT_BUSY
    else:
        rank = os.environ.get("RANK", "0")
        # In the folder of its own attempt, which no later one touches.
        path = folder.attempt(attempt) / f"error.rank{rank}.json"
        tell(path, state, reason, f"rank {rank}: {message}")
    return code


def _details(error: BaseException) -> dict[str, Any]:
    """What the record of an attempt holds beyond the message."""
    if not isinstance(error, DivergedError):
        return {}
    about = {
        "step": error.step,
        "samples": error.samples,
        "loss": error.loss if is_finite(error.loss) else str(error.loss),
        "grad_norm": error.norm if error.norm is None or is_finite(error.norm) else str(error.norm),
        "keys": error.keys,
    }
    return {"diverged": about}
