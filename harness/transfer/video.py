"""Video classification: the encoder inflated in time, trained on clips, judged on several views.

Shapes: B clips of one forward pass, V views, T frames, M test clips, Q classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from harness.data import loader
from harness.data.clips import ClipSampler, augmented_clips, multi_view_clips
from harness.data.dataset import Dataset, open_dataset
from harness.data.loader import Batch
from harness.ledger.context import StageContext, StageResult
from harness.models.heads import class_cross_entropy
from harness.models.init import initial_values
from harness.models.pixels import standardise
from harness.models.video import VideoClassifier, VideoEncoder, inflate
from harness.models.vit import VisionEncoder
from harness.models.weights import start_of
from harness.study.protocols import Video
from harness.study.stages import StageConfig, StageFile
from harness.train.blueprint import Blueprint
from harness.train.engine import Engine
from harness.train.loop import run
from harness.train.objectives import HeldOut, groups_of
from harness.transfer.predictions import write_predictions
from harness.transfer.samples import write_samples

NUM_TOP = 5


def video(stage: StageFile, ctx: StageContext) -> StageResult:
    """acc1, acc5 where there are more classes, and val_loss on the test clips after training."""
    started = time.perf_counter()
    data = open_dataset(stage.execution.dataset_path, ctx.root)
    objective = VideoObjective(stage.config, ctx, data)
    return run(objective, stage, ctx, data.split(stage.config.images.split), started)


class VideoObjective:
    """Predict a clip's one class."""

    evaluated_on_the_way = False
    """The test split is looked at once, at the end: nothing is chosen on it."""

    def __init__(self, config: StageConfig, ctx: StageContext, data: Dataset) -> None:
        assert isinstance(config.recipe, Video), f"{config.recipe} is no video recipe"
        self.recipe, self.config, self.ctx = config.recipe, config, ctx
        self.augment = self.recipe.augment
        side = config.model.image_size
        sampler = ClipSampler(
            frames=self.recipe.frames, stride=self.recipe.stride, sampling=self.recipe.sampling
        )
        split = data.split(config.images.split)
        self.make_batch = augmented_clips(split, sampler, config.seed, side, self.augment)
        self.test = HeldOutClips(data, sampler, side, self.recipe)
        num = self.test.num_images
        self._label_M = torch.zeros(num, dtype=torch.int64)
        self._pred_M = torch.zeros(num, dtype=torch.int64)
        self._loss_M = torch.zeros(num, dtype=torch.float64)
        self._rank_M = torch.zeros(num, dtype=torch.int64)

    def allows(self, micro_batch: int) -> bool:
        """Any number."""
        return True

    def blueprint(self) -> Blueprint:
        """Image encoder from `upstream_weights` or initial weights, inflated; zero head."""
        return Blueprint(
            make=self._model,
            seed=self.config.seed,
            groups=partial(groups_of, config=self.config),
            start=self._start,
        )

    def _model(self) -> VideoClassifier:
        recipe = self.recipe
        encoder = VideoEncoder(
            self.config.model,
            frames=recipe.frames,
            tube=recipe.tube,
            relative_bias=recipe.relative_bias,
            drop_path=recipe.drop_path,
        )
        return VideoClassifier(encoder, self.config.num_classes, recipe.pool, recipe.dropout)

    def _start(self, encoder: VisionEncoder) -> Mapping[str, Tensor]:
        """Initial weights are those of the image encoder too: all arms are inflated alike."""
        with torch.device("meta"):
            image = VisionEncoder(self.config.model)
        if self.ctx.upstream_weights is None:
            # With the names that the encoder has in every stage: the values follow from these.
            values = initial_values(torch.nn.ModuleDict({"encoder": image}), self.config.seed)
            tensors = {name.removeprefix("encoder."): make() for name, make in values.items()}
        else:
            tensors = dict(start_of(self.config, self.ctx.upstream_weights, image))
        return inflate(tensors, self.recipe.tube, self.recipe.inflation)

    def loss(self, engine: Engine, batch: Batch, step: int, first: int) -> Tensor:
        """Cross-entropy with label smoothing."""
        logits_BQ = engine.forward(standardise(batch.images, engine.dtype))
        return class_cross_entropy(logits_BQ, batch.class_ids, self.recipe.label_smoothing).mean()

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """acc1, acc5 and the loss of the probabilities that all views of a clip have on average."""

        def judge(batch: Batch, place_B: Tensor) -> Tensor:
            label_B1 = batch.class_ids[:, None]
            log_BVQ = torch.stack(
                [
                    engine.forward(standardise(view, engine.dtype)).float().log_softmax(dim=1)
                    for view in batch.images.unbind(1)
                ],
                dim=1,
            )
            log_BQ = log_BVQ.logsumexp(dim=1) - math.log(log_BVQ.shape[1])
            own_B1 = log_BQ.gather(1, label_B1)
            # Of classes with equal probabilities the first counts, as for argmax.
            before = torch.arange(log_BQ.shape[1], device=log_BQ.device) < label_B1
            rank_B = ((log_BQ > own_B1) | ((log_BQ == own_B1) & before)).sum(dim=1)
            self._label_M[place_B] = batch.class_ids.cpu()
            self._pred_M[place_B] = log_BQ.argmax(dim=1).cpu()
            self._rank_M[place_B] = rank_B.cpu()
            self._loss_M[place_B] = -own_B1[:, 0].double().cpu()
            columns = [values.to(log_BQ.device) for values in self._metrics(place_B).values()]
            return torch.stack(columns, dim=1)

        for kept in (self._label_M, self._pred_M, self._loss_M, self._rank_M):
            kept.zero_()
        means = self.test.mean(engine, judge)
        names = self._metrics(torch.zeros(1, dtype=torch.int64))
        found = dict(zip(names, means, strict=True))
        return found | {"n_test": float(self.test.num_images)}

    def _metrics(self, place_B: Tensor) -> dict[str, Tensor]:
        """Metric -> float64 [B], of test clips that were judged."""
        rank_B = self._rank_M[place_B]
        found = {"acc1": (rank_B == 0).double(), "val_loss": self._loss_M[place_B]}
        if self.config.num_classes > NUM_TOP:
            found["acc5"] = (rank_B < NUM_TOP).double()
        return found

    def finish(self, engine: Engine) -> dict[str, float]:
        """predictions.parquet and samples.parquet."""
        label_M = self.test.gather(engine, self._label_M)
        pred_M = self.test.gather(engine, self._pred_M)
        self._rank_M = self.test.gather(engine, self._rank_M)
        self._loss_M = self.test.gather(engine, self._loss_M)
        if engine.rank == 0:
            keys = [str(self.test.split.keys[index]) for index in self.test.indices]
            self.ctx.check_lease()
            write_predictions(self.ctx.folder, keys, label_M, pred_M)
            metrics = self._metrics(torch.arange(len(keys)))
            write_samples(self.ctx.folder, {name: (keys, v) for name, v in metrics.items()})
        return {}


class HeldOutClips(HeldOut):
    """Test clips, all views of each: images are uint8 [B, V, T, C, S, S]."""

    def __init__(self, data: Dataset, sampler: ClipSampler, image_size: int, recipe: Video) -> None:
        super().__init__(data.split(data.meta.split_for("test")), image_size)
        views = recipe.temporal_views, recipe.spatial_views
        self._make = multi_view_clips(self.split, sampler, image_size, *views)

    def _read(self, indices: np.ndarray, size: int) -> Iterator[Batch]:
        return loader.eval_batches(
            self.split, indices, batch=size, image_size=self.image_size, make=self._make
        )
