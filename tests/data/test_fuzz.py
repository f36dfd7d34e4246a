"""A thousand damaged files: none crashes or stalls a pack, and each is packed or listed."""

from __future__ import annotations

import io
import random
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness.data.dataset import open_dataset
from harness.data.pack import pack
from harness.data.shards import Sample, list_shard, write_shard
from harness.data.sources import find_source
from harness.data.sources.listing import all_items
from harness.errors import DataError, UserError

SECONDS_EACH = 60.0


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut, repeated or put in; sometimes the end is missing."""
    content = bytearray(raw)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(content))
        # Half of the damage is where formats have their headers.
        place = place % 64 if rng.random() < 0.5 else place
        kind = rng.randrange(5)
        if kind == 0:
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[place : place + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff"])
        elif kind == 2:
            del content[place : place + rng.randint(1, 200)]
        elif kind == 3:
            content[place:place] = content[place : place + rng.randint(1, 200)]
        else:
            content[place:place] = rng.randbytes(rng.randint(1, 50))
        if len(content) < 2:
            break
    return bytes(content if rng.random() < 0.8 else content[: rng.randrange(len(content) + 1)])


def images() -> Iterator[tuple[str, bytes]]:
    """Whole files of every type and mode that is packed."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 4), dtype=np.uint8)
    rgba = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames: dict[str, Any] = {"save_all": True, "append_images": [rgba.convert("RGB")] * 2}
    made: list[tuple[str, str, dict[str, Any]]] = [
        ("JPEG", "RGB", {"exif": exif}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "L", {"progressive": True}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "RGB", {"exif": exif, **frames}),
        ("WEBP", "RGBA", {}),
        ("WEBP", "RGB", frames),
        ("GIF", "P", frames),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "CMYK", {"compression": "tiff_deflate"}),
        ("TIFF", "L", {"compression": "packbits"}),
        ("PPM", "RGB", {}),
    ]
    for kind, mode, options in made:
        file = io.BytesIO()
        rgba.convert(mode).save(file, kind, **options)
        yield kind.lower(), file.getvalue()


def timed(work: Callable[[], Any], what: object) -> Any:
    started = time.monotonic()
    try:
        return work()
    finally:
        assert time.monotonic() - started < SECONDS_EACH, what


def test_600_damaged_images_are_each_packed_or_refused(tmp_path: Path) -> None:
    rng = random.Random(1)
    whole = list(images())
    names = {"jpeg": "jpg", "tiff": "tif"}
    for number in range(600):
        kind, raw = whole[number % len(whole)]
        path = tmp_path / "src" / "c" / f"{number}.{names.get(kind, kind)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(mutated(raw, rng))
    started = time.monotonic()
    report = pack(str(tmp_path / "src"), tmp_path / "out", split="train")
    assert time.monotonic() - started < 600
    packed = open_dataset(str(tmp_path / "out"), tmp_path).split("train")
    assert packed.num_samples + len(report.refused) == 600
    assert len({note.name for note in report.refused}) == len(report.refused) > 100
    assert all(note.text and "\n" not in note.text for note in report.refused)
    assert packed.num_samples > 50
    for row in range(packed.num_samples):  # what was packed can be read
        assert packed.decode(row).shape[2] == 3


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A tar of ten samples, as we write it."""
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    whole = list(images())
    kinds = {"jpeg": "jpg", "png": "png", "webp": "webp"}
    samples = [
        Sample(
            key="folder/" + "long" * 40 if k == 3 else f"s{k}",
            image=raw,
            image_type=kinds[kind],
            hashtags=["#a", f"#t{k}"],
            class_id=k,
        )
        for k, (kind, raw) in enumerate([pair for pair in whole if pair[0] in kinds])
    ]
    write_shard(path, samples)
    return path.read_bytes()


def counted(path: Path) -> int:
    """Samples that a reader of the folder finds: to be packed, or refused."""
    source = find_source(str(path.parent), "webdataset", "train")
    return len(list(all_items(source))) + len(source.refused)


def test_200_damaged_tars_lose_no_sample_in_silence(tmp_path: Path, tar: bytes) -> None:
    path = tmp_path / "src" / "a.tar"
    path.parent.mkdir()
    path.write_bytes(tar)
    num = counted(path)
    rng = random.Random(2)
    errors = 0
    for _ in range(200):
        path.write_bytes(mutated(tar, rng))
        try:
            assert timed(lambda: counted(path), path.read_bytes()) >= num
            assert len(timed(lambda: list_shard(path), path.read_bytes())) >= num
        except (UserError, DataError) as error:
            errors += 1
            assert "a.tar" in str(error) and "byte offset" in str(error)
            assert "\n" not in str(error)
    assert 50 < errors < 200


def test_200_tars_with_lying_headers_neither_crash_nor_stall(tmp_path: Path, tar: bytes) -> None:
    """Header fields are changed and the checksum made to fit: any content may follow."""
    path = tmp_path / "src" / "a.tar"
    path.parent.mkdir()
    path.write_bytes(tar)
    headers = [member.start for member in find_headers(path)]
    rng = random.Random(3)
    for _ in range(200):
        content = bytearray(tar)
        for start in rng.sample(headers, rng.randint(1, 3)):
            for _ in range(rng.randint(1, 3)):
                # Size, type and, with a leading 0x80 or 0xff, base-256 numbers, negative ones too.
                place = rng.choice([rng.randrange(512), 124, 125, 130, 156, 156])
                content[start + place] = rng.choice(
                    [0x80, 0xFF, *b"xgLKSVDM1270", rng.randrange(256)]
                )
            fit_checksum(content, start)
        path.write_bytes(content)
        for work in (lambda: counted(path), lambda: list_shard(path)):
            try:
                timed(work, bytes(content))
            except (UserError, DataError) as error:
                assert "\n" not in str(error)


def find_headers(path: Path) -> list[Any]:
    from harness.data.shards import walk_tar

    return list(walk_tar(path))


def fit_checksum(content: bytearray, start: int) -> None:
    header = bytes(content[start : start + 512])
    total = tarfile.calc_chksums(header)[0]  # type: ignore[attr-defined]
    content[start + 148 : start + 156] = b"%06o\0 " % total
