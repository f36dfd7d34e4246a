"""What a driver tells those who watch it, and what a feed orders of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from harness.launch.pool import Running
from harness.ledger.states import StageState
from harness.study.stages import StageFile


@dataclass
class Progress:
    """What a watcher of the driver is told; a new one with every call."""

    total: int
    counts: dict[str, int]
    """Stages by state."""
    bad: dict[str, str]
    """Stage id -> state, of those that failed or diverged."""
    running: list[Running]
    live: dict[str, dict[str, object]]
    """status.json of the running stages."""
    seconds_left: float
    started: float
    interrupted: bool = False
    elsewhere: list[str] = field(default_factory=list)
    """GPUs that another command uses."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How a submission ended."""

    ran: list[str]
    done: list[str]
    failed: dict[str, str]
    """Stage id -> what happened, for stages that failed or diverged on their own."""
    blocked: list[str]
    left: list[str]
    held: list[str]
    """Cancelled, and not to be run until somebody says `resume`."""
    interrupted: bool
    wall_s: float


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a feed wants of a driver that runs already."""

    add: Mapping[str, StageFile] = field(default_factory=dict)
    """More stages, in dependency order; those known already are left as they are."""
    cancel: Mapping[str, str] = field(default_factory=dict)
    """Stages running here to stop at a checkpoint, and the reason their state will have."""


Feed = Callable[[Mapping[str, StageState], Mapping[str, Running]], Orders]
"""Asked every half second, with the states of all stages (a new mapping when they were read
again) and the stages running here."""


@dataclass(frozen=True, kw_only=True)
class Summed:
    """What watchers are told of all stages, as of one reading of their files."""

    states: dict[str, StageState]
    counts: dict[str, int]
    bad: dict[str, str]
    left: float
    """Estimated seconds of slots of what is not over."""

    @classmethod
    def of(cls, states: dict[str, StageState], costs: Mapping[str, float]) -> Summed:
        """Sums up states; `costs`: stage id -> estimated seconds of slots."""
        return cls(
            states=states,
            counts=Counter([state.state for state in states.values()]),
            bad={s: v.state for s, v in states.items() if v.state in ("failed", "diverged")},
            left=sum([costs[s] for s, v in states.items() if not v.is_over]),
        )
