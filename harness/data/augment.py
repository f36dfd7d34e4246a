"""Views of an image: random resized crop and flip, or the whole image for evaluation."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from harness.data.hashing import GOLDEN, fold, mix_int

_LOG_ASPECT = math.log(4 / 3)
_TO_UNIT = 2.0**-64
_BICUBIC = Image.Resampling.BICUBIC


def view(
    image_HWC: np.ndarray,
    out_size: int,
    rng_key: tuple[int, ...] | None,
    crop_scale: tuple[float, float] = (1.0, 1.0),
    flip: bool = False,
) -> np.ndarray:
    """uint8 [out_size, out_size, 3] of a uint8 [H, W, 3], or faster of a contiguous [H, W, 4]
    whose last channel means nothing.

    With a key: a crop whose area is a uniform share of the image in `crop_scale` and whose aspect
    is log-uniform in 3/4..4/3 (He et al. 2022, app. A.1), flipped with probability 1/2 if `flip`;
    a function of the key alone. Without: the whole image, squashed to a square.
    """
    height, width, channels = image_HWC.shape
    mode = "RGBX" if channels == 4 else "RGB"
    # frombuffer shares the memory of four channels, and copies three once; fromarray copies twice.
    picture = Image.frombuffer(
        mode, (width, height), np.ascontiguousarray(image_HWC), "raw", mode, 0, 1
    )
    if rng_key is None:
        if (width, height) == (out_size, out_size):
            return image_HWC[:, :, :3]
        return np.asarray(picture.resize((out_size, out_size), _BICUBIC))[:, :, :3]
    box, is_flipped = crop_of(fold(*rng_key), width, height, crop_scale)
    seen = np.asarray(picture.resize((out_size, out_size), _BICUBIC, box=box))
    return seen[:, ::-1, :3] if flip and is_flipped else seen[:, :, :3]


def crop_of(
    state: int, width: int, height: int, crop_scale: tuple[float, float]
) -> tuple[tuple[float, float, float, float], bool]:
    """Crop box (left, top, right, bottom) in pixels, and whether to flip, of one random number."""
    # Unrolled draws: a numpy Generator per image would cost more than the crop itself.
    area, aspect, across, down = (
        mix_int(state + GOLDEN * place) * _TO_UNIT for place in range(1, 5)
    )
    low, high = crop_scale
    pixels = width * height * (low + (high - low) * area)
    ratio = math.exp((2 * aspect - 1) * _LOG_ASPECT)
    # A crop that would stick out is cut to the image, where torchvision would draw again.
    crop_width = min(math.sqrt(pixels * ratio), width)
    crop_height = min(math.sqrt(pixels / ratio), height)
    left = (width - crop_width) * across
    top = (height - crop_height) * down
    # The lowest bit of the state plays no part above.
    box = (left, top, min(left + crop_width, width), min(top + crop_height, height))
    return box, bool(mix_int(state ^ GOLDEN) & 1)
