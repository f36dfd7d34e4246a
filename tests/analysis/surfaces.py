"""Studies made from a known surface L(N, D) = E + A N^-alpha + B D^-beta, and its optima."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

HOFFMANN = (1.69, 406.4, 410.7, 0.34, 0.28)
"""As printed in Hoffmann et al. 2022 (arXiv 2203.15556), eq. 10."""
BESIROGLU = (1.8172, 482.01, 2085.43, 0.3478, 0.3658)
"""As refitted by Besiroglu et al. 2024 (arXiv 2404.10102)."""
STEEP_N = (1.69, 2000.0, 400.0, 0.45, 0.25)
STEEP_D = (1.69, 406.0, 2000.0, 0.25, 0.45)
EVEN = (1.7, 300.0, 900.0, 0.33, 0.33)

Surface = tuple[float, float, float, float, float]


class Study(NamedTuple):
    n: np.ndarray
    d: np.ndarray
    loss: np.ndarray
    c: np.ndarray
    run: np.ndarray


def loss_at(n: np.ndarray, d: np.ndarray, p: Surface) -> np.ndarray:
    return p[0] + p[1] * n ** -p[3] + p[2] * d ** -p[4]


def exponent(p: Surface) -> float:
    """a of N* = G C^a."""
    return p[4] / (p[3] + p[4])


def best_n(c: np.ndarray, p: Surface) -> np.ndarray:
    """N* at C = 6 N D."""
    _, a, b, alpha, beta = p
    return (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (c / 6) ** exponent(p)


def curves(
    sizes: np.ndarray,
    p: Surface,
    *,
    ratio: tuple[float, float] = (2.0, 100.0),
    points: int = 60,
    noise: float = 0.0,
    seed: int = 0,
) -> Study:
    """A run per size, D from ratio[0] N to ratio[1] N; noise is one factor per run."""
    rng = np.random.default_rng(seed)
    n = np.repeat(sizes, points)
    d = (sizes[:, None] * np.geomspace(*ratio, points)).ravel()
    run = np.repeat(np.arange(len(sizes)), points)
    loss = loss_at(n, d, p) * np.exp(noise * rng.normal(size=len(sizes)))[run]
    return Study(n, d, loss, 6 * n * d, run)


def valleys(
    budgets: np.ndarray,
    p: Surface,
    *,
    half: float = 1.2,
    offset: float = 0.0,
    sizes: int = 7,
    one_grid: bool = False,
    noise: float = 0.0,
    seed: int = 0,
) -> Study:
    """N evenly in ln N, `half` to both sides of N* + `offset`, of the middle C for `one_grid`."""
    rng = np.random.default_rng(seed)
    middle = np.full(len(budgets), np.sqrt(budgets[0] * budgets[-1])) if one_grid else budgets
    spread = offset + np.linspace(-half, half, sizes)
    n = (best_n(middle, p)[:, None] * np.exp(spread)).ravel()
    c = np.repeat(budgets, sizes)
    d = c / 6 / n
    loss = loss_at(n, d, p) * np.exp(noise * rng.normal(size=len(n)))
    return Study(n, d, loss, c, np.arange(len(n)))
