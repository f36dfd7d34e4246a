"""Views beyond the plain crop: RandAugment in training, the middle of an image in tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harness.data.dataset import Split
from harness.data.hashing import fold
from harness.data.loader import Batch, MakeBatch, labelled
from harness.data.order import Places
from harness.data.timm_parts import rand_augment, rand_augmented
from harness.study.recipes import Augmentation

_RAND_AUGMENT = 0x5A
"""Tells the numbers of RandAugment from those of the crop before it."""


def augmented(split: Split, *, seed: int, side: int, augment: Augmentation, spec: str) -> MakeBatch:
    """Crop and flip as everywhere, then RandAugment: all a function of (seed, epoch, key)."""
    split.prepare()
    rand_augment(spec, side)  # loaded here, not by several threads at once

    def make(places: Places, first: int) -> Batch:
        hashes = split.key_hashes[places.rows].tolist()
        epochs, repeats = places.epochs.tolist(), places.repeats.tolist()
        images = empty(len(hashes), side)
        for place, row in enumerate(places.rows.tolist()):
            key = (seed, epochs[place], hashes[place])
            if repeats[place]:
                key += (repeats[place],)
            image = images[place : place + 1]
            split.draw(image, row, key, augment.crop_scale, augment.flip)
            rand_augmented(image, spec, (fold(*key), _RAND_AUGMENT))
        return labelled(split, places.rows, images, first)

    return make


def whole(split: Split, *, side: int, crop: str, fraction: float) -> MakeBatch | None:
    """Test images: squashed (None: the loader's own way), or of `centre` their middle."""
    if crop == "squash":
        return None

    def make(places: Places, first: int) -> Batch:
        images = empty(len(places.rows), side)
        for place, row in enumerate(places.rows.tolist()):
            middle = centre_crop(split.decode(row), side, fraction)
            images[place] = torch.from_numpy(middle).permute(2, 0, 1)
        return labelled(split, places.rows, images, first)

    return make


def centre_crop(image_HWC: np.ndarray, side: int, fraction: float) -> np.ndarray:
    """uint8 [side, side, 3]: bicubic to a shorter side of round(side / fraction), then the middle.

    That is torchvision's Resize and CenterCrop.
    """
    height, width = image_HWC.shape[:2]
    shorter = round(side / fraction)
    # The longer side is cut to a whole number as torchvision does, not rounded.
    if width <= height:
        size = (shorter, int(shorter * height / width))
    else:
        size = (int(shorter * width / height), shorter)
    picture: Any = Image.fromarray(image_HWC)
    if size != (width, height):
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return np.array(picture.crop((left, top, left + side, top + side)))


def empty(num: int, side: int) -> Tensor:
    """uint8 [num, 3, side, side], channels last in memory."""
    return torch.empty((num, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
