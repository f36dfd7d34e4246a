"""What the results of done stages say, kept a file per kind: ROOT/index/<kind>.json.

Only a cache. A row counts as long as result.json has the inode, size and time of change that it had
when it was read; whatever is missing or wrong is read again from the files.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

from harness.errors import UserError
from harness.ledger.files import read_json, write_bytes
from harness.ledger.tree import Tree

KEYS = (
    *("uid", "upstream_uids", "kind", "size", "metrics", "flops", "wall_s", "device", "processes"),
    "attempts",
)
"""Of result.json: what states, summaries and estimates need of thousands of stages at a time."""

_SCHEMA = 1
_WORTH_KEEPING = 200
"""New rows, before the file is written again."""

_Rows = dict[str, tuple[list[int], dict[str, Any]]]
_read: dict[Path, _Rows] = {}
"""Files of this process so far. Every use of a row is checked against its result.json."""
_found: dict[Path, tuple[float, dict[str, dict[str, Any]]]] = {}
"""The last answer by file, and when it was given."""


def results(
    tree: Tree, kind: str, ids: Iterable[str], *, max_age_s: float = 0.0
) -> dict[str, dict[str, Any]]:
    """`KEYS` of the results of those stages that have one, by id.

    `told` is true where status.json says `done` too: its worker was not killed in between. What was
    found no longer ago than `max_age_s` is not looked for again.
    """
    path = tree.index / f"{kind}.json"
    when, recent = _found.get(path, (0.0, {}))
    if time.monotonic() - when > max_age_s:
        recent = {}
    ids = list(ids)
    new = _results(tree, path, kind, [i for i in ids if i not in recent])
    if not recent:
        _found[path] = (time.monotonic(), new)
    return {i: recent[i] for i in ids if i in recent} | new


def _results(tree: Tree, path: Path, kind: str, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    rows = _read.get(path)
    if rows is None:
        rows = _read[path] = _load(path)
    base = str(tree.root / "stages" / kind)
    found: dict[str, dict[str, Any]] = {}
    new = 0
    for stage in ids:
        try:
            stat = os.stat(f"{base}/{stage}/result.json")
        except (FileNotFoundError, NotADirectoryError):
            continue
        sign = [stat.st_ino, stat.st_size, stat.st_mtime_ns]
        known = rows.get(stage)
        if known is not None and known[0] == sign and known[1]["told"]:
            found[stage] = known[1]
            continue
        folder = tree.stage(kind, stage)
        result = read_json(folder.result)
        if result is None:  # removed this moment
            continue
        status = read_json(folder.status) or {}
        row = {key: result[key] for key in KEYS if key in result}
        row["told"] = status.get("state") == "done"
        found[stage] = row
        rows[stage] = (sign, row)
        new += 1
    if new >= _WORTH_KEEPING:
        _save(path, rows)
    return found


def _load(path: Path) -> _Rows:
    try:
        content = orjson.loads(path.read_bytes())
        if content["schema"] != _SCHEMA or content["keys"] != list(KEYS):
            return {}
        return {
            stage: (sign, row)
            for stage, (sign, row) in content["rows"].items()
            if isinstance(row, dict) and isinstance(row["told"], bool) and "uid" in row
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _save(path: Path, rows: _Rows) -> None:
    content = {"schema": _SCHEMA, "keys": list(KEYS), "rows": rows}
    # Whoever may only look at the tree does without.
    with contextlib.suppress(UserError, OSError):
        write_bytes(path, orjson.dumps(content))
