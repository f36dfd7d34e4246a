"""Resume checkpoints: written aside, renamed, marked complete; only the last one is kept.

    checkpoints/step_<N>/deepspeed/...   weights and optimizer, one pair of files a rank
    checkpoints/step_<N>/progress.json   where the run stood, by rank 0
    checkpoints/step_<N>/COMPLETE        written last; a folder without it is ignored

Every random choice of a run is a function of (seed, step), so no generator state is kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from harness.errors import LeaseLostError, UserError, storage_error
from harness.ledger.files import Guard
from harness.train.engine import Engine

SCHEMA = 1


@dataclass
class Progress:
    """What the loop carries from step to step besides weights and optimizer state."""

    step: int = 0
    """Finished optimizer steps."""
    loss_sum: float = 0.0
    """Sum of the losses since the last metrics row."""
    loss_count: int = 0
    wall_s: dict[str, float] = field(
        default_factory=lambda: {"setup": 0.0, "train": 0.0, "eval": 0.0, "checkpoint": 0.0}
    )
    """Seconds by part, over all attempts that led here."""


def save(folder: Path, engine: Engine, progress: Progress, guard: Guard) -> Path:
    """Write a checkpoint of the stage in `folder`, then remove the older ones.

    `guard` raises on rank 0 where another process owns the stage now.
    """
    final = folder / "checkpoints" / f"step_{progress.step}"
    # Never shared with another attempt: one that was stopped may go on after its successor began.
    partial = final.with_name(f"{final.name}.partial-{_common_number(engine):06x}")
    try:
        if engine.rank == 0:
            remove_partial(folder, guard)
            guard()
            partial.mkdir(parents=True)
        engine.barrier()
        engine.save(partial)
        engine.barrier()
        if engine.rank == 0:
            _complete(partial, final, {"ranks": engine.ranks, **asdict(progress)}, guard)
    except LeaseLostError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except (OSError, RuntimeError) as error:
        known = storage_error(error, final)
        if known is None:
            raise
        # What could not be finished must not hold the space; the checkpoint before it is whole.
        shutil.rmtree(partial, ignore_errors=True)
        raise known from None
    engine.barrier()
    return final


def _complete(partial: Path, final: Path, content: dict[str, Any], guard: Guard) -> None:
    """Rank 0: gives a written checkpoint its name and its mark, and removes the older ones."""
    (partial / "progress.json").write_text(json.dumps({"schema": SCHEMA, **content}))
    for file in partial.rglob("*"):
        _sync(file)
    if final.exists():
        # Without its mark, if it was killed before; or complete, and about to be replaced. In one
        # step: a process stopped while it removes file after file may go on in its successor's.
        guard()
        final.rename(partial.with_name(f"{partial.name}.old"))
    guard()
    partial.replace(final)
    _sync(final.parent)
    guard()
    (final / "COMPLETE").write_text("")
    _sync(final / "COMPLETE")
    _sync(final)
    for other in list(final.parent.iterdir()):
        if other != final:
            guard()  # stopped here, this process would remove what its successor has saved
            shutil.rmtree(other, ignore_errors=True)


def remove_partial(folder: Path, guard: Guard) -> None:
    """Takes away what attempts that were killed while they saved have left."""
    for partial in list((folder / "checkpoints").glob("step_*.partial*")):
        guard()  # what was there when this still was the owner is not its successor's
        shutil.rmtree(partial, ignore_errors=True)


def _common_number(engine: Engine) -> int:
    """A new random number, the same on all ranks."""
    own = uuid.uuid4().int % 2**24 if engine.rank == 0 else 0  # exact as a float32
    return int(engine.total(torch.tensor([float(own)], device=engine.device)).item())


def latest(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step; None if there is none."""
    found = [
        (int(match[1]), path)
        for path in (folder / "checkpoints").glob("step_*")
        if (match := re.fullmatch(r"step_(\d+)", path.name)) and (path / "COMPLETE").exists()
    ]
    return max(found)[1] if found else None


def load(path: Path, engine: Engine) -> Progress:
    """Restore `engine` from a complete checkpoint, and return where the run stood.

    The checkpoint may be of another number of ranks; losses then go on as they would have, to
    rounding. UserError where DeepSpeed's files cannot be read so.
    """
    content = json.loads((path / "progress.json").read_text())
    ranks = content.pop("ranks")
    schema = content.pop("schema")
    if schema != SCHEMA:
        raise UserError(f"{path}: checkpoint has schema {schema}, this version reads {SCHEMA}")
    if ranks == engine.ranks:
        engine.load(path)
    else:
        engine.load_from_other_ranks(path, ranks)
    return Progress(**content)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
