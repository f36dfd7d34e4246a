"""Stands where `harness.worker` does, without torch: what it does is the stage's id.

`sleep-*` waits to be killed, `polite-*` until TERM, `die-*` ends its zygote, `code-N-*` exits N.
All note their surroundings first.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

KEYS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main(args: list[str]) -> int:
    """Runs one rank."""
    name, rank = os.environ["HARNESS_STAGE"], os.environ["RANK"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # as `Stop` does
    noted = {k: os.environ.get(k) for k in (*KEYS, "CUDA_VISIBLE_DEVICES", "HARNESS_MARK")}
    noted |= {"pid": os.getpid(), "zygote": os.getppid(), "args": args, "began": time.monotonic()}
    noted["listens"] = "HARNESS_RENDEZVOUS_FD" in os.environ
    path = Path(os.environ["HARNESS_RUN_DIR"]) / f"noted.{os.environ['HARNESS_ATTEMPT']}.{rank}"
    path.write_text(json.dumps(noted))
    path.rename(f"{path}.json")
    what, _, rest = name.partition("-")
    if what == "sleep":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if what in ("sleep", "polite"):
        time.sleep(300)
    if what == "die":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(300)
    if what == "code":
        return int(rest.partition("-")[0]) if rank == "0" else time.sleep(300) or 0
    return 0
