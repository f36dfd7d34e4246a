"""Multinomial logistic regression on fixed features, by L-BFGS in float64.

Shapes: M images, B images of a block, D features, Q classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TOLERANCE = 1e-4
"""Largest gradient entry of the mean loss at the solution; scikit-learn's default too."""
MAX_ITERATIONS = 300
BLOCK = 2**27
"""Logits that are held at a time: a GiB of float64. More of them are summed up block by block."""


def fit(
    features_MD: Tensor,
    class_M: Tensor,
    num_classes: int,
    penalty: float,
    start: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """Weights [D + 1, Q], the last row the intercept, minimising

        mean cross-entropy + penalty / 2 * sum of squared weights, the intercept not counted.

    `start` warm-starts the search; the minimum is unique but for a shift of the intercepts. Works
    on the device of the features.
    """
    num, width = features_MD.shape
    if start is None:
        start = torch.zeros(width + 1, num_classes, dtype=torch.float64, device=features_MD.device)
    weights = start.clone().requires_grad_()
    rows = max(1, BLOCK // num_classes)
    blocks = list(zip(features_MD.split(rows), class_M.split(rows), strict=True))

    def closure() -> Tensor:
        # The gradient by hand: two matrix products, no graph.
        with torch.no_grad():
            loss, gradient = torch.zeros_like(weights[0, 0]), torch.zeros_like(weights)
            for block_BD, class_B in blocks:
                inputs = _with_one(block_BD.double())
                one_hot_BQ = F.one_hot(class_B, num_classes).double()
                log_p_BQ = torch.log_softmax(inputs @ weights, dim=1)
                loss -= (log_p_BQ * one_hot_BQ).sum() / num
                gradient += inputs.T @ (log_p_BQ.exp() - one_hot_BQ) / num
            gradient[:-1] += penalty * weights[:-1]
            weights.grad = gradient
            return loss + penalty / 2 * weights[:-1].square().sum()

    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=MAX_ITERATIONS,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)
    return weights.detach()


def logits(weights: Tensor, features_MD: Tensor) -> Tensor:
    """logits_MQ, float64."""
    return _with_one(features_MD.double()) @ weights


def _with_one(features_MD: Tensor) -> Tensor:
    return torch.cat([features_MD, features_MD.new_ones(len(features_MD), 1)], dim=1)
