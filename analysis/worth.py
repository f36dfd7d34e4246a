"""What an initialization is worth: how much data and compute it stands for, with intervals, the MAE
stage charged.

Two arms (random, MAE) over model parameters N and images D. Effective data after Hernandez et al.
2021 (arXiv 2102.01293): the images that the random arm would need at the same N for the loss that
the other arm has; what that is beyond the images used is the data transferred. Nothing is read off
beyond the random arm's own range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from analysis.arms import Arm
from analysis.fit import Fit, fit
from analysis.forms import CHINCHILLA, Array


@dataclass(frozen=True, kw_only=True)
class Worth:
    """What the MAE arm's value at one (N, D) is worth to the random arm. NaN with a reason."""

    n: float
    d: float
    effective_d: float = math.nan
    """Images the random arm needs at this N for the MAE arm's value."""
    transferred: float = math.nan
    """effective_d - d; negative is ossification."""
    multiplier: float = math.nan
    """effective_d / d, at equal samples per image."""
    multiplier_ci95: tuple[float, float] = (math.nan, math.nan)
    flops_multiplier: float = math.nan
    """FLOPs the random arm needs for the value, over those of the MAE arm, MAE stage charged."""
    flops_multiplier_ci95: tuple[float, float] = (math.nan, math.nan)
    ossified: bool = False
    """Whether the interval says that random needs fewer images: MAE holds the model back."""
    why: str = ""
    draws_beyond: float = 0.0
    """Share of bootstrap draws beyond the random arm's range; they count as its ends."""


@dataclass(frozen=True, kw_only=True)
class WorthTable:
    """A row per (N, D), or why there is none."""

    status: Literal["answered", "refused"]
    reason: str = ""
    rows: tuple[Worth, ...] = ()
    random: Fit | None = field(default=None, repr=False)
    mae: Fit | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Rows and the two laws."""
        return {
            "status": self.status,
            "reason": self.reason,
            "rows": [dict(r.__dict__) for r in self.rows],
            "laws": {k: f.to_json() for k, f in (("random", self.random), ("mae", self.mae)) if f},
        }


def worth(
    random: Arm,
    mae: Arm,
    flops: Mapping[tuple[float, float], tuple[float, float]],
    *,
    delta: float,
    bootstrap: int = 400,
    seed: int = 0,
) -> WorthTable:
    """Effective data and compute of the MAE arm at every (N, D) that it has.

    Both arms get a law of their own; `flops` gives (WSP, MAE stage) FLOPs of a cell by (N, D).
    An effective D outside the D that the random arm has at this N is refused: that would be
    extrapolation. Intervals are over bootstrap draws of both laws.
    """
    found = {
        name: fit(
            CHINCHILLA,
            {"N": arm.n, "D": arm.d},
            arm.y,
            groups=arm.units,
            delta=delta,
            bootstrap=bootstrap,
            seed=seed + i,
        )
        for i, (name, arm) in enumerate((("random", random), ("mae", mae)))
    }
    bad = [f"{name}: {f.status}, {f.reason}" for name, f in found.items() if not f.params]
    if bad:
        return WorthTable(
            status="refused", reason="; ".join(bad), random=found["random"], mae=found["mae"]
        )
    rows = []
    for n, d in sorted({(float(a), float(b)) for a, b in zip(mae.n, mae.d, strict=True)}):
        there = random.d[random.n == n]
        rows.append(_worth_at(n, d, np.unique(there), found["random"], found["mae"], flops))
    return WorthTable(status="answered", rows=tuple(rows), random=found["random"], mae=found["mae"])


def _worth_at(
    n: float,
    d: float,
    range_D: Array,
    random: Fit,
    mae: Fit,
    flops: Mapping[tuple[float, float], tuple[float, float]],
) -> Worth:
    if len(range_D) < 2:
        return Worth(n=n, d=d, why=f"the random arm has {len(range_D)} data sizes at this N")
    low, high = float(range_D[0]), float(range_D[-1])
    value = float(mae.predict({"N": n, "D": d}))
    effective = float(_needed(_params(random), n, np.array([value]))[0])
    if effective > high * (1 + 1e-9):
        return Worth(n=n, d=d, why=f"beyond the random arm's range: more than {high / d:.3g}x")
    if effective < low * (1 - 1e-9):
        return Worth(n=n, d=d, why=f"below the random arm's range: less than {low / d:.3g}x")
    spread, beyond = _effective_draws(n, d, low, high, random, mae)
    interval = _ends(spread / d)
    charged = _charged(n, d, effective, range_D, flops)
    scale = charged / (effective / d) if math.isfinite(charged) else math.nan
    return Worth(
        n=n,
        d=d,
        effective_d=effective,
        transferred=effective - d,
        multiplier=effective / d,
        multiplier_ci95=interval,
        flops_multiplier=charged,
        flops_multiplier_ci95=(interval[0] * scale, interval[1] * scale),
        ossified=interval[1] < 1.0,
        draws_beyond=beyond,
    )


def _params(found: Fit) -> Array:
    return np.array([[found.params[k] for k in CHINCHILLA.names]])


def _needed(params_B5: Array, n: float, value_B: Array) -> Array:
    """D at which the law has the value at n; infinite where it never gets so low."""
    e, a, b, alpha, beta = params_B5.T
    rest = value_B - e - a * n**-alpha
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(rest > 0, (b / np.maximum(rest, 1e-300)) ** (1 / beta), np.inf)


def _effective_draws(
    n: float, d: float, low: float, high: float, random: Fit, mae: Fit
) -> tuple[Array, float]:
    """Effective D over draws of both laws, held to the random arm's range; share held there."""
    if random.draws is None or mae.draws is None:
        return np.zeros(0), 0.0
    num = min(len(random.draws), len(mae.draws))
    if num < 20:
        return np.zeros(0), 0.0
    value = mae.draws_at({"N": n, "D": d})[:num]
    found = _needed(random.draws[:num], n, value)
    outside = (found < low) | (found > high)
    return np.clip(found, low, high), float(outside.mean())


def _ends(values: Array) -> tuple[float, float]:
    if not len(values):
        return math.nan, math.nan
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _charged(
    n: float,
    d: float,
    effective: float,
    range_D: Array,
    flops: Mapping[tuple[float, float], tuple[float, float]],
) -> float:
    """FLOPs of the random run with `effective` images over those of MAE and WSP together."""
    known = [(x, flops[n, float(x)][0]) for x in range_D if (n, float(x)) in flops]
    if len(known) < 2 or (n, d) not in flops:
        return math.nan
    # FLOPs of WSP between data sizes of the study: a line in logarithms.
    xs, costs = np.log(np.array(known)).T
    needed = math.exp(float(np.interp(math.log(effective), xs, costs)))
    wsp, stage = flops[n, d]
    return needed / (wsp + stage)
