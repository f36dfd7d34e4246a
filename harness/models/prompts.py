"""Visual prompt tuning, deep: learned tokens beside the input of every block of a frozen encoder.

Source: Jia et al. 2022 (arXiv 2203.12119), sec. 3.2. Shapes: B images, L patches, N tokens (class
token first), T prompts of a block, D width, Q classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from harness.models.vit import VisionEncoder
from harness.study.recipes import Pool


class PromptedClassifier(nn.Module):
    """Prompts and a linear head around an encoder, which takes no gradient from here on.

    Prompts are Xavier-uniform over a patch's numbers and the width, as the paper draws them; the
    head starts at zero (ours), so that the first gradient is that of equal odds.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        num_prompts: int,
        num_classes: int,
        pool: Pool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.pool = pool
        depth, width = len(encoder.blocks), encoder.embed_dim
        patch = int(encoder.patch_embed.patch_size[0])
        bound = math.sqrt(6 / (3 * patch * patch + width))
        values = torch.empty(depth, num_prompts, width).uniform_(-bound, bound, generator=generator)
        self.prompts = nn.Parameter(values)
        """[depth, T, D]: those of block i are prompts[i]."""
        self.head = nn.Linear(width, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """logits_BQ."""
        return self.head(self.pooled(images_BCHW))

    def pooled(self, images_BCHW: Tensor) -> Tensor:
        """[B, D], as `harness.models.heads.pooled`; prompts are never part of a mean."""
        encoder, batch = self.encoder, len(images_BCHW)
        patches_BLD = encoder.patch_embed(images_BCHW) + encoder.pos_embed[:, 1:]
        cls_11D = encoder.cls_token + encoder.pos_embed[:, :1]
        tokens_BND = torch.cat([cls_11D.expand(batch, -1, -1), patches_BLD], dim=1)
        num_prompts = self.prompts.shape[1]
        for block, prompts_TD in zip(encoder.blocks, self.prompts, strict=True):
            # What the block makes of its prompts goes nowhere: the next one has prompts of its own.
            prompts_BTD = prompts_TD.to(tokens_BND.dtype).expand(batch, -1, -1)
            out = block(torch.cat([tokens_BND[:, :1], prompts_BTD, tokens_BND[:, 1:]], dim=1))
            tokens_BND = torch.cat([out[:, :1], out[:, 1 + num_prompts :]], dim=1)
        if self.pool == "cls":
            return encoder.norm(tokens_BND[:, 0])
        if self.pool == "mean":
            return encoder.norm(tokens_BND[:, 1:]).mean(dim=1)
        return encoder.norm(tokens_BND[:, 1:].mean(dim=1))

    def learned(self) -> dict[str, Tensor]:
        """What training changes: `prompts`, `head.weight`, `head.bias`."""
        return {
            name: param.detach() for name, param in self.named_parameters() if param.requires_grad
        }

    def load_learned(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `learned`; names and shapes must be its own."""
        own = self.learned()
        assert own.keys() == tensors.keys(), f"expected {sorted(own)}, found {sorted(tensors)}"
        for name, value in own.items():
            value.copy_(tensors[name])
