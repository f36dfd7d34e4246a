"""What the user of `harness data labels` brings: tag -> target, and tags that are blocked."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.data.relabel import fold_tag
from harness.errors import NotFoundError, UserError

_TAG_NAMES = ("tag", "hashtag", "tags", "hashtags", "class", "name", "word")
_SHAPE = 'two columns tag,target in a CSV or TSV, or a JSON object {"tag": "target" or [targets]}'


def read_map(path: Path) -> dict[str, list[str]]:
    """Folded tag -> its targets, in order. A tag may stand in several rows.

    Targets are taken as they are written. Raises NotFoundError, or UserError with file and line.
    """
    text = _text(path)
    rows = _json_rows(path, text) if path.suffix.lower() == ".json" else _table_rows(path, text)
    targets: dict[str, list[str]] = {}
    for where, tag, target in rows:
        folded, target = fold_tag(tag), target.strip()
        if not folded or not target:
            raise UserError(f"{where}: found '{tag}' -> '{target}'; expected a tag and a target")
        known = targets.setdefault(folded, [])
        if target not in known:
            known.append(target)
    if not targets:
        raise UserError(f"{path}: holds no tags; expected {_SHAPE}")
    return targets


def read_blocked(path: Path) -> set[str]:
    """Folded tags of a file with one a line. Raises NotFoundError or UserError."""
    blocked: set[str] = set()
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        folded = fold_tag(line)
        if not folded:
            raise UserError(f"{path}:{number}: '{line.strip()}' is not a tag; one a line, please")
        blocked.add(folded)
    return blocked


def file_record(path: Path | None) -> dict[str, str] | None:
    """What a report says of such a file: its name and what was in it, not where it lay."""
    if path is None:
        return None
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _table_rows(path: Path, text: str) -> Iterator[tuple[str, str, str]]:
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for number, row in enumerate(reader):
            where = f"{path}:{reader.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != 2:
                raise UserError(f"{where}: found {len(row)} columns; expected {_SHAPE}")
            if number == 0 and row[0].strip().lower() in _TAG_NAMES:
                continue  # column names
            yield where, row[0], row[1]
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}; expected {_SHAPE}") from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, str, str]]:
    try:
        content: Any = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: found a {type(content).__name__}; expected {_SHAPE}")
    for tag, targets in content.items():
        for target in targets if isinstance(targets, list) else [targets]:
            if not isinstance(target, str):
                raise UserError(f"{path}: '{tag}': found {target!r}; expected {_SHAPE}")
            yield f"{path}: '{tag}'", tag, target
