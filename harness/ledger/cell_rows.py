"""Cells of a study as they were written down: rows of cells.jsonl."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness.errors import NotFoundError, UserError
from harness.ledger.files import read_jsonl
from harness.ledger.tree import Tree


def read_cells(tree: Tree, study: str) -> list[dict[str, Any]]:
    """Rows of cells.jsonl. Raises NotFoundError, naming the studies there are."""
    if study not in tree.studies():
        known = ", ".join(tree.studies()) or "none; run `harness grid FILE --submit` first"
        raise NotFoundError(f"no study '{study}' in {tree.root}; known: {known}")
    path = tree.study(study) / "cells.jsonl"
    rows = read_jsonl(path)
    check_keys(path, rows, "id", "name", "axes", "stages", "kinds")
    return rows


def stages_needed(tree: Tree, studies: Iterable[str]) -> set[str]:
    """Stages that cells of these studies need, as far as their rows can be read."""
    needed: set[str] = set()
    for study in studies:
        with contextlib.suppress(UserError):
            needed.update(s for row in read_cells(tree, study) for s in row["stages"].values())
    return needed


def check_keys(path: Path, rows: list[dict[str, Any]], *keys: str) -> None:
    """Raises UserError for a row without one of the keys."""
    for number, row in enumerate(rows, 1):
        missing = [key for key in keys if key not in row]
        if missing:
            raise UserError(f"{path}: row {number} has no '{missing[0]}'; submit the study again")
