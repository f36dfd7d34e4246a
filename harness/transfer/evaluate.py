"""A fine-tuned model on another test set of (some of) its classes, nothing trained.

One rule for all: an answer is right if it is among the image's classes. With one class an image
that is top-1 accuracy (ImageNetV2, Recht et al. 2019); with several it is ReaL's (Beyer et al.
2020), which leaves images without a class out; and with the ImageNet classes that an object's class
stands for it is ObjectNet's (Barbu et al. 2019).

Shapes: B images of a batch, M judged images, Q classes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.data import loader
from harness.data.dataset import Dataset, Split, open_dataset
from harness.data.loader import MakeBatch
from harness.errors import DataError, UserError
from harness.ledger.context import StageContext, StageResult
from harness.models.classifiers import Judge, read_classifier
from harness.models.pixels import standardise
from harness.study.protocols import Evaluate
from harness.study.stages import StageFile
from harness.transfer import views
from harness.transfer.features import BATCH, Progress, chunks, half_on_cuda
from harness.transfer.parts import Part, make_parts
from harness.transfer.predictions import solved
from harness.transfer.samples import write_samples, write_table

Answers = list[frozenset[int]]
"""Of each image the outputs of the model that are right."""


def evaluate(stage: StageFile, ctx: StageContext) -> StageResult:
    """acc1; n_test judged images, n_left_out without a class.

    Leaves predictions.parquet with key, pred and `right`, the classes that are.
    """
    started = time.perf_counter()
    recipe = stage.config.recipe
    assert isinstance(recipe, Evaluate), f"{recipe} is no evaluation"
    assert not isinstance(recipe.names, str), "not resolved"
    torch.set_num_threads(stage.execution.threads)
    device = torch.device(stage.execution.device)
    judge = read_classifier(ctx.upstream["model"])
    data = open_dataset(stage.execution.dataset_path, ctx.root)
    split = data.split(stage.config.images.split)
    rows = split.subset(split.num_samples)
    answers = right_answers(data, split, rows, judge.classes, recipe.names)
    judged = np.array([bool(answer) for answer in answers])
    if not judged.any():
        raise DataError(f"dataset {data.meta.name}: no image of split {split.name} has a class")
    left_out = int((~judged).sum())
    rows, answers = rows[judged], [answer for answer in answers if answer]
    allowed_Q = torch.ones(len(judge.classes), dtype=torch.bool)
    if recipe.among == "present":
        allowed_Q[:] = False
        allowed_Q[sorted(frozenset().union(*answers))] = True

    judge.model.to(device)
    progress = Progress(ctx)
    files = list(chunks(ctx.folder / "predicted", "test", rows))
    make = views.whole(
        split,
        side=judge.shape.image_size,
        crop=recipe.crop or judge.crop,
        fraction=recipe.crop_fraction or judge.crop_fraction,
    )
    parts = [
        Part(
            path=path, make=partial(_predict, judge, split, own, allowed_Q, device, progress, make)
        )
        for path, own in files
    ]
    make_parts(ctx, parts)
    pred_M = torch.cat([load_file(path)["pred"] for path, _ in files])
    right_M = [int(pred) in answer for pred, answer in zip(pred_M.tolist(), answers, strict=True)]
    ctx.check_lease()
    if ctx.rank == 0:
        keys = [str(split.keys[row]) for row in rows]
        right = [sorted(answer) for answer in answers]
        write_table(
            ctx.folder / "predictions.parquet", {"key": keys, "pred": pred_M, "right": right}
        )
        write_samples(ctx.folder, {"acc1": (keys, np.array(right_M))})
    metrics: dict[str, float | None] = {"acc1": float(np.mean(right_M))}
    metrics |= {"n_test": float(len(rows)), "n_left_out": float(left_out)}
    return solved(stage, metrics, started)


def right_answers(
    data: Dataset,
    split: Split,
    rows: np.ndarray,
    classes: Sequence[str],
    names: Mapping[str, Sequence[str]],
) -> Answers:
    """The model's classes that are right for each image; classes of model and set meet by name.

    `names`: class of the set -> what the model calls it, where that is something else. Raises
    UserError for a class of some image that the model does not know.
    """
    output_of = {name: place for place, name in enumerate(classes)}
    found: dict[int, frozenset[int]] = {}
    unknown: dict[str, None] = {}
    for place, name in enumerate(data.meta.classes):
        called = names.get(name, (name,))
        known = [output_of[own] for own in called if own in output_of]
        found[place] = frozenset(known)
        if len(known) < len(called):
            unknown[name] = None
    own = [_classes_of(split, row, bool(data.meta.hashtags)) for row in rows.tolist()]
    present = {data.meta.classes[place] for places in own for place in places}
    strangers = [name for name in unknown if name in present]
    if strangers:
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        raise UserError(
            f"dataset {data.meta.name}: its class '{strangers[0]}'{more} is none of the fine-tuned"
            f" model's ('{classes[0]}', ...); say in `names` what the model calls it"
        )
    return [frozenset().union(*(found[place] for place in places)) for places in own]


def _classes_of(split: Split, row: int, has_hashtags: bool) -> list[int]:
    """Class ids of an image: its one class, or those it has of several."""
    if split.class_ids[row] >= 0:
        return [int(split.class_ids[row])]
    if has_hashtags:
        return []
    start, stop = split.label_offsets[row], split.label_offsets[row + 1]
    return split.label_ids[start:stop].tolist()


def _predict(
    judge: Judge,
    split: Split,
    rows: np.ndarray,
    allowed_Q: Tensor,
    device: torch.device,
    progress: Progress,
    make: MakeBatch | None,
) -> dict[str, Tensor]:
    """`pred` int64 [M]: the most likely of the allowed classes."""
    found = []
    size = judge.shape.image_size
    banned_Q = (~allowed_Q).to(device)
    with torch.inference_mode(), half_on_cuda(device):
        for batch in loader.eval_batches(split, rows, batch=BATCH, image_size=size, make=make):
            progress.add(len(batch.images))
            images_BCHW = standardise(batch.images.to(device, non_blocking=True))
            logits_BQ = judge.model(images_BCHW).float().masked_fill(banned_Q, -torch.inf)
            found.append(logits_BQ.argmax(dim=1).cpu())
    return {"pred": torch.cat(found)}
