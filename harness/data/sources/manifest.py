"""Tables of images: CSV, TSV, JSONL or Parquet with a path and labels in each row."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.data.sources.listing import (
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    SPLITS,
    VIDEO_SUFFIXES,
    Item,
    Source,
    all_items,
    fields_text,
    file_item,
    find_file,
    is_test,
    is_val,
    key_of,
    suffix_of,
    usual_side,
)
from harness.errors import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "filepath", "image", "image_path"),
    "split": ("split",),
    "key": ("key", "id"),
    "class": ("class", "label", "category"),
    "hashtags": ("hashtags", "tags"),
    "caption": ("caption", "text"),
}
"""What a column means, and the names it may have."""
_Row = dict[str, Any]


def read_manifest(path: Path, split: str | None = None) -> Source:
    """Paths are relative to the manifest. Hashtags and captions are kept as they were written.

    Rows without a split are for `split`, or by their key: with hashtags, captions or no labels at
    all one in twenty is `val` and the rest `pretrain`; with classes one in five is `test` and the
    rest `train`. Raises UserError if the file is not a table or has no column of paths.
    """
    source = Source("manifest", path.parent)
    shapes: dict[tuple[str, ...], dict[str, str]] = {}
    rows: list[tuple[str, _Row]] = []
    for where, row in _rows(path, source):
        names = tuple(row)
        if names not in shapes:  # the rows of a JSONL file need not be alike
            shapes[names] = _known_columns(path, names, must_have_path=not shapes)
        if "path" in shapes[names]:
            rows.append((where, {what: row[name] for what, name in shapes[names].items()}))
        else:
            source.refuse(where, "no path")
    columns = {what: name for shape in shapes.values() for what, name in shape.items()}
    unknown = sorted({name for names in shapes for name in names} - set(columns.values()))
    if unknown:
        source.remarks.append(f"{path.name}: columns not used: {', '.join(unknown)}")
    if not rows and not source.refused:
        raise UserError(f"{path}: holds no rows")
    if split and any(_text(row.get("split")) for _, row in rows):
        raise UserError(f"{path}: its column '{columns['split']}' names the splits: no --split")
    is_weak = "hashtags" in columns or "caption" in columns or "class" not in columns
    found = [_item(source, where, row) for where, row in rows]
    names = {name for kept in found if kept for name in kept[1]}
    if all(name.isdecimal() for name in names):
        source.classes = [str(k) for k in range(1 + max(map(int, names), default=-1))]
    else:
        source.classes = sorted(names)
    place = {name: k for k, name in enumerate(source.classes)}
    for kept in found:
        if kept is None:
            continue
        item, classes, to = kept
        if len(classes) == 1:
            item = item._replace(class_id=place[classes[0]])
        elif classes:
            several = {"classes": [place[name] for name in classes]}
            fields = json.loads(item.fields or "{}")
            item = item._replace(fields=json.dumps({**several, **fields}, ensure_ascii=False))
        if not to and is_weak:
            to = split or ("val" if is_val(item.key) else "pretrain")
        source.add(to or split or ("test" if is_test(item.key) else "train"), item)
    if not is_weak and "val" in source.splits and "test" not in source.splits:
        source.splits["test"] = source.splits.pop("val")  # as for image folders
    source.image_size = usual_side(source, all_items(source))
    return source


def _item(source: Source, where: str, row: _Row) -> tuple[Item, list[str], str] | None:
    """The item of a row, its class names, its split ("" if it names none); None if refused."""
    name = _text(row["path"])
    if not name:
        source.refuse(where, "no path")
        return None
    if re.match(r"\w+://", name):
        source.refuse(name, f"{where}: a URL; fetch the images and give their paths")
        return None
    file = find_file(source, name)
    if file is None:
        source.refuse(name, f"{where}: there is no such file")
        return None
    if suffix_of(name) not in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
        source.refuse(name, f"{where}: not an image type: '{suffix_of(name) or 'no suffix'}'")
        return None
    split = _text(row.get("split"))
    if split and split.lower() not in SPLIT_NAMES:
        source.refuse(name, f"{where}: split '{split}' is unknown; known: {', '.join(SPLITS)}")
        return None
    caption = _text(row.get("caption"))
    key = _text(row.get("key"))
    item = file_item(file, key.replace(".", "_") if key else key_of(name.lstrip("/")))
    if caption:
        item = item._replace(fields=fields_text({"caption": caption}))
    hashtags = tuple(dict.fromkeys(_words(row.get("hashtags"))))
    classes = _words(row.get("class"), is_list_only=True)
    return item._replace(hashtags=hashtags or None), classes, SPLIT_NAMES.get(split.lower(), "")


def _known_columns(path: Path, names: Sequence[str], must_have_path: bool = True) -> dict[str, str]:
    lower = {name.strip().lower(): name for name in reversed(names)}
    columns = {
        what: next(lower[option] for option in options if option in lower)
        for what, options in _COLUMNS.items()
        if any(option in lower for option in options)
    }
    if "path" not in columns and must_have_path:
        raise UserError(
            f"{path}: no column of paths; found {', '.join(names) or 'none'}; expected one named"
            f" {', '.join(_COLUMNS['path'][:3])}"
        )
    return columns


def _text(value: Any) -> str:
    # A number that pandas wrote next to empty cells: 3.0 is class 3. NaN is an empty cell.
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, str) else str(value).strip()


def _words(value: Any, is_list_only: bool = False) -> list[str]:
    """A list, or text: JSON of a list, or separated by commas, else by spaces."""
    if isinstance(value, (list, tuple)):
        return [_text(part) for part in value if _text(part)]
    text = _text(value).strip()
    if text.startswith("["):
        try:
            return _words(json.loads(text))
        except ValueError:
            pass
    if is_list_only:
        return [text] if text else []
    parts = text.split(",") if "," in text else text.split()
    return [part.strip() for part in parts if part.strip()]


def _rows(path: Path, source: Source) -> Iterator[tuple[str, _Row]]:
    """Where each row stands, and its values by column."""
    suffix = suffix_of(path.name)
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(path)
        elif suffix in (".csv", ".tsv"):
            yield from _csv_rows(path, source, "," if suffix == ".csv" else "\t")
        else:
            yield from _jsonl_rows(path, source)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None
    except (OSError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _csv_rows(path: Path, source: Source, delimiter: str) -> Iterator[tuple[str, _Row]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        names = next(reader, [])
        if not any(name.strip().lower() in _COLUMNS["path"] for name in names):
            _known_columns(path, names)  # says what is wrong
        for row in reader:
            where = f"{path.name}:{reader.line_num}"
            if len(row) == len(names):
                yield where, dict(zip(names, row, strict=True))
            elif row:
                source.refuse(where, f"{len(row)} cells, expected {len(names)}")


def _jsonl_rows(path: Path, source: Source) -> Iterator[tuple[str, _Row]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                source.refuse(f"{path.name}:{number}", f"not JSON ({error})")
                continue
            if isinstance(row, dict):
                yield f"{path.name}:{number}", row
            else:
                source.refuse(f"{path.name}:{number}", "not a JSON object")


def _parquet_rows(path: Path) -> Iterator[tuple[str, _Row]]:
    import pyarrow  # slow to import, and only needed here
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches(batch_size=10_000):
            for row in batch.to_pylist():
                yield f"{path.name}: row {number}", row
                number += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file ({error})") from None
