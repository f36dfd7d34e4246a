"""timm's augmentations with random numbers that are a function of a key, in any number of threads.

timm draws from Python's and numpy's global generators, which reading threads share and a resumed
run finds elsewhere. Here its modules are loaded once more, as copies of our own in which the names
`random` and `np` lead to the generators of the thread's current key; timm itself stays as it is for
everybody else.
"""

from __future__ import annotations

import functools
import importlib.util
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harness.data.hashing import fold

_FILL = (124, 116, 104)
"""Mean colour of ImageNet in bytes, behind what is moved or turned; as timm's own transforms have
it for models that are normalised by it."""


class _Generators(threading.local):
    plain: random.Random | None = None
    numpy: np.random.RandomState | None = None


_current = _Generators()


@contextmanager
def drawing(*key: int) -> Iterator[None]:
    """Inside, what this module makes draws numbers that follow from `key` alone."""
    before = _current.plain, _current.numpy
    state = fold(*key)
    _current.plain = random.Random(state)
    _current.numpy = np.random.RandomState(np.random.PCG64(state))
    try:
        yield
    finally:
        _current.plain, _current.numpy = before


class _Random:
    """Stands for the module `random`."""

    def __getattr__(self, name: str) -> Any:
        assert _current.plain is not None, "drawn outside of drawing()"
        return getattr(_current.plain, name)


class _Numpy:
    """Stands for numpy: all of it, but for its generator."""

    @property
    def random(self) -> np.random.RandomState:
        assert _current.numpy is not None, "drawn outside of drawing()"
        return _current.numpy

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@functools.cache
def timm_module(name: str) -> ModuleType:
    """Our copy of a module of timm.data, whose numbers come from `drawing`."""
    spec = importlib.util.find_spec(f"timm.data.{name}")
    assert spec is not None and spec.loader is not None, f"timm has no data.{name}"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for own, stand_in in (("random", _Random()), ("np", _Numpy())):
        if hasattr(module, own):
            setattr(module, own, stand_in)
    content: dict[str, Any] = vars(module)
    if name == "random_erasing":
        content["_get_pixels"] = _noise
    if name == "auto_augment":
        plain = content["posterize"]
        for op, function in content["NAME_TO_OP"].items():
            if function is plain:
                content["NAME_TO_OP"][op] = functools.partial(_posterize, plain)
    return module


def _posterize(plain: Any, image: Image.Image, bits: int, **settings: Any) -> Image.Image:
    # timm's largest magnitude keeps 0 bits, which Pillow took as black and now refuses.
    return image.point([0] * 256 * 3) if bits < 1 else plain(image, bits, **settings)


@functools.cache
def rand_augment(spec: str, side: int) -> Any:
    """timm's RandAugment of PIL images of `side` pixels; call it inside `drawing`.

    The bound of absolute shifts, the fill colour and the bicubic interpolation are those of timm's
    training transforms as MAE calls them.
    Raises AssertionError or ValueError for what is no such spec.
    """
    hparams = {
        "translate_const": int(side * 0.45),
        "img_mean": _FILL,
        "interpolation": Image.Resampling.BICUBIC,
    }
    return timm_module("auto_augment").rand_augment_transform(spec, hparams)


def rand_augmented(image_1CSS: Tensor, spec: str, key: tuple[int, ...]) -> None:
    """Replaces uint8 pixels [1, 3, S, S], channels last in memory, by what RandAugment makes."""
    pixels = image_1CSS[0].permute(1, 2, 0).numpy()
    with drawing(*key):
        made = rand_augment(spec, len(pixels))(Image.fromarray(pixels))
    pixels[:] = np.asarray(made)


def mixup(*, alpha: float, cutmix: float, smoothing: float, num_classes: int) -> Any:
    """timm's Mixup of a batch, of which every call inside `drawing` mixes one pair."""
    return timm_module("mixup").Mixup(
        mixup_alpha=alpha,
        cutmix_alpha=cutmix,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )


def erasing(probability: float, device: torch.device) -> Any:
    """timm's RandomErasing by noise, of standardised images; call it inside `drawing`."""
    return timm_module("random_erasing").RandomErasing(
        probability, mode="pixel", device=str(device)
    )


def _noise(
    per_pixel: bool, rand_color: bool, patch_size: tuple[int, ...], dtype: Any, device: Any
) -> Tensor:
    """Normal noise, drawn on the CPU: the same on every device."""
    assert per_pixel and not rand_color, "erasing() asks for noise of each pixel"
    assert _current.numpy is not None, "drawn outside of drawing()"
    noise = _current.numpy.standard_normal(patch_size).astype(np.float32)
    return torch.from_numpy(noise).to(device=device, dtype=dtype)
