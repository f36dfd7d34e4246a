"""Stages of a study and what they start from, as cells.jsonl says.

Of thousands of cells that file is megabytes, most of it said several times over; a short copy is
kept in ROOT/index/<study>.graph.json. Only a cache: it counts as long as cells.jsonl has the inode,
size and time of change that it had when it was read.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from harness.errors import UserError
from harness.ledger import cell_rows
from harness.ledger.files import write_bytes
from harness.ledger.states import Node, PlainNode, graph_of_rows
from harness.ledger.tree import Tree

_SCHEMA = 1
_WORTH_KEEPING = 200
"""Cells."""


class StudyGraph(NamedTuple):
    """Of one study."""

    nodes: Mapping[str, Node]
    """In dependency order, cell by cell."""
    cells: list[tuple[str, ...]]
    """Stage ids of every cell."""


def read_study(tree: Tree, study: str) -> StudyGraph:
    """Raises NotFoundError, naming the studies there are."""
    path = tree.index / f"{study}.graph.json"
    sign = _sign(tree.study(study) / "cells.jsonl")
    found = _load(path, sign) if sign is not None else None
    if found is None:
        rows = cell_rows.read_cells(tree, study)
        found = StudyGraph(graph_of_rows(rows), [tuple(row["stages"].values()) for row in rows])
        if len(rows) >= _WORTH_KEEPING and sign is not None:
            _save(path, sign, found)
    return found


def _sign(path: Path) -> list[int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns]


def _load(path: Path, sign: list[int]) -> StudyGraph | None:
    try:
        content = orjson.loads(path.read_bytes())
        if content["schema"] != _SCHEMA or content["sign"] != sign:
            return None
        ids: list[str] = content["stages"]
        of_place = ids.__getitem__
        upstream = [tuple(map(of_place, places)) for places in content["upstream"]]
        kinds = map(content["kinds"].__getitem__, content["kind"])
        # `PlainNode(kind, upstream)`, without a call of Python's for each of thousands.
        nodes = map(functools.partial(tuple.__new__, PlainNode), zip(kinds, upstream, strict=True))
        return StudyGraph(
            dict(zip(ids, nodes, strict=True)),
            [tuple(map(of_place, places)) for places in content["cells"]],
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None


def _save(path: Path, sign: list[int], graph: StudyGraph) -> None:
    place = {stage: i for i, stage in enumerate(graph.nodes)}
    kinds = list(dict.fromkeys(node.kind for node in graph.nodes.values()))
    number = {kind: i for i, kind in enumerate(kinds)}

    def places(stages: Iterable[str]) -> list[int]:
        return [place[stage] for stage in stages]

    content: dict[str, Any] = {
        "schema": _SCHEMA,
        "sign": sign,
        "kinds": kinds,
        "stages": list(place),
        "kind": [number[node.kind] for node in graph.nodes.values()],
        "upstream": [places(node.upstream) for node in graph.nodes.values()],
        "cells": [places(cell) for cell in graph.cells],
    }
    # Whoever may only look at the tree does without. And of a study that changed meanwhile the
    # sign is another.
    with contextlib.suppress(UserError, OSError):
        write_bytes(path, orjson.dumps(content))
