"""The ViT encoder: timm's VisionTransformer with timm's parameter names and our own forward.

Shapes: B images, C channels, H height, W width, L patches, K kept patches, N tokens (class
token first), D width, P numbers of a patch.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from harness.study.recipes import Model


def sincos_positions(grid: int, width: int) -> Tensor:
    """Fixed 2-D position table [1, 1 + grid * grid, width], float32; the class row is zeros.

    The first half of a row encodes the column, the second half the row; each half is
    [sin(x / 10000**(2i/(D/2))), cos(...)], i < D/4 (Vaswani et al. 2017, in two dimensions).
    """
    if width % 4:
        raise ValueError(f"width {width} is not a multiple of 4, as 2-D sin-cos positions need")
    quarter = width // 4
    # Without BLAS and in float64: the table is then the same on every machine, and building
    # it starts no thread pool before a fork.
    omega_Q = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    place_G = torch.arange(grid, dtype=torch.float64)
    angle_GQ = place_G[:, None] * omega_Q[None, :]
    half_GH = torch.cat([angle_GQ.sin(), angle_GQ.cos()], dim=1)
    table = torch.zeros(1, 1 + grid * grid, width)
    columns = half_GH.repeat(grid, 1)
    rows = half_GH.repeat_interleave(grid, dim=0)
    table[0, 1:] = torch.cat([columns, rows], dim=1).float()
    return table


class PatchLinear(nn.Conv2d):
    """The patch projection: parameters of timm's convolution, applied to cut-out patches.

    A convolution whose stride is its size is a matrix product over patches. Written so, the
    hidden patches of MAE are never projected, and the slow weight gradient of small
    convolutions on CPU is gone.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name is torch's)
        """[B, K, D] from patches [B, K, P] in the order channel, row, column."""
        return F.linear(input, self.weight.flatten(1), self.bias)


class Patches(PatchEmbed):
    """timm's PatchEmbed with `PatchLinear` as `proj`; its forward takes what to keep."""

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **unused: Any
    ) -> None:
        super().__init__(img_size, patch_size, in_chans, embed_dim)
        self.proj = PatchLinear(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, images_BCHW: Tensor, keep_BK: Tensor | None = None) -> Tensor:  # type: ignore[override]  # timm's forward takes the images only
        """[B, K, D]: projections of the kept patches, of all L when `keep_BK` is None."""
        batch, channels, height, width = images_BCHW.shape
        patch = int(self.patch_size[0])
        if (height, width) != self.img_size:
            raise ValueError(f"images are {height}x{width}, the encoder takes {self.img_size}")
        grid = images_BCHW.reshape(batch, channels, height // patch, patch, width // patch, patch)
        patches_BLP = grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, self.num_patches, -1)
        if keep_BK is not None:
            patches_BLP = gather_rows(patches_BLP, keep_BK)
        return self.proj(patches_BLP)


def gather_rows(rows_BLD: Tensor, index_BK: Tensor) -> Tensor:
    """[B, K, D]: row index_BK[b, k] of sample b."""
    return rows_BLD.gather(1, index_BK[..., None].expand(-1, -1, rows_BLD.shape[-1]))


class VisionEncoder(VisionTransformer):
    """ViT without head: [B, 1 + K, D] normed tokens, class token first.

    Parameters have timm's names and shapes, so timm's weights of the same shape load strictly.
    The position table starts as 2-D sin-cos. It is a parameter when `train_positions`, else a
    buffer: ZeRO-3 would partition a frozen parameter and gather it in every step.

    Weights are those of torch's constructors; `harness.models.init.initialize` sets them.
    """

    cls_token: Tensor
    pos_embed: Tensor

    def __init__(
        self, model: Model, *, drop_path: float = 0.0, train_positions: bool = True
    ) -> None:
        if model.image_size % model.patch:
            raise ValueError(f"image size {model.image_size} is no multiple of patch {model.patch}")
        super().__init__(
            img_size=model.image_size,
            patch_size=model.patch,
            embed_dim=model.width,
            depth=model.depth,
            num_heads=model.heads,
            num_classes=0,
            drop_path_rate=drop_path,
            embed_layer=Patches,
            weight_init="skip",
        )
        table = sincos_positions(model.image_size // model.patch, model.width)
        table = table.to(self.pos_embed.device)
        del self.pos_embed
        if train_positions:
            self.pos_embed = nn.Parameter(table)
        else:
            self.register_buffer("pos_embed", table)

    def forward(  # type: ignore[override]  # timm returns logits
        self, images_BCHW: Tensor, keep_BK: Tensor | None = None, normed: bool = True
    ) -> Tensor:
        """Tokens of the images, or of the patches keep_BK of each sample only, in that order.

        `normed`: through the final norm.
        """
        tokens_BKD = self.patch_embed(images_BCHW, keep_BK)
        positions_BLD = self.pos_embed[:, 1:]
        if keep_BK is not None:
            positions_BLD = gather_rows(positions_BLD.expand(len(keep_BK), -1, -1), keep_BK)
        cls_B1D = (self.cls_token + self.pos_embed[:, :1]).expand(len(images_BCHW), -1, -1)
        tokens_BND = torch.cat([cls_B1D, tokens_BKD + positions_BLD], dim=1)
        # DeepSpeed leaves buffers in float32: a fixed table would make bfloat16 tokens float32.
        tokens_BND = self.blocks(tokens_BND.to(tokens_BKD.dtype))
        return self.norm(tokens_BND) if normed else tokens_BND
