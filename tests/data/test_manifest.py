"""Manifests: tables of paths with hashtags, captions or classes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pandas
import pytest

from harness.data.hashing import key_hash
from harness.errors import NotFoundError, UserError
from tests.data.layouts import Read, image

ROWS: list[dict[str, Any]] = [
    {"path": f"images/{k}.jpg", "hashtags": tags, "caption": f'A "caption", number {k} ☃'}
    for k, tags in enumerate([["#dog", "#Straße"], ["#dog"], [], ["#a b", "#c"]] * 15)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for row in ROWS:
        image(tmp_path / "src" / row["path"])
    return tmp_path / "src"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(rows[0])
            for row in rows:
                cells = [json.dumps(v) if isinstance(v, list) else v for v in row.values()]
                writer.writerow(cells)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_hashtags_and_captions_come_back_as_they_were_written(
    folder: Path, tmp_path: Path, suffix: str
) -> None:
    read = Read(write(folder / f"m{suffix}", ROWS), tmp_path)
    assert set(read.meta.splits) == {"pretrain", "val"} and read.report.refused == []
    found = {**read.fields("pretrain"), **read.fields("val")}
    assert len(found) == len(ROWS)
    for row in ROWS:
        fields = found[row["path"].replace(".", "_")]
        assert fields.get("hashtags", []) == row["hashtags"]
        assert fields["caption"] == row["caption"]
    # One in twenty is held out, by the key's hash alone.
    assert all(key_hash(key) % 20 == 0 for key in read.fields("val"))
    assert read.meta.hashtags == ["#Straße", "#a b", "#c", "#dog"]


def test_all_kinds_of_table_give_the_same_set(folder: Path, tmp_path: Path) -> None:
    kinds = (".csv", ".tsv", ".jsonl", ".parquet")
    found = [Read(write(folder / f"m{k}", ROWS), tmp_path / k).meta.fingerprint for k in kinds]
    assert len(set(found)) == 1


def test_other_captions_are_another_fingerprint(folder: Path, tmp_path: Path) -> None:
    one = Read(write(folder / "a.jsonl", ROWS), tmp_path / "a").meta.fingerprint
    rows = [*ROWS[:-1], {**ROWS[-1], "caption": "something else"}]
    assert Read(write(folder / "b.jsonl", rows), tmp_path / "b").meta.fingerprint != one


@pytest.mark.parametrize(
    ("cell", "tags"),
    [
        ("#a #b\t#c", ["#a", "#b", "#c"]),
        ("red car, blue sky", ["red car", "blue sky"]),
        ('["x, y", "z"]', ["x, y", "z"]),
        ("one", ["one"]),
        ("a,a, ,b", ["a", "b"]),
    ],
)
def test_a_cell_of_hashtags_is_split_at_commas_else_at_spaces(
    folder: Path, tmp_path: Path, cell: str, tags: list[str]
) -> None:
    path = write(folder / "m.csv", [{"file": "images/0.jpg", "tags": cell}])
    read = Read(path, tmp_path, split="pretrain")
    (fields,) = read.fields("pretrain").values()
    assert fields == {"hashtags": tags}


def test_classes_splits_and_keys_are_taken_from_their_columns(folder: Path, tmp_path: Path) -> None:
    rows = [
        {"filename": "images/0.jpg", "label": "cat", "split": "train", "key": "my.own"},
        {"filename": "images/1.jpg", "label": "ant", "split": "validation", "key": None},
        {"filename": str(folder / "images/2.jpg"), "label": "cat", "split": "TRAIN", "key": None},
    ]
    read = Read(write(folder / "m.parquet", rows), tmp_path)
    assert read.meta.classes == ["ant", "cat"]
    train = read.classes("train")
    assert train["my_own"] == "cat" and len(train) == 2
    assert any(key.endswith("src/images/2_jpg") and key[0] != "/" for key in train)
    assert read.classes("test") == {"images/1_jpg": "ant"}  # val of labelled images is the test


def test_numbers_are_classes_by_themselves_and_lists_are_several(
    folder: Path, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [{"path": f"images/{k}.jpg", "label": k % 4} for k in range(10)]
    read = Read(write(folder / "m.parquet", rows), tmp_path / "a", split="train")
    assert read.meta.classes == ["0", "1", "2", "3"]
    rows = [{"path": f"images/{k}.jpg", "label": [k % 2, 3]} for k in range(4)]
    read = Read(write(folder / "m.jsonl", rows), tmp_path / "b", split="train")
    assert read.fields("train")["images/1_jpg"] == {"classes": [1, 3]}


def test_what_cannot_be_packed_is_listed_and_the_rest_is_packed(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "notes.txt").write_text("no image")
    (folder / "empty.jpg").write_bytes(b"")
    lines = [
        json.dumps({"path": "images/0.jpg", "extra": 1}),
        json.dumps({"path": "images/gone.jpg"}),
        json.dumps({"path": "https://example.org/a.jpg"}),
        json.dumps({"path": "notes.txt"}),
        json.dumps({"path": "empty.jpg"}),
        json.dumps({"path": "images/1.jpg", "split": "dev"}),
        json.dumps({"path": ""}),
        json.dumps({"caption": "no path"}),
        "{torn",
        "[1]",
        json.dumps({"path": "images/2.jpg", "key": "folder/"}),
        json.dumps({"path": "images/0.jpg"}),
    ]
    (folder / "m.jsonl").write_text("\n".join(lines))
    read = Read(folder / "m.jsonl", tmp_path)
    # The same image twice is kept twice, under a key of its own.
    assert set(read.samples("pretrain")) == {"images/0_jpg", "images/0_jpg~2"}
    assert read.report.remarks == [
        "m.jsonl: columns not used: extra",
        "1 keys were taken: '~2' and so on was added to them",
    ]
    refused = read.notes("refused")
    assert refused["images/gone.jpg"] == "m.jsonl:2: there is no such file"
    assert refused["https://example.org/a.jpg"].startswith("m.jsonl:3: a URL")
    assert refused["notes.txt"] == "m.jsonl:4: not an image type: '.txt'"
    assert refused["empty.jpg"] == "empty file"
    assert refused["images/1.jpg"].startswith("m.jsonl:6: split 'dev' is unknown; known: pretrain")
    assert refused["m.jsonl:7"] == refused["m.jsonl:8"] == "no path"
    assert refused["m.jsonl:9"].startswith("not JSON")
    assert refused["m.jsonl:10"] == "not a JSON object"
    assert "'folder/' cannot be a key" in refused["images/2.jpg"]
    assert len(refused) == 10


def test_text_that_cannot_be_written_is_refused(folder: Path, tmp_path: Path) -> None:
    rows = [
        {"path": "images/0.jpg", "caption": "fine", "key": None},
        {"path": "images/1.jpg", "caption": "\ud800", "key": None},
        {"path": "images/2.jpg", "caption": "", "key": "\udfff"},
    ]
    read = Read(write(folder / "m.jsonl", rows), tmp_path)
    assert sum(read.meta.splits.values()) == 1
    reason = "its key or labels are not UTF-8"
    assert read.notes("refused") == {"images/1.jpg": reason, "images/2.jpg": reason}
    rows = [{"path": "images/0.jpg", "class": "\ud800"}]
    with pytest.raises(UserError, match="is not UTF-8; rename it"):
        Read(write(folder / "m.jsonl", rows), tmp_path / "b")


def test_images_without_any_label_are_for_pretraining(folder: Path, tmp_path: Path) -> None:
    rows = [{"path": row["path"]} for row in ROWS]
    read = Read(write(folder / "m.csv", rows), tmp_path)
    assert set(read.meta.splits) <= {"pretrain", "val"} and sum(read.meta.splits.values()) == 60


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("m.csv", "url,tags\nx,y\n", UserError, "no column of paths; found url, tags; expected"),
        ("m.csv", "", UserError, "no column of paths; found none"),
        ("m.csv", "path\n", UserError, "holds no rows"),
        ("m.jsonl", '{"url": "x"}\n', UserError, "no column of paths; found url"),
        ("m.parquet", "PAR1", UserError, "not a readable Parquet file"),
        ("m.csv", b"path\n\xff\xfe.jpg\n", UserError, "not UTF-8"),
        ("m.xlsx", "", NotFoundError, "m.xlsx: is a file; expected IDX"),
    ],
)
def test_tables_that_cannot_be_read_are_one_line_errors(
    tmp_path: Path, name: str, content: str | bytes, error: type[UserError], message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(error, match=message) as caught:
        Read(path, tmp_path)
    assert "\n" not in str(caught.value)
