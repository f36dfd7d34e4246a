"""What a stage's code is given by the worker, and what it gives back. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class Metrics(Protocol):
    """Append-only metric rows of one stage; does nothing on ranks other than 0."""

    def append(self, row: Mapping[str, float | int | None]) -> None:
        """Add one row; `step` and `samples` are required."""
        ...

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`: a resumed run writes them again, identically."""
        ...

    def sync(self) -> None:
        """Make sure that the rows so far outlive the machine: a checkpoint is to count on them."""
        ...


@dataclass
class Whereabouts:
    """What this rank is at, for whoever watches over it."""

    at: tuple[int, str] | None = None
    """(finished steps, part of the next one); None while nobody is to judge how long it takes."""
    moves: int = 0

    def move(self) -> None:
        """Says that something gets on within a part: a batch of an evaluation, of many images."""
        self.moves += 1


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """The surroundings of one attempt at one stage."""

    rank: int
    ranks: int
    folder: Path
    """The stage's folder: checkpoints, weights and predictions go there."""
    root: Path
    """HARNESS_ROOT; the built-in datasets live below it."""
    upstream_weights: Path | None
    """Encoder weights (safetensors) to start from; None means random initial weights."""
    upstream: Mapping[str, Path] = field(default_factory=dict)
    """Role -> folder of the stage that this one starts from; see StageConfig.upstream."""
    metrics: Metrics
    report: Callable[..., None]
    """report(step=, samples=, **scalars): live progress; throttled, cheap to call every step."""
    should_stop: Callable[[], bool]
    """True once the attempt was asked to stop: save a checkpoint and raise PreemptedError."""
    check_lease: Callable[[], None]
    """Raises LeaseLostError when another process owns the stage. Call before writing files."""
    whereabouts: Whereabouts = field(default_factory=Whereabouts)


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a finished stage reports."""

    metrics: dict[str, float | None]
    """Named results. None means not measured, never a stand-in number."""
    steps: int
    samples: int
    flops: float
    wall_s: dict[str, float]
    """Seconds by part: setup, train, eval, checkpoint."""
    earlier_s: float = 0.0
    """Seconds among them that earlier attempts took."""
