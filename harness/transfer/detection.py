"""Detection and instance segmentation: a detector trained on boxes and masks, judged by AP.

Shapes: B images of one forward pass, S side of a view, K classes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from harness.data import loader
from harness.data.boxes import annotations_of, training_views, whole_views
from harness.data.dataset import Dataset, open_dataset
from harness.data.loader import Batch
from harness.errors import UserError
from harness.ledger.context import StageContext, StageResult
from harness.ledger.files import write_bytes
from harness.models.convert import encoder_tensors_for
from harness.models.detector import CascadeMaskRCNN, Found, starting_zeros
from harness.models.init import initial_values
from harness.models.pixels import standardise
from harness.models.vit import VisionEncoder
from harness.models.vitdet import backbone_tensors
from harness.models.weight_files import read_weights
from harness.study.protocols import Detection
from harness.study.recipes import Augmentation
from harness.study.stages import StageConfig, StageFile
from harness.train.blueprint import Blueprint
from harness.train.engine import Engine
from harness.train.loop import run
from harness.train.objectives import HeldOut, groups_of
from harness.transfer.average_precision import (
    Precision,
    coco_precision,
    ground_truth,
    lvis_precision,
)
from harness.transfer.samples import write_replicates, write_table

RARE, COMMON = 10, 100
"""Most training images of a rare and of a common category (Gupta et al. 2019, LVIS)."""


def detection(stage: StageFile, ctx: StageContext) -> StageResult:
    """box_ap, box_ap50, mask_ap, mask_ap50 on the test split after training."""
    started = time.perf_counter()
    data = open_dataset(stage.execution.dataset_path, ctx.root)
    objective = DetectionObjective(stage.config, ctx, data)
    return run(objective, stage, ctx, data.split(stage.config.images.split), started)


class DetectionObjective:
    """Find every object of an image: its box, class and mask."""

    evaluated_on_the_way = False
    """The test split is looked at once, at the end: nothing is chosen on it."""

    def __init__(self, config: StageConfig, ctx: StageContext, data: Dataset) -> None:
        assert isinstance(config.recipe, Detection), f"{config.recipe} is no detection recipe"
        self.recipe, self.config, self.ctx, self.data = config.recipe, config, ctx, data
        self.augment = Augmentation()  # views have their own: see make_batch
        split = data.split(config.images.split)
        side, patch = config.model.image_size, config.model.patch
        if patch & (patch - 1):
            raise UserError(
                f"detection: patch {patch} is no power of two, as torchvision's pooling needs; set"
                " patch: 16 and an image_size that is a multiple of it"
            )
        self.make_batch = training_views(
            split, config.seed, side, self.recipe.jitter, self.recipe.flip
        )
        annotations_of(split, 0)  # says at once if the set has none
        self.images_K = torch.from_numpy(
            np.bincount(split.label_ids, minlength=config.num_classes).astype(np.float32)
        )
        self.test = _HeldOutImages(data, side)
        self._found: list[dict[str, Any]] = []
        self._precision: Precision | None = None

    def allows(self, micro_batch: int) -> bool:
        """Any number."""
        return True

    def blueprint(self) -> Blueprint:
        """Encoder from `upstream_weights` or initial weights; the rest from initial ones."""
        return Blueprint(
            make=self._model,
            seed=self.config.seed,
            groups=partial(groups_of, config=self.config),
            start=self._start,
            given=self._zeros,
        )

    def _model(self) -> CascadeMaskRCNN:
        config = self.config
        return CascadeMaskRCNN(config.model, self.recipe, config.num_classes, self.images_K)

    def _zeros(self) -> dict[str, Any]:
        with torch.device("meta"):
            return starting_zeros(self._model())

    def _start(self, encoder: VisionEncoder) -> Mapping[str, Tensor]:
        config, path = self.config, self.ctx.upstream_weights
        if path is None:
            with torch.device("meta"):
                image = VisionEncoder(config.model)
            # With the names that the encoder has in every stage: the values follow from these.
            values = initial_values(torch.nn.ModuleDict({"encoder": image}), config.seed)
            tensors = {name.removeprefix("encoder."): make() for name, make in values.items()}
            return backbone_tensors(tensors)
        return backbone_tensors(start_with_patch(path, config, self.recipe))

    def loss(self, engine: Engine, batch: Batch, step: int, first: int) -> Tensor:
        """Sum of the losses of proposals, of the three stages, and of masks."""
        images = standardise(batch.images, engine.dtype)
        objects = [batch.extra[name] for name in ("boxes", "classes", "masks")]
        losses = engine.forward(images, *objects)
        return torch.stack(list(losses.values())).sum()

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Average precision on the test split."""
        found: dict[int, list[dict[str, Any]]] = {}

        def judge(batch: Batch, place_B: Tensor) -> Tensor:
            seen = engine.forward(standardise(batch.images, engine.dtype))
            sizes: Any = batch.extra["sizes"]
            for place, size, own in zip(place_B.tolist(), sizes, seen, strict=True):
                found[place] = _results(place, own, size, self.config.model.image_size)
            return torch.zeros(len(seen), 1)

        self.test.mean(engine, judge)
        self._found = self._gathered(engine, found)
        names, values = list(self._names()), torch.zeros(len(self._names()), dtype=torch.float64)
        if engine.rank == 0:
            self._precision = self._measured()
            own = [self._precision.metrics.get(name, -1.0) for name in names]
            values = torch.tensor(own, dtype=torch.float64)
        shared = engine.total(values.to(engine.device)).tolist()
        # -1 marks a group of categories without objects in the test split.
        metrics = {name: value for name, value in zip(names, shared, strict=True) if value >= 0}
        return metrics | {"n_test": float(self.test.num_images)}

    def _names(self) -> tuple[str, ...]:
        endings = ["ap", "ap50"]
        if self.recipe.metric == "lvis":
            endings += ["ap_rare", "ap_common", "ap_frequent"]
        return tuple(f"{what}_{ending}" for what in ("box", "mask") for ending in endings)

    def _measured(self) -> Precision:
        split = self.test.split
        fields = [split.fields(int(row)) for row in self.test.indices]
        categories = [{"name": name} for name in self.data.meta.classes]
        if self.recipe.metric == "lvis":
            for category, count in zip(categories, self.images_K.tolist(), strict=True):
                category["frequency"] = "r" if count <= RARE else "c" if count <= COMMON else "f"
            truth = ground_truth(fields, categories, with_ids_of="lvis")
            return lvis_precision(truth, self._found, self.recipe.detections)
        truth = ground_truth(fields, categories)
        return coco_precision(truth, self._found, self.recipe.detections)

    def _gathered(
        self, engine: Engine, own: dict[int, list[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        """Rank 0: what all ranks found, in the order of images; through files of the stage."""
        files = [self.ctx.folder / f"found-{rank}.json" for rank in range(engine.ranks)]
        if engine.ranks > 1:
            content = json.dumps(list(own.items())).encode()
            write_bytes(files[engine.rank], content, self.ctx.check_lease)
            engine.barrier()
            if engine.rank == 0:
                own = {}
                for file in files:
                    own |= {int(place): rows for place, rows in json.loads(file.read_bytes())}
                    self.ctx.check_lease()
                    file.unlink()
        if engine.rank:
            return []
        return [row for place in sorted(own) for row in own[place]]

    def finish(self, engine: Engine) -> dict[str, float]:
        """predictions.parquet (key, category, score, box, mask as RLE), replicates.parquet."""
        if engine.rank == 0:
            assert self._precision is not None, "finish before evaluate"
            self.ctx.check_lease()
            write_replicates(self.ctx.folder, self._precision.replicates)
            split, rows, classes = self.test.split, self._found, self.data.meta.classes
            keys = [str(split.keys[int(row)]) for row in self.test.indices]
            boxes = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
            write_table(
                self.ctx.folder / "predictions.parquet",
                {
                    "key": [keys[row["image_id"] - 1] for row in rows],
                    "category": [classes[row["category_id"] - 1] for row in rows],
                    "score": np.array([row["score"] for row in rows], dtype=np.float64),
                    **{name: boxes[:, k] for k, name in enumerate(("x", "y", "width", "height"))},
                    "rle": [row["segmentation"]["counts"] for row in rows],
                },
            )
        return {}


def start_with_patch(path: Path, config: StageConfig, recipe: Detection) -> dict[str, Tensor]:
    """An encoder's tensors with its patch projection resampled to the detector's patch.

    By the pseudo-inverse of resizing (Beyer et al. 2023, FlexiViT, arXiv 2212.08013), so that a
    resized patch has the same projection.
    """
    weights, patch = read_weights(path), config.model.patch
    name = "patch_embed.proj.weight"
    if weights.patch != patch and recipe.patch is not None:
        kernel = resample_patch_embed(weights.encoder[name].float(), [patch, patch])
        weights = replace(weights, patch=patch, encoder={**weights.encoder, name: kernel})
    return encoder_tensors_for(weights, config.model, recipe.resize)


def _results(place: int, found: Found, size: tuple[int, int], side: int) -> list[dict[str, Any]]:
    """COCO's result rows of one image, in its own pixels."""
    width, height = size
    scale = max(width, height) / side
    boxes = found["boxes"].detach().float().cpu() * scale
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
    masks = paste_masks_in_image(found["masks"].float().cpu()[:, None], boxes, (height, width))
    whole = (masks[:, 0] > 0.5).numpy().astype(np.uint8)
    rows = []
    for box, score, class_id, mask in zip(
        boxes.tolist(), found["scores"].tolist(), found["classes"].tolist(), whole, strict=True
    ):
        left, top, right, bottom = box
        rle: Any = coco_mask.encode(np.asfortranarray(mask))
        rows.append(
            {
                "image_id": place + 1,
                "category_id": class_id + 1,
                "bbox": [left, top, right - left, bottom - top],
                "score": score,
                "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
            }
        )
    return rows


class _HeldOutImages(HeldOut):
    """Whole test images, padded to a square; in the order of their keys."""

    def __init__(self, data: Dataset, side: int) -> None:
        split = data.split(data.meta.split_for("test"))
        super().__init__(split, side, np.argsort([str(key) for key in split.keys]))
        self._make = whole_views(split, side)

    def _read(self, indices: np.ndarray, size: int) -> Iterator[Batch]:
        return loader.eval_batches(
            self.split, indices, batch=size, image_size=self.image_size, make=self._make
        )
