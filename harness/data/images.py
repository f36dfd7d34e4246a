"""What an image or a video becomes in a shard: its own bytes, converted ones, or a refusal.

A file is kept as it is if every decoder makes the same 8-bit RGB pixels of it and needs to know
nothing else. Whatever does not is converted by one stated rule each, and said to be; what has no
agreed rule, is damaged or is too large is refused. With default options converting loses nothing:
the pixels are stored as they came out, in a PNG.
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from harness.data.png import encode_png

MAX_PIXELS = 80_000_000
"""More in one image are refused: a few of them at once would fill a machine's memory."""
MAX_SIDE = 20_000
BACKGROUND = (255, 255, 255)
"""Colour behind transparent pixels."""
Format = Literal["keep", "jpeg", "webp", "png"]

# What Pillow may open: none of the formats that run programs (EPS) or are no pictures.
_READABLE = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# A MPO file is a JPEG with more pictures behind it, which JPEG decoders do not see.
_KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_ENCODED: dict[str, Format] = {"jpg": "jpeg", "webp": "webp", "png": "png"}
# Exif 2.3 sec. 4.6.4, tag 0x0112 "Orientation": what makes the picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_CONVERTED = {
    "1": "one bit",
    "P": "palette",
    "PA": "palette",
    "LA": "alpha",
    "La": "alpha",
    "RGBA": "alpha",
    "RGBa": "alpha",
    "RGBX": "padding",
    "CMYK": "CMYK",
    "YCbCr": "YCbCr",
}


class Refusal(Exception):
    """Why a file is not packed; its text goes into refused.txt."""


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """What `data pack` may do to images beyond what it must."""

    resize: int | None = None
    """Pixels of the shorter side, of images in which it is longer."""
    format: Format = "keep"
    quality: int = 90
    strict: bool = False
    """Refuse what would have to be converted."""
    crop_border: int = 0
    """Pixels to take off each side (ObjectNet's red border)."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a shard holds of a file."""

    content: bytes
    kind: str
    """File name extension."""
    size: tuple[int, int]
    """Width and height; (0, 0) of a video."""
    changes: tuple[str, ...] = ()
    """What had to be done to it, in order."""
    asked: tuple[str, ...] = ()
    """What was done because the options say so; without either these are the file's own bytes."""
    scale: tuple[float, float] = (1.0, 1.0)
    """New width and height by the old ones."""


def store_image(
    raw: bytes, options: ImageOptions, annotated: tuple[int, int] | None = None
) -> Stored:
    """The image as it goes into a shard. Raises Refusal.

    `annotated`: width and height of the picture that the image's boxes are in, if it has any.
    """
    if not raw:
        raise Refusal("empty file")
    try:
        # Pillow warns of sizes that this module refuses, and of odd metadata it copes with.
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(io.BytesIO(raw), formats=_READABLE) as picture,
        ):
            return _store(raw, picture, options, annotated)
    except Image.UnidentifiedImageError:
        raise Refusal("not an image, or of no known type") from None
    except Image.DecompressionBombError:
        raise Refusal(f"too large: more than {MAX_PIXELS} pixels") from None
    except (Refusal, MemoryError):
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        text = " ".join(str(error).split()) or type(error).__name__
        raise Refusal(f"damaged: {text}") from None


def _store(
    raw: bytes, picture: Image.Image, options: ImageOptions, annotated: tuple[int, int] | None
) -> Stored:
    width, height = picture.size
    if width < 1 or height < 1:
        raise Refusal(f"no pixels: {width} x {height}")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise Refusal(
            f"too large: {width} x {height}; at most {MAX_PIXELS} pixels and {MAX_SIDE} a side"
        )
    if annotated is not None and annotated != picture.size:
        width, height = annotated
        raise Refusal(f"is {picture.size[0]} x {picture.size[1]}, annotated as {width} x {height}")
    picture.load()
    kind = _KEPT.get(picture.format or "", "")
    pixels, changes = _plain(picture, raw, kind, is_annotated=annotated is not None)
    if changes and options.strict:
        raise Refusal(f"would have to be converted: {', '.join(changes)}")
    asked: list[str] = []
    border = options.crop_border
    if border:
        if min(pixels.size) <= 2 * border:
            raise Refusal(f"nothing is left without a border of {border} pixels")
        size = pixels.size
        pixels = pixels.crop((border, border, size[0] - border, size[1] - border))
        asked.append("border cut off")
    before, pixels = pixels.size, _resized(pixels, options.resize)
    is_resized = pixels.size != before
    if is_resized:
        asked.append("resized")
    target = options.format
    if target == "keep":
        # Bytes that are lost to resizing anyway may be small; mere conversion loses nothing.
        may_lose = is_resized or not (changes or asked)
        target = _ENCODED.get(kind, "png") if may_lose else "png"
    if not changes and not asked and _ENCODED.get(kind) == target:
        return Stored(content=raw, kind=kind, size=picture.size)
    content, stored_kind = _encode(pixels, target, options.quality)
    if not changes and not asked:
        of = changes if options.format == "keep" else asked
        of.append(f"{(picture.format or '?').lower()} to {stored_kind}")
    return Stored(
        content=content,
        kind=stored_kind,
        size=pixels.size,
        changes=tuple(changes),
        asked=tuple(asked),
        scale=(pixels.size[0] / before[0], pixels.size[1] / before[1]),
    )


def _plain(
    picture: Image.Image, raw: bytes, kind: str, is_annotated: bool
) -> tuple[Image.Image, list[str]]:
    """The first frame as upright RGB or grey, and what had to be done to make it that."""
    changes: list[str] = []
    if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
        changes.append("first frame of several")
    mode = picture.mode
    if mode in _SIXTEEN_BITS:
        changes.append("16 bits")
        # The upper 8 bits, as libpng strips them; Pillow's own conversion clips at 255.
        high = np.asarray(picture).astype(np.uint16) >> 8
        plain = Image.fromarray(high.astype(np.uint8))
    elif picture.has_transparency_data:
        changes.append("palette" if mode == "P" else "alpha")
        rgba = picture.convert("RGBA")
        plain = Image.new("RGB", picture.size, BACKGROUND)
        plain.paste(rgba, mask=rgba.getchannel("A"))
    elif mode in _CONVERTED:
        changes.append(_CONVERTED[mode])
        plain = picture.convert("RGB")
    elif mode in ("L", "RGB"):
        if kind == "png" and raw[24] == 16:  # bit depth, W3C PNG sec. 11.2.1
            changes.append("16 bits")  # of which Pillow keeps the upper 8
        plain = picture
    else:
        raise Refusal(f"pixels of Pillow's mode {mode} have no agreed range; convert it first")
    # Boxes are in the pixels as they are stored: they would not turn with the picture.
    turn = None if is_annotated else _TURNS.get(_orientation(picture))
    if turn is not None:
        changes.append("EXIF rotation")
        plain = plain.transpose(turn)
    return plain, changes


def _orientation(picture: Image.Image) -> int:
    try:
        return picture.getexif().get(0x0112, 1)
    except Exception:
        return 1  # damaged metadata, about which Pillow raises many kinds: the pixels are whole


def _resized(picture: Image.Image, side: int | None) -> Image.Image:
    if side is None or min(picture.size) <= side:
        return picture
    width, height = picture.size
    shorter = min(width, height)
    size = (max(1, round(width * side / shorter)), max(1, round(height * side / shorter)))
    # Pillow widens the filter by the factor of reduction: this is antialiased.
    return picture.resize(size, Image.Resampling.BICUBIC)


def _encode(picture: Image.Image, target: Format, quality: int) -> tuple[bytes, str]:
    if target == "png":
        return encode_png(np.asarray(picture.convert("RGB"))), "png"
    file = io.BytesIO()
    extra: dict[str, Any] = {"subsampling": 0} if target == "jpeg" else {"method": 4}
    if target == "webp" and max(picture.size) > 16_383:
        raise Refusal(f"a WebP has at most 16383 pixels a side, this has {max(picture.size)}")
    clean = Image.fromarray(np.asarray(picture))  # without the metadata of its source
    clean.save(file, "JPEG" if target == "jpeg" else "WEBP", quality=quality, **extra)
    return file.getvalue(), "jpg" if target == "jpeg" else "webp"


def store_video(raw: bytes, kind: str) -> Stored:
    """A video as it is, if its container is whole. Raises Refusal. Frames are not decoded."""
    if not raw:
        raise Refusal("empty file")
    found = (_mp4_problem if kind == "mp4" else _webm_problem)(raw)
    if found:
        raise Refusal(found)
    return Stored(content=raw, kind=kind, size=(0, 0))


def _mp4_problem(raw: bytes) -> str | None:
    """ISO/IEC 14496-12 sec. 4.2: a file is a row of boxes, each of which begins with its size."""
    if raw[4:8] != b"ftyp":
        return "not an mp4: it does not begin with 'ftyp'"
    names = set()
    start = 0
    while start + 8 <= len(raw):
        size, name = struct.unpack(">I4s", raw[start : start + 8])
        if size == 1 and start + 16 <= len(raw):
            size = struct.unpack(">Q", raw[start + 8 : start + 16])[0]
        elif size == 0:  # the last one
            size = len(raw) - start
        if size < 8:
            return f"damaged: a box of {size} bytes at byte {start}"
        names.add(name)
        start += size
    if start > len(raw):
        return f"cut short: {len(raw)} of at least {start} bytes"
    return None if b"moov" in names else "cut short or damaged: an mp4 without 'moov'"


def _webm_problem(raw: bytes) -> str | None:
    """RFC 8794 sec. 4-6: an EBML header, then a segment; each an id, a size and its content."""
    if raw[:4] != b"\x1a\x45\xdf\xa3":
        return "not a webm: it does not begin with an EBML header"
    place = 4
    for _ in range(2):
        size, place = _ebml_size(raw, place)
        if size is None:  # of a live recording: it ends where the file does
            return None
        place += size
        if place > len(raw):
            return f"cut short: {len(raw)} of at least {place} bytes"
        if raw[place : place + 4] != b"\x18\x53\x80\x67":
            return None
        place += 4
    return None


def _ebml_size(raw: bytes, place: int) -> tuple[int | None, int]:
    first = raw[place] if place < len(raw) else 0
    length = 9 - first.bit_length()
    value = int.from_bytes(raw[place : place + length], "big") & ((1 << 7 * length) - 1)
    return (None if value == (1 << 7 * length) - 1 else value), place + length
