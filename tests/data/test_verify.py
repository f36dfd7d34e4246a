"""`data verify`: all damage is named, with shard, byte offset and key; a whole set has none."""

from __future__ import annotations

import json
import os
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness.data import storage
from harness.data.dataset import Dataset, open_dataset
from harness.data.index import build_index, sha256_of, shard_entry, write_index
from harness.data.labels import LabelOptions, make_labels
from harness.data.pack import pack
from harness.data.png import encode_png
from harness.data.shards import Sample, list_shard, write_shard
from harness.data.verify import Verdict, verify
from harness.errors import DataError, NotFoundError
from harness.ledger.files import write_json
from harness.study.datasets import DatasetMeta, ShardEntry
from tests.conftest import Harness
from tests.data.test_remote import Server

RNG = np.random.default_rng(0)


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 images with hashtags, captions and classes, in four shards of pretrain and one of test."""
    monkeypatch.setattr("harness.data.pack.SHARD_SAMPLES", 8)
    (tmp_path / "src").mkdir()
    with open(tmp_path / "src" / "m.jsonl", "w") as file:
        for number in range(40):
            pixels = RNG.integers(0, 256, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "src" / f"{number}.png")
            row: dict[str, Any] = {"path": f"{number}.png", "key": f"k{number:02d}"}
            if number < 32:
                row |= {"hashtags": [f"#t{number % 3}", "#all"], "caption": f"no {number}"}
                row["split"] = "pretrain"
            else:
                several = ["ant", "bee"] if number % 2 else ["bee"]
                row |= {"split": "test", "class": several}
            file.write(json.dumps(row) + "\n")
    pack(str(tmp_path / "src" / "m.jsonl"), tmp_path / "set")
    return tmp_path / "set"


def check(folder: Path, **options: Any) -> Verdict:
    return verify(str(folder), folder.parent / "root", **options)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    meta = json.loads((folder / "dataset.json").read_text())
    change(meta)
    write_json(folder / "dataset.json", meta)


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_a_whole_set_has_no_damage_and_its_counts_are_those_of_its_source(packed: Path) -> None:
    found = check(packed)
    assert found.damage == [] and found.is_fingerprint_checked
    weak, test = found.splits["pretrain"], found.splits["test"]
    assert (weak.images, weak.labels, weak.unlabelled) == (32, 64, 0)
    tags = Counter(f"#t{number % 3}" for number in range(32))
    assert weak.by_hashtag == {"#all": 32, **tags}
    assert (test.images, test.by_class) == (8, {"ant": 0, "bee": 4})
    assert check(packed, quick=True).damage == []


def test_every_damaged_sample_of_every_shard_is_named(packed: Path) -> None:
    split = open_dataset(str(packed), packed.parent / "other").split("pretrain")
    rows = [1, 2, 9, 30]
    places = {row: split.place(row) for row in rows}
    for shard, offset in places.values():
        flip(Path(shard), offset + 40)
    found = check(packed)
    assert len(found.damage) == 4
    for row, line in zip(rows, found.damage, strict=True):
        shard, offset = places[row]
        assert line.startswith(f"{shard}: byte offset {offset}: sample {split.keys[row]}: ")
        assert "its bytes are not those that were written" in line
        assert "not a readable image" in line, "a PNG knows its own checksum"
    # Its checksum says so, too, without decoding.
    assert len(check(packed, quick=True).damage) == 4


def test_damage_to_a_header_is_named_with_all_samples_that_it_touches(packed: Path) -> None:
    split = open_dataset(str(packed), packed.parent / "other").split("pretrain")
    start = int(split.index.starts[3])
    flip(packed / "pretrain" / "000000.tar", start + 10)
    found = check(packed)
    assert any(f"000000.tar: byte offset {start}: not a whole tar" in line for line in found.damage)
    assert any(f"sample {split.keys[3]}: its bytes" in line for line in found.damage)
    assert len(found.damage) == 2


def test_a_truncated_a_missing_and_a_grown_shard_are_all_named(packed: Path) -> None:
    split = open_dataset(str(packed), packed.parent / "other").split("pretrain")
    shards = sorted((packed / "pretrain").iterdir())
    cut = int(split.index.starts[5]) + 100
    os.truncate(shards[0], cut)
    shards[1].unlink()
    with open(shards[2], "ab") as file:
        file.write(bytes(512))
    text = "\n".join(lines := check(packed).damage)
    assert f"{shards[0]}: byte offset {cut}: the shard is truncated" in text
    assert "(3 samples lost)" in text
    for row in (5, 6, 7):
        assert f"sample {split.keys[row]}: its bytes" in text
    assert f"{shards[1]}: byte offset 0: the shard cannot be read" in text
    assert "(8 samples lost)" in text
    assert f"{shards[2]}: byte offset" in text and "the shard is grown" in text
    assert str(shards[3]) not in text
    assert any("split pretrain: says 32 samples, found 24" in line for line in lines)


def test_any_flipped_bit_and_any_cut_is_noticed_and_named_in_one_line(packed: Path) -> None:
    rng = np.random.default_rng(0)
    files = [path for path in sorted(packed.rglob("*")) if path.suffix in (".tar", ".safetensors")]
    for turn in range(60):
        path = files[int(rng.integers(len(files)))]
        before = path.read_bytes()
        place = int(rng.integers(len(before)))
        if turn % 6:
            flip(path, place)
        else:
            os.truncate(path, place)
        lines = check(packed).damage
        assert lines, (path, place)
        assert any(str(path) in line and "byte offset" in line for line in lines), lines
        assert not any("\n" in line for line in lines)
        path.write_bytes(before)
    assert check(packed).damage == []


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_a_lost_or_damaged_index_is_named_and_the_rest_is_checked(
    packed: Path, damage: str
) -> None:
    file = packed / "index" / "test.safetensors"
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        os.truncate(file, 700)
    else:
        flip(file, file.stat().st_size - 5)
    found = check(packed)
    (line,) = found.damage
    assert line.startswith(f"{file}: byte offset ") and "it is made again from the shards" in line
    assert ("delete it" in line) == (damage != "gone")
    assert found.splits["test"].images == 8


def rewrite(folder: Path, split: str, **columns: np.ndarray) -> None:
    """Another index, with its right checksum in dataset.json."""
    index = open_dataset(str(folder), folder.parent / "other").split(split).index
    meta = json.loads((folder / "dataset.json").read_text())
    changed = write_index(folder, split, replace(index, **columns), meta["shards"])
    edit(folder, lambda meta: meta["indexes"].update({split: changed}))


def test_an_index_that_contradicts_the_shard_is_named_sample_by_sample(packed: Path) -> None:
    index = open_dataset(str(packed), packed.parent / "other").split("pretrain").index
    label_ids, sizes = index.label_ids.copy(), index.image_sizes.copy()
    label_ids[[0, -1]] = (label_ids[[0, -1]] + 1) % 4
    sizes[4] -= 7
    rewrite(packed, "pretrain", label_ids=label_ids, image_sizes=sizes)
    lines = check(packed).damage
    assert len(lines) == 3
    assert f"sample {index.keys[0]}: labels: " in lines[0]
    assert f"sample {index.keys[4]}: bytes of the image: {sizes[4]} in the index" in lines[1]
    assert f"sample {index.keys[31]}: labels: " in lines[2]


def test_an_index_with_other_keys_is_named(packed: Path) -> None:
    index = open_dataset(str(packed), packed.parent / "other").split("test").index
    characters = index.key_bytes.copy()
    characters[2] = ord("z")
    rewrite(packed, "test", key_bytes=characters)
    lines = check(packed).damage
    assert any("are not those of the index: only the index has" in line for line in lines)
    assert any("split test: its layout is not that of the index" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta["splits"].update(test=9), "split test: says 9 samples, found 8"),
        (lambda meta: meta.update(fingerprint="packed-0"), "fingerprint packed-0: that of"),
        (lambda meta: meta["layout"].update(test="0"), "split test: its layout is not that of"),
        (lambda meta: meta["shards"]["test"][0].update(samples=7), "says 7 samples, found 8"),
        (lambda meta: meta["shards"]["test"][0].update(sha256="0"), "not an index of these shards"),
        (lambda meta: meta["hashtags"].remove("#t1"), "hashtag '#t1' is not one of 3"),
    ],
)
def test_a_manifest_that_contradicts_the_rest_is_named(
    packed: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(packed, change)
    assert any(message in line for line in check(packed).damage)


def test_a_swapped_image_is_named_by_the_fingerprint_when_all_checksums_are_right(
    packed: Path,
) -> None:
    path = packed / "test" / "000000.tar"
    listed = list_shard(path)
    with open(path, "r+b") as file:
        file.seek(listed[0].offset)
        first = file.read(listed[0].size)
        other = next(one for one in listed[1:] if one.size == listed[0].size)
        file.seek(other.offset)
        file.write(first)
    meta = DatasetMeta.model_validate_json((packed / "dataset.json").read_text())
    shards: dict[str, list[ShardEntry]] = {"test": [shard_entry(path, packed, 8)]}
    index = build_index([list_shard(path)], shards["test"], meta.hashtags, meta.classes)
    entry = write_index(packed, "test", index, shards)
    edit(packed, lambda meta: (meta["shards"].update(shards), meta["indexes"].update(test=entry)))
    (line,) = check(packed).damage
    assert "dataset.json: fingerprint packed-" in line


def hand_made(folder: Path, image: bytes, kind: str) -> Path:
    """A set of three images, the second of which is `image`; every checksum is right."""
    whole = encode_png(np.zeros((4, 4, 3), np.uint8))
    samples = [
        Sample(
            key=f"k{k}",
            image=image if k == 1 else whole,
            image_type=kind if k == 1 else "png",
            class_id=k,
        )
        for k in range(3)
    ]
    path = folder / "test" / "000000.tar"
    write_shard(path, samples)
    shards: dict[str, list[ShardEntry]] = {"test": [shard_entry(path, folder, 3)]}
    index = build_index([list_shard(path)], shards["test"], [], ["a", "b", "c"])
    meta = DatasetMeta(
        name="made",
        fingerprint="made-1",
        image_size=4,
        classes=["a", "b", "c"],
        splits={"test": 3},
        shards=shards,
        indexes={"test": write_index(folder, "test", index, shards)},
    )
    write_json(folder / "dataset.json", meta.model_dump(mode="json", by_alias=True))
    return folder


def boxes(*names: bytes) -> bytes:
    return b"".join(struct.pack(">I4s", 12, name) + bytes(4) for name in names)


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        (b"", "png", "not a readable image (of no known type)"),
        (b"no image at all", "jpg", "not a readable image (of no known type)"),
        (
            encode_png(np.ones((4, 4, 3), np.uint8))[:60],
            "png",
            "not a readable image (image file is",
        ),
        (boxes(b"ftyp", b"mdat"), "mp4", "cut short or damaged: an mp4 without 'moov'"),
        (boxes(b"ftyp", b"moov"), "mp4", None),
    ],
    ids="empty text cut video whole-video".split(),
)
def test_images_that_do_not_decode_are_found_though_every_checksum_is_right(
    tmp_path: Path, image: bytes, kind: str, message: str | None
) -> None:
    folder = hand_made(tmp_path / "set", image, kind)
    found = check(folder)
    assert check(folder, quick=True).damage == []
    if message is None:
        assert found.damage == []
        return
    (line,) = found.damage
    offset = list_shard(folder / "test" / "000000.tar")[1].offset
    assert f"000000.tar: byte offset {offset}: sample k1: " in line and message in line
    assert "\n" not in line


def test_the_built_in_set_and_derived_labels_are_checked(
    scenes: Dataset, scenes_root: Path, tmp_path: Path
) -> None:
    assert verify("scenes-600", scenes_root).damage == []
    options = LabelOptions(min_count=30)
    make_labels("scenes-600", tmp_path / "named", scenes_root, options)
    found = verify(str(tmp_path / "named"), scenes_root)
    assert found.damage == [] and found.is_fingerprint_checked
    assert 0 < found.splits["pretrain"].images < 600
    edit(tmp_path / "named", lambda meta: meta["hashtags"].reverse())
    (line,) = verify(str(tmp_path / "named"), scenes_root, quick=True).damage
    assert "fingerprint labels-" in line
    edit(tmp_path / "named", lambda meta: meta["hashtags"].reverse())
    file = tmp_path / "named" / "labels.json"
    content = json.loads(file.read_text())
    tag = next(iter(content["tags"]))
    content["tags"][tag] = []
    file.write_text(json.dumps(content))
    (line,) = verify(str(tmp_path / "named"), scenes_root, quick=True).damage
    assert "labels.json: cannot be used (its checksum differs" in line
    edit(
        tmp_path / "named",
        lambda meta: meta["labels"].update(sha256=sha256_of(file), bytes=file.stat().st_size),
    )
    lines = verify(str(tmp_path / "named"), scenes_root, quick=True).damage
    assert any("its samples are not those of the index: only the index has" in x for x in lines)


def test_a_set_behind_a_url_is_checked(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    with Server(packed) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = packed.parent / "far"
        assert verify(server.url, root).damage == []
        flip(packed / "test" / "000000.tar", 3000)
        (packed / "pretrain" / "000001.tar").unlink()
        lines = verify(server.url, packed.parent / "farther").damage
        assert any("000001.tar: byte offset 0: there is no such file" in line for line in lines)
        assert any("test/000000.tar: byte offset 0: the bytes are not those" in x for x in lines)
        server.shutdown()


def test_there_must_be_a_set_and_a_manifest_that_can_be_read(tmp_path: Path, packed: Path) -> None:
    with pytest.raises(NotFoundError):
        check(tmp_path / "nowhere")
    (packed / "dataset.json").write_text('{"name": ')
    with pytest.raises(DataError, match=r"dataset\.json: not a dataset description"):
        check(packed)


# --- the command ---------------------------------------------------------------------------------


def test_exit_codes_names_and_counts(here: Harness, packed: Path) -> None:
    done = here("data", "verify", packed)
    assert "whole; fingerprint packed-" in done.stdout and "(checked)" in done.stdout
    assert "#all" in done.stdout and "bee" in done.stdout
    answer = json.loads(here("data", "verify", packed, "--quick", "--json").stdout)
    assert answer["damage"] == [] and answer["splits"]["pretrain"]["hashtags"]["#all"] == 32
    split = open_dataset(str(packed), packed.parent / "other").split("test")
    shard, offset = split.place(2)
    flip(Path(shard), offset + 40)
    done = here("data", "verify", packed, check=1)
    assert f"{shard}: byte offset {offset}: sample {split.keys[2]}: " in done.stdout
    assert done.stderr.endswith("1 problems found\n")
    assert len(json.loads(here("data", "verify", packed, "--json", check=1).stdout)["damage"]) == 1
    here("data", "verify", "nowhere", check=4)
    (packed / "dataset.json").write_text("[]")
    assert "not a dataset description" in here("data", "verify", packed, check=1).stderr
