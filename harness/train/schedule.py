"""Learning rate as a closed form of the samples seen, so that a resumed run needs no state."""

from __future__ import annotations

import math

from harness.study.recipes import Duration, Optimization


def lr_at(recipe: Optimization, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0, of a run of `steps`.

    Warm-up rises linearly from 0 and reaches lr at its last step; afterwards `cosine` is half a
    cosine down to lr_min at the end, `constant` stays, `wsd` stays until the last `cooldown` of
    the run and then falls linearly to lr_min (Haegele et al. 2024, arXiv 2405.18392).
    """
    total = steps * recipe.batch
    seen = step * recipe.batch
    warm = samples_of(recipe.warmup, total, recipe.batch)
    if seen + recipe.batch <= warm:
        return recipe.lr * (seen + recipe.batch) / warm
    if recipe.schedule == "constant":
        return recipe.lr
    if recipe.schedule == "cosine":
        progress = max(0.0, seen - warm) / (total - warm)
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        fall = samples_of(recipe.cooldown, total, recipe.batch)
        factor = min(1.0, (total - seen) / fall) if fall else 1.0
    return recipe.lr_min + (recipe.lr - recipe.lr_min) * factor


def samples_of(share: float | Duration, total: int, batch: int) -> float:
    """Samples of a part of a run of `total` samples. Its epochs were converted when planned."""
    if not isinstance(share, Duration):
        return share * total
    assert share.unit != "epochs", "a plan gives warm-up and cooldown in samples"
    return share.amount * (batch if share.unit == "steps" else 1)
