"""k-NN: the nearest training images vote on the class of a test image.

Source: the protocol of DINO (Caron et al. 2021, arXiv 2104.14294), after Wu et al. 2018 (arXiv
1805.01978, sec. 3.4). Shapes: M images, D width, B test images at a time, K neighbours, Q classes.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.ledger.context import StageContext, StageResult
from harness.study.protocols import Knn
from harness.study.stages import StageFile
from harness.transfer.features import read_features
from harness.transfer.predictions import judge, solved

SIMILARITIES = 2**27
"""How many are held at a time: half a GiB of float32."""


def knn(stage: StageFile, ctx: StageContext) -> StageResult:
    """acc1 on the test split."""
    started = time.perf_counter()
    recipe = stage.config.recipe
    assert isinstance(recipe, Knn), f"{recipe} is no k-NN"
    if ctx.rank:
        return solved(stage, {}, started)
    train, test = read_features(stage, ctx)
    pred_M = vote(
        train.values_MD.to(stage.execution.device),
        train.class_M,
        test.values_MD,
        stage.config.num_classes,
        recipe.k,
        recipe.temperature,
    )
    return solved(stage, judge(ctx, test.keys, test.class_M, pred_M), started)


def vote(
    train_MD: Tensor,
    class_M: Tensor,
    test_MD: Tensor,
    num_classes: int,
    k: int,
    temperature: float,
) -> Tensor:
    """pred_M, on the CPU: the class with the largest sum of exp(cosine / temperature).

    Sums run over the k training images of the largest cosine, or over all if there are fewer; of
    classes with equal sums the first wins. Not centred. Works on the device of `train_MD`.
    """
    train_MD = F.normalize(train_MD, dim=1)
    batch = max(1, SIMILARITIES // len(train_MD))
    predictions = []
    for test_BD in test_MD.split(batch):
        cosine_BM = F.normalize(test_BD.to(train_MD.device), dim=1) @ train_MD.T
        nearest = cosine_BM.topk(min(k, len(train_MD)), dim=1)
        # On the CPU: CUDA adds the votes in an order of its own.
        weight_BK = (nearest.values.cpu().double() / temperature).exp()
        votes_BQ = torch.zeros(len(test_BD), num_classes, dtype=torch.float64)
        votes_BQ.scatter_add_(1, class_M.cpu()[nearest.indices.cpu()], weight_BK)
        predictions.append(votes_BQ.argmax(dim=1))
    return torch.cat(predictions)
