"""Packing: other formats into shards, whole or not at all, nothing lost silently."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from harness.data.dataset import open_dataset
from harness.data.pack import pack
from harness.errors import NotFoundError, UserError

RNG = np.random.default_rng(0)


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    raw = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def idx_folder(folder: Path, suffix: str = "") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    folder.mkdir(parents=True)
    made = {}
    for split, prefix, num in (("train", "train", 40), ("test", "t10k", 12)):
        images = RNG.integers(0, 256, (num, 28, 28), dtype=np.uint8)
        labels = np.arange(num) % 10
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
        made[split] = (images, labels)
    return made


@pytest.mark.parametrize(("place", "suffix"), [(".", ".gz"), ("FashionMNIST/raw", "")])
def test_idx_files_come_back_as_grey_rgb(tmp_path: Path, place: str, suffix: str) -> None:
    made = idx_folder(tmp_path / "src" / place, suffix)
    report = pack(str(tmp_path / "src"), tmp_path / "out")
    assert report.meta.splits == {"train": 40, "test": 12} and report.refused == []
    data = open_dataset(str(tmp_path / "out"), tmp_path)
    for split, (images, labels) in made.items():
        read = data.split(split)
        rows = [list(read.keys).index(f"{split}-{row:06d}") for row in range(len(images))]
        assert read.class_ids[rows].tolist() == labels.tolist()
        # A set without hashtags learns from its class names.
        assert read.label_ids[rows].tolist() == labels.tolist()
        for row, image in enumerate(images):
            expected = np.repeat(image[..., None], 3, axis=2)
            np.testing.assert_array_equal(read.decode(rows[row]), expected)
    assert data.meta.split_for("pretrain") == "train" and data.meta.split_for("val") == "test"
    assert data.meta.image_size == 28 and data.meta.num_hashtags == 10


@pytest.mark.system
@pytest.mark.slow
def test_debians_fashion_mnist_has_its_real_class_names(tmp_path: Path) -> None:
    source = Path("/usr/share/datasets/fashion-mnist")
    if not source.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    report = pack(str(source), tmp_path / "out")
    assert report.meta.splits == {"train": 60_000, "test": 10_000}
    assert report.meta.classes[0] == "t-shirt/top" and report.meta.classes[9] == "ankle boot"
    assert report.meta.fingerprint == "packed-8faffc41bfe7c75f"
    train = open_dataset(str(tmp_path / "out"), tmp_path).split("train")
    rows = {key: row for row, key in enumerate(train.keys)}
    first = [train.class_ids[rows[f"train-{k:06d}"]] for k in range(10)]
    assert first == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]


def test_digits_are_split_by_key_and_packed_alike_each_time(tmp_path: Path) -> None:
    reports = [pack("digits", tmp_path / name) for name in ("a", "b")]
    counts = reports[0].meta.splits
    assert counts["train"] + counts["test"] == 1797 and 300 < counts["test"] < 420
    assert reports[0].meta.fingerprint == reports[1].meta.fingerprint
    for split, entries in reports[0].meta.shards.items():
        for entry in entries:
            file = str(entry["file"])
            same = (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
            assert same, split
    data = open_dataset(str(tmp_path / "a"), tmp_path)
    assert set(data.split("train").keys).isdisjoint(data.split("test").keys)
    assert data.split("train").decode(0).shape == (8, 8, 3)


def save(path: Path, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"RGB": (3,), "L": ()}[mode]
    Image.fromarray(RNG.integers(0, 256, (*size, *channels), dtype=np.uint8)).save(path)
    return path.read_bytes()


def test_an_image_folder_keeps_files_as_they_are_and_lists_what_it_refuses(tmp_path: Path) -> None:
    src = tmp_path / "src"
    stored = {
        "a/one.jpg": save(src / "train" / "a" / "one.jpg"),
        "a/two.v2.png": save(src / "train" / "a" / "two.v2.png", (9, 9)),
        "b/three.bmp": save(src / "train" / "b" / "three.bmp", mode="L"),
        "b/four.webp": save(src / "val" / "b" / "four.webp"),
    }
    (src / "train" / "a" / "bad.jpg").write_bytes(stored["a/one.jpg"][:200])
    (src / "train" / "a" / "notes.txt").write_text("hello")
    save(src / "train" / "stray.png")
    report = pack(str(src), tmp_path / "out")
    assert report.meta.splits == {"train": 3, "test": 1} and report.meta.classes == ["a", "b"]
    reasons = {refused.name: refused.text for refused in report.refused}
    assert set(reasons) == {"train/a/bad.jpg", "train/a/notes.txt", "train/stray.png"}
    lines = (tmp_path / "out" / "refused.txt").read_text().splitlines()
    assert len(lines) == 3 and "3 refused" in report.summary()

    train = open_dataset(str(tmp_path / "out"), tmp_path).split("train")
    class_of = dict(zip(train.keys, train.class_ids.tolist(), strict=True))
    assert class_of == {"train/a/one_jpg": 0, "train/a/two_v2_png": 0, "train/b/three_bmp": 1}
    assert not train.prepare()
    raw = (tmp_path / "out" / "train" / "000000.tar").read_bytes()
    assert stored["a/one.jpg"] in raw and stored["a/two.v2.png"] in raw
    with Image.open(io.BytesIO(stored["b/three.bmp"])) as picture:
        row = list(train.keys).index("train/b/three_bmp")
        np.testing.assert_array_equal(train.decode(row), np.asarray(picture.convert("RGB")))


def test_an_image_folder_without_splits_is_split_by_name(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for place in range(30):
            save(tmp_path / "src" / name / f"{place}.png", (8, 8))
    report = pack(str(tmp_path / "src"), tmp_path / "out")
    keys = set(open_dataset(str(tmp_path / "out"), tmp_path).split("test").keys)
    assert report.meta.splits["train"] + len(keys) == 60 and 3 <= len(keys) <= 25
    # Another image moves none of the others.
    save(tmp_path / "src" / "cat" / "new.png", (8, 8))
    pack(str(tmp_path / "src"), tmp_path / "again")
    again = set(open_dataset(str(tmp_path / "again"), tmp_path).split("test").keys)
    assert again - {"cat/new_png"} == keys


@pytest.mark.parametrize("labels", ["json", "cls", "names", "txt"])
def test_shards_of_stock_webdataset_are_read(tmp_path: Path, labels: str) -> None:
    images = RNG.integers(0, 256, (30, 10, 10, 3), dtype=np.uint8)
    for split, rows in (("train", range(0, 20)), ("test", range(20, 30))):
        (tmp_path / "src").mkdir(exist_ok=True)
        with TarWriter(str(tmp_path / "src" / f"{split}-0.tar")) as writer:
            for row in rows:
                label = {
                    "json": {"json": {"hashtags": [f"#t{row % 3}", "#all"]}},
                    "cls": {"cls": row % 4},
                    "names": {"cls": str(["ant", "bee"][row % 2])},
                    "txt": {"txt": f"look #t{row % 3} and #all of it"},
                }[labels]
                writer.write({"__key__": f"dir/s{row:03d}", "png": images[row], **label})
    report = pack(str(tmp_path / "src"), tmp_path / "out")
    assert report.meta.splits == {"train": 20, "test": 10}
    split = open_dataset(str(tmp_path / "out"), tmp_path).split("test")
    row = list(split.keys).index("dir/s024")
    np.testing.assert_array_equal(split.decode(row), images[24])
    own = split.label_ids[split.label_offsets[row] : split.label_offsets[row + 1]]
    if labels in ("json", "txt"):
        assert {report.meta.hashtags[i] for i in own} == {"#t0", "#all"}
        assert split.class_ids[row] == -1
    else:
        expected = {"cls": ["0", "1", "2", "3"], "names": ["ant", "bee"]}[labels]
        assert report.meta.classes == expected
        assert split.class_ids[row] == 24 % len(expected) == own[0]


def test_shards_cut_differently_have_the_same_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = pack("digits", tmp_path / "one").meta
    monkeypatch.setattr("harness.data.pack.SHARD_SAMPLES", 300)
    many = pack("digits", tmp_path / "many").meta
    assert one.fingerprint == many.fingerprint
    assert len(one.shards["train"]) == 1 and len(many.shards["train"]) == 5
    assert one.layout["train"] != many.layout["train"]
    a, b = (open_dataset(str(tmp_path / n), tmp_path).split("train") for n in ("one", "many"))
    assert [a.keys[i] for i in a.subset(50)] == [b.keys[i] for i in b.subset(50)]
    # The subset of n images is the first n of the set.
    assert a.subset(50).tolist() == list(range(50))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda src: None, r"src: does not exist; expected IDX files .* image folder .*`digits`"),
        (lambda src: src.write_text("x"), r"src: is a file; expected IDX"),
        (lambda src: src.mkdir(), r"src: nothing to pack was found in it; expected IDX"),
        (
            lambda src: (
                idx_folder(src),
                (src / "train-images-idx3-ubyte").write_bytes(
                    (src / "train-images-idx3-ubyte").read_bytes()[:-100]
                ),
            ),
            r"train-images-idx3-ubyte: found 31276 bytes, expected 31376 for \(40, 28, 28\)",
        ),
        (
            lambda src: (
                idx_folder(src, ".gz"),
                (src / "t10k-images-idx3-ubyte.gz").write_bytes(
                    (src / "t10k-images-idx3-ubyte.gz").read_bytes()[:-100]
                ),
            ),
            r"t10k-images-idx3-ubyte.gz: not a whole gzip file",
        ),
        (
            lambda src: (idx_folder(src), (src / "t10k-labels-idx1-ubyte").unlink()),
            r"no t10k-labels-idx1-ubyte\[\.gz\]; expected the four IDX files together",
        ),
    ],
)
def test_unusable_sources_are_one_line_errors_and_leave_nothing(
    tmp_path: Path, make: object, message: str
) -> None:
    make(tmp_path / "src")  # type: ignore[operator]
    with pytest.raises(UserError, match=message) as caught:
        pack(str(tmp_path / "src"), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.name != "src"] == []


def test_a_folder_that_holds_something_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(UserError, match="out: exists and is not empty"):
        pack("digits", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_missing_source_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        pack(str(tmp_path / "nowhere"), tmp_path / "out")


def test_a_shard_that_is_cut_short_is_refused_with_its_offset(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    path = tmp_path / "src" / "train-0.tar"
    with TarWriter(str(path)) as writer:
        for row in range(5):
            image = RNG.integers(0, 256, (10, 10, 3), dtype=np.uint8)
            writer.write({"__key__": f"s{row}", "png": image, "cls": row})
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"train-0\.tar: byte offset \d+: "):
        pack(str(tmp_path / "src"), tmp_path / "out")


def test_packing_a_packed_set_changes_nothing(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        for place in range(6):
            save(tmp_path / "src" / name / f"{place}.png", (8, 8))
    once = pack(str(tmp_path / "src"), tmp_path / "once").meta
    twice = pack(str(tmp_path / "once"), tmp_path / "twice").meta
    assert twice.classes == ["ant", "bee"] and twice.fingerprint == once.fingerprint
    for entries in once.shards.values():
        for entry in entries:
            file = str(entry["file"])
            raw = (tmp_path / "once" / file).read_bytes()
            assert raw == (tmp_path / "twice" / file).read_bytes()


def test_all_that_is_in_a_tar_is_packed_or_listed(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    image = RNG.integers(0, 256, (10, 10, 3), dtype=np.uint8)
    for name in ("00000", "00001"):
        with TarWriter(str(tmp_path / "src" / f"{name}.tar")) as writer:
            writer.write({"__key__": "a", "png": image, "txt": "a dog", "json": {"width": 10}})
            writer.write({"__key__": "b", "npy": image, "txt": "no image"})
            writer.write({"__key__": "c", "jpg": b"broken", "cls": 0})
            writer.write({"__key__": "d", "png": image, "seg.png": image, "json": b"{torn"})
            writer.write({"__key__": "e", "png": image, "cls": 1, "npy": image})
    (tmp_path / "src" / "00002.tar.gz").write_bytes(b"packed")
    report = pack(str(tmp_path / "src"), tmp_path / "out", split="train")
    # Both tars number their samples alike.
    split = open_dataset(str(tmp_path / "out"), tmp_path).split("train")
    assert set(split.keys) == {"a", "a~2", "e", "e~2"}
    reasons = [note.text for note in report.refused]
    assert reasons.count("no image") == 2 and len(reasons) == 6
    assert sum("is not a label" in reason for reason in reasons) == 2
    assert sum("not an image" in reason for reason in reasons) == 2
    left_out = {note.name: note.text for note in report.left_out}
    assert left_out["00002.tar.gz"].startswith("not a tar file")
    assert left_out["00000.tar: 2 members"].startswith("'.npy'")
    urls = [str(path) for path in (tmp_path / "out").rglob("*.tar")]
    kept = {s["__key__"]: s for s in WebDataset(urls, shardshuffle=False)}
    assert json.loads(kept["a"]["json"]) == {
        "hashtags": ["a", "dog"],
        "width": 10,
        "caption": "a dog",
    }


def test_tars_with_names_or_labels_that_are_no_text_are_listed(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    image = save(tmp_path / "x.png")
    with tarfile.open(tmp_path / "src" / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in (
            ("good.png", image),
            ("b\udcff.png", image),
            ("c.png", image),
            ("c.json", b'{"caption": "\\ud800"}'),
            ("README", b"no sample"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    report = pack(str(tmp_path / "src"), tmp_path / "out", split="train")
    assert report.meta.splits == {"train": 1} and len(report.refused) == 2
    assert {note.text for note in report.refused} == {"its key or labels are not UTF-8"}
    assert [note.name for note in report.left_out] == ["a.tar: README"]
    assert "b\\udcff" in (tmp_path / "out" / "refused.txt").read_text()


def test_names_that_are_no_text_links_and_hidden_files_are_listed(tmp_path: Path) -> None:
    src = tmp_path / "src"
    save(src / "a" / "x.png")
    (src / "a" / ".DS_Store").write_bytes(b"x")
    (src / "a" / "gone.png").symlink_to("nowhere.png")
    (src / "a" / "loop").symlink_to("..")
    (src / "b").symlink_to("a")
    os.mkfifo(src / "a" / "pipe.png")
    with open(os.fsencode(src / "a") + b"/\xff.png", "wb") as file:
        file.write(b"x")
    report = pack(str(src), tmp_path / "out", split="train")
    assert report.meta.classes == ["a", "b"] and report.meta.splits == {"train": 2}
    reasons = {note.name: note.text for note in report.refused}
    for name in ("a", "b"):
        assert reasons[f"{name}/gone.png"] == "a broken link"
        assert reasons[f"{name}/pipe.png"] == "not a regular file"
        assert reasons[f"{name}/loop"] == "a link to a folder it lies in"
    assert len(reasons) == 8
    assert (tmp_path / "out" / "refused.txt").read_text().count("the name is not UTF-8") == 2
    assert {note.name for note in report.left_out} == {"a/.DS_Store", "b/.DS_Store"}
