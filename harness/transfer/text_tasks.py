"""What zero-shot classification and retrieval share: the test images in the space of the words.

Shapes: M test images, E width of the shared space.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.data.dataset import Dataset, Split, open_dataset
from harness.ledger.context import StageContext
from harness.models.lit import TrainedLit, read_lit
from harness.study.stages import StageFile
from harness.transfer.features import Progress, chunks, frozen_encoder, pass_images
from harness.transfer.parts import Part, make_parts


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Test images and the towers that look at them."""

    lit: TrainedLit
    data: Dataset
    split: Split
    rows: np.ndarray
    image_ME: Tensor
    """float32, of length 1, on the CPU."""

    @property
    def keys(self) -> list[str]:
        """Of the images."""
        return [str(self.split.keys[row]) for row in self.rows]


def read_judged(stage: StageFile, ctx: StageContext) -> Judged:
    """The towers of the lit task upstream, and the test images through its image tower.

    Ranks share the images out, by chunks; a chunk that an earlier attempt left stays.
    """
    torch.set_num_threads(stage.execution.threads)
    device = torch.device(stage.execution.device)
    lit = read_lit(ctx.upstream["model"], device)
    data = open_dataset(stage.execution.dataset_path, ctx.root)
    split = data.split(data.meta.split_for("test"))
    rows = split.subset(split.num_samples)
    # Pooled, and its positions resized, as they were when the text tower was trained to it.
    config = stage.config.model_copy(update={"recipe": lit.recipe})
    encoder = frozen_encoder(config, ctx).to(device)
    files = list(chunks(ctx.folder / "features", "test", rows))
    make = partial(
        pass_images, encoder, split, pool=lit.recipe.pool, device=device, seen=Progress(ctx).add
    )
    make_parts(ctx, [Part(path=path, make=partial(make, rows=own)) for path, own in files])
    features_MD = torch.cat([load_file(path)["values"] for path, _ in files])
    return Judged(lit=lit, data=data, split=split, rows=rows, image_ME=lit.images(features_MD))
