import pytest

from harness.errors import UserError
from harness.units import (
    format_count,
    format_seconds,
    format_si,
    parse_count,
    parse_seconds,
    steps_of,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1k", 1000), ("0.5M", 500_000), ("3B", 3_000_000_000), ("16", 16), (7, 7), ("1e3", 1000)],
)
def test_counts_are_decimal_multiples(text: object, number: int) -> None:
    assert parse_count(text) == number


@pytest.mark.parametrize("bad", ["", "k", "-1", 0, "1.5", True, None, "1kk", "nan", "1e-3"])
def test_a_count_that_is_no_whole_positive_number_is_refused(bad: object) -> None:
    with pytest.raises(UserError, match="not a count"):
        parse_count(bad)


@pytest.mark.parametrize("number", [1, 999, 1000, 1797, 16_000, 1_500_000, 3 * 10**9, 65_536])
def test_a_formatted_count_reads_back_exactly(number: int) -> None:
    assert parse_count(format_count(number)) == number


def test_durations_in_every_unit_agree() -> None:
    # 10 epochs of 1280 images at batch 128 are 12800 samples are 100 steps.
    assert steps_of("epochs", 10, 1280, 128) == 100
    assert steps_of("samples", 12_800, 1280, 128) == 100
    assert steps_of("steps", 100, 1280, 128) == 100


def test_a_partial_batch_rounds_up_and_is_never_dropped() -> None:
    assert steps_of("samples", 129, 1000, 128) == 2
    assert steps_of("samples", 5, 1000, 128) == 1
    assert steps_of("epochs", 0.1, 1280, 128) == 1


def test_times() -> None:
    assert parse_seconds("90s") == 90 and parse_seconds("2h") == 7200 and parse_seconds(5) == 5
    with pytest.raises(UserError, match="not a time"):
        parse_seconds("soon")
    assert format_seconds(59.6) == "1 min 00 s"
    assert format_seconds(3 * 86400 + 7200) == "3 d 02 h"
    assert format_si(1.234e12, "FLOPs") == "1.23 TFLOPs"
