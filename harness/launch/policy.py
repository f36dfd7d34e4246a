"""Whether a stage is tried again: by the cause of its end, from what its attempts left on disk.

Nothing here remembers anything: a new driver, or a job that Slurm started again, decides as the
one before it would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.ledger.attempts import Attempt
from harness.study.schema import Retry

CAUSES = {"stopped": "preempted", "interrupted": "preempted", "lost": "node_fail"}
"""Words of the ledger for causes of the retry table, where they differ."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do after the last attempt."""

    again: bool
    why: str
    """In words: for the event and for the user."""
    avoid: tuple[str, ...] = ()
    """Hosts on which the stage was lost."""


def decide(retry: Retry, attempts: Sequence[Attempt], progress: int) -> Decision:
    """After the last of `attempts`; `progress` is what is there now to go on from.

    A cause with `always` is tried again as long as something was gained in the last
    `retry.patience` attempts that ended so; any other, its number of times.
    """
    if not attempts:  # a user has just forgiven all of them
        return Decision(again=True, why="earlier tries count no longer")
    last = attempts[-1]
    cause = CAUSES.get(last.end or "lost", last.end or "node_fail")
    avoid = tuple(
        dict.fromkeys(
            a.host
            for a in attempts
            if a.host and CAUSES.get(a.end or "lost", a.end or "") == "node_fail"
        )
    )
    allowed = getattr(retry, cause, None)
    if allowed is None:  # cancelled, config, too_large: trying again changes nothing
        return Decision(again=False, why=f"{cause} is never tried again")
    same = [a for a in attempts if CAUSES.get(a.end or "lost", a.end) == cause]
    if allowed == "always":
        if len(same) < retry.patience or progress > same[-retry.patience].progress:
            return Decision(again=True, why=f"{cause}: always, while progress is made", avoid=avoid)
        why = f"{cause}: no progress in {retry.patience} attempts"
        return Decision(again=False, why=why, avoid=avoid)
    again = len(same) <= allowed
    times = f"{cause}: try {min(len(same), allowed)} of {allowed}"
    return Decision(again=again, why=times if again else f"{times} was the last", avoid=avoid)


def lost_on(attempts: Sequence[Attempt]) -> tuple[str, ...]:
    """Hosts that are known to have taken an attempt with them."""
    return tuple(dict.fromkeys(a.host for a in attempts if a.end == "node_fail" and a.host))
