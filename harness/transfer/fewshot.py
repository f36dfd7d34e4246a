"""Few-shot: logistic regression on K labelled images of each class, over several splits.

Shapes: M images, D width, S chosen images.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.ledger.context import StageContext, StageResult
from harness.models.init import generator_of
from harness.study.protocols import FewShot
from harness.study.stages import StageFile
from harness.transfer import logistic
from harness.transfer.features import Features, read_features
from harness.transfer.predictions import write_predictions


def few_shot(stage: StageFile, ctx: StageContext) -> StageResult:
    """acc1_<K>shot, mean over the splits, and its standard deviation acc1_<K>shot_std."""
    started = time.perf_counter()
    recipe = stage.config.recipe
    assert isinstance(recipe, FewShot), f"{recipe} is no few-shot protocol"
    train, test = read_features(stage, ctx)
    extracted = time.perf_counter()

    metrics: dict[str, float | None] = {"n_test": float(len(test.class_M))}
    columns: dict[str, list[int]] = {"split": [], "shots": []}
    predictions = []
    for shots in recipe.shots:
        accuracies = []
        for split in range(recipe.splits):
            chosen_S = choose(train.class_M, shots, split)
            pred_M = _predict(train, test, chosen_S, stage.config.num_classes, recipe.penalty)
            accuracies.append((pred_M == test.class_M).double().mean().item())
            predictions.append(pred_M)
            columns["split"] += [split] * len(pred_M)
            columns["shots"] += [shots] * len(pred_M)
        metrics[f"acc1_{shots}shot"] = statistics.fmean(accuracies)
        metrics[f"acc1_{shots}shot_std"] = (
            statistics.stdev(accuracies) if len(accuracies) > 1 else None
        )

    ctx.check_lease()
    if ctx.rank == 0:
        repeats = len(predictions)
        write_predictions(
            ctx.folder,
            test.keys * repeats,
            test.class_M.repeat(repeats),
            torch.cat(predictions),
            columns,
        )
    ended = time.perf_counter()
    return StageResult(
        metrics=metrics,
        steps=0,
        samples=0,
        flops=stage.flops,
        wall_s={
            "setup": 0.0,
            "train": ended - extracted,
            "eval": extracted - started,
            "checkpoint": 0.0,
            "total": ended - started,
        },
    )


def choose(class_M: Tensor, shots: int, split: int) -> Tensor:
    """index_S: `shots` images of each class, or all where a class has fewer.

    A function of the split number alone, not of the stage's seed: every model is judged on the
    same images. Fewer shots are a subset of more.
    """
    order_M = torch.randperm(len(class_M), generator=generator_of(split, "few-shot"))
    chosen = [order_M[class_M[order_M] == cls][:shots] for cls in class_M.unique()]
    return torch.cat(chosen)


def _predict(
    train: Features, test: Features, chosen_S: Tensor, num_classes: int, penalty: float
) -> Tensor:
    """Test classes by a model fitted on the chosen images.

    Features are centred on the chosen images and brought to unit length, as few images do not
    tell the deviation of a feature (Assran et al. 2022, arXiv 2204.07141, appendix).
    """
    shots_SD = train.values_MD[chosen_S]
    centre_D = shots_SD.mean(dim=0)
    weights = logistic.fit(
        F.normalize(shots_SD - centre_D, dim=1), train.class_M[chosen_S], num_classes, penalty
    )
    return logistic.logits(weights, F.normalize(test.values_MD - centre_D, dim=1)).argmax(dim=1)
