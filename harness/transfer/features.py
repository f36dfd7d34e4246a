"""One pass of the frozen encoder over the labelled images: all that the solvers need.

Shapes: M images, C images of a chunk, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from harness.data import loader
from harness.data.dataset import Split, open_dataset
from harness.errors import DataError
from harness.ledger.context import StageContext, StageResult
from harness.models.heads import pooled
from harness.models.init import initialize
from harness.models.pixels import standardise
from harness.models.vit import VisionEncoder
from harness.models.weights import start_of
from harness.study.protocols import Features as FeaturesRecipe
from harness.study.recipes import Pool
from harness.study.stages import StageConfig, StageFile
from harness.transfer.parts import Part, make_parts, stop_if_asked

BATCH = 256
CHUNK = 64 * BATCH
"""Images of one file. Whole batches, so that neither chunks nor ranks move a batch's borders."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """Pooled encoder outputs of some images, with their classes."""

    values_MD: Tensor
    """float32."""
    class_M: Tensor
    """int64."""
    keys: list[str]


class MappedFeatures:
    """Pooled encoder outputs that stay in their files; of a step only its rows are read."""

    def __init__(self, chunks_CD: list[Tensor]) -> None:
        self._chunks_CD = chunks_CD
        self._ends = np.cumsum([len(chunk_CD) for chunk_CD in chunks_CD])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, places: np.ndarray) -> Tensor:
        """float32 [len(places), D], a copy."""
        chunk_B = np.searchsorted(self._ends, places, side="right")
        found_BD = torch.empty(len(places), self._chunks_CD[0].shape[1])
        for chunk in np.unique(chunk_B).tolist():
            here = np.flatnonzero(chunk_B == chunk)
            chunk_CD = self._chunks_CD[chunk]
            inside = places[here] - (self._ends[chunk] - len(chunk_CD))
            found_BD[torch.from_numpy(here)] = chunk_CD[torch.from_numpy(inside)]
        return found_BD


Choice = Callable[[Tensor], Tensor]
"""Classes of the training images -> places of those that are needed, ascending."""


def features(stage: StageFile, ctx: StageContext) -> StageResult:
    """Leaves features/{train,test}-000000.safetensors and on, of CHUNK images each.

    `values` float32 [C, D], `classes` int64 [C], `rows` int64 [C], the places in the split.
    Files that are there stay: a stopped pass goes on behind them.
    """
    started = time.perf_counter()
    recipe = stage.config.recipe
    assert isinstance(recipe, FeaturesRecipe), f"{recipe} is no pass of features"
    torch.set_num_threads(stage.execution.threads)
    device = torch.device(stage.execution.device)
    encoder = frozen_encoder(stage.config, ctx).to(device)
    splits = splits_of(stage, ctx)
    progress = Progress(ctx)
    parts = [
        Part(
            path=path,
            make=partial(pass_images, encoder, split, rows, recipe.pool, device, progress.add),
        )
        for name, (split, chosen) in splits.items()
        for path, rows in chunks(ctx.folder / "features", name, chosen)
    ]
    ready = time.perf_counter()
    make_parts(ctx, parts)
    return StageResult(
        metrics={f"n_{name}": float(len(rows)) for name, (_, rows) in splits.items()},
        steps=0,
        samples=0,
        flops=stage.flops,
        wall_s={
            "setup": ready - started,
            "train": 0.0,
            "eval": time.perf_counter() - ready,
            "checkpoint": 0.0,
        },
    )


def read_features(
    stage: StageFile, ctx: StageContext, needed: Choice | None = None
) -> tuple[Features, Features]:
    """Features of the stage's training images and of the test split, from the stage upstream.

    Of the training images only those that are `needed`. Raises DataError if the files are not those
    of this stage's images.
    """
    folder = ctx.upstream["features"]
    return tuple(  # type: ignore[return-value]  # two splits, two elements
        _read(folder, name, split, rows, needed if name == "train" else None)
        for name, (split, rows) in splits_of(stage, ctx).items()
    )


def map_features(stage: StageFile, ctx: StageContext) -> tuple[MappedFeatures, MappedFeatures]:
    """As `read_features`, but left where they are: any number, on every rank."""
    folder = ctx.upstream["features"]
    return tuple(  # type: ignore[return-value]  # two splits, two elements
        MappedFeatures([found["values"] for found, _ in _files(folder, name, rows)])
        for name, (_, rows) in splits_of(stage, ctx).items()
    )


def frozen_encoder(config: StageConfig, ctx: StageContext) -> VisionEncoder:
    """The encoder that a stage judges, on the CPU, in evaluation mode.

    Without upstream weights it is the one of the seed's initial weights.
    """
    encoder = VisionEncoder(config.model)
    initialize(encoder, config.seed)
    if ctx.upstream_weights is not None:
        encoder.load_state_dict(start_of(config, ctx.upstream_weights, encoder))
    return encoder.eval()


def half_on_cuda(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 products on CUDA, as in training; float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def splits_of(stage: StageFile, ctx: StageContext) -> dict[str, tuple[Split, np.ndarray]]:
    """train, test -> the split and the rows of it that the stage is about."""
    data = open_dataset(stage.execution.dataset_path, ctx.root)
    train = data.split(stage.config.images.split)
    test = data.split(data.meta.split_for("test"))
    return {
        "train": (train, train.subset(stage.config.images.images)),
        "test": (test, test.subset(test.num_samples)),
    }


def chunks(folder: Path, name: str, rows: np.ndarray) -> Iterator[tuple[Path, np.ndarray]]:
    """Files <name>-000000.safetensors and on, each with the rows that it is about."""
    for number, first in enumerate(range(0, len(rows), CHUNK)):
        path = folder / f"{name}-{number:06d}.safetensors"
        yield path, rows[first : first + CHUNK]


class Progress:
    """Images that went through the encoder in this attempt, for the status file."""

    def __init__(self, ctx: StageContext) -> None:
        self.ctx, self.images = ctx, 0

    def add(self, images: int) -> None:
        """So many more. Raises PreemptedError once the attempt was asked to stop."""
        stop_if_asked(self.ctx)
        self.images += images
        self.ctx.report(step=0, samples=self.images)


def pass_images(
    encoder: VisionEncoder,
    split: Split,
    rows: np.ndarray,
    pool: Pool,
    device: torch.device,
    seen: Callable[[int], None],
) -> dict[str, Tensor]:
    """`values`, `classes` and `rows` of these images; `seen` hears how many each batch has."""
    size = encoder.patch_embed.img_size[0]
    values, classes = [], []
    with torch.inference_mode(), half_on_cuda(device):
        for batch in loader.eval_batches(split, rows, batch=BATCH, image_size=size):
            seen(len(batch.images))
            images_BCHW = standardise(batch.images.to(device, non_blocking=True))
            # The pooled features leave in float32.
            values.append(pooled(encoder, images_BCHW, pool).float().cpu())
            classes.append(batch.class_ids)
    return {
        "values": torch.cat(values),
        "classes": torch.cat(classes),
        "rows": torch.from_numpy(rows),
    }


def _read(
    folder: Path, name: str, split: Split, rows: np.ndarray, needed: Choice | None
) -> Features:
    chosen = np.arange(len(rows))
    if needed is not None:
        chosen = needed(torch.from_numpy(split.class_ids[rows].astype(np.int64))).numpy()
    values, classes = [], []
    first = 0
    for found, expected in _files(folder, name, rows):
        here = chosen[(first <= chosen) & (chosen < first + len(expected))] - first
        # The file is mapped: what is not needed is not read.
        values.append(found["values"][torch.from_numpy(here)])
        classes.append(found["classes"][torch.from_numpy(here)])
        first += len(expected)
    return Features(
        values_MD=torch.cat(values),
        class_M=torch.cat(classes),
        keys=[str(split.keys[row]) for row in rows[chosen]],
    )


def _files(
    folder: Path, name: str, rows: np.ndarray
) -> Iterator[tuple[dict[str, Tensor], np.ndarray]]:
    """Each file's tensors, mapped, and the rows that it is about."""
    for path, expected in chunks(folder / "features", name, rows):
        found = _load(path)
        if not np.array_equal(found["rows"].numpy(), expected):
            raise DataError(
                f"{path}: holds the features of other images; remove its stage's folder"
            )
        yield found, expected


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path}: cannot be read as features ({error}); remove its stage's folder and submit"
            " again"
        ) from None
