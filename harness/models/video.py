"""The image encoder inflated in time: tubes for patches, attention over space and time together.

Names and shapes are those of `VisionEncoder`, but for `patch_embed.proj.weight`, which has a time
axis, and the two tables that it adds, `time_embed` and `relative_bias`. Both start at zero, so the
inflated encoder begins as the image encoder: on a clip that stands still, with the time left
aside, it computes the same.

Shapes: B clips, T frames, C channels, H height, W width, t frames of a tube, Q = T / t tubes in
time, G patches along a side, L = Q * G * G tubes, N = 1 + L tokens (class token first), D width,
A attention heads, P numbers of a tube, R rows of a bias table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.models.heads import Classifier, Targets, pooled
from harness.models.vit import Patches, VisionEncoder
from harness.study.recipes import Model, Pool

Inflation = Literal["central", "mean"]
RelativeBias = Literal["none", "shared", "per_block"]


def inflated(kernel_DCpp: Tensor, tube: int, how: Inflation) -> Tensor:
    """[D, C, t, p, p]: a kernel of tubes that answers to a still clip as the image's to the image.

    `central`: the image's kernel at the middle frame, zeros at the others. `mean`: 1/t of it at
    every frame (Arnab et al. 2021, ViViT, arXiv 2103.15691, sec. 3.4, which found `central` best).
    """
    if how == "mean":
        return kernel_DCpp[:, :, None].repeat(1, 1, tube, 1, 1) / tube
    kernel = kernel_DCpp.new_zeros(*kernel_DCpp.shape[:2], tube, *kernel_DCpp.shape[2:])
    kernel[:, :, tube // 2] = kernel_DCpp
    return kernel


def inflate(tensors: Mapping[str, Tensor], tube: int, how: Inflation) -> dict[str, Tensor]:
    """An image encoder's tensors for a `VideoEncoder`; what it adds is not among them."""
    name = "patch_embed.proj.weight"
    return {**tensors, name: inflated(tensors[name].float(), tube, how)}


def bias_rows(frames: int, grid: int) -> int:
    """Rows of a table of relative position biases, for Q = `frames` and G = `grid`."""
    return (2 * frames - 1) * (2 * grid - 1) ** 2 + 3


def relative_index(frames: int, grid: int) -> Tensor:
    """int64 [N, N]: row of the table for (query, key).

    A row for each offset in time, row and column, as Swin's in space (Liu et al. 2021, arXiv
    2103.14030, sec. 3.2); the last three for class token to tube, tube to class token, class token
    to itself, as BEiT's (Bao et al. 2022).
    """
    places = torch.cartesian_prod(torch.arange(frames), torch.arange(grid), torch.arange(grid))
    offset_LL3 = places[:, None] - places[None] + torch.tensor([frames - 1, grid - 1, grid - 1])
    span = 2 * grid - 1
    num, rows = len(places), bias_rows(frames, grid)
    index_NN = torch.empty(1 + num, 1 + num, dtype=torch.int64)
    index_NN[1:, 1:] = (offset_LL3[..., 0] * span + offset_LL3[..., 1]) * span + offset_LL3[..., 2]
    index_NN[0, 1:], index_NN[1:, 0], index_NN[0, 0] = rows - 3, rows - 2, rows - 1
    return index_NN


class TubeLinear(nn.Conv3d):
    """The projection of tubes: a convolution's parameters, applied to cut-out tubes."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name is torch's)
        """[B, Q, G * G, D] from tubes [B, Q, G * G, P] in the order channel, frame, row, column."""
        return F.linear(input, self.weight.flatten(1), self.bias)


class Tubes(Patches):
    """`Patches` of t frames each."""

    def __init__(self, model: Model, tube: int) -> None:
        super().__init__(model.image_size, model.patch, 3, model.width)
        self.tube = tube
        kernel = (tube, model.patch, model.patch)
        self.proj = TubeLinear(3, model.width, kernel, kernel)

    def forward(self, clips_BTCHW: Tensor) -> Tensor:  # type: ignore[override]  # no patches are left out
        """[B, Q, G * G, D]."""
        batch, frames, channels, height, width = clips_BTCHW.shape
        if (height, width) != self.img_size or frames % self.tube:
            raise ValueError(f"clips are {frames}x{height}x{width}, tubes {self.tube} of them")
        patch = int(self.patch_size[0])
        shape = (frames // self.tube, self.tube, channels, height // patch, patch)
        grid = clips_BTCHW.reshape(batch, *shape, width // patch, patch)
        # batch, Q, t, C, row, y, column, x -> batch, Q, row, column, C, t, y, x
        tubes = grid.permute(0, 1, 4, 6, 3, 2, 5, 7)
        return self.proj(tubes.reshape(batch, shape[0], self.num_patches, -1))


class VideoEncoder(VisionEncoder):
    """`VisionEncoder` of clips: [B, 1 + L, D] normed tokens, class token first, frames in order.

    Spatial positions are those of the image encoder, at every time again; `time_embed` [1, Q, 1, D]
    is added to them. `relative_bias` [1 or depth, R, A] is added to the attention's scores.
    """

    def __init__(
        self,
        model: Model,
        *,
        frames: int,
        tube: int,
        relative_bias: RelativeBias = "shared",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(model, drop_path=drop_path)
        self.patch_embed = Tubes(model, tube)
        self.clip_frames = frames
        times, grid = frames // tube, model.image_size // model.patch
        self.time_embed = nn.Parameter(torch.zeros(1, times, 1, model.width))
        self.relative_bias: nn.Parameter | None = None
        if relative_bias != "none":
            tables = model.depth if relative_bias == "per_block" else 1
            self.relative_bias = nn.Parameter(
                torch.zeros(tables, bias_rows(times, grid), model.heads)
            )
        self._extent = (times, grid)
        self._index: Tensor | None = None

    def forward(  # type: ignore[override]  # clips for images
        self, clips_BTCHW: Tensor, keep_BK: None = None, normed: bool = True
    ) -> Tensor:
        """Tokens of the clips; `normed`: through the final norm."""
        assert keep_BK is None, "tubes of a clip are never left out"
        tokens_BQLD = self.patch_embed(clips_BTCHW)
        tokens_BQLD = tokens_BQLD + self.pos_embed[:, None, 1:] + self.time_embed
        cls_B1D = (self.cls_token + self.pos_embed[:, :1]).expand(len(clips_BTCHW), -1, -1)
        tokens_BND = torch.cat([cls_B1D, tokens_BQLD.flatten(1, 2)], dim=1)
        biases = self._biases(tokens_BND)
        for place, block in enumerate(self.blocks):
            tokens_BND = block(tokens_BND, biases[place % len(biases)])
        return self.norm(tokens_BND) if normed else tokens_BND

    def _biases(self, tokens_BND: Tensor) -> list[Tensor | None]:
        """Biases [1, A, N, N] of the blocks, or one for all of them."""
        if self.relative_bias is None:
            return [None]
        if self._index is None or self._index.device != tokens_BND.device:
            self._index = relative_index(*self._extent).to(tokens_BND.device)
        # An embedding, not indexing: its gradient is summed up in a fixed order on CUDA too.
        tables = (F.embedding(self._index, table) for table in self.relative_bias)
        return [bias_NNA.permute(2, 0, 1)[None].to(tokens_BND.dtype) for bias_NNA in tables]


class VideoClassifier(Classifier):
    """Logits from a clip's pooled tokens, some of them dropped in training."""

    def __init__(
        self, encoder: VideoEncoder, num_classes: int, pool: Pool, dropout: float = 0.0
    ) -> None:
        super().__init__(encoder, num_classes, pool)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        images_BCHW: Tensor,
        targets: Targets | None = None,
        head_images: int | None = None,
    ) -> Tensor:
        """logits_BQ of clips [B, T, C, H, W]; with targets, losses_B (see `Head`)."""
        features_BD = pooled(self.encoder, images_BCHW, self.pool)
        return self.head(self.dropout(features_BD), targets, head_images)
