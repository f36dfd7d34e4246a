"""Stages that nobody trains: ids and resources are all that placing looks at."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.launch.pool import Ended, Pool
from harness.ledger.files import write_json
from harness.ledger.tree import Tree
from harness.study.protocols.common import Features
from harness.study.recipes import Model
from harness.study.stages import Execution, Images, StageConfig, StageFile


def stage(stage_id: str, **execution: Any) -> StageFile:
    """A stage that needs what `execution` says."""
    images = Images(dataset="none", fingerprint="none", split="train", images=1)
    model = Model(width=16, depth=1, heads=1, patch=4, image_size=8)
    config = StageConfig(
        kind="features", size="d16x1", model=model, images=images, recipe=Features()
    )
    return StageFile(
        id=stage_id,
        kind="features",
        name=stage_id,
        config=config,
        params=1,
        flops=1,
        execution=Execution(dataset_path="", **execution),
    )


def start(pool: Pool, stage_file: StageFile) -> None:
    """Starts a new attempt as the driver does: when there is room, with its folders there."""
    assert not poll_until(pool, lambda: pool.fits(stage_file)), "something ended meanwhile"
    folder = pool.tree.stage(stage_file.kind, stage_file.id)
    write_json(folder.stage, {"schema": 1})
    pool.start(stage_file, folder.new_attempt())


def end(pool: Pool) -> None:
    """Closes a pool at once: workers that ignore TERM would be given a long time to save."""
    for running in pool.running.values():
        pool.stop(running, kill=True)
    pool.close()


def noted(tree: Tree, stage_id: str, attempt: int = 1) -> list[dict[str, Any]]:
    """What each rank that has started noted, by rank."""
    folder = tree.stage("features", stage_id).path
    found = folder.glob(f"noted.{attempt}.*.json")
    rows = [json.loads(path.read_text()) for path in found]
    return sorted(rows, key=lambda row: int(row["RANK"]))


def poll_until(
    pool: Pool, condition: Callable[[], bool], timeout_s: float = 60
) -> dict[str, Ended]:
    """Polls until the condition holds; what ended meanwhile, by stage id."""
    ended: dict[str, Ended] = {}
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still running: {sorted(pool.running)}"
        ended |= {e.running.stage.id: e for e in pool.poll(0.1)}
    return ended


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> bool:
    """True as soon as the condition holds; False if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_alive(pid: int) -> bool:
    """True if the process exists and is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] not in ("Z", "X")
