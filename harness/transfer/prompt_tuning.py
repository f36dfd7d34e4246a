"""Visual prompt tuning on K labelled images of each class, over several splits.

The encoder is frozen, so a rank holds it once and learns the prompts of one (K, split) after the
other; then one pass over the test images serves all of them. Both are cut into files.

Shapes: B images of a step, M test images, R runs, Q classes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from harness.data import loader
from harness.data.dataset import Split
from harness.ledger.context import StageContext, StageResult
from harness.models.init import generator_of
from harness.models.pixels import standardise
from harness.models.prompts import PromptedClassifier
from harness.study.protocols import PromptTuning
from harness.study.stages import StageFile
from harness.train.memory import memory_checked
from harness.transfer import fewshot
from harness.transfer.features import BATCH, chunks, frozen_encoder, half_on_cuda, splits_of
from harness.transfer.parts import Part, make_parts, stop_if_asked
from harness.transfer.sgd_probe import rate

Run = tuple[int, int]
"""Shots, split."""


def prompt_tuning(stage: StageFile, ctx: StageContext) -> StageResult:
    """acc1_<K>shot, mean over the splits, and its standard deviation acc1_<K>shot_std.

    Leaves prompts/<K>shot-<split>.safetensors: `prompts`, `head.weight`, `head.bias`.
    """
    started = time.perf_counter()
    recipe = stage.config.recipe
    assert isinstance(recipe, PromptTuning), f"{recipe} is no prompt tuning"
    splits = splits_of(stage, ctx)
    (train, train_rows), (test, test_rows) = splits["train"], splits["test"]
    tuner = _Tuner(stage, ctx, recipe)
    class_M = torch.from_numpy(train.class_ids[train_rows].astype(np.int64))
    chosen = fewshot.choices(class_M, recipe.shots, recipe.splits)
    learned = {(k, s): ctx.folder / "prompts" / f"{k}shot-{s}.safetensors" for k, s in chosen}
    ready = time.perf_counter()
    make_parts(
        ctx,
        [
            Part(path=path, make=partial(tuner.learn, run, train, train_rows[chosen[run].numpy()]))
            for run, path in learned.items()
        ],
    )
    trained = time.perf_counter()
    judged = list(chunks(ctx.folder / "predicted", "test", test_rows))
    make_parts(
        ctx,
        [Part(path=p, make=partial(tuner.predict, learned, test, rows)) for p, rows in judged],
    )
    metrics = {}
    if ctx.rank == 0:
        pred_RM = torch.cat([load_file(path)["pred"] for path, _ in judged], dim=1)
        metrics = fewshot.judge(
            ctx,
            [str(test.keys[row]) for row in test_rows],
            torch.from_numpy(test.class_ids[test_rows].astype(np.int64)),
            dict(zip(learned, pred_RM, strict=True)),
        )
    return StageResult(
        metrics=metrics,
        steps=0,
        samples=0,
        flops=stage.flops,
        wall_s={
            "setup": ready - started,
            "train": trained - ready,
            "eval": time.perf_counter() - trained,
            "checkpoint": 0.0,
        },
    )


@dataclass(frozen=True)
class _ForwardPass:
    """Its images; a smaller one is tried where memory ends."""

    micro_batch: int
    accumulation: int = 1


class _Tuner:
    """One frozen encoder on the device, and what is done with it."""

    def __init__(self, stage: StageFile, ctx: StageContext, recipe: PromptTuning) -> None:
        torch.set_num_threads(stage.execution.threads)
        self.stage, self.ctx, self.recipe = stage, ctx, recipe
        self.device = torch.device(stage.execution.device)
        self.encoder = frozen_encoder(stage.config, ctx).to(self.device)
        self.images = 0

    def model(self, run: Run) -> PromptedClassifier:
        """Prompts and head as a run starts with them."""
        generator = generator_of(self.stage.config.seed, "prompt_tuning", *run)
        recipe, classes = self.recipe, self.stage.config.num_classes
        made = PromptedClassifier(self.encoder, recipe.prompts, classes, recipe.pool, generator)
        return made.to(self.device).eval()

    def learn(self, run: Run, split: Split, rows: np.ndarray) -> dict[str, Tensor]:
        """The prompts and the head after training on these images."""
        recipe, model = self.recipe, self.model(run)
        params = [param for param in model.parameters() if param.requires_grad]
        if recipe.optimizer == "adamw":
            optimizer = torch.optim.AdamW(params, recipe.lr, weight_decay=recipe.weight_decay)
        else:
            optimizer = torch.optim.SGD(
                params, recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay
            )
        # Epochs one after the other, each in an order of its own; what fills no step is left out.
        batch = min(recipe.batch, len(rows))
        seed = self.stage.config.seed
        orders = [
            torch.randperm(len(rows), generator=generator_of(seed, "prompts", *run, epoch))
            for epoch in range(recipe.epochs)
        ]
        steps = recipe.epochs * len(rows) // batch
        stream = rows[torch.cat(orders).numpy()][: steps * batch]
        size = self.stage.config.model.image_size
        batches = loader.eval_batches(split, stream, batch=batch, image_size=size)
        for step, images in enumerate(batches):
            self._seen(batch)
            epoch = step * batch / len(rows)
            share = rate(epoch, recipe.warmup_epochs, recipe.epochs)
            optimizer.param_groups[0]["lr"] = recipe.lr * share
            optimizer.zero_grad()
            self._gradient(model, images)
            optimizer.step()
        return model.learned()

    def _gradient(self, model: PromptedClassifier, batch: loader.Batch) -> None:
        """Adds up the gradient of the batch's mean loss, a forward pass at a time."""
        num = len(batch.images)
        at_once = self.stage.execution.micro_batch or num
        parts = zip(batch.images.split(at_once), batch.class_ids.split(at_once), strict=True)
        with memory_checked(_ForwardPass(at_once)):
            for images, class_B in parts:
                with half_on_cuda(self.device):
                    logits_BQ = model(standardise(images.to(self.device, non_blocking=True)))
                loss = F.cross_entropy(logits_BQ.float(), class_B.to(self.device), reduction="sum")
                (loss / num).backward()

    def predict(
        self, learned: dict[Run, Path], split: Split, rows: np.ndarray
    ) -> dict[str, Tensor]:
        """`pred` int64 [R, M]: every run's classes of these images."""
        models = []
        for run, path in learned.items():
            models.append(self.model(run))
            models[-1].load_learned(load_file(path))
        size, found = self.stage.config.model.image_size, []
        with torch.inference_mode(), half_on_cuda(self.device):
            for batch in loader.eval_batches(split, rows, batch=BATCH, image_size=size):
                self._seen(len(batch.images))
                images = standardise(batch.images.to(self.device, non_blocking=True))
                found.append(torch.stack([model(images).argmax(dim=1) for model in models]))
        return {"pred": torch.cat(found, dim=1)}

    def _seen(self, images: int) -> None:
        stop_if_asked(self.ctx)
        self.images += images
        self.ctx.report(step=0, samples=self.images)
