"""One pass of the frozen encoder over the labelled images: all that the solvers need.

Shapes: M images, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harness.data import loader
from harness.data.dataset import Split, open_dataset
from harness.ledger.context import StageContext
from harness.models.heads import pooled
from harness.models.init import initialize
from harness.models.pixels import standardise
from harness.models.vit import VisionEncoder
from harness.models.weights import start_of
from harness.study.recipes import Pool, StageFile

BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Features:
    """Pooled encoder outputs of some images, with their classes."""

    values_MD: Tensor
    """float32."""
    class_M: Tensor
    """int64."""
    keys: list[str]


Choice = Callable[[Tensor], Tensor]
"""Classes of the training images -> places of those that are needed, ascending."""


def extract(
    stage: StageFile, ctx: StageContext, pool: Pool, needed: Choice | None = None
) -> tuple[Features, Features]:
    """Features of the stage's training images (only of the `needed` ones) and of the test split."""
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
    chosen = train.subset(stage.config.images.images)
    if needed is not None:
        chosen = chosen[needed(torch.from_numpy(train.class_ids[chosen])).numpy()]
    return (
        _pass(encoder, train, chosen, pool, device),
        _pass(encoder, test, test.subset(test.num_samples), pool, device),
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
