"""`harness logs`: what the attempts of a cell's stages printed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.cli import base, show
from harness.cli.run import find_in_studies
from harness.errors import NotFoundError
from harness.launch import queue
from harness.ledger import states
from harness.ledger.files import read_json
from harness.ledger.tree import StageFolder

_QUIET_S = 20.0
"""`--follow` ends when nobody has run anything of the cell for so long."""
_QUEUE_S = 10.0


def logs(
    cell: Annotated[str, typer.Argument(help="Name or id of a cell, or id of a stage.")],
    stage: Annotated[
        str | None, typer.Option(help="Only this stage: mae, wsp, or a transfer task.")
    ] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Wait for more.")] = False,
    study: Annotated[str | None, typer.Option(help="Study, if several have the cell.")] = None,
    root: base.Root = None,
) -> int:
    """Print the logs of a cell's stages, last attempt of each.

    Example:

      harness logs d32x3-4k-mae-s0 --stage wsp
    """
    tree = base.tree(root)
    _, row = find_in_studies(tree, cell, study, stages_too=True)
    roles: dict[str, str] = row["stages"]
    if stage is not None and stage not in roles:
        have = ", ".join(roles)
        raise NotFoundError(f"cell {row['name']} has no stage '{stage}'; it has: {have}")
    graph = states.graph_of_rows([row])
    chosen = {r: s for r, s in roles.items() if stage in (None, r)}
    folders = {r: tree.stage(row["kinds"][s], s) for r, s in chosen.items()}
    printer = _Printer()
    quiet_since: float | None = None
    now: dict[str, states.StageState] = {}
    read_at = -_QUEUE_S
    while True:
        # States first: what was printed before an end is then in the files. The queue of a
        # scheduler, which serves many, is not asked twice a second.
        in_queue = any(s.status.get("job") or s.status.get("token") for s in now.values())
        if follow and (not in_queue or time.monotonic() - read_at >= _QUEUE_S):
            now, read_at = queue.read_graph(tree, graph), time.monotonic()
        for role, folder in folders.items():
            printer.print_new(role, folder)
        if not follow or all(now[s].is_over for s in chosen.values()):
            break
        is_active = any(state.state in states.ACTIVE for state in now.values())
        quiet_since = None if is_active else quiet_since or time.monotonic()
        if quiet_since is not None and time.monotonic() - quiet_since > _QUIET_S:
            left = [f"{r} is {now[s].state}" for r, s in chosen.items() if not now[s].is_over]
            print(f"nobody runs this cell now: {', '.join(left)}", file=sys.stderr)
            break
        time.sleep(0.5)
    if not printer.offsets:
        print(f"no attempt of {row['name']} has a log yet", file=sys.stderr)
    return 0


class _Printer:
    """What was not printed yet: of the last attempt, and of those that follow it."""

    def __init__(self) -> None:
        self.offsets: dict[Path, int] = {}
        self._from: dict[str, int] = {}

    def print_new(self, role: str, folder: StageFolder) -> None:
        """Prints what has come since the last call."""
        numbers = folder.attempt_numbers()
        if not numbers:
            return
        first = self._from.setdefault(role, numbers[-1])
        for number in (n for n in numbers if n >= first):
            attempt = folder.attempt(number)
            if attempt not in self.offsets:
                self._head(role, folder, number)
            for path in sorted(attempt.glob("std*.log")):
                with open(path, "rb") as file:
                    file.seek(self.offsets.get(path, 0))
                    text = file.read()
                    self.offsets[path] = file.tell()
                sys.stdout.write(text.decode("utf-8", "replace"))
        self._from[role] = numbers[-1] - 1  # its last lines may come after the next has begun
        sys.stdout.flush()

    def _head(self, role: str, folder: StageFolder, number: int) -> None:
        self.offsets[folder.attempt(number)] = 0
        about: dict[str, Any] = read_json(folder.attempt(number) / "attempt.json") or {}
        end = about.get("message") or about.get("end") or "running"
        print(f"== {role}: {folder.path.name}, attempt {number}: {show.printable(str(end))}")
        job, paths = _job_logs(folder, about)
        for path in paths:
            print(f"   job {job}: {path}")


def _job_logs(folder: StageFolder, about: dict[str, Any]) -> tuple[str | None, list[Path]]:
    """An attempt's Slurm job, and what its batch script printed: before and after the ranks."""
    status = read_json(folder.status) or {}
    is_last = status.get("attempt") == about.get("attempt")
    job = about.get("job") or (status.get("job") if is_last else None)
    token = about.get("token") or status.get("token")
    return job, folder.job_logs(str(token), str(job)) if job and token else []
