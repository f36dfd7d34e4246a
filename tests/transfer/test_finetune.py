"""Fine-tuning's augmentations and moving average: equal to timm's, and functions of their keys."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import auto_augment
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch.nn import functional as F
from torchvision.transforms import v2

from harness import transfer
from harness.data import timm_parts
from harness.data.loader import train_batches
from harness.errors import PreemptedError
from harness.study.protocols import FineTune
from harness.study.recipes import Augmentation, Duration
from harness.transfer import views
from harness.transfer.finetune import mixed_pairs

SPEC = "rand-m9-mstd0.5-inc1"
ALL = FineTune(
    duration=Duration(steps=8),
    batch=16,
    rand_augment=SPEC,
    erase=0.5,
    mixup=0.8,
    cutmix=1.0,
    ema=0.9,
    ema_warmup=True,
    drop_path=0.1,
)


def noise(side: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


# --- RandAugment ---


def test_rand_augment_is_timms_with_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's own module, whose global generators are put where the keyed ones are."""
    training: Any = create_transform(
        16, is_training=True, auto_augment=SPEC, interpolation="bicubic"
    )
    timms = next(t for t in training.transforms if isinstance(t, auto_augment.RandAugment))
    changed = 0
    for key in range(40):
        with timm_parts.drawing(3, key):
            state, numpy_state = timm_parts._current.plain, timm_parts._current.numpy
            assert state is not None and numpy_state is not None
            random.setstate(state.getstate())
            with monkeypatch.context() as patched:
                patched.setattr(np.random, "choice", numpy_state.choice)
                wanted = np.asarray(timms(Image.fromarray(noise())))
        made = torch.from_numpy(noise().copy()).permute(2, 0, 1)[None]
        timm_parts.rand_augmented(made, SPEC, (3, key))
        np.testing.assert_array_equal(made[0].permute(1, 2, 0).numpy(), wanted)
        changed += not np.array_equal(wanted, noise())
    assert changed > 20


def test_the_strongest_posterization_keeps_no_bit() -> None:
    """Pillow refuses what timm asks it for there: a run would end in the middle."""
    ops = {op.name: op for op in timm_parts.rand_augment("rand-m10-mstd0-p1-inc1", 16).ops}
    with timm_parts.drawing(0):
        black = ops["PosterizeIncreasing"](Image.fromarray(noise()))
    assert not np.asarray(black).any()
    milder = timm_parts.rand_augment("rand-m7-mstd0-p1-inc1", 16).ops
    op = next(op for op in milder if op.name == "PosterizeIncreasing")
    with timm_parts.drawing(0):
        np.testing.assert_array_equal(op(Image.fromarray(noise())), noise() & 0b11000000)


def test_timm_itself_and_the_global_generators_stay_as_they_are() -> None:
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    timm_parts.rand_augmented(
        torch.zeros(1, 16, 16, 3, dtype=torch.uint8).permute(0, 3, 1, 2), SPEC, (1,)
    )
    assert (random.random(), np.random.rand()) == expected
    assert auto_augment.random is random


def test_numbers_are_not_drawn_outside_of_a_key() -> None:
    transform = timm_parts.rand_augment(SPEC, 16)
    with pytest.raises(AssertionError, match="outside"):
        transform(Image.fromarray(noise()))


def batches(root: Path, *, threads: int, rank: int = 0, ranks: int = 1, start: int = 0) -> list:
    split = tiny.opened(root).split("train")
    augment = Augmentation(crop_scale=(0.4, 1.0))
    make = views.augmented(split, seed=5, side=16, augment=augment, spec=SPEC)
    found = train_batches(
        split,
        split.stream(50, 5),
        batch=16,
        start_step=start,
        num_steps=8 - start,
        rank=rank,
        ranks=ranks,
        image_size=16,
        augment=augment,
        threads=threads,
        make=make,
    )
    return [batch.images for batch in found]


def test_images_are_the_same_for_any_threads_ranks_and_after_a_resume(tmp_path: Path) -> None:
    alone = batches(tmp_path, threads=1)
    for threads in (2, 7):
        for one, other in zip(alone, batches(tmp_path, threads=threads), strict=True):
            assert torch.equal(one, other)
    shares = [batches(tmp_path, threads=3, rank=rank, ranks=2) for rank in (0, 1)]
    for one, left, right in zip(alone, *shares, strict=True):
        assert torch.equal(one, torch.cat([left, right]))
    for one, other in zip(alone[5:], batches(tmp_path, threads=4, start=5), strict=True):
        assert torch.equal(one, other)
    # 50 images, 128 samples: the third epoch does not repeat the first.
    assert not torch.equal(alone[0], alone[3])


def test_threads_do_not_share_a_generator() -> None:
    def made(key: int) -> np.ndarray:
        image = torch.from_numpy(noise().copy()).permute(2, 0, 1)[None]
        for turn in range(5):
            timm_parts.rand_augmented(image, SPEC, (key, turn))
        return image.numpy()

    alone = [made(key) for key in range(64)]
    with ThreadPoolExecutor(8) as pool:
        for one, other in zip(alone, pool.map(made, range(64)), strict=True):
            np.testing.assert_array_equal(one, other)


# --- mixup, cutmix, erasing ---


def mix(recipe: FineTune, images: torch.Tensor, classes: torch.Tensor, first: int) -> torch.Tensor:
    return mixed_pairs(images, classes, recipe, num_classes=5, key=11, first=first)


def test_micro_batches_and_ranks_mix_the_same_pairs() -> None:
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(16) % 5
    whole = images.clone()
    targets = mix(ALL, whole, classes, 0)
    for size in (2, 8):
        parts = images.clone()
        found = [
            mix(ALL, parts[at : at + size], classes[at : at + size], at)
            for at in range(0, 16, size)
        ]
        assert torch.equal(parts, whole) and torch.equal(torch.cat(found), targets)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(16))
    torch.testing.assert_close(whole[0::2] + whole[1::2], images[0::2] + images[1::2])


def test_a_pair_is_mixed_as_timms_mixup_mixes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([1, 4])
    kinds = set()
    for first in range(0, 40, 2):
        made = images.clone()
        target = mix(ALL, made, classes, first)
        with timm_parts.drawing(11, first):
            numbers = timm_parts._current.numpy
            assert numbers is not None
            with monkeypatch.context() as patched:
                for name in ("rand", "beta", "randint"):
                    patched.setattr(np.random, name, getattr(numbers, name))
                timms = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=5)
                wanted, soft = timms(images.clone(), classes)
        assert torch.equal(made, wanted) and torch.equal(target, soft)
        kinds.add(bool((made[0] == images[0]).any()))
    assert kinds == {True, False}  # cutmix leaves pixels as they are, mixup none


def test_the_loss_of_mixed_pairs_is_timms_soft_target_cross_entropy() -> None:
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    targets = mix(ALL, torch.randn(8, 3, 8, 8), torch.arange(8) % 5, 0)
    torch.testing.assert_close(
        F.cross_entropy(logits, targets), SoftTargetCrossEntropy()(logits, targets)
    )


def test_erasing_follows_from_its_key_and_fills_with_unit_noise() -> None:
    erase = timm_parts.erasing(0.5, torch.device("cpu"))
    images = torch.full((400, 3, 32, 32), 9.0)
    for place, image in enumerate(images):
        with timm_parts.drawing(0, place):
            erase(image)
    again = torch.full((3, 32, 32), 9.0)
    with timm_parts.drawing(0, 7):
        erase(again)
    assert torch.equal(again, images[7])
    erased = images != 9.0
    share = erased.flatten(1).any(dim=1).float().mean().item()
    assert abs(share - 0.5) < 0.08  # three deviations of 400 draws
    noise = images[erased]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


# --- whole runs ---


def ended(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_stopped_and_resumed_run_is_the_undisturbed_one(tmp_path: Path) -> None:
    stage = tiny.stage(ALL, micro_batch=8)
    transfer.run(stage, tiny.context(tmp_path / "straight"))
    with pytest.raises(PreemptedError):
        context = tiny.context(tmp_path / "resumed", should_stop=tiny.StopAfter(5))
        transfer.run(stage, context)
    result = transfer.run(stage, tiny.context(tmp_path / "resumed"))
    straight, resumed = ended(tmp_path / "straight"), ended(tmp_path / "resumed")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    assert 0 <= result.metrics["acc1"] <= 1  # type: ignore[operator]  # a number


def test_micro_batches_change_rounding_only(tmp_path: Path) -> None:
    losses = []
    for size in (4, 16):
        rows = tiny.Rows()
        recipe = ALL.model_copy(update={"drop_path": 0.0})  # its noise is that of a forward pass
        transfer.run(
            tiny.stage(recipe, micro_batch=size), tiny.context(tmp_path / str(size), metrics=rows)
        )
        losses.append([row["loss"] for row in rows.rows])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("bad", ["randm9", "rand-x3", "augmix-m3"])
def test_what_is_no_rand_augment_is_refused_with_the_study(bad: str) -> None:
    with pytest.raises(ValueError, match="expected a RandAugment such as"):
        FineTune(duration=Duration(steps=1), rand_augment=bad)


# --- views of tests ---


@pytest.mark.parametrize("size", [(40, 61), (57, 33), (32, 32)])
@pytest.mark.parametrize("fraction", [0.875, 1.0])
def test_centre_is_torchvisions_resize_and_crop(size: tuple[int, int], fraction: float) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    short = round(24 / fraction)
    both = v2.Compose([v2.Resize(short, v2.InterpolationMode.BICUBIC), v2.CenterCrop(24)])
    wanted = np.asarray(both(Image.fromarray(image)))
    np.testing.assert_array_equal(views.centre_crop(image, 24, fraction), wanted)


def test_a_run_is_judged_by_its_middle_crop(tmp_path: Path) -> None:
    base = FineTune(duration=Duration(steps=4), batch=16)
    for name, recipe in (
        ("squash", base),
        ("all", base.model_copy(update={"crop": "centre", "crop_fraction": 1.0})),
        ("middle", base.model_copy(update={"crop": "centre", "crop_fraction": 0.5})),
    ):
        transfer.run(tiny.stage(recipe), tiny.context(tmp_path / name))
    values = {
        name: (tmp_path / name / "samples.parquet").read_bytes()
        for name in ("squash", "all", "middle")
    }
    assert values["squash"] == values["all"] != values["middle"]
