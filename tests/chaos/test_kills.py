"""A study killed at random moments ends as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.kills import chaos
from tests.chaos.together import together


@pytest.mark.long
def test_killed_again_and_again_the_study_ends_with_the_same_bits(tmp_path: Path) -> None:
    assert chaos(tmp_path, kills=8, seed=3) == []


@pytest.mark.long
def test_of_four_commands_at_once_each_stage_is_run_by_one(tmp_path: Path) -> None:
    assert together(tmp_path, commands=4) == []
