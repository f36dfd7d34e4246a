"""The finished runs of a study by initialization: two arms that are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.forms import Array


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Finished rows of one initialization, (P,) each."""

    n: Array
    d: Array
    y: Array
    units: tuple[str, ...]
    """Cell (run) of each row."""
    pairs: tuple[str, ...]
    """What both arms share: size, data, seed and all other axes."""


def arms(rows: Sequence[Mapping[str, Any]], with_init: str, without: str) -> tuple[Arm, Arm]:
    """(random, MAE) arms from rows with params, data, y, init, cell and pair; finite y only."""
    out = []
    for init in (without, with_init):
        own = [r for r in rows if r["init"] == init and math.isfinite(r["y"]) and r["y"] > 0]
        out.append(
            Arm(
                n=np.array([float(r["params"]) for r in own]),
                d=np.array([float(r["data"]) for r in own]),
                y=np.array([float(r["y"]) for r in own]),
                units=tuple(str(r["cell"]) for r in own),
                pairs=tuple(str(r["pair"]) for r in own),
            )
        )
    return out[0], out[1]
