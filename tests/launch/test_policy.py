"""The retry table: what is tried again, how often, and what ends it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from harness.launch.policy import decide
from harness.ledger.attempts import Attempt
from harness.study.schema import Retry


def tries(*ended: tuple[str | None, int], host: str = "n1:x") -> list[Attempt]:
    """Attempts by their (end, progress at their start)."""
    return [
        Attempt(number=n, end=end, host=host, progress=progress)
        for n, (end, progress) in enumerate(ended, 1)
    ]


def test_preempted_is_tried_for_ever_while_steps_are_gained() -> None:
    many = tries(*[("preempted", 10 * n) for n in range(500)])
    assert decide(Retry(), many, progress=5000).again


@pytest.mark.parametrize("cause", ["preempted", "timeout"])
def test_three_attempts_that_gain_nothing_are_the_end(cause: str) -> None:
    stuck = tries((cause, 0), (cause, 40), (cause, 40), (cause, 40))
    assert not decide(Retry(), stuck, progress=40).again
    assert decide(Retry(), stuck, progress=41).again
    assert decide(Retry(patience=4), stuck, progress=40).again
    assert "no progress in 3 attempts" in decide(Retry(), stuck, progress=40).why


@pytest.mark.parametrize(
    ("cause", "allowed"),
    [("killed", 2), ("node_fail", 3), ("hung", 1), ("code", 0), ("data", 0), ("diverged", 0)],
)
def test_a_counted_cause_is_tried_so_often_and_no_more(cause: str, allowed: int) -> None:
    for n in range(1, allowed + 3):
        assert decide(Retry(), tries(*[(cause, 0)] * n), progress=0).again == (n <= allowed)


def test_one_more_try_after_a_divergence_is_declared_and_there_is_no_second() -> None:
    declared = Retry(diverged=1)
    first = decide(declared, tries(("diverged", 0)), progress=0)
    assert (first.again, first.why) == (True, "diverged: try 1 of 1")
    # Steps that were gained in between buy no more.
    for progress in (0, 500):
        last = decide(declared, tries(("diverged", 0), ("diverged", 0)), progress)
        assert (last.again, last.why) == (False, "diverged: try 1 of 1 was the last")
    with pytest.raises(ValidationError, match=r"diverged\n.*less than or equal to 1"):
        Retry(diverged=2)


def test_other_ends_cost_nothing_of_the_try_after_a_divergence() -> None:
    mixed = tries(("node_fail", 0), ("preempted", 0), ("diverged", 0))
    assert decide(Retry(diverged=1), mixed, progress=0).again
    more = tries(*[(a.end, 0) for a in mixed], ("node_fail", 0), ("diverged", 0))
    assert not decide(Retry(diverged=1), more, progress=0).again


def test_causes_are_counted_apart() -> None:
    mixed = tries(("killed", 0), ("node_fail", 0), ("killed", 0), ("node_fail", 0), ("hung", 0))
    assert decide(Retry(), mixed, progress=0).again


@pytest.mark.parametrize("cause", ["cancelled", "config", "too_large"])
def test_what_a_retry_cannot_mend_is_not_tried(cause: str) -> None:
    assert not decide(Retry(), tries((cause, 0)), progress=0).again


def test_hosts_on_which_it_was_lost_are_avoided_and_others_are_not() -> None:
    lost = [*tries(("node_fail", 0), host="n1:a"), *tries((None, 0), host="n2:b")]
    assert decide(Retry(), [*lost, *tries(("killed", 0), host="n3:c")], 0).avoid == ("n1:a", "n2:b")


def test_where_every_try_was_forgiven_it_is_tried_again() -> None:
    assert decide(Retry(), [], progress=0).again
