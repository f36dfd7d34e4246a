"""LiT: a text tower learns to say what a frozen image tower sees (Zhai et al. 2022).

The image tower is frozen and images are not augmented, so its features are those of the `features`
stage: an image passes through it once, however many epochs there are.

Shapes: B pairs of a rank's share of a step, M test images, D width of the image tower, E width of
the shared space.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from harness.data.loader import Batch
from harness.data.order import Places
from harness.errors import UserError
from harness.ledger.context import StageContext, StageResult
from harness.models.lit import FILE, TEXT_FOLDER, TwoTowers, start_values
from harness.models.text import make_tokenizer, save_folder
from harness.models.weight_files import write_safetensors
from harness.study.protocols import Lit
from harness.study.recipes import Augmentation
from harness.study.stages import StageFile
from harness.study.words import TextFolder, text_hash
from harness.train.blueprint import Blueprint, Groups
from harness.train.contrastive import contrastive_loss
from harness.train.engine import Engine
from harness.train.groups import parameter_groups
from harness.train.loop import run
from harness.transfer.captions import Captions
from harness.transfer.features import map_features, splits_of


def lit(stage: StageFile, ctx: StageContext) -> StageResult:
    """loss and val_loss; leaves lit.safetensors, and text/ for a tower of `transformers`."""
    started = time.perf_counter()
    recipe = stage.config.recipe
    assert isinstance(recipe, Lit), f"{recipe} is no LiT recipe"
    execution = stage.execution
    share = recipe.batch // ctx.ranks
    if execution.micro_batch is not None and execution.micro_batch < share:
        raise UserError(
            f"lit: a micro_batch of {execution.micro_batch} is less than a rank's share of the"
            f" batch, {share}: every text is told from all others of the batch, which are needed at"
            " once; leave micro_batch out, use more ranks or activation_checkpointing"
        )
    if isinstance(recipe.text, TextFolder):
        if text_hash(Path(recipe.text.folder)) != recipe.text.sha256:
            raise UserError(
                f"{recipe.text.folder}: the text tower has changed since the study was planned;"
                " submit again"
            )
        # Its tables are no parameters, and would be missing from a model made without memory.
        stage = stage.model_copy(
            update={"execution": execution.model_copy(update={"sharded_init": False})}
        )
    objective = LitObjective(stage, ctx, recipe)
    return run(objective, stage, ctx, objective.split, started)


class LitObjective:
    """Tell which text belongs to which image."""

    augment = Augmentation(crop_scale=(0.0, 1.0), flip=False)
    """Unused: no image is drawn."""
    evaluated_on_the_way = False

    def __init__(self, stage: StageFile, ctx: StageContext, recipe: Lit) -> None:
        self.recipe, self.config, self.ctx = recipe, stage.config, ctx
        splits = splits_of(stage, ctx)
        self.split, rows = splits["train"]
        test, self._test_rows = splits["test"]
        self.train, self.test = map_features(stage, ctx)
        self._place_of_row = np.full(self.split.num_samples, -1)
        self._place_of_row[rows] = np.arange(len(rows))
        self._captions, self._test_captions = Captions(self.split), Captions(test)
        self._tokenizer = make_tokenizer(recipe.text, recipe.context, None)

    def allows(self, micro_batch: int) -> bool:
        """A rank's whole share: a text is told from all others of the batch."""
        return micro_batch * self.ctx.ranks >= self.recipe.batch

    def blueprint(self) -> Blueprint:
        """Both towers' new parts; the text tower's own weights where it comes from a folder."""
        return Blueprint(
            make=lambda: TwoTowers(self.recipe, self.config.model.width),
            seed=self.config.seed,
            groups=self._groups,
            given=lambda: start_values(self.recipe),
        )

    def _groups(self, model: torch.nn.Module) -> Groups:
        return parameter_groups(
            model, depth=self.config.model.depth, weight_decay=self.recipe.weight_decay
        )

    def make_batch(self, places: Places, first: int) -> Batch:
        """Features and one caption of each image; a function of (seed, epoch, image)."""
        hashes = self.split.key_hashes[places.rows].tolist()
        drawn = zip(
            places.rows.tolist(), places.epochs.tolist(), places.repeats.tolist(), hashes,
            strict=True,
        )  # fmt: skip
        seed = self.config.seed
        texts = [self._captions.one(row, (seed, *key)) for row, *key in drawn]
        tokens_BT, mask_BT = self._tokenizer(texts)
        features_BD = self.train.rows(self._place_of_row[places.rows])
        num = len(texts)
        return Batch(
            images=torch.empty(num, 0, dtype=torch.uint8),
            label_ids=torch.empty(0, dtype=torch.int64),
            label_offsets=torch.zeros(num + 1, dtype=torch.int64),
            class_ids=torch.full((num,), -1),
            first_position=first,
            extra={"features": features_BD, "tokens": tokens_BT, "mask": mask_BT},
        )

    def loss(self, engine: Engine, batch: Batch, step: int, first: int) -> Tensor:
        """Symmetric cross-entropy over the batch of all ranks; see `contrastive_loss`."""
        extra = batch.extra
        image_BE, text_BE, log_scale_1 = engine.forward(
            extra["features"], extra["tokens"], extra["mask"]
        )
        return contrastive_loss(
            image_BE,
            text_BE,
            log_scale_1,
            max_scale=self.recipe.max_scale,
            chunk=engine.head_batch,
        )

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """val_loss on the test images, each with its first caption, in batches as in training."""
        num, size = len(self.test), min(self.recipe.batch, len(self.test))
        shared = self.recipe.embed or self.config.model.width
        both_M2E = torch.zeros(num, 2, shared, device=engine.device)
        log_scale_1 = torch.zeros(1)
        with engine.evaluating():
            for place_B, is_own_B in self._test_batches(engine):
                rows = self._test_rows[place_B.numpy()].tolist()
                texts = [self._test_captions.of(row)[0] for row in rows]
                tokens_BT, mask_BT = self._tokenizer(texts)
                image_BE, text_BE, log_scale_1 = engine.forward(
                    self.test.rows(place_B.numpy()).to(engine.device),
                    tokens_BT.to(engine.device),
                    mask_BT.to(engine.device),
                )
                found_B2E = torch.stack([image_BE, text_BE], dim=1)
                both_M2E[place_B[is_own_B]] = found_B2E[is_own_B]
            # Every rank computes the whole, of what each has done a share of.
            both_M2E = engine.total(both_M2E).cpu()
            scale_1 = log_scale_1.cpu().exp().clamp(max=self.recipe.max_scale)
        losses = [
            _plain_loss(both_M2E[first : first + size], scale_1)
            for first in range(0, num - size + 1, size)
        ]
        return {
            "val_loss": sum(losses) / len(losses),
            "temperature": 1 / scale_1.item(),
            "n_test": float(num),
        }

    def _test_batches(self, engine: Engine) -> Iterator[tuple[Tensor, Tensor]]:
        """Places, and which of them are this rank's share; as many batches on every rank, as
        ZeRO-3 needs: where its share is at an end a rank helps with the last image.
        """
        num, step = len(self.test), engine.ranks * engine.micro_batch
        for first in range(0, num, step):
            place_B = torch.arange(first + engine.rank, first + step, engine.ranks)
            yield place_B.clamp(max=num - 1), place_B < num

    def finish(self, engine: Engine) -> dict[str, float]:
        """lit.safetensors, and text/ where the text tower is of `transformers`."""
        tensors = dict(engine.tensors())
        if engine.rank == 0:
            self.ctx.check_lease()
            if isinstance(self.recipe.text, TextFolder):
                save_folder(Path(self.recipe.text.folder), self.ctx.folder / TEXT_FOLDER)
            said = {
                "recipe": self.recipe.model_dump(mode="json"),
                "features": self.config.model.width,
            }
            write_safetensors(self.ctx.folder / FILE, tensors, said)
        return {}


def _plain_loss(both_B2E: Tensor, scale_1: Tensor) -> float:
    logits_BB = scale_1 * (both_B2E[:, 0] @ both_B2E[:, 1].T)
    target_B = torch.arange(len(logits_BB))
    losses = [F.cross_entropy(x_BB, target_B).item() for x_BB in (logits_BB, logits_BB.T)]
    return sum(losses) / 2
