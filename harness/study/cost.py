"""What a stage will take: seconds from FLOPs, by speeds measured here where there are any."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.study.stages import StageFile

# Before anything was measured. CPU: sustained fp32 of one core on small ViTs (20 to 55 GFLOP/s on
# AVX2 to AVX-512 cores; the low end). GPU: 40 % of the 989 TFLOP/s dense bf16 of an H100.
_GUESS_FLOPS_PER_S = {"cpu": 25e9, "cuda": 400e12}
# Process start, DeepSpeed set-up, reading the index, evaluation and export.
_GUESS_OVERHEAD_S = {"cpu": 1.5, "cuda": 20.0}
# Python of ZeRO-3 in an optimizer step, however small the model (measured on CPU).
_GUESS_STEP_S = {"cpu": 0.015, "cuda": 0.03}

CalibrationKey = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """FLOP/s per process by (kind, size), measured on finished stages of this run root."""

    device: str = "cpu"
    flops_per_s: Mapping[CalibrationKey, float] = field(default_factory=dict)

    def seconds(self, stage: StageFile) -> float:
        """Wall time of a stage with its resources, start-up included."""
        rate = self._rate(stage.kind, stage.config.size)
        processes = stage.execution.ranks * (stage.execution.threads if self.device == "cpu" else 1)
        fixed = _GUESS_OVERHEAD_S[self.device]
        if rate is not None:
            return fixed + stage.flops / (rate * processes)
        computing = stage.flops / (_GUESS_FLOPS_PER_S[self.device] * processes)
        stepping = stage.config.steps * _GUESS_STEP_S[self.device]
        # A GPU computes while Python prepares the next step; a CPU does one, then the other.
        both = computing + stepping if self.device == "cpu" else max(computing, stepping)
        return fixed + both

    def is_measured(self, stage: StageFile) -> bool:
        """True if the estimate rests on finished stages of this kind and size."""
        return (stage.kind, stage.config.size) in self.flops_per_s

    def _rate(self, kind: str, size: str) -> float | None:
        """Measured, steps included; None if no stage of the kind was."""
        if (kind, size) in self.flops_per_s:
            return self.flops_per_s[kind, size]
        same_kind = [v for (k, _), v in self.flops_per_s.items() if k == kind]
        if same_kind:
            return math.exp(sum(map(math.log, same_kind)) / len(same_kind))
        return None


def pace(ended: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Kind -> true seconds by estimated ones, of (kind, true, estimated); '' for all kinds."""
    sums: dict[str, tuple[float, float]] = {}
    for kind, true, estimated in ended:
        for key in (kind, ""):
            before = sums.get(key, (0.0, 0.0))
            sums[key] = (before[0] + true, before[1] + estimated)
    return {key: true / estimated for key, (true, estimated) in sums.items() if estimated > 0}


def running_left(estimate: float, elapsed: float, status: Mapping[str, Any]) -> float:
    """Seconds that a running stage still takes: at its own rate where it tells one."""
    step, steps = status.get("step") or 0, status.get("steps") or 0
    rate, seen = status.get("samples_per_s") or 0.0, status.get("samples") or 0
    if step and steps and rate and seen:
        return max(0.0, seen * (steps / step - 1) / rate)
    # Beyond its estimate nobody knows; a little that grows is at least no number that stands.
    return max(estimate - elapsed, elapsed / 10)


def makespan(work: list[tuple[float, int]], slots: int) -> float:
    """Least wall time of (seconds, slots needed) items: no less than the longest, nor the area."""
    if not work:
        return 0.0
    area = sum(seconds * width for seconds, width in work)
    return max(max(seconds for seconds, _ in work), area / max(1, slots))


def checkpoint_bytes(stage: StageFile) -> float:
    """Largest disk use of a stage: fp32 weights, two Adam moments, and the exported weights."""
    return 16.0 * stage.params if stage.config.steps else 0.0
