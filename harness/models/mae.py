"""Masked autoencoder (He et al. 2022, arXiv 2111.06377): encoder on visible patches, decoder.

Shapes: B images, C channels, H height, W width, L patches, K kept (visible) patches, N tokens
(class token first), D encoder width, E decoder width, P numbers of a patch.
"""

from __future__ import annotations

import torch
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from harness.models.pixels import patchify
from harness.models.vit import VisionEncoder, sincos_positions
from harness.study.recipes import MaeRecipe, Model


def visible_patches(noise_BL: Tensor, mask_ratio: float) -> Tensor:
    """keep_BK: the patches with the smallest noise, smallest first; K = int(L * (1 - ratio)).

    At least one patch stays visible and one is hidden.
    """
    num_patches = noise_BL.shape[1]
    num_kept = int(num_patches * (1 - mask_ratio))
    if not 1 <= num_kept < num_patches:
        raise ValueError(f"mask ratio {mask_ratio} keeps {num_kept} of {num_patches} patches")
    # Stable, so that equal noise gives the same mask on every device.
    return noise_BL.argsort(dim=1, stable=True)[:, :num_kept]


def hidden_mask(keep_BK: Tensor, num_patches: int) -> Tensor:
    """mask_BL, float32: 1 where a patch is hidden, 0 where it is visible."""
    mask_BL = torch.ones(len(keep_BK), num_patches, device=keep_BK.device)
    return mask_BL.scatter_(1, keep_BK, 0.0)


def target_statistics(target_BLP: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(unbiased variance + 1e-6) of each patch, both [B, L, 1], float32."""
    variance, mean = torch.var_mean(target_BLP.float(), dim=-1, keepdim=True, correction=1)
    return mean, (variance + 1e-6).sqrt()


def masked_loss(pred_BLP: Tensor, target_BLP: Tensor, mask_BL: Tensor) -> Tensor:
    """Squared error in float32, averaged over a patch, then over the hidden patches only."""
    error_BL = (pred_BLP.float() - target_BLP.float()).square().mean(dim=-1)
    return (error_BL * mask_BL).sum() / mask_BL.sum()


class Decoder(nn.Module):
    """Light transformer from visible tokens to the pixels of every patch.

    The position table is fixed, so it is a buffer, left out of state dicts.
    """

    pos_embed: Tensor

    def __init__(
        self, *, in_width: int, grid: int, patch: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(in_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_positions(grid, width), persistent=False)
        self.blocks = nn.Sequential(
            *[Block(width, heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth)]
        )
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, patch * patch * 3)

    def forward(self, tokens_BND: Tensor, keep_BK: Tensor) -> Tensor:
        """pred_BLP for all patches, in the order of `patchify`."""
        tokens_BNE = self.embed(tokens_BND)
        num_patches = self.pos_embed.shape[1] - 1
        hidden_BLE = self.mask_token.expand(len(keep_BK), num_patches, -1).to(tokens_BNE.dtype)
        # Scatter, not gather by the inverse permutation: its backward adds nothing atomically,
        # so CUDA gives the same bits each time.
        index_BKE = keep_BK[..., None].expand(-1, -1, tokens_BNE.shape[-1])
        patches_BLE = hidden_BLE.scatter(1, index_BKE, tokens_BNE[:, 1:])
        full_BNE = torch.cat([tokens_BNE[:, :1], patches_BLE], dim=1) + self.pos_embed
        full_BNE = full_BNE.to(tokens_BNE.dtype)  # the table is float32, whatever the weights are
        return self.head(self.norm(self.blocks(full_BNE))[:, 1:])


class Mae(nn.Module):
    """Encoder and decoder in one module, so that training enters through one forward."""

    def __init__(self, model: Model, recipe: MaeRecipe) -> None:
        super().__init__()
        self.patch = model.patch
        self.num_patches = model.num_patches
        self.mask_ratio = recipe.mask_ratio
        self.norm_target = recipe.norm_target
        self.encoder = VisionEncoder(model, train_positions=False)
        self.decoder = Decoder(
            in_width=model.width,
            grid=model.image_size // model.patch,
            patch=model.patch,
            width=recipe.decoder_width,
            depth=recipe.decoder_depth,
            heads=recipe.decoder_heads,
        )

    def forward(
        self, images_BCHW: Tensor, noise_BL: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (scalar, float32), pred_BLP, mask_BL (1 = hidden).

        noise_BL decides the mask of each sample; None draws it from torch's default generator.
        """
        if noise_BL is None:
            noise_BL = torch.rand(len(images_BCHW), self.num_patches, device=images_BCHW.device)
        keep_BK = visible_patches(noise_BL, self.mask_ratio)
        mask_BL = hidden_mask(keep_BK, self.num_patches)
        pred_BLP = self.decoder(self.encoder(images_BCHW, keep_BK), keep_BK)
        target_BLP = patchify(images_BCHW, self.patch)
        if self.norm_target:
            mean_BL1, scale_BL1 = target_statistics(target_BLP)
            target_BLP = (target_BLP.float() - mean_BL1) / scale_BL1
        return masked_loss(pred_BLP, target_BLP, mask_BL), pred_BLP, mask_BL
