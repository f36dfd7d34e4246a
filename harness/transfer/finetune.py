"""Fine-tuning: every weight trained on the labelled set, through the one training loop.

Shapes: B images of one forward pass, M test images, Q classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from harness.data import loader, timm_parts
from harness.data.dataset import Dataset, Split, open_dataset
from harness.data.loader import Batch
from harness.ledger.context import StageContext, StageResult
from harness.models.classifiers import save_classifier
from harness.models.heads import class_cross_entropy
from harness.models.init import seed_of
from harness.models.pixels import standardise
from harness.study.protocols import FineTune
from harness.study.protocols.fine_tune import Crop
from harness.study.stages import StageConfig, StageFile
from harness.train.blueprint import Blueprint
from harness.train.engine import Engine
from harness.train.loop import run
from harness.train.objectives import HeldOut, classifier
from harness.transfer import views
from harness.transfer.predictions import write_predictions
from harness.transfer.samples import write_samples


def fine_tune(stage: StageFile, ctx: StageContext) -> StageResult:
    """acc1 and val_loss on the test split after training; loss is that of training."""
    started = time.perf_counter()
    data = open_dataset(stage.execution.dataset_path, ctx.root)
    objective = FineTuneObjective(stage.config, ctx, data)
    return run(objective, stage, ctx, data.split(stage.config.images.split), started)


class FineTuneObjective:
    """Predict an image's one class."""

    evaluated_on_the_way = False
    """The test split is looked at once, at the end: nothing is chosen on it."""

    def __init__(self, config: StageConfig, ctx: StageContext, data: Dataset) -> None:
        assert isinstance(config.recipe, FineTune), f"{config.recipe} is no fine-tuning recipe"
        self.recipe, self.config, self.ctx = config.recipe, config, ctx
        self.classes = data.meta.classes
        recipe, side = self.recipe, config.model.image_size
        self.augment = recipe.augment
        self.make_batch = None
        if recipe.rand_augment:
            self.make_batch = views.augmented(
                data.split(config.images.split),
                seed=config.seed,
                side=side,
                augment=recipe.augment,
                spec=recipe.rand_augment,
            )
        test = data.split(data.meta.split_for("test"))
        self.test = HeldOutViews(test, side, recipe.crop, recipe.crop_fraction)
        self._label_M = torch.zeros(self.test.num_images, dtype=torch.int64)
        self._pred_M = torch.zeros(self.test.num_images, dtype=torch.int64)
        self._loss_M = torch.zeros(self.test.num_images, dtype=torch.float64)

    def allows(self, micro_batch: int) -> bool:
        """Whole pairs, where they are mixed."""
        return not self.recipe.mixes or micro_batch % 2 == 0

    def blueprint(self) -> Blueprint:
        """Encoder from `upstream_weights` or initial weights, zero head, layer-wise scales."""
        return classifier(self.config, self.ctx.upstream_weights)

    def loss(self, engine: Engine, batch: Batch, step: int, first: int) -> Tensor:
        """Cross-entropy with label smoothing; of mixed pairs, against their mixed classes."""
        recipe, seed = self.recipe, self.config.seed
        images_BCHW = standardise(batch.images)
        if recipe.erase:
            eraser = timm_parts.erasing(recipe.erase, images_BCHW.device)
            for place, image_CHW in enumerate(images_BCHW, start=first):
                with timm_parts.drawing(seed_of(seed, "erase", step), place):
                    eraser(image_CHW)
        if not recipe.mixes:
            logits_BQ = engine.forward(images_BCHW.to(engine.dtype))
            losses_B = class_cross_entropy(logits_BQ, batch.class_ids, recipe.label_smoothing)
            return losses_B.mean()
        target_BQ = mixed_pairs(
            images_BCHW,
            batch.class_ids,
            recipe,
            num_classes=self.config.num_classes,
            key=seed_of(seed, "mixup", step),
            first=first,
        )
        logits_BQ = engine.forward(images_BCHW.to(engine.dtype))
        return F.cross_entropy(logits_BQ.float(), target_BQ)

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """acc1 and the unsmoothed loss on the test split, of the averaged weights if there are."""

        def judge(batch: Batch, place_B: Tensor) -> Tensor:
            logits_BQ = engine.forward(standardise(batch.images, engine.dtype))
            pred_B = logits_BQ.argmax(dim=1)
            loss_B = class_cross_entropy(logits_BQ, batch.class_ids)
            self._label_M[place_B] = batch.class_ids.cpu()
            self._pred_M[place_B] = pred_B.cpu()
            self._loss_M[place_B] = loss_B.double().cpu()
            return torch.stack([(pred_B == batch.class_ids).float(), loss_B], dim=1)

        for kept_M in (self._label_M, self._pred_M, self._loss_M):
            kept_M.zero_()
        with engine.averaged():
            accuracy, loss = self.test.mean(engine, judge)
        return {"acc1": accuracy, "val_loss": loss, "n_test": float(self.test.num_images)}

    def finish(self, engine: Engine) -> dict[str, float]:
        """predictions.parquet, samples.parquet and model.safetensors."""
        label_M = self.test.gather(engine, self._label_M)
        pred_M = self.test.gather(engine, self._pred_M)
        loss_M = self.test.gather(engine, self._loss_M)
        with engine.averaged():
            tensors = dict(engine.tensors())
        if engine.rank == 0:
            keys = [str(self.test.split.keys[index]) for index in self.test.indices]
            folder, right_M = self.ctx.folder, (pred_M == label_M).double()
            self.ctx.check_lease()
            save_classifier(
                folder,
                tensors,
                self.config.model,
                self.recipe.pool,
                self.classes,
                self.config.images.fingerprint,
                (self.recipe.crop, self.recipe.crop_fraction),
            )
            write_predictions(folder, keys, label_M, pred_M)
            write_samples(folder, {"acc1": (keys, right_M), "val_loss": (keys, loss_M)})
        return {}


def mixed_pairs(
    images_BCHW: Tensor,
    class_B: Tensor,
    recipe: FineTune,
    *,
    num_classes: int,
    key: int,
    first: int,
) -> Tensor:
    """Mixes images 2i and 2i + 1 in place, each pair in its own way; their targets, [B, Q].

    The way follows from `key` and the pair's place in the global batch, in which `first` is the
    place of the first image here: micro-batches and ranks change nothing. timm's mode `pair` draws
    one way for each pair, too, but pairs the first image with the last.
    """
    mix = timm_parts.mixup(
        alpha=recipe.mixup,
        cutmix=recipe.cutmix,
        smoothing=recipe.label_smoothing,
        num_classes=num_classes,
    )
    targets = []
    for place in range(0, len(images_BCHW), 2):
        pair = slice(place, place + 2)
        with timm_parts.drawing(key, first + place):
            targets.append(mix(images_BCHW[pair], class_B[pair])[1])
    return torch.cat(targets)


class HeldOutViews(HeldOut):
    """Test images, squashed or their middle."""

    def __init__(self, split: Split, image_size: int, crop: Crop, fraction: float) -> None:
        super().__init__(split, image_size)
        self._make = views.whole(split, side=image_size, crop=crop, fraction=fraction)

    def _read(self, indices: np.ndarray, size: int) -> Iterator[Batch]:
        if self._make is None:
            yield from super()._read(indices, size)
            return
        yield from loader.eval_batches(
            self.split, indices, batch=size, image_size=self.image_size, make=self._make
        )
