"""Studies and stages written down: what a study asks for, before and beside what was run."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from harness.errors import NotFoundError, UserError
from harness.ledger.cell_rows import check_keys, read_cells
from harness.ledger.files import (
    Guard,
    JsonlWriter,
    jsonl,
    read_json,
    read_jsonl,
    unguarded,
    write_bytes,
    write_json,
)
from harness.ledger.lease import exclusive
from harness.ledger.tree import StageFolder, Tree
from harness.study.cells import Ablation, Cell, Grid, build_grid
from harness.study.schema import load_study
from harness.study.stage_set import outline_of
from harness.study.stages import StageFile


def register(tree: Tree, grid: Grid, ablations: list[Ablation]) -> dict[str, str]:
    """Writes studies/<name>: the file as it was read, all of it resolved, a row per cell.

    `ablations` are those of `grid`. What other commands have added since stays in the study.
    Returns stages that the study had and has no longer: id -> kind.
    """
    folder = tree.study(grid.loaded.study.name)
    with exclusive(_lock(folder)):
        known = _joined(read_ablations(tree, folder.name), ablations)
        if known != ablations:
            grid = build_grid(grid.loaded, known)
        before = _stages_before(tree, folder.name)
        _write_study(folder, grid, known)
    return {stage: kind for stage, kind in before.items() if stage not in grid.feeds}


def add_ablations(tree: Tree, study: str, new: list[Ablation]) -> None:
    """Adds cells to a study as it is by now, whatever was submitted since it was read."""
    folder = tree.study(study)
    with exclusive(_lock(folder)):
        known = read_ablations(tree, study)
        joined = _joined(known, new)
        if joined != known:
            loaded = load_study(folder / "study.yaml", base_folders(tree, study))
            _write_study(folder, build_grid(loaded, joined), joined)


def _stages_before(tree: Tree, study: str) -> dict[str, str]:
    try:
        rows = read_cells(tree, study)
    except UserError:  # not submitted yet, or damaged: what is written now mends it
        return {}
    return {stage: row["kinds"][stage] for row in rows for stage in row["stages"].values()}


def _lock(folder: Path) -> Path:
    """Held by whoever changes a study: its files are read, changed and written again."""
    return folder / "changing"


def _joined(known: list[Ablation], new: list[Ablation]) -> list[Ablation]:
    return list({jsonl([_ablation_row(a)]): a for a in (*known, *new)}.values())


def _write_study(folder: Path, grid: Grid, ablations: list[Ablation]) -> None:
    study = grid.loaded.study
    write_bytes(folder / "study.yaml", grid.loaded.source.raw)
    dataset = next(iter(grid.datasets.values())).model_dump(mode="json", by_alias=True)
    dataset.pop("shards", None)
    write_json(
        folder / "resolved.json",
        {
            "schema": 1,
            "name": study.name,
            "question": study.question,
            "bases": [str(b) for b in grid.loaded.bases],
            "dataset": dataset,
            "axes": _jsonable(study.axes),
            "study": study.model_dump(mode="json"),
        },
    )
    # Before the cells, which can be made again of these.
    write_bytes(folder / "ablations.jsonl", jsonl(_ablation_row(a) for a in ablations))
    write_bytes(folder / "cells.jsonl", jsonl(cell_row(c, grid) for c in grid.cells))


def _ablation_row(ablation: Ablation) -> dict[str, Any]:
    return {
        **{"schema": 1, "parent": ablation.parent, "values": ablation.values, "set": ablation.set},
        **{"tag": ablation.tag, "until": ablation.until},
    }


def read_ablations(tree: Tree, study: str) -> list[Ablation]:
    """The ablations that were run on a study so far."""
    path = tree.study(study) / "ablations.jsonl"
    rows = read_jsonl(path)
    check_keys(path, rows, "parent", "values", "set", "tag")
    return [
        Ablation(
            parent=r["parent"],
            values=r["values"],
            set=r["set"],
            tag=r["tag"],
            until=r.get("until"),  # older files do not have it
        )
        for r in rows
    ]


def cell_row(cell: Cell, grid: Grid) -> dict[str, Any]:
    """A cell as a line of cells.jsonl."""
    own = {s: outline_of(grid.stages, s) for s in cell.stages.values()}
    return {
        "schema": 1,
        "id": cell.id,
        "name": cell.name,
        "axes": _jsonable(cell.axes),
        "stages": cell.stages,
        "kinds": {s: outline.like.kind for s, outline in own.items()},
        "upstream": {s: list(outline.upstream) for s, outline in own.items()},
        "params": cell.params,
        "images": cell.images,
        "flops": cell.flops,
        "flops_by_role": cell.flops_by_role,
        "tag": cell.tag,
        "parent": cell.parent,
        "set": _jsonable(cell.set),
    }


def read_stage(folder: StageFolder) -> StageFile:
    """The stage's own file. Raises NotFoundError if it is missing."""
    raw = read_json(folder.stage)
    if raw is None:
        raise NotFoundError(f"{folder.stage}: no such file; submit the study again")
    return StageFile.model_validate(raw)


def with_upstream(tree: Tree, stage: StageFile) -> dict[str, StageFile]:
    """The stage and all that it rests on, in dependency order."""
    found: dict[str, StageFile] = {}
    for upstream, kind in stage.upstream_kinds.items():
        found |= with_upstream(tree, read_stage(tree.stage(kind, upstream)))
    return found | {stage.id: stage}


def write_stage(tree: Tree, stage: StageFile) -> StageFolder:
    """Writes stage.json if it is new or the way to run it changed; returns the folder."""
    folder = tree.stage(stage.kind, stage.id)
    content = stage.model_dump(mode="json", by_alias=True)
    if read_json(folder.stage) != content:
        write_json(folder.stage, content)
    return folder


def add_event(folder: StageFolder, event: str, *, guard: Guard = unguarded, **fields: Any) -> None:
    """Notes something that happened to a stage."""
    JsonlWriter(folder.events, guard).append({"time": time.time(), "event": event, **fields})


def set_aside(folder: StageFolder, guard: Guard = unguarded) -> None:
    """Moves what an earlier run produced into its last attempt's folder, to start from scratch.

    Attempts are kept, never overwritten; the stage's own files then belong to the new run. The
    result goes first: killed in between, this leaves no stage that is done with half of its files.
    """
    numbers = folder.attempt_numbers()
    target = _unused(folder.attempt(numbers[-1]) / "superseded") if numbers else None
    about = ("stage.json", "status.json", "events.jsonl", "lineage.json", "memory.json", "attempts")
    for path in sorted(folder.path.iterdir(), key=lambda path: (path != folder.result, path)):
        if path.name in about or path.name.startswith((".", "lease", "claim", "stop.json")):
            continue
        guard()
        if target is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            continue
        target.mkdir(exist_ok=True)
        path.replace(target / path.name)
    # Optimizer state of a superseded run is of no use to anybody.
    if target is not None:
        shutil.rmtree(target / "checkpoints", ignore_errors=True)


def _unused(path: Path) -> Path:
    """The path, or it with a number: an attempt that set a stale run aside may leave one, too."""
    unused, number = path, 1
    while unused.exists():
        number += 1
        unused = path.with_name(f"{path.name}.{number}")
    return unused


def base_folders(tree: Tree, study: str) -> list[Path]:
    """Where the study's relative dataset paths are looked for."""
    resolved = read_json(tree.study(study) / "resolved.json") or {}
    return [Path(b) for b in resolved.get("bases", ["."])]


def _jsonable(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
