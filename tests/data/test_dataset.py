"""Reading: labels, nested subsets, damage that is noticed before it moves a number."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from harness.data.dataset import Dataset, Split, open_dataset
from harness.data.pack import pack
from harness.data.scenes import draw
from harness.errors import DataError, NotFoundError, UserError
from harness.study import scenes_spec as spec
from harness.study.datasets import describe


def tags_of(split: Split, index: int) -> list[str]:
    ids = split.label_ids[split.label_offsets[index] : split.label_offsets[index + 1]]
    return [spec.HASHTAGS[i] for i in ids]


def test_stored_images_and_labels_are_the_drawn_ones(scenes: Dataset) -> None:
    for name, count in scenes.meta.splits.items():
        split, drawn = scenes.split(name), draw(name, 0, count)
        assert split.num_samples == count
        for index in (0, 1, count // 2, count - 1):
            np.testing.assert_array_equal(split.decode(index), drawn.pixels[index])
            assert tags_of(split, index) == drawn.hashtags[index]
        np.testing.assert_array_equal(split.class_ids, drawn.class_ids)


def test_described_and_opened_sets_are_the_same(scenes: Dataset) -> None:
    described = describe("scenes-600")
    assert scenes.meta.model_dump(exclude={"shards", "indexes"}) == described.model_dump(
        exclude={"shards", "indexes"}
    )


def test_stock_webdataset_reads_our_shards(scenes: Dataset) -> None:
    split = scenes.split("pretrain")
    urls = [str(Path(scenes.location) / str(e["file"])) for e in scenes.meta.shards["pretrain"]]
    read = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")
    for index, sample in enumerate(read):
        assert sample["__key__"] == split.keys[index]
        assert sample["json"]["hashtags"] == tags_of(split, index)
        if index % 50 == 0:
            np.testing.assert_array_equal(sample["png"], split.decode(index))
    assert index == split.num_samples - 1


def test_subsets_are_nested_and_exact_and_blind_to_sharding(scenes: Dataset) -> None:
    split = scenes.split("pretrain")
    whole = split.subset(600)
    assert sorted(whole) == list(range(600))
    for num in (1, 10, 100, 599):
        np.testing.assert_array_equal(split.subset(num), whole[:num])
    assert (np.diff(split.key_hashes[whole].astype(object)) > 0).all()
    with pytest.raises(UserError, match="cannot take 601 images; expected 1 to 600"):
        split.subset(601)


def test_the_same_image_has_the_same_rank_in_sets_of_other_sizes(
    scenes: Dataset, scenes_root: Path
) -> None:
    small, large = (
        open_dataset("scenes-50", scenes_root).split("pretrain"),
        scenes.split("pretrain"),
    )
    among = [large.keys[i] for i in large.subset(600) if large.keys[i] in set(small.keys)]
    assert among == [small.keys[i] for i in small.subset(50)]


def test_decoding_from_shards_and_from_the_cache_agree(scenes: Dataset) -> None:
    split = scenes.split("val")
    assert split.prepare()
    for index in range(0, 100, 9):
        np.testing.assert_array_equal(split._decode(index), split.decode(index))


def test_an_unknown_split_names_the_known_ones(scenes: Dataset) -> None:
    with pytest.raises(NotFoundError, match="no split 'dev'; it has: pretrain, val, train, test"):
        scenes.split("dev")


@pytest.fixture
def copied(scenes: Dataset, tmp_path: Path) -> Path:
    """A directory of its own that was opened before: verified and cached."""
    folder = tmp_path / "set"
    shutil.copytree(Path(scenes.location), folder)
    split = open_dataset(str(folder), tmp_path).split("pretrain")
    split.prepare()
    return folder


def shard_of(folder: Path) -> Path:
    return folder / "pretrain" / "000000.tar"


def test_a_truncated_shard_is_named_with_its_offset_despite_the_cache(
    copied: Path, tmp_path: Path
) -> None:
    whole = shard_of(copied).stat().st_size
    os.truncate(shard_of(copied), 1_000_003)
    with pytest.raises(DataError) as caught:
        open_dataset(str(copied), tmp_path).split("pretrain")
    message = str(caught.value)
    assert f"{shard_of(copied)}: byte offset 1000003: the shard is truncated" in message
    assert f"expected {whole}" in message and "\n" not in message
    # Other splits do not suffer.
    assert open_dataset(str(copied), tmp_path).split("val").decode(0).shape == (32, 32, 3)


def test_a_flipped_byte_is_named_with_its_sample(copied: Path, tmp_path: Path) -> None:
    split = open_dataset(str(copied), tmp_path).split("pretrain")
    key, start, offset = split.keys[7], split.index.starts[7], split._image_offset(7)
    with open(shard_of(copied), "r+b") as file:
        file.seek(offset + 500)
        byte = file.read(1)[0]
        file.seek(offset + 500)
        file.write(bytes([byte ^ 1]))
    expected = (
        rf"000000\.tar: byte offset {start}: sample {key} \(image at byte {offset}\) is damaged"
    )
    with pytest.raises(DataError, match=expected):
        open_dataset(str(copied), tmp_path).split("pretrain")


def test_of_several_damaged_shards_the_first_is_named_and_none_is_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checksums are taken in threads, in whatever order they end."""
    monkeypatch.setattr("harness.data.pack.SHARD_SAMPLES", 4)
    (tmp_path / "src" / "class").mkdir(parents=True)
    for number in range(24):
        Image.new("RGB", (8, 8), (9 * number, 0, 0)).save(tmp_path / "src/class" / f"{number}.png")
    pack(str(tmp_path / "src"), tmp_path / "set", split="train")
    shards = sorted((tmp_path / "set" / "train").glob("*.tar"))
    assert len(shards) == 6
    good = {path: path.read_bytes() for path in (shards[2], shards[5])}
    for path, raw in good.items():
        path.write_bytes(raw.replace(b"IDAT", b"IDAX", 1))
    for first in (shards[2], shards[5]):
        for _ in range(2):
            with pytest.raises(DataError, match=rf"{first.name}: .* is damaged"):
                open_dataset(str(tmp_path / "set"), tmp_path).split("train")
        first.write_bytes(good[first])
    assert open_dataset(str(tmp_path / "set"), tmp_path).split("train").num_samples == 24


def test_a_missing_shard_is_named(copied: Path, tmp_path: Path) -> None:
    shard_of(copied).unlink()
    with pytest.raises(DataError, match=r"000000\.tar: byte offset 0: the shard cannot be read"):
        open_dataset(str(copied), tmp_path).split("pretrain")


def test_an_image_that_cannot_be_read_is_named_with_its_offset(
    copied: Path, tmp_path: Path
) -> None:
    split = open_dataset(str(copied), tmp_path).split("train")
    offset = split._image_offset(3)
    with open(copied / "train" / "000000.tar", "r+b") as file:
        file.seek(offset)
        file.write(b"no image")
    with pytest.raises(
        DataError, match=rf"byte offset {offset}: sample {split.keys[3]}: not a readable"
    ):
        split.prepare()


def test_a_lost_or_stale_index_and_a_torn_cache_are_made_again(
    copied: Path, tmp_path: Path
) -> None:
    before = open_dataset(str(copied), tmp_path).split("pretrain")
    expected, labels = before.decode(5).copy(), before.label_ids
    index = copied / "index" / "pretrain.safetensors"
    (cache,) = (tmp_path / "cache").glob("*/pretrain.npy")
    os.truncate(cache, 1000)
    for damage in (index.unlink, lambda: index.write_bytes(b"PK torn")):
        damage()
        split = open_dataset(str(copied), tmp_path).split("pretrain")
        np.testing.assert_array_equal(split.label_ids, labels)
        np.testing.assert_array_equal(split.decode(5), expected)
        assert index.exists()


def test_a_set_that_is_only_described_cannot_be_opened(tmp_path: Path) -> None:
    plan = tmp_path / "planned.json"
    content = {
        "schema": 1,
        "name": "x",
        "fingerprint": "f",
        "image_size": 8,
        "splits": {"train": 9},
    }
    plan.write_text(json.dumps(content))
    with pytest.raises(UserError, match="only described"):
        open_dataset(str(plan), tmp_path)


def test_looking_at_a_dataset_imports_no_torch() -> None:
    """`harness data` verbs answer in a second or two; drawing views is what needs torch."""
    verbs = "dataset, labels, overlap, sheet, verify"
    code = f"import sys; from harness.data import {verbs}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
