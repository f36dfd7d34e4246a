"""Fine-tuning: every weight trained on the labelled set, through the one training loop.

Shapes: B images of one forward pass, M test images, Q classes.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from harness.data.dataset import Dataset, open_dataset
from harness.data.loader import Batch
from harness.ledger.context import StageContext, StageResult
from harness.models.classifiers import save_classifier
from harness.models.heads import class_cross_entropy
from harness.models.pixels import standardise
from harness.study.protocols import FineTune
from harness.study.stages import StageConfig, StageFile
from harness.train.blueprint import Blueprint
from harness.train.engine import Engine
from harness.train.loop import run
from harness.train.objectives import HeldOut, classifier
from harness.transfer.predictions import judge


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
    make_batch = None

    def __init__(self, config: StageConfig, ctx: StageContext, data: Dataset) -> None:
        assert isinstance(config.recipe, FineTune), f"{config.recipe} is no fine-tuning recipe"
        self.recipe, self.config, self.ctx = config.recipe, config, ctx
        self.augment = self.recipe.augment
        self.classes = data.meta.classes
        self.test = HeldOut(data.split(data.meta.split_for("test")), config.model.image_size)
        self._label_M = torch.zeros(self.test.num_images, dtype=torch.int64)
        self._pred_M = torch.zeros(self.test.num_images, dtype=torch.int64)

    def blueprint(self) -> Blueprint:
        """Encoder from `upstream_weights` or initial weights, zero head, layer-wise scales."""
        return classifier(self.config, self.ctx.upstream_weights)

    def loss(self, engine: Engine, batch: Batch, step: int, first: int) -> Tensor:
        """Cross-entropy with label smoothing."""
        logits_BQ = engine.forward(standardise(batch.images, engine.dtype))
        return class_cross_entropy(logits_BQ, batch.class_ids, self.recipe.label_smoothing).mean()

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """acc1 and the unsmoothed loss on the test split."""
        self._label_M.zero_()
        self._pred_M.zero_()

        def look(batch: Batch, place_B: Tensor) -> Tensor:
            logits_BQ = engine.forward(standardise(batch.images, engine.dtype))
            pred_B = logits_BQ.argmax(dim=1)
            self._label_M[place_B] = batch.class_ids.cpu()
            self._pred_M[place_B] = pred_B.cpu()
            loss_B = class_cross_entropy(logits_BQ, batch.class_ids)
            return torch.stack([(pred_B == batch.class_ids).float(), loss_B], dim=1)

        accuracy, loss = self.test.mean(engine, look)
        return {"acc1": accuracy, "val_loss": loss, "n_test": float(self.test.num_images)}

    def finish(self, engine: Engine) -> dict[str, float]:
        """model.safetensors, predictions.parquet and samples.parquet."""
        tensors = dict(engine.tensors())
        label_M = self.test.gather(engine, self._label_M)
        pred_M = self.test.gather(engine, self._pred_M)
        if engine.rank == 0:
            keys = [str(self.test.split.keys[index]) for index in self.test.indices]
            judge(self.ctx, keys, label_M, pred_M)
            save_classifier(
                self.ctx.folder,
                tensors,
                self.config.model,
                self.recipe.pool,
                self.classes,
                self.config.images.fingerprint,
            )
        return {}
