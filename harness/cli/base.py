"""What every verb needs: the run root it works on, and JSON as it is printed.

Nothing here imports what a study is made of: that takes half a second, and `status` needs none.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import orjson
import typer

from harness.errors import UserError
from harness.launch.settings_file import settings_path
from harness.ledger.tree import Tree, default_root

T = TypeVar("T")

Root = Annotated[
    Path | None,
    typer.Option(
        "--root",
        help="Run root. Default: HARNESS_ROOT, the settings, or ./runs.",
        show_default=False,
    ),
]


def tree(root: Path | None) -> Tree:
    """The run tree a verb works on: the flag, HARNESS_ROOT, the settings, or ./runs."""
    named = None if root or os.environ.get("HARNESS_ROOT") else _root_of_settings()
    found = (root or named or default_root()).expanduser().absolute()
    if found.exists() and not found.is_dir():
        raise UserError(f"run root {found}: is a file; expected a folder, new or of earlier runs")
    return Tree(found)


def _root_of_settings() -> Path | None:
    if not settings_path().exists() and "HARNESS_SETTINGS" not in os.environ:
        return None
    from harness.launch import settings  # as above

    return settings.load_settings().root


held: list[object] = []
"""What is large and not freed before the process ends: object by object, that takes a second."""


def hold(value: T) -> T:
    """Holds a value until the process ends."""
    held.append(value)
    return value


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection: all of the many objects of a plan or a status stay."""
    held.clear()  # of an earlier verb, where a process runs several
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # or the first collection of what comes next would look at all of them
        gc.enable()


def print_json(value: dict[str, Any]) -> None:
    """JSON on stdout, indented as long as a person may read it: that takes seconds for a lot."""
    parts = [value, *(v for k, v in value.items() if k == "studies" for v in v)]
    is_large = any(isinstance(v, list) and len(v) > 1000 for p in parts for v in p.values())
    print(orjson.dumps(value).decode() if is_large else json.dumps(value, indent=1))
