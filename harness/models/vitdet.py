"""The plain ViT as a detector's backbone, with a simple feature pyramid.

After Li et al. 2022, "Exploring plain vision transformer backbones for object detection" (ViTDet,
arXiv 2203.16527), sec. 3. Shapes: B images, G patches along a side, L = G * G, D width, W side of a
window in patches, N tokens of a window, H heads, C channels of the pyramid.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from harness.models.vit import VisionEncoder
from harness.study.recipes import Model


def global_blocks(depth: int, num: int) -> list[int]:
    """Blocks with global attention: the last of each of `num` equal parts (sec. 3)."""
    num = min(num, depth)
    return [(part + 1) * depth // num - 1 for part in range(num)]


class RelativePositions(nn.Module):
    """Decomposed relative positions (Li et al. 2022, MViTv2, arXiv 2112.01526, sec. 4.1)."""

    def __init__(self, side: int, head_width: int) -> None:
        super().__init__()
        self.relative_bias = nn.Parameter(torch.zeros(2, 2 * side - 1, head_width))
        self.side = side

    def forward(self, query_BHND: Tensor) -> Tensor:
        """[B, H, N, N]: q . (row of the distance down) + q . (row of the distance across)."""
        side = self.side
        place = torch.arange(side, device=query_BHND.device)
        table_2GGD = self.relative_bias[:, place[:, None] - place[None, :] + side - 1]
        grid = query_BHND.unflatten(2, (side, side))
        down = torch.einsum("bhyxd,ykd->bhyxk", grid, table_2GGD[0])
        across = torch.einsum("bhyxd,xkd->bhyxk", grid, table_2GGD[1])
        return (down[..., :, None] + across[..., None, :]).flatten(4).flatten(2, 3)


class WindowAttention(Attention):
    """timm's attention inside windows that do not overlap, or over the whole image.

    Where windows do not fill the grid it is padded with zeros below and to the right.
    """

    def __init__(self, model: Model, window: int, *, relative: bool) -> None:
        super().__init__(model.width, num_heads=model.heads, qkv_bias=True)
        self.grid = model.image_size // model.patch
        self.window = min(window, self.grid)
        self.relative = RelativePositions(self.window, self.head_dim) if relative else None

    def forward(self, tokens_BLD: Tensor, **unused: Any) -> Tensor:  # type: ignore[override]
        """[B, L, D]."""
        grid, window = self.grid, self.window
        pad = -grid % window
        parts = (grid + pad) // window
        square = F.pad(tokens_BLD.unflatten(1, (grid, grid)), (0, 0, 0, pad, 0, pad))
        square = square.unflatten(2, (parts, window)).unflatten(1, (parts, window))
        windows_WND = square.transpose(2, 3).flatten(0, 2).flatten(1, 2)
        out = self._attend(windows_WND)
        out = out.reshape(-1, parts, parts, window, window, out.shape[-1]).transpose(2, 3)
        out = out.flatten(3, 4).flatten(1, 2)[:, :grid, :grid]
        return out.flatten(1, 2)

    def _attend(self, tokens_BND: Tensor) -> Tensor:
        qkv = self.qkv(tokens_BND).unflatten(2, (3, self.num_heads, self.head_dim))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        bias = None if self.relative is None else self.relative(query)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(out.transpose(1, 2).flatten(2))


class PlainBackbone(VisionEncoder):
    """[B, D, G, G] of the last block: no class token, no final norm.

    Its parameters have the encoder's names and shapes, less those two and the class row of the
    positions: see `backbone_tensors`.
    """

    def __init__(
        self, model: Model, *, window: int, num_global: int, relative: bool, drop_path: float
    ) -> None:
        super().__init__(model, drop_path=drop_path)
        grid = model.image_size // model.patch
        whole = global_blocks(model.depth, num_global)
        blocks: Any = self.blocks
        for place, block in enumerate(blocks):
            block.attn = WindowAttention(
                model, grid if place in whole else window, relative=relative
            )
        del self.cls_token
        self.norm = nn.Identity()
        self.pos_embed = nn.Parameter(self.pos_embed.detach()[:, 1:].clone())
        self.grid = grid

    def forward(self, images_BCHW: Tensor) -> Tensor:  # type: ignore[override]
        """The map of the last block."""
        tokens_BLD = self.blocks(self.patch_embed(images_BCHW) + self.pos_embed)
        return tokens_BLD.transpose(1, 2).unflatten(2, (self.grid, self.grid))


def backbone_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An image encoder's tensors, those that `PlainBackbone` has."""
    kept = {
        name: value
        for name, value in tensors.items()
        if name != "cls_token" and not name.startswith("norm.")
    }
    return kept | {"pos_embed": kept["pos_embed"][:, 1:].clone()}


class SimplePyramid(nn.Module):
    """Maps of other scales made of the last one alone (sec. 3), and a coarser one for proposals."""

    def __init__(self, width: int, channels: int, scales: tuple[float, ...]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_level(width, channels, scale) for scale in scales)

    def forward(self, map_BDGG: Tensor) -> dict[str, Tensor]:
        """float32 maps by place, finest first, and "pool": every second pixel of the last.

        float32, because boxes and their losses follow from them.
        """
        maps = {str(k): level(map_BDGG).float() for k, level in enumerate(self.levels)}
        last = next(reversed(maps.values()))
        return maps | {"pool": F.max_pool2d(last, 1, stride=2)}


def _level(width: int, channels: int, scale: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    if scale == 4.0:
        layers = [
            nn.ConvTranspose2d(width, width // 2, 2, stride=2),
            LayerNorm2d(width // 2),
            nn.GELU(),
            nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2),
        ]
        width //= 4
    elif scale == 2.0:
        layers = [nn.ConvTranspose2d(width, width // 2, 2, stride=2)]
        width //= 2
    elif scale == 0.5:
        layers = [nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers,
        nn.Conv2d(width, channels, 1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        LayerNorm2d(channels),
    )
