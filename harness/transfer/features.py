"""One pass of the frozen encoder over the labelled images: all that the solvers need.

Shapes: M images, D width.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.data import loader
from harness.data.dataset import Split, open_dataset
from harness.ledger.context import StageContext, StageResult
from harness.models.heads import pooled
from harness.models.init import initialize
from harness.models.pixels import standardise
from harness.models.vit import VisionEncoder
from harness.models.weight_files import write_atomically
from harness.models.weights import start_of
from harness.study.protocols import Features as FeaturesRecipe
from harness.study.recipes import Pool
from harness.study.stages import StageFile

BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Features:
    """Pooled encoder outputs of some images, with their classes."""

    values_MD: Tensor
    """float32."""
    class_M: Tensor
    """int64."""
    keys: list[str]


def features(stage: StageFile, ctx: StageContext) -> StageResult:
    """features/{train,test}.safetensors: values float32 [M, D], classes and rows int64 [M]."""
    started = time.perf_counter()
    recipe = stage.config.recipe
    assert isinstance(recipe, FeaturesRecipe), f"{recipe} is no pass of features"
    torch.set_num_threads(stage.execution.threads)
    encoder = VisionEncoder(stage.config.model)
    initialize(encoder, stage.config.seed)
    if ctx.upstream_weights is not None:
        encoder.load_state_dict(start_of(stage.config, ctx.upstream_weights, encoder))
    device = torch.device(stage.execution.device)
    encoder = encoder.to(device).eval()
    data = open_dataset(stage.execution.dataset_path, ctx.root)
    train = data.split(stage.config.images.split)
    test = data.split(data.meta.split_for("test"))
    ready = time.perf_counter()
    parts = {
        "train": (train, train.subset(stage.config.images.images)),
        "test": (test, test.subset(test.num_samples)),
    }
    for name, (split, rows) in parts.items():
        found = _pass(encoder, split, rows, recipe.pool, device)
        ctx.check_lease()
        if ctx.rank == 0:
            (ctx.folder / "features").mkdir(exist_ok=True)
            write_atomically(
                ctx.folder / "features" / f"{name}.safetensors",
                lambda path, found=found: save_file(
                    {"values": found.values_MD, "classes": found.class_M}, path
                ),
            )
    ended = time.perf_counter()
    return StageResult(
        metrics={"n_train": float(stage.config.images.images), "n_test": float(test.num_samples)},
        steps=0,
        samples=0,
        flops=stage.flops,
        wall_s={
            "setup": ready - started,
            "train": 0.0,
            "eval": ended - ready,
            "checkpoint": 0.0,
            "total": ended - started,
        },
    )


def read_features(stage: StageFile, ctx: StageContext) -> tuple[Features, Features]:
    """Features of the stage's training images and of the test split, from the stage upstream."""
    data = open_dataset(stage.execution.dataset_path, ctx.root)
    train = data.split(stage.config.images.split)
    test = data.split(data.meta.split_for("test"))
    folder = ctx.upstream["features"] / "features"
    return (
        _read(folder / "train.safetensors", train, train.subset(stage.config.images.images)),
        _read(folder / "test.safetensors", test, test.subset(test.num_samples)),
    )


def _read(path: Path, split: Split, rows: np.ndarray) -> Features:
    found = load_file(path)
    return Features(
        values_MD=found["values"],
        class_M=found["classes"],
        keys=[str(split.keys[row]) for row in rows],
    )


def _pass(
    encoder: VisionEncoder, split: Split, indices: np.ndarray, pool: Pool, device: torch.device
) -> Features:
    size = encoder.patch_embed.img_size[0]
    values, classes = [], []
    # bfloat16 products on CUDA, as in training; the pooled features leave in float32.
    half = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    with torch.inference_mode(), half:
        for batch in loader.eval_batches(split, indices, batch=BATCH, image_size=size):
            images_BCHW = standardise(batch.images.to(device, non_blocking=True))
            values.append(pooled(encoder, images_BCHW, pool).float().cpu())
            classes.append(batch.class_ids)
    return Features(
        values_MD=torch.cat(values),
        class_M=torch.cat(classes),
        keys=[str(split.keys[index]) for index in indices],
    )
