"""The index: one mapped file, equal bytes for equal sets, never trusted beyond its checksum."""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from harness.data import storage
from harness.data.dataset import Dataset, open_dataset
from harness.data.hashing import key_hash
from harness.data.index import Index, finish_index, load_index, save_index
from harness.data.shards import list_shard
from harness.errors import DataError


def synthetic(num: int, shards: int = 4) -> Index:
    rng = np.random.default_rng(0)
    keys = [f"k{place}".encode() for place in range(num)]
    lengths = np.array([len(key) for key in keys])
    return finish_index(
        shard_rows=np.linspace(0, num, shards + 1).astype(np.int64),
        starts=np.arange(num, dtype=np.int64) * 2048,
        lengths=np.full(num, 2048, np.uint32),
        image_starts=np.full(num, 512, np.uint32),
        image_sizes=np.full(num, 900, np.uint32),
        crcs=rng.integers(0, 2**32, num, dtype=np.uint32),
        class_ids=np.full(num, -1, np.int32),
        label_offsets=np.arange(num + 1, dtype=np.int64) * 2,
        label_ids=rng.integers(0, 50, 2 * num).astype(np.int32),
        key_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
        key_hashes=np.array([key_hash(key.decode()) for key in keys], np.uint64),
    )


ENTRIES: list[dict[str, str | int]] = [{"file": f"{k}.tar", "sha256": f"{k}"} for k in range(4)]


def test_it_comes_back_mapped_and_any_safetensors_reader_reads_it(tmp_path: Path) -> None:
    index, path = synthetic(1000), tmp_path / "a.safetensors"
    save_index(index, path, ENTRIES)
    loaded, other = load_index(path, ENTRIES), load_file(path)
    assert loaded is not None
    for field in fields(Index):
        expected, found = getattr(index, field.name), getattr(loaded, field.name)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(other[field.name], expected)
        assert found.dtype == expected.dtype and found.flags.aligned
        base = found
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(getattr(base, "obj", base), mmap.mmap), "no copy: pages are shared"
    assert loaded.keys[17] == "k17" and loaded.keys[-3:] == ["k997", "k998", "k999"]
    assert [loaded.shard_of(row) for row in (0, 249, 250, 999)] == [0, 0, 1, 3]


def test_equal_indexes_have_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_index(synthetic(300), tmp_path / name, ENTRIES)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("cut", [0, 5, 8, 300, -1])
def test_a_torn_file_or_one_of_other_shards_is_not_used(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a"
    save_index(synthetic(300), path, ENTRIES)
    assert load_index(path, ENTRIES[:3]) is None
    path.write_bytes(path.read_bytes()[:cut])
    assert load_index(path, ENTRIES) is None
    assert load_index(tmp_path / "none", ENTRIES) is None


def test_an_index_with_a_flipped_bit_is_made_again(scenes: Dataset, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "set"
    shutil.copytree(scenes.location, folder)
    path = folder / "index" / "train.safetensors"
    good = path.read_bytes()
    content = bytearray(good)
    content[-3] ^= 4
    path.write_bytes(bytes(content))
    split = open_dataset(str(folder), tmp_path).split("train")
    np.testing.assert_array_equal(split.index.by_hash, scenes.split("train").index.by_hash)
    np.testing.assert_array_equal(split.class_ids, scenes.split("train").class_ids)
    assert path.read_bytes() == good


def test_rows_lie_where_the_shard_has_them(scenes: Dataset) -> None:
    split = scenes.split("val")
    path = Path(scenes.location) / "val" / "000000.tar"
    for row, sample in enumerate(list_shard(path)):
        assert split.keys[row] == sample.key
        assert split.read(row) == path.read_bytes()[sample.offset : sample.offset + sample.size]


def test_few_files_are_kept_open_and_none_is_closed_under_a_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_OPEN_FILES", 3)
    for shard in range(20):
        (tmp_path / str(shard)).write_bytes(bytes([shard]) * 1000)
    reader = storage.Reader(20, lambda shard: tmp_path / str(shard))

    def num_open() -> int:
        """Of this test's files: what other tests left may be closed at any time."""
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return sum(
            os.readlink(link).startswith(str(tmp_path)) for link in links if os.path.islink(link)
        )

    def read(seed: int) -> bool:
        shards = np.random.default_rng(seed).integers(0, 20, 400).tolist()
        return all(reader.read(shard, 7, 5) == bytes([shard]) * 5 for shard in shards)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(16)))
    assert 0 < num_open() <= 3 + 8
    reader.close()
    assert num_open() == 0


def test_keys_with_one_hash_are_ordered_by_key() -> None:
    index = synthetic(6, 1)
    columns = {f.name: getattr(index, f.name) for f in fields(Index) if f.name != "by_hash"}
    columns["key_hashes"] = np.array([7, 7, 3, 7, 9, 3], np.uint64)
    columns["key_bytes"] = np.frombuffer(b"kfkekdkckbka", np.uint8)
    assert finish_index(**columns).by_hash.tolist() == [5, 2, 3, 1, 0, 4]


def test_an_index_that_says_other_than_dataset_json_is_an_error(
    scenes: Dataset, tmp_path: Path
) -> None:
    far = open_dataset(scenes.location, tmp_path)
    far.meta.splits["test"] = 7
    try:
        with pytest.raises(DataError, match=r"found 80 samples, dataset\.json says 7"):
            far.split("test")
    finally:
        far.meta.splits["test"] = 80
