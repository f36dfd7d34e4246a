"""A linear head trained by SGD or LARS on frozen features, as MAE probes (He et al. 2022).

Shapes: M images, B images of a batch, D width, Q classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.ledger.context import StageContext, StageResult
from harness.models.init import generator_of
from harness.study.protocols import SgdProbe
from harness.study.stages import StageFile
from harness.transfer.features import read_features
from harness.transfer.lars import Lars
from harness.transfer.parts import stop_if_asked
from harness.transfer.predictions import judge, solved


def sgd_probe(stage: StageFile, ctx: StageContext) -> StageResult:
    """acc1 on the test split."""
    started = time.perf_counter()
    recipe = stage.config.recipe
    assert isinstance(recipe, SgdProbe), f"{recipe} is no probe by SGD"
    if ctx.rank:
        return solved(stage, {}, started)
    device = torch.device(stage.execution.device)
    train, test = read_features(stage, ctx)
    model = fit(
        train.values_MD.to(device),
        train.class_M.to(device),
        stage.config.num_classes,
        recipe,
        stage.config.seed,
        lambda: stop_if_asked(ctx),
    )
    with torch.inference_mode():
        pred_M = model(test.values_MD.to(device)).argmax(dim=1).cpu()
    return solved(stage, judge(ctx, test.keys, test.class_M, pred_M), started)


def head(width: int, num_classes: int, seed: int) -> nn.Sequential:
    """Batch norm without weights of its own, then a linear layer of N(0, 0.01), biases 0."""
    linear = nn.Linear(width, num_classes)
    nn.init.normal_(linear.weight, std=0.01, generator=generator_of(seed, "sgd_probe"))
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), linear)


def rate(epoch: float, warmup: float, epochs: float) -> float:
    """Share of the peak learning rate after so many epochs: linear from 0, then a half cosine."""
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def fit(
    train_MD: Tensor,
    class_M: Tensor,
    num_classes: int,
    recipe: SgdProbe,
    seed: int,
    after_step: Callable[[], None] = lambda: None,
) -> nn.Sequential:
    """The trained head, on the device of the features and in evaluation mode.

    An epoch is in an order of its own, a function of (seed, epoch); its last images that fill no
    batch are left out. A batch has at most as many images as there are.
    """
    device, num = train_MD.device, len(train_MD)
    batch = min(recipe.batch, num)
    model = head(train_MD.shape[1], num_classes, seed).to(device).train()
    peak = recipe.base_lr * batch / 256
    make = Lars if recipe.optimizer == "lars" else torch.optim.SGD
    optimizer = make(
        model.parameters(), lr=peak, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    steps = num // batch
    for epoch in range(recipe.epochs):
        order_M = torch.randperm(num, generator=generator_of(seed, "sgd_probe", epoch)).to(device)
        for step in range(steps):
            chosen_B = order_M[step * batch : (step + 1) * batch]
            share = rate(epoch + step / steps, recipe.warmup_epochs, recipe.epochs)
            optimizer.param_groups[0]["lr"] = peak * share
            optimizer.zero_grad()
            F.cross_entropy(model(train_MD[chosen_B]), class_M[chosen_B]).backward()
            optimizer.step()
            after_step()
    return model.eval()
