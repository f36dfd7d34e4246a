"""The oracle of the loop: the same training in plain PyTorch, without harness and DeepSpeed."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import tiny
import torch
from torch.nn import functional as F

from harness.data import loader
from harness.data.loader import Batch
from harness.models.heads import Classifier
from harness.models.init import generator_of, initialize, seed_of
from harness.models.mae import Mae
from harness.models.pixels import standardise
from harness.models.vit import VisionEncoder
from harness.study.protocols import FineTune
from harness.study.recipes import MaeRecipe, WspRecipe
from harness.train.groups import parameter_groups
from harness.train.schedule import lr_at


def dense_targets(batch: Batch) -> torch.Tensor:
    dense = torch.zeros(len(batch.images), tiny.NUM_HASHTAGS)
    for row, (begin, end) in enumerate(itertools.pairwise(batch.label_offsets.tolist())):
        dense[row, batch.label_ids[begin:end]] = 1 / (end - begin)
    return dense


def plain_loop(
    recipe: MaeRecipe | WspRecipe | FineTune, root: Path
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and encoder of the same training without harness and DeepSpeed."""
    split = tiny.opened(root).split("train" if isinstance(recipe, FineTune) else "pretrain")
    model: torch.nn.Module
    if isinstance(recipe, MaeRecipe):
        model = Mae(tiny.MODEL, recipe)
    else:
        outputs = tiny.NUM_CLASSES if isinstance(recipe, FineTune) else tiny.NUM_HASHTAGS
        model = Classifier(VisionEncoder(tiny.MODEL), outputs, recipe.pool)
    initialize(model, 0)
    layer_decay = recipe.layer_decay if isinstance(recipe, FineTune) else 1.0
    groups = parameter_groups(
        model, depth=2, weight_decay=recipe.weight_decay, layer_decay=layer_decay
    )
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas)
    steps = int(recipe.duration.amount)
    losses = []
    batches = loader.train_batches(
        split,
        split.stream(200, 0),
        batch=recipe.batch,
        start_step=0,
        num_steps=steps,
        rank=0,
        ranks=1,
        image_size=16,
        augment=recipe.augment,
    )
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(recipe, step, steps) * group["lr_scale"]
        images = standardise(batch.images)
        if isinstance(recipe, MaeRecipe):
            noise = torch.rand(recipe.batch, 16, generator=generator_of(0, "mask", step))
            loss = model(images, noise)[0]
        elif isinstance(recipe, FineTune):
            smoothing = recipe.label_smoothing
            loss = F.cross_entropy(model(images), batch.class_ids, label_smoothing=smoothing)
        else:
            target_BQ = dense_targets(batch)
            if recipe.mixup:
                rng = np.random.default_rng(seed_of(0, "mixup", step))
                drawn = rng.beta(recipe.mixup, recipe.mixup, recipe.batch // 2)
                share_B = torch.tensor(drawn, dtype=torch.float32).repeat_interleave(2)
                pair = [place ^ 1 for place in range(recipe.batch)]
                share_B1 = share_B[:, None, None, None]
                images = share_B1 * images + (1 - share_B1) * images[pair]
                target_BQ = share_B[:, None] * target_BQ + (1 - share_B[:, None]) * target_BQ[pair]
            loss = F.cross_entropy(model(images), target_BQ)
        optimizer.zero_grad()
        loss.backward()
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses, model.encoder.state_dict()  # type: ignore[union-attr]  # both have one
