"""`harness logs`: what the attempts of a cell's stages printed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.cli import shared
from harness.cli.run import find_in_studies
from harness.errors import NotFoundError
from harness.ledger.files import read_json
from harness.ledger.tree import StageFolder


def logs(
    cell: Annotated[str, typer.Argument(help="Name or id of a cell, or id of a stage.")],
    stage: Annotated[
        str | None, typer.Option(help="Only this stage: mae, wsp, or a transfer task.")
    ] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Wait for more.")] = False,
    study: Annotated[str | None, typer.Option(help="Study, if several have the cell.")] = None,
    root: shared.Root = None,
) -> int:
    """Print the logs of a cell's stages, last attempt of each.

    Example:

      harness logs d32x3-4k-mae-s0 --stage wsp
    """
    tree = shared.tree(root)
    _, row = find_in_studies(tree, cell, study, stages_too=True)
    roles: dict[str, str] = row["stages"]
    if stage is not None and stage not in roles:
        have = ", ".join(roles)
        raise NotFoundError(f"cell {row['name']} has no stage '{stage}'; it has: {have}")
    chosen = {r: s for r, s in roles.items() if stage in (None, r)}
    folders = {r: tree.stage(row["kinds"][s], s) for r, s in chosen.items()}
    offsets: dict[Path, int] = {}
    found = False
    while True:
        for role, folder in folders.items():
            found |= _print_new(role, folder, offsets)
        if not follow:
            break
        if all(_is_over(f) for f in folders.values()):
            break
        time.sleep(0.5)
    if not found:
        print(f"no attempt of {row['name']} has a log yet", file=sys.stderr)
    return 0


def _print_new(role: str, folder: StageFolder, offsets: dict[Path, int]) -> bool:
    numbers = folder.attempt_numbers()
    if not numbers:
        return False
    attempt = folder.attempt(numbers[-1])
    if attempt not in offsets:
        offsets[attempt] = 0
        about: dict[str, Any] = read_json(attempt / "attempt.json") or {}
        end = about.get("message") or about.get("end") or "running"
        print(f"== {role}: {folder.path.name}, attempt {numbers[-1]}: {end}")
    for path in sorted(attempt.glob("std*.log")):
        with open(path, "rb") as file:
            file.seek(offsets.get(path, 0))
            text = file.read()
            offsets[path] = file.tell()
        sys.stdout.write(text.decode("utf-8", "replace"))
    sys.stdout.flush()
    return True


def _is_over(folder: StageFolder) -> bool:
    state = (read_json(folder.status) or {}).get("state")
    return folder.result.exists() or state in ("failed", "diverged", "cancelled")
