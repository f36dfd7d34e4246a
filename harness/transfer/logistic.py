"""Multinomial logistic regression on fixed features, by L-BFGS in float64.

Shapes: M images, B images of a block, D features, Q classes.
"""

from __future__ import annotations

import contextlib
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
    rows = max(1, BLOCK // num_classes)
    pairs = zip(features_MD.split(rows), class_M.split(rows), strict=True)
    blocks: Sequence[tuple[Tensor, Tensor]] = list(pairs)
    if len(blocks) == 1:  # prepared once: of more than one the copies might not fit
        blocks = [_prepared(*blocks[0], num_classes)]

    # L-BFGS searches for the point in weights = factor^-T point, where the loss curves alike in
    # every direction: features are correlated, and with weak penalties it took thousands of steps.
    factor = _factor(features_MD, rows, num_classes, penalty, start)
    point = torch.zeros(width + 1, num_classes, dtype=torch.float64, device=features_MD.device)
    point.requires_grad_()

    def weights() -> Tensor:
        return torch.linalg.solve_triangular(factor.T, point.detach(), upper=True)

    def loss_and_gradient(weights: Tensor) -> tuple[Tensor, Tensor]:
        # The gradient by hand: two matrix products, no graph.
        loss, gradient = torch.zeros_like(weights[0, 0]), torch.zeros_like(weights)
        for block in blocks:
            inputs, one_hot_BQ = block if len(blocks) == 1 else _prepared(*block, num_classes)
            log_p_BQ = torch.log_softmax(inputs @ weights, dim=1)
            loss -= (log_p_BQ * one_hot_BQ).sum() / num
            gradient += inputs.T @ (log_p_BQ.exp() - one_hot_BQ) / num
        gradient[:-1] += penalty * weights[:-1]
        return loss + penalty / 2 * weights[:-1].square().sum(), gradient

    at_zero = loss_and_gradient(weights())[1].abs().max().item()

    @torch.no_grad()
    def closure() -> Tensor:
        loss, gradient = loss_and_gradient(weights())
        if gradient.abs().max() <= tolerance * at_zero:
            raise _Converged
        found = torch.linalg.solve_triangular(factor, gradient, upper=False)
        point.grad = found.contiguous()  # it comes by columns
        return loss

    if start is not None:
        with torch.no_grad():
            point.copy_(factor.T @ start)
    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=MAX_ITERATIONS,
        max_eval=2 * MAX_ITERATIONS,
        history_size=20,
        tolerance_grad=0.0,
        tolerance_change=1e-17,  # of a loss near ln Q: as good as none
        line_search_fn="strong_wolfe",
    )
    with contextlib.suppress(_Converged):
        optimizer.step(closure)
    found = weights()
    largest = loss_and_gradient(found)[1].abs().max().item()
    return Fit(
        weights=found,
        iterations=optimizer.state[point].get("n_iter", 0),
        relative_gradient=largest / at_zero if at_zero else 0.0,
        tolerance=tolerance,
    )


class _Converged(Exception):
    """Raised where the gradient is small enough."""


def _prepared(block_BD: Tensor, class_B: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    return _with_one(block_BD.double()), F.one_hot(class_B, num_classes).double()


def _factor(
    features_MD: Tensor, rows: int, num_classes: int, penalty: float, start: Tensor | None
) -> Tensor:
    """Lower Cholesky factor [D + 1, D + 1] of the second derivative at `start`, mean over classes.

    Near the minimum of the penalty before, it is the curvature there that counts.
    """
    width = features_MD.shape[1]
    second = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=features_MD.device)
    for block_BD in features_MD.split(rows):
        inputs = _with_one(block_BD.double())
        if start is None:
            share_B1 = (1 - 1 / num_classes) / num_classes
        else:
            p_BQ = torch.softmax(inputs @ start, dim=1)
            share_B1 = (p_BQ * (1 - p_BQ)).mean(dim=1, keepdim=True)
        second += inputs.T @ (share_B1 * inputs)
    second /= len(features_MD)
    second.diagonal()[:-1].add_(penalty)
    # Without a penalty, or with features that repeat each other, it may be singular.
    second.diagonal().add_(1e-12 * second.diagonal().mean())
    return torch.linalg.cholesky(second)


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
