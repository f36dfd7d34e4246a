"""Fixtures shared by all tests: a small study in a folder of its own, a command-line runner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

# Tests side by side share the cores, and so do the processes that they start. Before torch comes.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SMALL = """\
name: small
axes:
  size: [d16x2, d32x3]
  data: [1k, 4k]
  init: [random, mae]
defaults:
  dataset: scenes-4k
  image_size: 24
stages:
  mae:
    duration: {samples: 2k}
    decoder_width: 32
    decoder_depth: 1
    decoder_heads: 2
  wsp:
    duration: {samples: 2k}
  transfer:
    probe: {protocol: linear_probe}
"""

Harness = Callable[..., "subprocess.CompletedProcess[str]"]


LONGEST_FILES = (
    "train/test_zero3.py",
    "launch/test_study_stops.py",
    "test_docs.py",
    "chaos/test_clocks.py",
    "analysis/test_coverage.py",
    "transfer/test_frozen.py",
    "launch/test_steer.py",
    "chaos/test_rank_counts.py",
    "transfer/test_video_task.py",
    "train/test_ranks.py",
    "data/test_pack_resume.py",
    "transfer/test_robustness.py",
    "analysis/test_worth.py",
    "train/test_memory.py",
)
"""Of `long`, those of two minutes and more, the longest first: where workers take whole files, none
of them is begun last, with the others idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests and real clusters may take long: minutes are many more where cores are shared.

    Tests that need the trained encoder come first: workers side by side begin with one half of the
    tests each and take from the ends of the others', so that only one of them trains it. So do
    those of the finished study: where workers take whole files, the longest is not begun last.
    """
    first = {"trained_encoder", "finished"}
    items.sort(key=lambda item: first.isdisjoint(getattr(item, "fixturenames", ())))
    place = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST_FILES)}
    assert all(path.is_file() for path in place), place
    items.sort(
        key=lambda item: (
            place.get(item.path, len(place)) if item.get_closest_marker("long") else len(place)
        )
    )
    for item in items:
        if any(item.get_closest_marker(name) for name in ("long", "slurm", "system")):
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(autouse=True, scope="session")
def gpu_locks(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Slots that tests make up are not the machine's, and not those of other test runs."""
    os.environ["HARNESS_GPU_LOCKS"] = str(tmp_path_factory.mktemp("gpu-locks"))


@pytest.fixture
def own_signals() -> Iterator[None]:
    """A worker sets handlers of its process."""
    numbers = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def study_file(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a study file and returns its path."""

    def write(text: str = SMALL, name: str = "study.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def surroundings(folder: Path) -> dict[str, str]:
    """What commands find in their environment: a run root of their own, no GPU."""
    return {"HARNESS_ROOT": str(folder / "runs"), "HARNESS_DEVICE": "cpu", "NO_COLOR": "1"}


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    """Runs the command line as a user does: another process, its own run root."""

    def run(
        *arguments: object,
        check: int | None = 0,
        env: dict[str, str] | None = None,
        **options: object,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "harness.cli.main", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, **surroundings(tmp_path), **(env or {})},
            check=False,
            **options,  # type: ignore[arg-type]
        )
        if check is not None:
            assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Harness:
    """The same in this process, for what a command says: a process takes a second to start."""
    from harness.cli.main import command_line

    monkeypatch.chdir(tmp_path)
    for name, value in surroundings(tmp_path).items():
        monkeypatch.setenv(name, value)

    def run(*arguments: object, check: int | None = 0) -> subprocess.CompletedProcess[str]:
        words = [str(a) for a in arguments]
        done = CliRunner().invoke(command_line(), words, prog_name="harness")
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception  # a process would print a traceback
        if check is not None:
            assert done.exit_code == check, f"{done.exit_code}\n{done.stdout}\n{done.stderr}"
        return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)

    return run
