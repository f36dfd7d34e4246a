"""A study killed at random moments ends as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.kills import INSIDE, chaos, dying
from tests.chaos.tiny_study import STUDY, flaws, numbers, start, undisturbed, with_its_images
from tests.chaos.together import together


@pytest.mark.long
def test_killed_again_and_again_the_study_ends_with_the_same_bits(tmp_path: Path) -> None:
    assert chaos(tmp_path, kills=8, seed=3) == []


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run root, study file) of a study that nobody killed."""
    return undisturbed(tmp_path_factory.mktemp("oracle"), STUDY)


@pytest.mark.long
@pytest.mark.parametrize("moment", INSIDE)
def test_who_dies_inside_a_write_leaves_nothing_that_counts(
    moment: str, oracle: tuple[Path, Path], tmp_path: Path
) -> None:
    root, mark = with_its_images(oracle[0], tmp_path / "runs"), tmp_path / "died"
    dying(root, oracle[1], moment, 2, mark).wait(600)  # of a worker the same command makes another
    assert mark.exists(), "nobody died"
    assert start(root, oracle[1]).wait(600) == 0, (tmp_path / "output.log").read_text()
    assert flaws(root) == []
    assert numbers(root) == numbers(oracle[0])


@pytest.mark.long
def test_of_four_commands_at_once_each_stage_is_run_by_one(tmp_path: Path) -> None:
    assert together(tmp_path, commands=4) == []
