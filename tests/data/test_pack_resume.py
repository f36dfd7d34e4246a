"""Packing that was killed, starved of disk or split among processes ends with the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.data.pack import pack
from harness.errors import DataError, UserError

NUM = 240
# Packs with small shards; the first argument is the source, then out and the number of processes.
SCRIPT = """
import os, sys, time
from pathlib import Path
from harness.data import pack, pack_shard
pack.SHARD_SAMPLES = 20
stored = pack_shard._stored
def slowly(*arguments):
    time.sleep(float(os.environ.get("SECONDS_EACH", 0)))
    return stored(*arguments)
pack_shard._stored = slowly  # in the processes too: they import this file
if __name__ == "__main__":
    pack.pack(sys.argv[1], Path(sys.argv[2]), workers=int(sys.argv[3]), say=print)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes, some of them odd."""
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for row in range(NUM):
        path = folder / "train" / f"c{row % 2}" / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8))
        (image.convert("P") if row % 7 == 0 else image).save(path)
        if row % 11 == 0:
            path.write_bytes(path.read_bytes()[:100])
    (folder / "train" / "c0" / "script.py").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "packs.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the files of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("expected") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.data.pack.SHARD_SAMPLES", 20)
        report = pack(str(source), out, workers=1)
    assert len(report.meta.shards["train"]) == NUM // 20
    assert len(report.refused) == 1 + len(range(0, NUM, 11))
    assert report.meta.splits == {"train": NUM - len(range(0, NUM, 11))}
    return digests(out)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def start(
    script: Path, source: Path, out: Path, workers: int = 1, seconds_each: float = 0
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(script), str(source), str(out), str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "SECONDS_EACH": str(seconds_each)},
        start_new_session=True,
        # A shell's background job inherits that Ctrl-C is ignored; a person's terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_number_of_processes_does_not_show(
    script: Path, source: Path, expected: dict[str, str], tmp_path: Path, workers: int
) -> None:
    process = start(script, source, tmp_path / "out", workers)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert digests(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def shards_done(folder: Path) -> int:
    return len(list((folder / ".out.partial" / "done").rglob("*.json")))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    script: Path, source: Path, expected: dict[str, str], tmp_path: Path, workers: int
) -> None:
    process = start(script, source, tmp_path / "out", workers, seconds_each=0.01)
    while shards_done(tmp_path) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = shards_done(tmp_path)
    assert 3 <= kept < NUM // 20 and not (tmp_path / "out").exists()
    partial = tmp_path / ".out.partial" / "set"
    done = tmp_path / ".out.partial" / "done"
    times = {
        path: path.stat().st_mtime_ns
        for path in partial.rglob("*.tar")
        if (done / f"{path.relative_to(partial)}.json").exists()
    }
    # Torn files of a crash of the machine are made again, too.
    torn = min(times)
    torn.write_bytes(torn.read_bytes()[:-512])
    del times[torn]
    again = start(script, source, tmp_path / "out", workers)
    stdout, stderr = again.communicate()
    assert again.returncode == 0, stderr
    assert "going on where an earlier run stopped" in stdout
    assert digests(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for path, changed in times.items():  # the finished shards are those of the first run
        now = tmp_path / "out" / path.relative_to(partial)
        assert now.stat().st_mtime_ns == changed


def test_control_c_stops_all_processes_at_once(
    script: Path, source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    process = start(script, source, tmp_path / "out", 2, seconds_each=0.02)
    while shards_done(tmp_path) < 1 and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert stderr.rstrip().endswith("KeyboardInterrupt") and "Process Spawn" not in stderr
    assert 1 <= shards_done(tmp_path) < NUM // 20
    assert list((tmp_path / ".out.partial" / "tmp").iterdir()) == []
    start(script, source, tmp_path / "out", 2).communicate()
    assert digests(tmp_path / "out") == expected


def test_a_process_that_dies_is_said_and_the_rest_is_kept(
    script: Path, source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    process = start(script, source, tmp_path / "out", 2, seconds_each=0.02)
    while shards_done(tmp_path) < 1 and process.poll() is None:
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [
        pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(workers) == 2
    os.kill(int(workers[0]), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert "DataError: a process that packed was killed, perhaps for want of memory" in stderr
    assert not (tmp_path / "out").exists()
    start(script, source, tmp_path / "out", 1).communicate()
    assert digests(tmp_path / "out") == expected


def running(script: Path) -> list[str]:
    """Process ids whose command line names the script."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(script).encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


@pytest.mark.slow
@pytest.mark.long
def test_kills_at_any_moment_leave_the_same_bytes(
    script: Path, source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    started = time.monotonic()
    start(script, source, tmp_path / "whole").communicate()
    usual_s = time.monotonic() - started
    rng = random.Random(0)
    for trial in range(12):
        out = tmp_path / str(trial) / "out"
        for _ in range(3):
            process = start(script, source, out, rng.choice([1, 2]))
            time.sleep(rng.uniform(0.2, 1.1) * usual_s)
            process.kill()
            process.communicate()
        if not out.exists():
            last = start(script, source, out)
            _, stderr = last.communicate()
            assert last.returncode == 0, stderr
        assert digests(out) == expected
    until = time.monotonic() + 60
    while alive := running(script):  # nobody lives on without its parent
        assert time.monotonic() < until, alive
        time.sleep(0.1)


def test_another_source_or_other_options_start_over(
    script: Path, source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    process = start(script, source, tmp_path / "out", seconds_each=0.01)
    while shards_done(tmp_path) < 2 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    image = source / "train" / "c1" / "3.png"
    before = os.stat(image)
    try:
        os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        lines: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("harness.data.pack.SHARD_SAMPLES", 20)
            pack(str(source), tmp_path / "out", say=lines.append)
    finally:
        os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(lines) == 1 and lines[0].startswith("starting over: the source or the options")
    assert digests(tmp_path / "out") == expected


def test_a_full_disk_is_one_line_and_what_is_done_is_kept(
    source: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.data.pack.SHARD_SAMPLES", 20)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Larger than one shard, smaller than the largest: some palettes become whole pictures.
    sizes = sorted((path.stat().st_size for path in source.rglob("*.png")), reverse=True)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sum(sizes[:5]), before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written: File too large") as error:
            pack(str(source), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    pack(str(source), tmp_path / "out")
    assert digests(tmp_path / "out") == expected


def test_a_source_that_changes_meanwhile_is_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import harness.data.pack_shard as shard

    def changed(task: shard.Task, item: shard.Item) -> bytes:
        return read(task, item._replace(size=item.size + 1))

    read = shard._read
    monkeypatch.setattr(shard, "_read", changed)
    with pytest.raises(DataError, match=r"png: byte offset 0: changed while it was being packed"):
        pack(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_runs_do_not_write_the_same_set(source: Path, tmp_path: Path) -> None:
    from harness.ledger.lease import Lease

    lease = Lease.acquire(tmp_path / ".out.partial" / "lease")
    with pytest.raises(UserError, match=r"out: another process is packing to it"):
        pack(str(source), tmp_path / "out")
    lease.release()
    pack(str(source), tmp_path / "out")


def test_a_set_of_which_nothing_could_be_packed_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / "x.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"no image could be packed; the first of 2 refused: a/x"):
        pack(str(tmp_path / "src"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
