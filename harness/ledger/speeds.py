"""How fast stages ran here, for estimates of those to come."""

from __future__ import annotations

import math

from harness.ledger.index import results
from harness.ledger.tree import Tree
from harness.study.cost import CalibrationKey, Speeds

_MAX_AGE_S = 10.0


def measured_speeds(tree: Tree, device: str) -> Speeds:
    """FLOP/s by (kind, size) from the finished stages of this root, on this kind of device."""
    flops: dict[CalibrationKey, list[float]] = {}
    seconds: dict[CalibrationKey, list[float]] = {}
    stages = tree.root / "stages"
    kinds = sorted(p.name for p in stages.iterdir() if p.is_dir()) if stages.is_dir() else []
    for kind in kinds:
        # A command has just read the states: what an estimate rests on need not be newer.
        for row in results(tree, kind, tree.begun(kind), max_age_s=_MAX_AGE_S).values():
            flops_, busy = row.flops or 0.0, (row.total_s or 0.0) * (row.processes or 1)
            # A clock that was set back makes times of anything.
            if row.device not in (device, None) or not (flops_ > 0 and 0 < busy < math.inf):
                continue
            key = (row.kind, row.size)
            if key not in flops:
                flops[key], seconds[key] = [], []
            flops[key].append(flops_)
            seconds[key].append(busy)
    # Exact sums: folders come in no order.
    speeds = {key: math.fsum(flops[key]) / math.fsum(seconds[key]) for key in flops}
    return Speeds(device=device, flops_per_s=speeds)
