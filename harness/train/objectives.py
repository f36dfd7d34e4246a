"""What is trained: the model of a stage, its loss, its evaluation, the files it leaves.

The loop knows nothing of images and labels; an objective knows nothing of steps, ranks and
checkpoints. Shapes: B images of one forward pass, L patches, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from harness.data import loader
from harness.data.dataset import Dataset, Split
from harness.data.loader import Batch, MakeBatch
from harness.ledger.context import StageContext
from harness.models.heads import Classifier, label_entropy, label_targets, mixed_targets
from harness.models.init import generator_of, seed_of
from harness.models.mae import Mae, target_statistics
from harness.models.pixels import patchify, standardise, to_bytes, unpatchify
from harness.models.vit import VisionEncoder
from harness.models.weight_files import write_atomically
from harness.models.weights import save_encoder, start_of
from harness.study.protocols import FineTune
from harness.study.recipes import Augmentation, MaeRecipe, Model, Optimization, Pool, WspRecipe
from harness.study.stages import StageConfig
from harness.train.blueprint import Blueprint, Groups
from harness.train.engine import Engine
from harness.train.groups import parameter_groups

CACHED_BYTES = 256 * 2**20
"""Held-out images are kept decoded up to this size; they are read again at every evaluation."""

NUM_PICTURES = 8


class Objective(Protocol):
    """One kind of gradient stage."""

    augment: Augmentation
    evaluated_on_the_way: bool
    """Whether held-out metrics are measured at every evaluation point, or at the end only."""

    @property
    def make_batch(self) -> MakeBatch | None:
        """Draws a rank's share of a step, where views with their labels are not enough."""
        ...

    def allows(self, micro_batch: int) -> bool:
        """Whether a forward pass may have so many images."""
        ...

    def blueprint(self) -> Blueprint:
        """The model, its initial weights and its optimizer groups."""
        ...

    def loss(self, engine: Engine, batch: Batch, step: int, first: int) -> Tensor:
        """Mean loss of one forward pass.

        `first` is the place of the batch's first image in the global batch of step `step`.
        """
        ...

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Held-out metrics; every rank must call and gets the same numbers."""
        ...

    def finish(self, engine: Engine) -> dict[str, float]:
        """Write the stage's files at the end; extra metrics for the result."""
        ...


class MaeObjective:
    """Reconstruct hidden patches."""

    evaluated_on_the_way = False
    make_batch = None

    def __init__(self, config: StageConfig, ctx: StageContext, data: Dataset) -> None:
        assert isinstance(config.recipe, MaeRecipe), f"{config.recipe} is no MAE recipe"
        self.recipe, self.config, self.ctx = config.recipe, config, ctx
        self.augment = self.recipe.augment
        self.num_patches = config.model.num_patches
        self.val = _validation(config, data, self.recipe.val_images)
        self._noise: tuple[int, Tensor] = (-1, torch.empty(0))

    def allows(self, micro_batch: int) -> bool:
        """Any number."""
        return True

    def blueprint(self) -> Blueprint:
        """Encoder with fixed positions, and decoder."""
        return Blueprint(
            make=lambda: Mae(self.config.model, self.recipe),
            seed=self.config.seed,
            groups=lambda model: groups_of(model, self.config),
        )

    def loss(self, engine: Engine, batch: Batch, step: int, first: int) -> Tensor:
        """Masked reconstruction error; masks depend on (seed, step, place) only."""
        if self._noise[0] != step:
            generator = generator_of(self.config.seed, "mask", step)
            self._noise = step, torch.rand(self.recipe.batch, self.num_patches, generator=generator)
        noise_BL = self._noise[1][first : first + len(batch.images)]
        images = standardise(batch.images, engine.dtype)
        return engine.forward(images, noise_BL.to(engine.device, non_blocking=True))[0]

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """val_loss: with masks of its own, the same at every evaluation."""
        generator = generator_of(self.config.seed, "val-mask")
        noise_ML = torch.rand(self.val.num_images, self.num_patches, generator=generator)

        def losses(batch: Batch, place_B: Tensor) -> Tensor:
            noise_BL = noise_ML[place_B].to(engine.device)
            images = standardise(batch.images, engine.dtype)
            _, pred_BLP, mask_BL = engine.forward(images, noise_BL)
            target_BLP = _target(images, self.config.model.patch, self.recipe.norm_target)
            error_BL = (pred_BLP.float() - target_BLP).square().mean(dim=-1)
            return ((error_BL * mask_BL).sum(dim=1) / mask_BL.sum(dim=1))[:, None]

        return {"val_loss": self.val.mean(engine, losses)[0]}

    def finish(self, engine: Engine) -> dict[str, float]:
        """weights.safetensors and reconstructions.npz."""
        _save_encoder(engine, self.ctx, self.config.model, has_fixed_positions=True)
        self._save_pictures(engine)
        return {}

    def _save_pictures(self, engine: Engine) -> None:
        """The same few held-out images in every run: original, masked, reconstructed.

        Visible patches of a reconstruction are the original's; predicted patches get the mean
        and deviation of the true ones back, which normalised targets do not tell.
        """
        patch = self.config.model.patch
        images_BCHW = standardise(self.val.first(NUM_PICTURES).to(engine.device))
        noise_BL = torch.rand(
            len(images_BCHW), self.num_patches, generator=generator_of(0, "pictures")
        )
        with engine.evaluating():
            _, pred_BLP, mask_BL = engine.forward(
                images_BCHW.to(engine.dtype), noise_BL.to(engine.device)
            )
        truth_BLP = patchify(images_BCHW, patch)
        pred_BLP = pred_BLP.float()
        if self.recipe.norm_target:
            mean_BL1, scale_BL1 = target_statistics(truth_BLP)
            pred_BLP = pred_BLP * scale_BL1 + mean_BL1
        hidden_BL1 = mask_BL[..., None]
        pictures = {
            "original": truth_BLP,
            "masked": truth_BLP * (1 - hidden_BL1),  # 0 is the mean colour: grey
            "reconstructed": truth_BLP * (1 - hidden_BL1) + pred_BLP * hidden_BL1,
        }
        if engine.rank == 0:
            arrays = {
                name: to_bytes(unpatchify(value, patch)).permute(0, 2, 3, 1).cpu().numpy()
                for name, value in pictures.items()
            }
            self.ctx.check_lease()
            write_atomically(
                self.ctx.folder / "reconstructions.npz",
                lambda path: np.savez_compressed(path, allow_pickle=False, **arrays),
            )


class WspObjective:
    """Predict an image's hashtags."""

    evaluated_on_the_way = True
    make_batch = None

    def __init__(self, config: StageConfig, ctx: StageContext, data: Dataset) -> None:
        assert isinstance(config.recipe, WspRecipe), f"{config.recipe} is no WSP recipe"
        self.recipe, self.config, self.ctx = config.recipe, config, ctx
        self.augment = self.recipe.augment
        self.val = _validation(config, data, self.recipe.val_images)

    def allows(self, micro_batch: int) -> bool:
        """Whole pairs, where mixup mixes them."""
        return not self.recipe.mixup or micro_batch % 2 == 0

    def blueprint(self) -> Blueprint:
        """Encoder from `upstream_weights` or initial weights, and a head of zeros."""
        return classifier(self.config, self.ctx.upstream_weights)

    def loss(self, engine: Engine, batch: Batch, step: int, first: int) -> Tensor:
        """Softmax cross-entropy against 1/k on the image's k hashtags."""
        images_BCHW = standardise(batch.images, engine.dtype)
        targets = label_targets(batch.label_ids, batch.label_offsets)
        if self.recipe.mixup:
            # One share a pair, a function of (seed, step, place): ranks change nothing.
            rng = np.random.default_rng(seed_of(self.config.seed, "mixup", step))
            shares = rng.beta(self.recipe.mixup, self.recipe.mixup, self.recipe.batch // 2)
            share_B = torch.from_numpy(shares.astype(np.float32)).repeat_interleave(2)
            share_B = share_B[first : first + len(images_BCHW)].to(engine.device, non_blocking=True)
            images_BCHW = mixed(images_BCHW, share_B)
            targets = mixed_targets(targets, share_B)
        return engine.forward(images_BCHW, targets, engine.head_batch).mean()

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """val_loss, and val_floor = mean ln k, which no model can beat."""

        def losses(batch: Batch, place_B: Tensor) -> Tensor:
            targets = label_targets(batch.label_ids, batch.label_offsets)
            images = standardise(batch.images, engine.dtype)
            loss_B = engine.forward(images, targets, engine.head_batch)
            return torch.stack([loss_B, label_entropy(batch.label_offsets)], dim=1)

        loss, floor = self.val.mean(engine, losses)
        return {"val_loss": loss, "val_floor": floor}

    def finish(self, engine: Engine) -> dict[str, float]:
        """weights.safetensors."""
        _save_encoder(engine, self.ctx, self.config.model, pool=self.recipe.pool)
        return {}


def classifier(config: StageConfig, weights: Path | None) -> Blueprint:
    """Encoder and zero head; weights by seed, the encoder's from upstream where there is one."""
    recipe = config.recipe
    assert isinstance(recipe, WspRecipe | FineTune), f"{recipe} trains no classifier"

    def make() -> Classifier:
        encoder = VisionEncoder(config.model, drop_path=recipe.drop_path)
        return Classifier(encoder, config.num_classes, recipe.pool)

    return Blueprint(
        make=make,
        seed=config.seed,
        groups=lambda model: groups_of(model, config),
        start=None if weights is None else partial(start_of, config, weights),
    )


def groups_of(model: nn.Module, config: StageConfig) -> Groups:
    """Optimizer groups by the recipe, with layer-wise rates where it has them."""
    recipe = config.recipe
    assert isinstance(recipe, Optimization), f"{recipe} is no gradient recipe"
    return parameter_groups(
        model,
        depth=config.model.depth,
        weight_decay=recipe.weight_decay,
        layer_decay=getattr(recipe, "layer_decay", 1.0),
    )


def mixed(images_BCHW: Tensor, share_B: Tensor) -> Tensor:
    """share * an image + (1 - share) * its neighbour, images 2i and 2i + 1."""
    share_B111 = share_B[:, None, None, None].to(images_BCHW.dtype)
    neighbours_BCHW = images_BCHW.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return images_BCHW * share_B111 + neighbours_BCHW * (1 - share_B111)


def _validation(config: StageConfig, data: Dataset, num_images: int | None) -> HeldOut:
    """The held-out images of a stage: all of the split, or its nested subset of that many."""
    split = data.split(data.meta.split_for("val"))
    chosen = split.subset(min(num_images or split.num_samples, split.num_samples))
    return HeldOut(split, config.model.image_size, chosen)


class HeldOut:
    """Images for evaluation, in a fixed order, shared out over ranks."""

    def __init__(self, split: Split, image_size: int, indices: np.ndarray | None = None) -> None:
        self.split, self.image_size = split, image_size
        self.indices = split.subset(split.num_samples) if indices is None else indices
        self.num_images = len(self.indices)
        self._cache: list[Batch] | None = None

    def first(self, num_images: int) -> Tensor:
        """uint8 pixels of the first images."""
        chosen = self.indices[:num_images]
        batches = loader.eval_batches(
            self.split, chosen, batch=len(chosen), image_size=self.image_size
        )
        return next(iter(batches)).images

    def mean(self, engine: Engine, function: Callable[[Batch, Tensor], Tensor]) -> list[float]:
        """Mean over all images of each column of function(batch, places) [B, columns].

        Called without gradients and in eval mode. Every rank runs the same number of forward
        passes, as ZeRO-3 needs: shares are padded with the last image, which then counts 0.
        """
        total: Tensor | None = None
        with engine.evaluating():
            for batch, place_B, counts_B in self._batches(engine):
                values = function(batch, place_B).double()
                weighted = (values * counts_B[:, None].to(values.device)).sum(dim=0)
                total = weighted if total is None else total + weighted
        assert total is not None, f"split {self.split.name} is empty"
        return (engine.total(total) / self.num_images).tolist()

    def gather(self, engine: Engine, value_M: Tensor) -> Tensor:
        """[M] on the CPU of every rank, from tensors in which a rank filled its own share."""
        share = -(-self.num_images // engine.ranks)
        own_M = torch.zeros_like(value_M)
        own = slice(engine.rank * share, (engine.rank + 1) * share)
        own_M[own] = value_M[own]
        return engine.total(own_M.to(engine.device)).cpu()

    def _batches(self, engine: Engine) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        share = -(-self.num_images // engine.ranks)
        place = torch.arange(engine.rank * share, (engine.rank + 1) * share)
        counts = (place < self.num_images).double()
        place = place.clamp(max=self.num_images - 1)
        size = engine.micro_batch
        first = 0
        for batch in self._read(self.indices[place.numpy()], size):
            chosen = slice(first, first + len(batch.images))
            yield to_device(batch, engine.device), place[chosen], counts[chosen]
            first += size

    def _read(self, indices: np.ndarray, size: int) -> Iterator[Batch]:
        if self._cache is not None:
            yield from self._cache
            return
        kept: list[Batch] = []
        keep = len(indices) * 3 * self.image_size**2 <= CACHED_BYTES
        for batch in loader.eval_batches(
            self.split, indices, batch=size, image_size=self.image_size
        ):
            if keep:
                kept.append(batch)
            yield batch
        if keep:
            self._cache = kept


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on `device`; from pinned memory and without waiting on CUDA."""
    if device.type == "cpu":
        return batch

    def move(tensor: Tensor) -> Tensor:
        # Images come pinned; to pin what is pinned costs nothing.
        return tensor.pin_memory().to(device, non_blocking=True)

    return replace(
        batch,
        images=move(batch.images),
        label_ids=move(batch.label_ids),
        label_offsets=move(batch.label_offsets),
        class_ids=move(batch.class_ids),
        extra={
            name: move(values)
            if isinstance(values, Tensor)
            else [move(value) if isinstance(value, Tensor) else value for value in values]
            for name, values in batch.extra.items()
        },
    )


def part(batch: Batch, start: int, stop: int) -> Batch:
    """Images start..stop of a batch, with their labels."""
    if start == 0 and stop == len(batch.images):
        return batch
    offsets = batch.label_offsets[start : stop + 1]
    return replace(
        batch,
        images=batch.images[start:stop],
        label_ids=batch.label_ids[int(offsets[0]) : int(offsets[-1])],
        label_offsets=offsets - offsets[0],
        class_ids=batch.class_ids[start:stop],
        first_position=batch.first_position + start,
        extra={name: values[start:stop] for name, values in batch.extra.items()},
    )


def _target(images_BCHW: Tensor, patch: int, normalised: bool) -> Tensor:
    target_BLP = patchify(images_BCHW, patch).float()
    if not normalised:
        return target_BLP
    mean_BL1, scale_BL1 = target_statistics(target_BLP)
    return (target_BLP - mean_BL1) / scale_BL1


def _save_encoder(
    engine: Engine,
    ctx: StageContext,
    model: Model,
    *,
    pool: Pool | None = None,
    has_fixed_positions: bool = False,
) -> None:
    """weights.safetensors: the encoder alone, timm's names, float32; by rank 0."""
    tensors = {
        name.removeprefix("encoder."): value
        for name, value in engine.tensors()
        if name.startswith("encoder.")
    }
    if has_fixed_positions:
        # MAE's positions are a buffer: no parameter, and rounded to bfloat16 in a bf16 run.
        tensors["pos_embed"] = VisionEncoder(model).pos_embed
    if engine.rank == 0:
        ctx.check_lease()
        save_encoder(ctx.folder / "weights.safetensors", tensors, model, pool)


OBJECTIVES: dict[str, type[MaeObjective] | type[WspObjective]] = {
    "mae": MaeObjective,
    "wsp": WspObjective,
}
