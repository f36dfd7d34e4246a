"""Shards: what webdataset writes and reads, and tars whose damage is noticed wherever it is."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from harness.data.shards import Sample, list_shard, walk_tar, write_shard
from harness.errors import DataError


def samples(num: int = 20) -> list[Sample]:
    return [
        Sample(
            key=f"dir/ünï{k}",
            image=bytes([k]) * (37 * k + 1),
            image_type=["png", "jpg", "webp", "mp4", "webm"][k % 5],
            hashtags=["#a", "#ö"] if k % 3 else None,
            class_id=k if k % 2 else None,
            fields={"caption": "ein Bild", "classes": [k, 1]} if k % 4 == 0 else {},
        )
        for k in range(num)
    ]


def test_equal_samples_give_equal_bytes_whenever_and_by_whomever_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "a.tar", samples())
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setenv("USER", "someone")
    write_shard(tmp_path / "b.tar", samples())
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uname, member.gname, member.uid) == (0, "", "", 0)


def test_webdataset_reads_what_was_written(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", samples())
    read = WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    for sample, found in zip(samples(), read, strict=True):
        assert found["__key__"] == sample.key
        assert found[sample.image_type] == sample.image
        content = json.loads(found["json"]) if "json" in found else {}
        assert content.get("hashtags") == sample.hashtags
        assert found.get("cls") == (
            None if sample.class_id is None else str(sample.class_id).encode()
        )


def test_listed_samples_are_those_written_and_their_offsets_are_right(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, samples())
    raw, listed = path.read_bytes(), list_shard(path)
    assert [found.key for found in listed] == [sample.key for sample in samples()]
    for sample, found in zip(samples(), listed, strict=True):
        assert raw[found.offset : found.offset + found.size] == sample.image
        assert found.hashtags == tuple(sample.hashtags or ())
        assert found.cls == (None if sample.class_id is None else str(sample.class_id))
        assert found.classes == tuple(map(str, sample.fields.get("classes", ())))
    assert [found.stop for found in listed[:-1]] == [found.start for found in listed[1:]]


def test_names_too_long_for_plain_tars_are_read_back_by_webdataset(tmp_path: Path) -> None:
    key = "folder/" + "x" * 240
    write_shard(tmp_path / "a.tar", [Sample(key=key, image=b"1", image_type="png", class_id=3)])
    (found,) = list_shard(tmp_path / "a.tar")
    assert found.key == key and found.start == 0
    (read,) = WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    assert read["__key__"] == key and read["png"] == b"1" and read["cls"] == b"3"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    write_shard(tmp_path / "a.tar", samples())
    return tmp_path / "a.tar"


def test_a_damaged_header_in_the_middle_does_not_end_the_shard_quietly(whole: Path) -> None:
    start = list_shard(whole)[7].start
    raw = bytearray(whole.read_bytes())
    raw[start + 150] ^= 0xFF  # in the header's checksum
    whole.write_bytes(raw)
    with tarfile.open(whole) as tar:
        assert 0 < len(tar.getmembers()) < 20  # tarfile itself takes it for the end
    with pytest.raises(DataError, match=rf"a\.tar: byte offset {start}: not a whole tar"):
        list_shard(whole)


def test_every_cut_is_noticed(whole: Path) -> None:
    raw = whole.read_bytes()
    end = list_shard(whole)[-1].stop
    for stop in (*range(0, end, 331), end, end + 511):
        whole.write_bytes(raw[:stop])
        with pytest.raises(DataError, match=r"a\.tar: byte offset \d+: "):
            list_shard(whole)
    whole.write_bytes(raw[: end + 512])  # some writers leave one empty block
    assert len(list_shard(whole)) == 20


def test_tars_that_were_glued_together_are_not_read_by_half(whole: Path) -> None:
    whole.write_bytes(whole.read_bytes() * 2)
    with pytest.raises(DataError, match="more follows: glued tars"):
        list_shard(whole)


def test_folders_and_links_hold_no_samples_and_move_no_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind, name in ((tarfile.DIRTYPE, "d"), (tarfile.SYMTYPE, "d/x.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "y.png"
            tar.addfile(info)
        info = tarfile.TarInfo("d/y.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    members = list(walk_tar(path))
    assert [member.is_file for member in members] == [False, False, True]
    (found,) = list_shard(path)
    assert path.read_bytes()[found.offset : found.offset + 3] == b"abc"


def test_hashtags_of_a_text_keep_their_combining_marks(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with TarWriter(str(path), encoder=False) as writer:
        text = "#हिन्दी und #café! nicht &#39; #b"
        writer.write({"__key__": "a", "png": b"x", "txt": text.encode()})
    (found,) = list_shard(path)
    assert found.hashtags == ("#हिन्दी", "#café", "#b")
