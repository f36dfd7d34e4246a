"""Layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

TRUST = 1e-3
"""Ratio of an update's norm to its weights' norm, at a learning rate of 1 and without momentum."""


class Lars(torch.optim.SGD):
    """SGD with momentum whose gradients are scaled tensor by tensor:

        g <- TRUST * |w| / (|g| + decay * |w|) * (g + decay * w)     (the paper's eq. 6)

    A tensor of one dimension or none (a bias) is neither scaled nor decayed, and one whose weights
    or gradient are zero is not scaled. As in `torch.optim.SGD` the learning rate multiplies what
    momentum has gathered.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum)
        self.decay = weight_decay

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures here
        """One step; gradients are changed in place."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None or param.ndim <= 1:
                    continue
                norm, grad_norm = param.norm(), param.grad.norm()
                scale = TRUST * norm / (grad_norm + self.decay * norm)
                scale = torch.where((norm > 0) & (grad_norm > 0), scale, torch.ones_like(scale))
                param.grad.add_(param, alpha=self.decay).mul_(scale)
        super().step(closure)
