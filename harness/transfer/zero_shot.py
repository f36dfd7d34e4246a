"""Zero-shot classification: the class whose name, in prompts, is nearest to the image.

Source: Radford et al. 2021 (arXiv 2103.00020), sec. 3.1. Shapes: M images, Q classes, E width of
the shared space.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.errors import DataError
from harness.ledger.context import StageContext, StageResult
from harness.models.lit import TrainedLit
from harness.study.protocols import ZeroShot
from harness.study.stages import StageFile
from harness.study.words import names_of
from harness.transfer.predictions import solved, write_predictions
from harness.transfer.samples import write_samples
from harness.transfer.text_tasks import read_judged

TOP = 5


def zero_shot(stage: StageFile, ctx: StageContext) -> StageResult:
    """acc1, and acc5 where there are more than five classes."""
    started = time.perf_counter()
    recipe = stage.config.recipe
    assert isinstance(recipe, ZeroShot), f"{recipe} is no zero-shot recipe"
    judged = read_judged(stage, ctx)
    label_M = torch.from_numpy(judged.split.class_ids[judged.rows].astype("int64"))
    if (label_M < 0).any():
        row = int(judged.rows[int((label_M < 0).nonzero()[0])])
        raise DataError(f"{judged.split.where(row)}: has no class; zero_shot needs one per image")
    classes, names = judged.data.meta.classes, recipe.names
    assert not isinstance(names, str) and not isinstance(recipe.templates, str), "not resolved"
    class_QE = class_vectors(judged.lit, names_of(classes, names), recipe.templates)
    score_MQ = judged.image_ME @ class_QE.T
    best_MK = score_MQ.topk(min(TOP, len(classes)), dim=1).indices
    is_right_MK = best_MK == label_M[:, None]
    right = {"acc1": is_right_MK[:, 0].double()}
    if len(classes) > TOP:
        right[f"acc{TOP}"] = is_right_MK.any(dim=1).double()
    ctx.check_lease()
    if ctx.rank == 0:
        write_predictions(ctx.folder, judged.keys, label_M, best_MK[:, 0])
        write_samples(ctx.folder, {name: (judged.keys, own) for name, own in right.items()})
    metrics: dict[str, float | None] = {name: own.mean().item() for name, own in right.items()}
    return solved(stage, metrics | {"n_test": float(len(label_M))}, started)


def class_vectors(
    lit: TrainedLit, names: Sequence[Sequence[str]], templates: Sequence[str]
) -> Tensor:
    """[Q, E]: of each class the mean over its names in all templates, made length 1 again."""
    prompts = [t.replace("{}", name) for own in names for name in own for t in templates]
    text_PE = lit.texts(prompts)
    counts = [len(own) * len(templates) for own in names]
    return F.normalize(torch.stack([part.mean(dim=0) for part in text_PE.split(counts)]), dim=-1)
