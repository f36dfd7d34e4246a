"""Stored bytes to pixels: whole images, and views drawn straight from JPEG bytes.

The one place that names decoders. Of a JPEG no more is decoded than the view needs: where the crop
is at least f = 2, 4 or 8 times as wide and high as the view, the decoder's inverse transform makes
an image f times smaller (these are the factors that libjpeg-turbo has SIMD code for). The crop's
edges are then multiples of f, so that the crop is the same whatever f is. It is resized by
torch's antialiased bicubic filter on uint8. Everything else (PNG, WebP, JPEGs that the fast decoder
does not take) goes through Pillow.
"""

# Shapes: H, W of a stored image, h, w of a decoded one, S side of a view.

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
from PIL import Image

from harness.data.augment import crop_of, view
from harness.data.hashing import fold

if TYPE_CHECKING:
    from torch import Tensor

Decoder = Callable[[bytes, int], np.ndarray]
"""JPEG bytes and a factor f of 1, 2, 4 or 8 -> uint8 [ceil(H / f), ceil(W / f), 3].

Raises ValueError or OSError for what it does not take.
"""
_JPEG = b"\xff\xd8\xff"
_PLAIN = ("YCbCr", "Gray", "RGB")  # CMYK and YCCK are left to Pillow
_FACTORS = (8, 4, 2)


def _header(raw: bytes) -> tuple[int, int, str]:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(raw)
    return int(height), int(width), str(colours)


_scratch = threading.local()


def _memory(name: str, size: int) -> np.ndarray:
    """uint8 [size], the same memory at every call of a thread.

    Fresh memory for every image would cost a page fault every 4 KiB.
    """
    buffer = getattr(_scratch, name, None)
    if buffer is None or len(buffer) < size:
        buffer = np.empty(size, dtype=np.uint8)
        setattr(_scratch, name, buffer)
    return buffer[:size]


def decode_simplejpeg(raw: bytes, factor: int) -> np.ndarray:
    """By libjpeg-turbo, through simplejpeg; any damage is an error. Valid until the next call."""
    height, width, _ = _header(raw)
    height, width = -(-height // factor), -(-width // factor)
    buffer = _memory("image", height * width * 3)
    return simplejpeg.decode_jpeg(
        raw, min_height=height, min_width=width, min_factor=factor, buffer=buffer
    )


def decode_pillow(raw: bytes, factor: int) -> np.ndarray:
    """By the libjpeg-turbo in Pillow."""
    with Image.open(io.BytesIO(raw)) as picture:
        if factor > 1:
            picture.draft("RGB", (picture.width // factor, picture.height // factor))
        return np.array(picture.convert("RGB"))


DECODERS: dict[str, Decoder] = {"simplejpeg": decode_simplejpeg, "pillow": decode_pillow}
DEFAULT = decode_simplejpeg
"""The fastest of those measured by benchmarks/decoders.py. Another may change single pixels."""


def decode_image(raw: bytes) -> np.ndarray:
    """uint8 [H, W, 3] of stored bytes. Raises whatever Pillow raises for what is no image."""
    with Image.open(io.BytesIO(raw)) as picture:
        return np.asarray(picture.convert("RGB"))


def draw_view(
    out_1CSS: Tensor,
    raw: bytes,
    rng_key: tuple[int, ...] | None,
    crop_scale: tuple[float, float] = (1.0, 1.0),
    flip: bool = False,
    decoder: Decoder = DEFAULT,
) -> None:
    """Draws the view that `augment.view` describes into uint8 [1, 3, S, S] (channels last).

    A function of the bytes and the key alone. Raises whatever Pillow raises for what is no image.
    """
    if raw.startswith(_JPEG) and _draw_jpeg(out_1CSS, raw, rng_key, crop_scale, flip, decoder):
        return
    seen_SSC = view(decode_image(raw), out_1CSS.shape[2], rng_key, crop_scale, flip)
    put(out_1CSS, seen_SSC)


def put(out_1CSS: Tensor, seen_SSC: np.ndarray) -> None:
    """Copies uint8 [S, S, 3] to its place in a batch."""
    out_1CSS[0].permute(1, 2, 0).numpy()[:] = seen_SSC


def _draw_jpeg(
    out_1CSS: Tensor,
    raw: bytes,
    rng_key: tuple[int, ...] | None,
    crop_scale: tuple[float, float],
    flip: bool,
    decoder: Decoder,
) -> bool:
    """Whether the decoder took it."""
    # torch takes seconds to import; `harness data`, which looks at whole images, must not wait
    import torch

    side = out_1CSS.shape[2]
    try:
        height, width, colours = _header(raw)
        if colours not in _PLAIN:
            return False
        box, is_flipped = (0.0, 0.0, float(width), float(height)), False
        if rng_key is not None:
            box, is_flipped = crop_of(fold(*rng_key), width, height, crop_scale)
        factor = scale_factor(box, side)
        pixels_hwC = decoder(raw, factor)
    except (ValueError, OSError):
        return False
    left, top, right, bottom = (round(edge / factor) for edge in box)
    seen_hwC = pixels_hwC[top : max(bottom, top + 1), left : max(right, left + 1)]
    # Torch would make it contiguous too, pixel by pixel; numpy copies whole rows.
    crop_hwC = _memory("crop", seen_hwC.size).reshape(seen_hwC.shape)
    np.copyto(crop_hwC, seen_hwC)
    crop_1Chw = torch.from_numpy(crop_hwC).permute(2, 0, 1)[None]
    resize = torch.ops.aten._upsample_bicubic2d_aa  # interpolate() without its allocation
    resize.out(crop_1Chw, [side, side], False, out=out_1CSS)
    if flip and is_flipped:
        out_1CSS.copy_(out_1CSS.flip(3))
    return True


def scale_factor(box: tuple[float, float, float, float], side: int) -> int:
    """The largest factor at which a crop (left, top, right, bottom) still has `side` pixels."""
    left, top, right, bottom = box
    smaller = min(right - left, bottom - top)
    return next((factor for factor in _FACTORS if smaller >= factor * side), 1)
