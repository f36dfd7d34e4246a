"""The contrastive loss over a batch that is spread over ranks, some rows of it at a time.

Source: Radford et al. 2021 (arXiv 2103.00020), fig. 3. Shapes: B pairs of this rank, N pairs of all
ranks, E width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 1024
"""Rows of the N x N similarities that are in memory at a time, unless said otherwise."""


def contrastive_loss(
    image_BE: Tensor,
    text_BE: Tensor,
    log_scale_1: Tensor,
    *,
    max_scale: float = math.inf,
    chunk: int | None = None,
) -> Tensor:
    """Mean cross-entropy of finding a pair's text among all N, and its image; of this rank's pairs.

    The vectors have length 1; similarities are their products times exp(log_scale), at most
    `max_scale`. Ranks hold equal numbers of pairs; the mean over ranks of this loss, and of its
    gradients, is the loss of the whole batch. Memory is O(chunk x N).
    """
    scale_1 = bounded(log_scale_1, math.log(max_scale)).exp()
    first = _rank() * len(image_BE)
    both = (gathered(image_BE), gathered(text_BE))
    total = image_BE.new_zeros(())
    for own_BE, other_NE in ((image_BE, both[1]), (text_BE, both[0])):
        for start in range(0, len(own_BE), chunk or CHUNK):
            part_CE = own_BE[start : start + (chunk or CHUNK)]
            # The backward pass computes a part's similarities anew: they are never all there.
            loss: Any = checkpoint(
                _part, part_CE, other_NE, scale_1, first + start, use_reentrant=False
            )
            total = total + loss
    return total / (2 * len(image_BE))


def _part(own_CE: Tensor, other_NE: Tensor, scale_1: Tensor, first: int) -> Tensor:
    """Sum of the losses of rows `first` and on."""
    target_C = torch.arange(first, first + len(own_CE), device=own_CE.device)
    return F.cross_entropy(scale_1 * (own_CE @ other_NE.T), target_C, reduction="sum")


def gathered(own_BE: Tensor) -> Tensor:
    """[N, E]: the rows of all ranks, in their order; gradients find their way back."""
    return own_BE if _ranks() == 1 else _Gather.apply(own_BE)  # type: ignore[return-value]


def bounded(value_1: Tensor, limit: float) -> Tensor:
    """min(value, limit); at the limit a gradient passes only if it leads back.

    A plain clamp would hold a value for good that one step took beyond.
    """
    return _Bounded.apply(value_1, limit)  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own_BE: Tensor) -> Tensor:  # type: ignore[override]
        ctx.rows = len(own_BE)
        parts = [torch.empty_like(own_BE) for _ in range(_ranks())]
        dist.all_gather(parts, own_BE.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad_NE: Tensor) -> Tensor:  # type: ignore[override]
        # Every rank's loss looks at this rank's rows. (Gloo has no reduce-scatter.)
        grad_NE = grad_NE.contiguous()
        dist.all_reduce(grad_NE)
        return grad_NE[_rank() * ctx.rows : (_rank() + 1) * ctx.rows]


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value_1: Tensor, limit: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(value_1 > limit)
        return value_1.clamp(max=limit)

    @staticmethod
    def backward(ctx: Any, grad_1: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (is_beyond_1,) = ctx.saved_tensors
        # Of the whole batch, so that ranks agree. Descent follows the negative gradient.
        mean_1 = grad_1.clone()
        if _ranks() > 1:
            dist.all_reduce(mean_1)
        mean_1 = (mean_1 / _ranks()).clamp(min=0)
        return torch.where(is_beyond_1, mean_1, grad_1), None


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
