"""`harness report`: figures, fits and tables of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.cli import base
from harness.errors import NotFoundError, StorageError
from harness.ledger import cell_rows


def report(
    study: Annotated[
        str | None, typer.Argument(help="Name of the study; all of them when left out.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder; each study gets one below it.")] = Path(
        "reports"
    ),
    root: base.Root = None,
) -> int:
    """Write a report: convergence curves, transfer, gain of MAE, scaling-law fits, every cell.

    Example:

      harness report scale_study --out reports/
    """
    tree = base.tree(root)
    names = [study] if study else tree.studies()
    if not names:
        raise NotFoundError(f"no study in {tree.root}; run `harness grid FILE --submit` first")
    # seaborn takes a second to import; the other verbs must not wait for it
    from analysis.report import build

    for name in names:
        cell_rows.read_cells(tree, name)  # raises if there is none of that name
        try:
            (out / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"--out {out}", error) from None
        result = build(tree.root, name, out)
        print(result.finding)
        print(f"report: {result.index}")
    return 0
