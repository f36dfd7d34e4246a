"""Decoding: the same pixels for the same bytes, fewer decoded where the view needs fewer."""

from __future__ import annotations

import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from harness.data import cache, decode, loader
from harness.data.augment import crop_of, view
from harness.data.dataset import Dataset, open_dataset
from harness.data.hashing import fold
from harness.data.pack import pack
from harness.data.scenes import draw
from harness.errors import DataError
from harness.study.recipes import Augmentation


def photo(width: int, height: int, **options: object) -> bytes:
    image = Image.fromarray(load_sample_images().images[0]).resize((width, height))
    file = io.BytesIO()
    image.convert(str(options.pop("mode", "RGB"))).save(file, "JPEG", **options)
    return file.getvalue()


def empty(side: int, num: int = 1) -> Tensor:
    return torch.zeros((num, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)


def drawn(raw: bytes, side: int, *args: object, **options: object) -> np.ndarray:
    out = empty(side)
    decode.draw_view(out, raw, *args, **options)  # type: ignore[arg-type]  # passed on
    return out[0].permute(1, 2, 0).numpy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_view_of_a_jpeg_is_the_crop_of_the_whole_picture_resized(mode: str) -> None:
    raw = photo(220, 180, mode=mode, quality=90)
    for epoch in range(8):
        key = (0, epoch, 77)
        box, flipped = crop_of(fold(*key), 220, 180, (0.2, 1.0))
        edges = tuple(round(edge) for edge in box)
        with Image.open(io.BytesIO(raw)) as picture:
            expected = np.asarray(picture.convert("RGB").crop(edges).resize((112, 112), 3))
        expected = expected[:, ::-1] if flipped else expected
        # Pillow's bicubic is another implementation of the same filter: it rounds elsewhere.
        assert psnr(drawn(raw, 112, key, (0.2, 1.0), True), expected) > 48


@pytest.mark.parametrize("side, factors", [(224, {2, 4}), (96, {4, 8})])
def test_fewer_pixels_are_decoded_where_the_crop_allows(side: int, factors: set[int]) -> None:
    raw = photo(1280, 960, quality=88)
    used, worst = set(), 99.0
    for epoch in range(12):
        key = (0, epoch, 5)
        box, flipped = crop_of(fold(*key), 1280, 960, (0.2, 1.0))
        factor = decode.scale_factor(box, side)
        used.add(factor)
        left, top, right, bottom = (round(edge / factor) * factor for edge in box)
        assert min(right - left, bottom - top) >= factor * (side - 1)
        with Image.open(io.BytesIO(raw)) as picture:
            whole = picture.convert("RGB").crop((left, top, right, bottom))
        expected = np.asarray(whole.resize((side, side), 3))
        found = drawn(raw, side, key, (0.2, 1.0), flip=True)
        worst = min(worst, psnr(found, expected[:, ::-1] if flipped else expected))
    assert factors <= used
    # What a good JPEG (quality 90) costs is about 35 dB on such pictures.
    assert worst > 30, worst


def test_a_decoder_may_be_swapped_for_another() -> None:
    raw = photo(640, 480, quality=90)
    views = [
        drawn(raw, 112, (0, 1, 2), (0.5, 1.0), True, decoder)
        for decoder in decode.DECODERS.values()
    ]
    assert len(views) == 2 and psnr(*views) > 40


def test_whole_images_are_squashed_for_evaluation() -> None:
    raw = photo(400, 300, quality=90)
    with Image.open(io.BytesIO(raw)) as picture:
        expected = np.asarray(picture.resize((96, 96), 3))
    found = drawn(raw, 96, None)
    assert psnr(found, expected) > 30


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_pillow_draws_what_the_fast_decoder_does_not_take(mode: str) -> None:
    raw = photo(200, 150, mode=mode, quality=90)
    if mode == "RGB":
        raw = raw[:-2] + b"\0" * 50 + raw[-2:]  # rubbish before the end mark: a warning to libjpeg
    with Image.open(io.BytesIO(raw)) as picture:
        whole = np.asarray(picture.convert("RGB"))
    key = (1, 2, 3)
    expected = view(whole, 64, key, (0.9, 1.0), True)
    assert psnr(drawn(raw, 64, key, (0.9, 1.0), True), expected) > 28


# Of scenes, which are PNGs: every past run hangs on these bits.
GOLDEN = {
    ((0, 0, 5), 0): "586b1355ef62a630",
    ((0, 0, 5), 3): "8c20f5fefad56575",
    ((3, 2, 9), 0): "91ffe5874f08248a",
    ((3, 2, 9), 3): "b7d1eff788a923c6",
}


def test_views_of_the_built_in_images_are_what_they_always_were(scenes: Dataset) -> None:
    pixels = draw("pretrain", 0, 4).pixels
    split = scenes.split("pretrain")
    for (key, row), golden in GOLDEN.items():
        assert (
            hashlib.sha256(view(pixels[row], 24, key, (0.3, 1.0), True)).hexdigest()[:16] == golden
        )
        cached, decoded = empty(24), empty(24)
        split.draw(cached, row, key, (0.3, 1.0), True)
        decode.draw_view(decoded, split.read(row), key, (0.3, 1.0), True)
        for out in (cached, decoded):
            seen = np.ascontiguousarray(out[0].permute(1, 2, 0).numpy())
            assert hashlib.sha256(seen).hexdigest()[:16] == golden


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed set of JPEGs of several sizes."""
    top = tmp_path_factory.mktemp("photos")
    for place in range(40):
        path = top / "src" / "train" / str(place % 2) / f"{place}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(300 + 20 * place, 240 + 10 * place, quality=85))
    pack(str(top / "src"), top / "set")
    return top / "set"


def batches(folder: Path, root: Path, threads: int) -> list[loader.Batch]:
    split = open_dataset(str(folder), root).split("train")
    stream = split.stream(40, 0)
    common = {"start_step": 0, "num_steps": 10, "rank": 0, "ranks": 1, "image_size": 64}
    augment = Augmentation(crop_scale=(0.2, 1.0))
    return list(
        loader.train_batches(split, stream, batch=8, augment=augment, threads=threads, **common)
    )


def test_any_number_of_threads_draws_the_same_pixels(photos: Path, tmp_path: Path) -> None:
    one, four = (batches(photos, tmp_path, threads) for threads in (1, 4))
    for a, b in zip(one, four, strict=True):
        assert torch.equal(a.images, b.images)
    with ThreadPoolExecutor(4) as pool:  # the scratch memory of a thread is its own
        raw = [photo(300 + 30 * k, 300, quality=80) for k in range(6)]
        expected = [drawn(r, 64, (0, 0, 1), (0.5, 1.0)) for r in raw]
        found = list(pool.map(lambda k: drawn(raw[k % 6], 64, (0, 0, 1), (0.5, 1.0)), range(60)))
    assert all((found[k] == expected[k % 6]).all() for k in range(60))


def test_a_damaged_jpeg_is_named_with_shard_and_offset(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "CACHE_BYTES", 0)
    split = open_dataset(str(photos), tmp_path).split("train")
    offset = split._image_offset(3)
    shard = photos / "train" / "000000.tar"
    content = bytearray(shard.read_bytes())
    content[offset : offset + 300] = bytes(300)
    shard.write_bytes(bytes(content))
    try:
        with pytest.raises(DataError) as caught:
            split.draw(empty(32), 3, None)
        assert f"000000.tar: byte offset {offset}: sample {split.keys[3]}: not a readable" in str(
            caught.value
        )
    finally:
        content[offset : offset + 300] = b""
    assert json.loads((photos / "dataset.json").read_text())["splits"] == {"train": 40}
