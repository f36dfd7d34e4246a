"""Low-shot: K labelled images of each class, over several splits. Here by logistic regression.

Shapes: M images, D width, S chosen images.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.ledger.context import StageContext, StageResult
from harness.models.init import generator_of
from harness.study.protocols import FewShot
from harness.study.stages import StageFile
from harness.transfer import logistic
from harness.transfer.features import Features, read_features
from harness.transfer.parts import stop_if_asked
from harness.transfer.predictions import solved, write_predictions
from harness.transfer.samples import write_samples

Runs = Mapping[tuple[int, int], Tensor]
"""(shots, split) -> something of that run."""


def few_shot(stage: StageFile, ctx: StageContext) -> StageResult:
    """acc1_<K>shot, mean over the splits, its standard deviation acc1_<K>shot_std, and how far the
    fits converged.
    """
    started = time.perf_counter()
    recipe = stage.config.recipe
    assert isinstance(recipe, FewShot), f"{recipe} is no few-shot protocol"
    if ctx.rank:
        return solved(stage, {}, started)
    chosen: dict[tuple[int, int], Tensor] = {}

    def needed(class_M: Tensor) -> Tensor:
        """Only the images of some split are read; there may be a million others."""
        chosen.update(choices(class_M, recipe.shots, recipe.splits))
        return torch.cat(list(chosen.values())).unique()

    train, test = read_features(stage, ctx, needed)
    places_M = torch.cat(list(chosen.values())).unique()
    predictions, fits = {}, []
    for run, chosen_S in chosen.items():
        stop_if_asked(ctx)
        predictions[run], fit = _predict(
            train,
            test,
            torch.searchsorted(places_M, chosen_S),
            stage.config.num_classes,
            recipe.penalty,
            torch.device(stage.execution.device),
        )
        fits.append(fit)
    metrics = judge(ctx, test.keys, test.class_M, predictions)
    return solved(stage, metrics | logistic.summary(fits, "few_shot"), started)


def choices(class_M: Tensor, shots: Sequence[int], splits: int) -> dict[tuple[int, int], Tensor]:
    """(shots, split) -> index_S, for all of them."""
    return {(k, split): choose(class_M, k, split) for k in shots for split in range(splits)}


def choose(class_M: Tensor, shots: int, split: int) -> Tensor:
    """index_S: `shots` images of each class, or all where a class has fewer.

    A function of the split number alone, not of the stage's seed: every model is judged on the
    same images. Fewer shots are a subset of more. Class by class.
    """
    order_M = torch.randperm(len(class_M), generator=generator_of(split, "few-shot"))
    chosen_S = order_M[rank_in_class(class_M[order_M]) < shots]
    return chosen_S[torch.argsort(class_M[chosen_S], stable=True)]


def rank_in_class(class_M: Tensor) -> Tensor:
    """int64 [M]: how many images of its class come before an image."""
    order_M = torch.argsort(class_M, stable=True)
    counts_Q = torch.bincount(class_M)
    first_Q = counts_Q.cumsum(0) - counts_Q
    rank_M = torch.empty_like(order_M)
    rank_M[order_M] = torch.arange(len(class_M), device=class_M.device) - first_Q[class_M[order_M]]
    return rank_M


def judge(
    ctx: StageContext, keys: Sequence[str], class_M: Tensor, predictions: Runs
) -> dict[str, float | None]:
    """Accuracy by number of shots: the mean over splits and its standard deviation.

    Leaves predictions.parquet, and samples.parquet: how often an image was right over the splits.
    """
    metrics: dict[str, float | None] = {"n_test": float(len(class_M))}
    by_image: dict[str, tuple[Sequence[str], Tensor]] = {}
    for shots in dict.fromkeys(shots for shots, _ in predictions):
        right = [(pred == class_M).double() for (k, _), pred in predictions.items() if k == shots]
        accuracies = [right_M.mean().item() for right_M in right]
        metrics[f"acc1_{shots}shot"] = statistics.fmean(accuracies)
        metrics[f"acc1_{shots}shot_std"] = (
            statistics.stdev(accuracies) if len(accuracies) > 1 else None
        )
        by_image[f"acc1_{shots}shot"] = keys, torch.stack(right).mean(dim=0)
    num = len(keys)
    columns = {
        "split": [split for _, split in predictions for _ in range(num)],
        "shots": [shots for shots, _ in predictions for _ in range(num)],
    }
    ctx.check_lease()
    write_predictions(
        ctx.folder,
        list(keys) * len(predictions),
        class_M.repeat(len(predictions)),
        torch.cat(list(predictions.values())),
        columns,
    )
    write_samples(ctx.folder, by_image)
    return metrics


def _predict(
    train: Features,
    test: Features,
    chosen_S: Tensor,
    num_classes: int,
    penalty: float,
    device: torch.device,
) -> tuple[Tensor, logistic.Fit]:
    """Test classes by a model fitted on the chosen images, and the fit.

    Features are centred on the chosen images and brought to unit length, as few images do not
    tell the deviation of a feature (Assran et al. 2022, arXiv 2204.07141, appendix).
    """
    shots_SD, class_S = train.values_MD[chosen_S].to(device), train.class_M[chosen_S].to(device)
    centre_D = shots_SD.mean(dim=0)
    fit = logistic.fit(F.normalize(shots_SD - centre_D, dim=1), class_S, num_classes, penalty)
    test_MD = F.normalize(test.values_MD.to(device) - centre_D, dim=1)
    return logistic.logits(fit.weights, test_MD).argmax(dim=1).cpu(), fit
