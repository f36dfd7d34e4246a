"""The built-in images are hard enough: more of them and a bigger model still win, over seeds."""

import dataclasses
import statistics
from pathlib import Path

import pytest
import tiny

from harness.study.recipes import Duration, Model, WspRecipe
from harness.study.scenes_spec import HASHTAGS
from harness.study.sizes import SIZES
from harness.study.stages import Images
from harness.train.loop import train

pytestmark = pytest.mark.long

SEEDS = (0, 1, 2)
T_975 = 4.303
"""Of Student's t with len(SEEDS) - 1 = 2 degrees of freedom."""
RECIPE = WspRecipe(duration=Duration(steps=320), batch=32, lr=4e-3, val_images=1000)


def val_loss(folder: Path, size: str, images: int, seed: int) -> float:
    file, shape = tiny.stage(RECIPE), SIZES[size]
    config = file.config.model_copy(
        update={
            "model": Model(
                width=shape.width,
                depth=shape.depth,
                heads=shape.heads,
                patch=shape.patch,
                image_size=24,
            ),
            "images": Images(dataset="scenes", fingerprint="", split="pretrain", images=images),
            "num_classes": len(HASHTAGS),
            "seed": seed,
        }
    )
    execution = file.execution.model_copy(update={"dataset_path": "scenes-4k", "eval_points": 1})
    file = file.model_copy(update={"config": config, "execution": execution})
    context = tiny.context(folder / f"{size}-{images}-{seed}")
    done = train(file, dataclasses.replace(context, root=folder))
    return float(done.metrics["val_loss"])  # type: ignore[arg-type]  # wsp has it


def interval(worse: list[float], better: list[float]) -> tuple[float, float]:
    """95 % interval of the mean gain, paired by seed."""
    gains = [a - b for a, b in zip(worse, better, strict=True)]
    half = T_975 * statistics.stdev(gains) / len(gains) ** 0.5
    return statistics.fmean(gains) - half, statistics.fmean(gains) + half


def test_more_images_and_a_bigger_model_lower_the_held_out_loss(tmp_path: Path) -> None:
    arms = {"best": ("d32x3", 4000), "few images": ("d32x3", 250), "small": ("d8x2", 4000)}
    loss = {
        arm: [val_loss(tmp_path, size, images, seed) for seed in SEEDS]
        for arm, (size, images) in arms.items()
    }
    for arm in ("few images", "small"):
        low, high = interval(loss[arm], loss["best"])
        assert low > 0, (arm, low, high, loss)
