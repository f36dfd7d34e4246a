"""Full and read-only file systems: a line that says what to do, and nothing lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.ledger.files import read_json
from tests.chaos.tiny_study import (
    STUDY,
    TWO_RANKS,
    environment,
    flaws,
    kill_all,
    numbers,
    processes,
    start,
    undisturbed,
)

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0, reason="mounts a tmpfs, as root"
    ),
]


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("oracles")
    texts = {1: STUDY, 2: TWO_RANKS}
    small = {k: v.replace("[random, mae]", "[random]") for k, v in texts.items()}
    return {k: undisturbed(folder / str(k), text) for k, text in small.items()}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A root on a small file system of its own."""
    root = tmp_path / "runs"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(root)], check=True)
    try:
        yield root
    finally:
        kill_all(root)
        subprocess.run(["umount", "-l", str(root)], check=True)


def said(root: Path) -> str:
    return (root.parent / "output.log").read_text()


def leave(root: Path, free: int) -> Path:
    """Fills the file system but for so many bytes."""
    filler = root / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        if not free:  # others write as well: until it is full
            while file.write(bytes(2**16)):
                continue
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(root).free - free)
    return filler


@pytest.mark.parametrize(
    ("ranks", "free_kb"),
    [(1, 0), (1, 60), (1, 400), (2, 150)],
)
def test_a_full_disk_is_named_and_with_space_the_same_command_ends_as_ever(
    disk: Path, oracles: dict[int, tuple[Path, Path]], ranks: int, free_kb: int
) -> None:
    oracle, file = oracles[ranks]
    shutil.copytree(oracle / "datasets", disk / "datasets")
    filler = leave(disk, free_kb * 1024)
    code = start(disk, file).wait(300)
    output = said(disk)
    assert code in (1, 2), output
    assert "No space left on device" in output and "free space" in output
    assert "Traceback" not in output
    assert not processes(disk)
    filler.unlink()
    assert start(disk, file).wait(300) == 0, said(disk)
    assert flaws(disk) == []
    assert numbers(disk) == numbers(oracle)


def test_a_disk_that_fills_up_in_the_middle(
    disk: Path, oracles: dict[int, tuple[Path, Path]]
) -> None:
    oracle, file = oracles[1]
    shutil.copytree(oracle / "datasets", disk / "datasets")
    process = start(disk, file)
    while not list(disk.glob("stages/*/*/checkpoints/*/COMPLETE")):
        assert process.poll() is None, said(disk)
    filler = leave(disk, 0)
    assert process.wait(300) in (1, 2), said(disk)
    assert "Traceback" not in said(disk) and "free space" in said(disk)
    assert list(disk.glob("stages/*/*/checkpoints/*/COMPLETE")), "the last checkpoint is lost"
    filler.unlink()
    assert start(disk, file).wait(300) == 0, said(disk)
    assert flaws(disk) == []
    assert numbers(disk) == numbers(oracle)
    resumed = [read_json(p) or {} for p in disk.glob("stages/*/*/attempts/*/attempt.json")]
    assert any((row.get("first_step") or 0) > 0 for row in resumed)


def test_a_read_only_root_can_be_looked_at_and_says_so_to_a_submission(
    disk: Path, oracles: dict[int, tuple[Path, Path]], tmp_path: Path
) -> None:
    oracle, file = oracles[1]
    for name in ("datasets", "studies", "stages"):
        shutil.copytree(oracle / name, disk / name)
    for left in disk.glob("stages/transfer/*"):
        shutil.rmtree(left)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    def harness(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "harness.cli.main", *words]
        env = environment(disk)
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False)

    for words in (("status",), ("grid", str(file)), ("report", "--out", str(tmp_path / "out"))):
        seen = harness(*words)
        assert seen.returncode == 0, seen.stderr
    refused = harness("grid", str(file), "--submit")
    assert refused.returncode == 2
    (line,) = refused.stderr.strip().splitlines()
    assert "Read-only file system" in line and "mount it writable" in line
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert harness("grid", str(file), "--submit").returncode == 0
    assert numbers(disk) == numbers(oracle)
