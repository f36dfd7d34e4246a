"""What becomes of odd images: kept, converted by a stated rule, or refused with a reason."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from harness.data.images import MAX_PIXELS, ImageOptions, Refusal, store_image, store_video

RNG = np.random.default_rng(0)
KEEP = ImageOptions()
RGB = RNG.integers(0, 256, (12, 17, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def encoded(picture: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    whole = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    whole.save(file, kind, **options)
    return file.getvalue()


def pixels(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.mode in ("RGB", "L")
        return np.asarray(picture.convert("RGB"))


def png(rows: bytes, width: int, height: int, depth: int, colour: int, extra: bytes = b"") -> bytes:
    """A PNG of raw rows, each of which opens with its filter byte."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + extra + body


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (encoded(RGB, "JPEG"), "jpg"),
        (encoded(GREY, "JPEG"), "jpg"),
        (encoded(RGB, "JPEG", progressive=True), "jpg"),
        (encoded(RGB, "PNG"), "png"),
        (encoded(GREY, "PNG"), "png"),
        (encoded(RGB, "WEBP"), "webp"),
        (encoded(RGB, "WEBP", lossless=True), "webp"),
        (encoded(RGB, "MPO", save_all=True, append_images=[Image.fromarray(RGB)]), "jpg"),
        # Metadata that cannot be read does not make the pixels worse.
        (encoded(RGB, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), "jpg"),
    ],
)
def test_plain_images_keep_their_bytes(raw: bytes, kind: str) -> None:
    stored = store_image(raw, KEEP)
    assert (stored.content, stored.kind, stored.changes, stored.asked) == (raw, kind, (), ())
    assert stored.size == (17, 12)


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("image", [RGB, GREY])
def test_formats_that_shards_do_not_hold_become_png(kind: str, image: np.ndarray) -> None:
    stored = store_image(encoded(image, kind), KEEP)
    assert stored.kind == "png" and stored.changes == (f"{kind.lower()} to png",)
    expected = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    np.testing.assert_array_equal(pixels(stored.content), expected)


def test_a_palette_is_looked_up() -> None:
    picture = Image.fromarray(GREY % 5).convert("L")
    indices = np.asarray(picture)
    colours = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
    indexed = Image.frombytes("P", picture.size, indices.tobytes())
    indexed.putpalette(colours.tobytes())
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        stored = store_image(encoded(indexed, kind), KEEP)
        assert stored.changes == ("palette",)
        np.testing.assert_array_equal(pixels(stored.content), colours[indices])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_transparent_pixels_are_laid_on_white(kind: str) -> None:
    alpha = RNG.integers(0, 256, (12, 17, 1), dtype=np.uint8)
    alpha[:4], alpha[4:6] = 0, 255
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    stored = store_image(encoded(np.concatenate([RGB, alpha], 2), kind, **options), KEEP)
    assert stored.changes == ("alpha",) and stored.kind == "png"
    share = alpha / 255
    expected = RGB * share + 255 * (1 - share)
    found = pixels(stored.content)
    assert np.abs(found - expected).max() <= 1
    assert (found[:4] == 255).all()
    np.testing.assert_array_equal(found[4:6], RGB[4:6])


def test_grey_with_alpha_and_transparent_colours_are_laid_on_white() -> None:
    alpha = np.where(np.arange(17) % 2, 255, 0).astype(np.uint8)[None].repeat(12, 0)
    stored = store_image(encoded(np.stack([GREY, alpha], 2), "PNG"), KEEP)
    expected = np.where(alpha == 255, GREY, 255)[..., None].repeat(3, 2)
    np.testing.assert_array_equal(pixels(stored.content), expected)
    # PNG's tRNS names one colour that is transparent.
    colour = tuple(int(v) for v in RGB[3, 4])
    stored = store_image(encoded(RGB, "PNG", transparency=colour), KEEP)
    assert stored.changes == ("alpha",)
    expected = np.where((RGB == RGB[3, 4]).all(2, keepdims=True), 255, RGB)
    np.testing.assert_array_equal(pixels(stored.content), expected)


def test_cmyk_becomes_rgb() -> None:
    smooth = np.linspace(0, 255, 12 * 17 * 4).reshape(12, 17, 4).astype(np.uint8)
    for kind in ("JPEG", "TIFF"):
        raw = encoded(Image.fromarray(smooth, "CMYK"), kind)
        stored = store_image(raw, KEEP)
        assert stored.changes == ("CMYK",) and stored.kind == "png"
        with Image.open(io.BytesIO(raw)) as picture:
            inks = np.asarray(picture).astype(float)
        expected = (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255
        assert np.abs(pixels(stored.content) - expected).max() <= 1.5


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_upper_8_bits(kind: str) -> None:
    deep = RNG.integers(0, 1 << 16, (12, 17)).astype(np.uint16)
    stored = store_image(encoded(deep, kind), KEEP)
    assert stored.changes == ("16 bits",)
    expected = (deep >> 8).astype(np.uint8)[..., None].repeat(3, 2)
    np.testing.assert_array_equal(pixels(stored.content), expected)
    assert len(np.unique(pixels(stored.content))) > 100  # Pillow's own conversion gives 255


def test_16_bit_colour_keeps_its_upper_8_bits() -> None:
    deep = RNG.integers(0, 1 << 16, (12, 17, 3)).astype(np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    stored = store_image(png(rows, 17, 12, 16, 2), KEEP)
    assert stored.changes == ("16 bits",)
    np.testing.assert_array_equal(pixels(stored.content), deep >> 8)


def test_one_bit_becomes_black_and_white() -> None:
    stored = store_image(encoded(Image.fromarray(GREY > 99), "PNG"), KEEP)
    assert stored.changes == ("one bit",)
    expected = np.where(GREY > 99, 255, 0)[..., None].repeat(3, 2)
    np.testing.assert_array_equal(pixels(stored.content), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(RGB, kind, exif=exif)
    stored = store_image(raw, KEEP)
    with Image.open(io.BytesIO(raw)) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture))
    np.testing.assert_array_equal(pixels(stored.content), expected)
    if kind != "TIFF":
        assert stored.changes == (("EXIF rotation",) if orientation > 1 else ())
    with Image.open(io.BytesIO(stored.content)) as picture:
        assert picture.getexif().get(0x0112, 1) == 1


def test_images_with_boxes_are_not_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = encoded(RGB, "JPEG", exif=exif)
    assert store_image(raw, KEEP, annotated=(17, 12)).content == raw
    with pytest.raises(Refusal, match="is 17 x 12, annotated as 12 x 17"):
        store_image(raw, KEEP, annotated=(12, 17))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_kept(kind: str) -> None:
    frames = [Image.fromarray(np.full((9, 9, 3), v, np.uint8)) for v in (250, 128, 7)]
    options = {"lossless": True} if kind == "WEBP" else {}
    raw = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    stored = store_image(raw, KEEP)
    assert stored.changes[0] == "first frame of several" and stored.kind == "png"
    assert (pixels(stored.content) == 250).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_truncated_files_are_refused(kind: str) -> None:
    raw = encoded(RNG.integers(0, 256, (60, 70, 3), dtype=np.uint8), kind)
    for stop in (1, 10, 60, len(raw) // 2, len(raw) * 9 // 10):
        with pytest.raises(Refusal, match=r"damaged|not an image"):
            store_image(raw[:stop], KEEP)


def big(width: int, height: int) -> bytes:
    return png(zlib.compress(b""), width, height, 8, 2)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404</html>", "not an image, or of no known type"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image, or of no known"),
        (big(30_000, 30_000), "too large"),
        (big(30_000, 10), "too large: 30000 x 10; at most 80000000 pixels and 20000 a side"),
        (big(9_000, 9_000), "too large: 9000 x 9000"),
        (encoded(np.ones((4, 4), np.float32), "TIFF"), "mode F have no agreed range"),
        (encoded(np.ones((4, 4), np.int32), "TIFF"), "mode I have no agreed range"),
    ],
)
def test_what_cannot_be_packed_is_refused_with_its_reason(raw: bytes, reason: str) -> None:
    assert MAX_PIXELS < 9_000 * 9_000
    with pytest.raises(Refusal, match=reason) as caught:
        store_image(raw, KEEP)
    assert "\n" not in str(caught.value)


def test_strict_refuses_instead_of_converting() -> None:
    strict = ImageOptions(strict=True)
    with pytest.raises(Refusal, match="would have to be converted: palette"):
        store_image(encoded(Image.fromarray(RGB).convert("P"), "PNG"), strict)
    assert store_image(encoded(RGB, "PNG"), strict).changes == ()
    assert store_image(encoded(RGB, "BMP"), strict).changes == ("bmp to png",)


def test_resizing_brings_the_shorter_side_down_and_never_up() -> None:
    x, y = np.meshgrid(np.linspace(0, 255, 200), np.linspace(0, 255, 100))
    ramp = np.stack([x, y, x], 2).astype(np.uint8)
    stored = store_image(encoded(ramp, "PNG"), ImageOptions(resize=25))
    assert stored.size == (50, 25) and stored.kind == "png" and stored.scale == (0.25, 0.25)
    # A ramp stays one: block means are what an antialiased reduction gives.
    means = ramp.reshape(25, 4, 50, 4, 3).mean((1, 3))
    assert np.abs(pixels(stored.content) - means).max() <= 3
    assert stored.asked == ("resized",) and not stored.changes
    for raw in (encoded(ramp, "PNG"), encoded(ramp, "JPEG")):
        assert store_image(raw, ImageOptions(resize=100)).content == raw


def test_resized_images_keep_their_format_and_others_take_the_one_asked_for() -> None:
    raw = {kind: encoded(RGB, kind) for kind in ("JPEG", "PNG", "WEBP")}
    small = ImageOptions(resize=6)
    kinds = {kind: store_image(content, small).kind for kind, content in raw.items()}
    assert kinds == {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
    jpeg = ImageOptions(format="jpeg", quality=95)
    assert store_image(raw["JPEG"], jpeg).content == raw["JPEG"]
    stored = store_image(raw["PNG"], jpeg)
    assert stored.kind == "jpg" and stored.asked == ("png to jpg",) and not stored.changes
    assert np.abs(pixels(stored.content).astype(int) - RGB).mean() < 6
    less = store_image(raw["PNG"], ImageOptions(format="jpeg", quality=30))
    assert len(less.content) < len(stored.content)


def box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), name) + content


MP4 = box(b"ftyp", b"isom" + bytes(8)) + box(b"mdat", b"x" * 100) + box(b"moov", b"y" * 50)
_SEGMENT = b"\x1a\x45\xdf\xa3\x84" + bytes(4) + b"\x18\x53\x80\x67\x01"
WEBM = _SEGMENT + (60).to_bytes(7, "big") + bytes(60)
LIVE = _SEGMENT + b"\xff" * 7 + bytes(60)


@pytest.mark.parametrize(("raw", "kind"), [(MP4, "mp4"), (WEBM, "webm"), (LIVE, "webm")])
def test_whole_videos_keep_their_bytes(raw: bytes, kind: str) -> None:
    assert store_video(raw, kind).content == raw


@pytest.mark.parametrize(
    ("raw", "kind", "reason"),
    [
        (b"", "mp4", "empty file"),
        (b"<html>gone</html>", "mp4", "not an mp4"),
        (MP4[:-10], "mp4", f"cut short: {len(MP4) - 10} of at least {len(MP4)} bytes"),
        (MP4[: len(MP4) - 58], "mp4", "without 'moov'"),
        (b"GIF89a", "webm", "not a webm"),
        (WEBM[:-1], "webm", "cut short"),
        (WEBM[:7], "webm", "cut short"),
    ],
)
def test_broken_videos_are_refused(raw: bytes, kind: str, reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        store_video(raw, kind)
