"""Work that is cut into files: a stopped stage keeps what it has, and ranks share it out.

No collective is called: a part belongs to one rank, and a file that is there is whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from harness.errors import PreemptedError
from harness.ledger.context import StageContext
from harness.models.weight_files import write_atomically

_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Part:
    """A safetensors file and how to make its tensors."""

    path: Path
    make: Callable[[], dict[str, Tensor]]
    """Depends on nothing that another part or another rank does."""


def make_parts(ctx: StageContext, parts: Sequence[Part]) -> None:
    """Makes the parts that are missing: part k by rank k % ranks.

    Returns when all parts are there: a rank waits for the others, whose death ends the stage from
    outside, and whose standstill the watchdog notices. Raises PreemptedError where the stage is
    asked to stop.
    """
    ctx.whereabouts.at = (0, "compute")
    for part in parts[ctx.rank :: ctx.ranks]:
        if is_whole(part.path):
            continue
        stop_if_asked(ctx)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in part.make().items()}
        ctx.check_lease()
        part.path.parent.mkdir(exist_ok=True)
        write_atomically(part.path, lambda path, tensors=tensors: save_file(tensors, path))
    ctx.whereabouts.at = (0, "reduce")
    while not all(is_whole(part.path) for part in parts):
        stop_if_asked(ctx)
        ctx.check_lease()
        time.sleep(_POLL_S)
    ctx.whereabouts.at = None  # what is left of the stage has no parts that could be looked at


def is_whole(path: Path) -> bool:
    """Whether the file is there, as long as its header says."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def stop_if_asked(ctx: StageContext) -> None:
    """Raises PreemptedError once the attempt was asked to stop."""
    if ctx.should_stop():
        raise PreemptedError("stopped; the files that are whole stay, the next attempt goes on")
