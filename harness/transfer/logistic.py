"""Multinomial logistic regression on fixed features, by L-BFGS in float64.

Shapes: M images, B images of a block, D features, Q classes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

TOLERANCE = 1e-5
"""Largest gradient entry at the solution, as a share of the largest one at weights of zero. Not
absolute: with thousands of classes the gradient is below any fixed number before the first step."""
MAX_ITERATIONS = 2000
BLOCK = 2**27
"""Logits that are held at a time: a GiB of float64. More of them are summed up block by block."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Where a search ended."""

    weights: Tensor
    """float64 [D + 1, Q], the last row the intercept."""
    iterations: int
    relative_gradient: float
    """Largest gradient entry, as a share of the largest one at weights of zero."""
    tolerance: float

    @property
    def is_converged(self) -> bool:
        """Whether it ended at its tolerance, not at its most iterations."""
        return self.relative_gradient <= self.tolerance


def fit(
    features_MD: Tensor,
    class_M: Tensor,
    num_classes: int,
    penalty: float,
    start: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> Fit:
    """The weights that minimise

        mean cross-entropy + penalty / 2 * sum of squared weights, the intercept not counted.

    `start` warm-starts the search; the minimum is unique but for a shift of the intercepts. Works
    on the device of the features.
    """
    num, width = features_MD.shape
    weights = torch.zeros(width + 1, num_classes, dtype=torch.float64, device=features_MD.device)
    weights.requires_grad_()
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

    def largest_gradient() -> float:
        closure()
        assert weights.grad is not None, "closure sets it"
        return weights.grad.abs().max().item()

    at_zero = largest_gradient()
    if start is not None:
        with torch.no_grad():
            weights.copy_(start)
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=MAX_ITERATIONS,
        max_eval=2 * MAX_ITERATIONS,
        history_size=20,
        tolerance_grad=tolerance * at_zero,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)
    return Fit(
        weights=weights.detach(),
        iterations=optimizer.state[weights]["n_iter"],
        relative_gradient=largest_gradient() / at_zero if at_zero else 0.0,
        tolerance=tolerance,
    )


def summary(fits: Sequence[Fit], task: str) -> dict[str, float | None]:
    """Most iterations and largest relative gradient of several fits, as metrics of their stage.

    Says on stderr, which is the attempt's log, if some did not converge.
    """
    worst = max(fit.relative_gradient for fit in fits)
    short = [fit for fit in fits if not fit.is_converged]
    if short:
        print(
            f"{task}: {len(short)} of {len(fits)} fits ended before they converged, at a relative"
            f" gradient of up to {worst:.1e}, expected at most {short[0].tolerance:.0e}; larger"
            " penalties converge sooner",
            file=sys.stderr,
        )
    return {
        "iterations": float(max(fit.iterations for fit in fits)),
        "relative_gradient": worst,
    }


def logits(weights: Tensor, features_MD: Tensor) -> Tensor:
    """logits_MQ, float64."""
    return _with_one(features_MD.double()) @ weights


def _with_one(features_MD: Tensor) -> Tensor:
    return torch.cat([features_MD, features_MD.new_ones(len(features_MD), 1)], dim=1)
