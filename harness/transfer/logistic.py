"""Multinomial logistic regression on fixed features, by L-BFGS in float64.

Shapes: M images, D features, Q classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TOLERANCE = 1e-4
"""Largest gradient entry of the mean loss at the solution; scikit-learn's default too."""
MAX_ITERATIONS = 300


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

    `start` warm-starts the search; the minimum is unique but for a shift of the intercepts.
    """
    inputs = _with_one(features_MD.double())
    if start is None:
        start = torch.zeros(inputs.shape[1], num_classes, dtype=torch.float64)
    weights = start.clone().requires_grad_()
    one_hot_MQ = F.one_hot(class_M, num_classes).double()

    def closure() -> Tensor:
        # The gradient by hand: two matrix products, no graph.
        with torch.no_grad():
            log_p_MQ = torch.log_softmax(inputs @ weights, dim=1)
            loss = -(log_p_MQ * one_hot_MQ).sum() / len(inputs)
            gradient = inputs.T @ (log_p_MQ.exp() - one_hot_MQ) / len(inputs)
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
