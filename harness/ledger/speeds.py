"""How fast stages ran here, for estimates of those to come."""

from __future__ import annotations

from harness.ledger.index import results
from harness.ledger.tree import Tree
from harness.study.cost import CalibrationKey, Speeds

_MAX_AGE_S = 10.0


def measured_speeds(tree: Tree, device: str) -> Speeds:
    """FLOP/s by (kind, size) from the finished stages of this root, on this kind of device."""
    sums: dict[CalibrationKey, tuple[float, float]] = {}
    stages = tree.root / "stages"
    kinds = sorted(p.name for p in stages.iterdir() if p.is_dir()) if stages.is_dir() else []
    # A command has just read the states: what an estimate rests on need not be newer.
    known = {k: results(tree, k, sorted(tree.begun(k)), max_age_s=_MAX_AGE_S) for k in kinds}
    for result in (r for found in known.values() for r in found.values()):
        if result.get("device", device) != device:
            continue
        busy = float(result["wall_s"].get("total", 0.0)) * result.get("processes", 1)
        if busy <= 0 or not result["flops"]:
            continue
        key = (result["kind"], result["size"])
        flops, seconds = sums.get(key, (0.0, 0.0))
        sums[key] = (flops + result["flops"], seconds + busy)
    return Speeds(device=device, flops_per_s={k: f / s for k, (f, s) in sums.items()})
