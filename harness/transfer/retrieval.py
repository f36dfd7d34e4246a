"""Retrieval: an image's caption among all captions, and a caption's image among all images.

Shapes: M images, P captions, E width of the shared space.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from harness.ledger.context import StageContext, StageResult
from harness.study.protocols import Retrieval
from harness.study.stages import StageFile
from harness.transfer.captions import Captions
from harness.transfer.predictions import solved
from harness.transfer.samples import write_samples, write_table
from harness.transfer.text_tasks import read_judged

CHUNK = 1024
"""Queries whose similarities are in memory at a time."""


def retrieval(stage: StageFile, ctx: StageContext) -> StageResult:
    """i2t_recallK: one of the image's captions is among the K nearest of all captions; t2i_recallK:
    the caption's image is among the K nearest images.
    """
    started = time.perf_counter()
    recipe = stage.config.recipe
    assert isinstance(recipe, Retrieval), f"{recipe} is no retrieval recipe"
    judged = read_judged(stage, ctx)
    texts, places = Captions(judged.split).all(judged.rows)
    image_P = torch.from_numpy(places)
    text_PE = judged.lit.texts(texts)
    rank_M = ranks(judged.image_ME, text_PE, torch.arange(len(judged.rows)), image_P)
    rank_P = ranks(text_PE, judged.image_ME, image_P, torch.arange(len(judged.rows)))
    keys = judged.keys
    nth = torch.arange(len(image_P)) - torch.searchsorted(image_P, image_P)
    of_image = zip(image_P.tolist(), nth.tolist(), strict=True)
    image_of = {f"{keys[image]}#{number}": keys[image] for image, number in of_image}
    text_keys = list(image_of)
    found = {
        f"{name}_recall{k}": (own_keys, (rank < k).double())
        for name, own_keys, rank in (("i2t", keys, rank_M), ("t2i", text_keys, rank_P))
        for k in recipe.recalls
    }
    ctx.check_lease()
    if ctx.rank == 0:
        write_table(
            ctx.folder / "predictions.parquet",
            {
                "query": ["image"] * len(keys) + ["text"] * len(text_keys),
                "key": keys + text_keys,
                "rank": torch.cat([rank_M, rank_P]),
            },
        )
        write_samples(ctx.folder, found, image_of)
    metrics: dict[str, float | None] = {name: own.mean().item() for name, (_, own) in found.items()}
    sizes = {"n_test": float(len(keys)), "n_captions": float(len(texts))}
    return solved(stage, metrics | sizes, started)


def ranks(query_AE: Tensor, answer_CE: Tensor, group_A: Tensor, group_C: Tensor) -> Tensor:
    """int64 [A]: how many answers are nearer to a query than the nearest right one.

    An answer is right if it is of the query's group. Wrong answers at the same distance count as
    nearer: a tower that gives all the same vector finds nothing.
    """
    found = []
    for query_QE, group_Q in zip(query_AE.split(CHUNK), group_A.split(CHUNK), strict=True):
        score_QC = query_QE @ answer_CE.T
        is_right_QC = group_Q[:, None] == group_C[None]
        best_Q1 = score_QC.masked_fill(~is_right_QC, -torch.inf).amax(dim=1, keepdim=True)
        found.append(((score_QC >= best_Q1) & ~is_right_QC).sum(dim=1))
    return torch.cat(found)
