"""Linear probe: logistic regression on frozen features, its penalty chosen on held-out images.

Shapes: M images, D width, Q classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.ledger.context import StageContext, StageResult
from harness.study.protocols import LinearProbe
from harness.study.stages import StageFile
from harness.transfer import logistic
from harness.transfer.features import read_features
from harness.transfer.fewshot import rank_in_class
from harness.transfer.parts import stop_if_asked
from harness.transfer.predictions import judge, solved

PATH_TOLERANCE = 1e-3
"""To tell which power of ten is the best penalty; weights are fitted to it anew, to
`logistic.TOLERANCE`. Converging on the weak penalties, too, took five times as long as all else."""
HELD_OUT = 5
"""One training image in so many, of each class, chooses the penalty."""


def linear_probe(stage: StageFile, ctx: StageContext) -> StageResult:
    """acc1 on the test split, the penalty that was chosen, and how far the last fit converged."""
    started = time.perf_counter()
    recipe = stage.config.recipe
    assert isinstance(recipe, LinearProbe), f"{recipe} is no linear probe"
    if ctx.rank:
        return solved(stage, {}, started)
    num_classes, device = stage.config.num_classes, torch.device(stage.execution.device)
    train, test = read_features(stage, ctx)

    train_MD, class_M = train.values_MD.to(device), train.class_M.to(device)
    shift_D, scale_D = train_MD.mean(dim=0), train_MD.std(dim=0) + 1e-6
    # In place: the features of a million images are gigabytes.
    train_MD.sub_(shift_D).div_(scale_D)
    test_MD = test.values_MD.to(device).sub_(shift_D).div_(scale_D)
    penalty, fits = choose_penalty(
        train_MD, class_M, num_classes, recipe.penalties, lambda: stop_if_asked(ctx)
    )
    last = logistic.fit(train_MD, class_M, num_classes, penalty, start=fits[penalty].weights)
    pred_M = logistic.logits(last.weights, test_MD).argmax(dim=1).cpu()
    metrics = judge(ctx, test.keys, test.class_M, pred_M)
    logistic.summary(list(fits.values()), "linear_probe: choice of a penalty")
    solver = logistic.summary([last], "linear_probe")
    return solved(stage, {**metrics, "penalty": penalty, **solver}, started)


def choose_penalty(
    features_MD: Tensor,
    class_M: Tensor,
    num_classes: int,
    penalties: tuple[float, ...],
    before_fit: Callable[[], None] = lambda: None,
) -> tuple[float, dict[float, logistic.Fit]]:
    """The penalty with the best accuracy on held-out images, and penalty -> fit of those tried.

    The path is walked from strong to weak, each fit starting where the last one ended. Of equal
    accuracies the lower held-out loss decides.
    """
    held_M = held_out(class_M)
    fit_MD, fit_class_M = features_MD[~held_M], class_M[~held_M]
    held_MD, held_class_M = features_MD[held_M], class_M[held_M]
    best: tuple[tuple[float, float], float] | None = None
    fits: dict[float, logistic.Fit] = {}
    weights: Tensor | None = None
    for penalty in sorted(penalties, reverse=True):
        before_fit()
        fits[penalty] = logistic.fit(
            fit_MD, fit_class_M, num_classes, penalty, start=weights, tolerance=PATH_TOLERANCE
        )
        if len(held_MD) == 0:  # one image a class: nothing to choose on, so the strongest
            return penalty, fits
        weights = fits[penalty].weights
        logits_MQ = logistic.logits(weights, held_MD)
        accuracy = (logits_MQ.argmax(dim=1) == held_class_M).double().mean().item()
        loss = F.cross_entropy(logits_MQ, held_class_M).item()
        if best is None or (accuracy, -loss) > best[0]:
            best = (accuracy, -loss), penalty
    assert best is not None, "no penalties to choose from"
    return best[1], fits


def held_out(class_M: Tensor) -> Tensor:
    """Mask of the images kept for the choice: every fifth of each class, in the order given."""
    return rank_in_class(class_M) % HELD_OUT == HELD_OUT - 1
