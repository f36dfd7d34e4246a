"""Two ways to take a training step, timed in turns: what one costs over the other."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import TypedDict

import numpy as np


class Comparison(TypedDict):
    """Milliseconds of a step, and how many times the one's the other's is."""

    bare_ms: float
    ours_ms: float
    ratio: float
    ci95: list[float]


def compare(
    bare: Callable[[], object],
    ours: Callable[[], object],
    *,
    pairs: int,
    steps: int,
    wait: Callable[[], object] = lambda: None,
) -> Comparison:
    """`ratio` of ours over bare: the median of paired log-ratios of blocks of `steps` steps in ABBA
    order, with a bootstrap 95 % interval; and the median milliseconds of a step of each.

    `wait` returns once the device has done what it was given.
    """

    def block(step: Callable[[], object]) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        return (time.perf_counter() - start) / steps

    gc.collect()
    gc.disable()
    ratios, bare_s, ours_s = [], [], []
    for _ in range(pairs):
        a, b, c, d = block(bare), block(ours), block(ours), block(bare)
        ratios.append(np.log((b + c) / (a + d)))
        bare_s.append((a + d) / 2)
        ours_s.append((b + c) / 2)
    gc.enable()
    rng = np.random.default_rng(0)
    medians = [np.median(rng.choice(ratios, len(ratios))) for _ in range(2000)]
    low, high = np.exp(np.quantile(medians, [0.025, 0.975]))
    return {
        "bare_ms": round(float(np.median(bare_s)) * 1e3, 2),
        "ours_ms": round(float(np.median(ours_s)) * 1e3, 2),
        "ratio": round(float(np.exp(np.median(ratios))), 4),
        "ci95": [round(float(low), 4), round(float(high), 4)],
    }
