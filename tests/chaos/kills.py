"""Kills a study at random moments, again and again, until it is done; then looks what is left.

    python -m tests.chaos.kills --kills 200 --seed 0

Every kill is followed by the same command. In the end the numbers must be those of an undisturbed
run, bit for bit, and nothing may be left of what was killed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.chaos.tiny_study import (
    STUDY,
    TWO_RANKS,
    flaws,
    kill_all,
    numbers,
    processes,
    start,
    undisturbed,
    with_its_images,
)

TARGETS = ("rank", "driver", "zygote", "session")
MOMENTS = ("any", "partial", "row", "temporary", "result")
INSIDE = ("row", "checkpoint", "checkpoint mark", "file")
"""Writes that a process dies in by itself: half a row of metrics, a checkpoint that is not renamed
or not marked complete yet, a JSON file that is only a temporary one."""
_DIE_INSIDE = Path(__file__).parent / "die_inside"
_ENOUGH = 60
"""Kills after which each kind of moment must have been hit."""
_PATIENCE_S = 20.0
_KILLS_PER_LIFE = 25


def _pids(root: Path) -> dict[str, list[int]]:
    """Processes of the run by what they are."""
    found: dict[str, list[int]] = {target: [] for target in TARGETS}
    for pid, line in processes(root).items():
        if "harness.cli.main" in line:
            found["driver"].append(pid)
        elif "harness.launch.zygote" in line:
            # A worker is a fork: its command line is the zygote's, its parent another of them.
            found["zygote"].append(pid)
    zygotes = set(found["zygote"])
    found["rank"] = [p for p in zygotes if _parent(p) in zygotes]
    found["zygote"] = sorted(zygotes - set(found["rank"]))
    return found


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


def _rows(root: Path) -> int:
    return sum(p.stat().st_size for p in root.glob("stages/*/*/metrics.jsonl"))


def _moment(root: Path, moment: str) -> Callable[[], bool]:
    """A condition that becomes true when the aim is in sight."""
    if moment == "partial":
        return lambda: any(root.glob("stages/*/*/checkpoints/*.partial*"))
    if moment == "temporary":
        return lambda: any(root.glob("stages/*/*/.tmp.*"))
    if moment == "row":
        size = _rows(root)
        return lambda: _rows(root) > size
    known = len(list(root.glob("stages/*/*/result.json")))
    return lambda: len(list(root.glob("stages/*/*/result.json"))) > known


def _training(root: Path) -> bool:
    return any(root.glob("stages/*/*/lease"))


def _wait(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    """True once the condition holds; False if the command ended first, or it takes too long."""
    deadline = time.monotonic() + _PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if condition():
                return True
        except OSError:  # a file went away while it was looked at
            continue
    return False


def _kill(root: Path, target: str, rng: random.Random) -> bool:
    """Kills; a session is every process of it, as a power cut would."""
    if target == "session":
        kill_all(root)
        return True
    pids = _pids(root)[target]
    if not pids:
        return False
    try:
        os.kill(rng.choice(pids), signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def chaos(folder: Path, kills: int, seed: int) -> list[str]:
    """Kills until `kills` have hit; what is wrong in the end, a line each."""
    print(f"seed {seed}", flush=True)
    rng = random.Random(seed)
    texts = (STUDY, TWO_RANKS)
    oracles: dict[int, tuple[Path, Path]] = {}
    hits, problems = Counter[str](), list[str]()
    life = 0
    while hits.total() < kills and not problems:
        life += 1
        ranks = 1 + life % 2
        if ranks not in oracles:
            oracles[ranks] = undisturbed(folder / f"oracle{ranks}", texts[ranks - 1])
        root = with_its_images(oracles[ranks][0], folder / f"life{life}" / "runs")
        try:
            problems = _life(root, oracles[ranks], rng, hits, kills)
        finally:
            kill_all(root)
        about = f"{hits.total()} kills so far, {len(problems)} problems"
        print(f"life {life}, {ranks} ranks: {about}", flush=True)
        if not problems:
            shutil.rmtree(root.parent)
    for what, count in sorted(hits.items()):
        print(f"{count:4d}  {what}")
    if kills >= _ENOUGH and not problems:
        problems += [f"no kill {moment}" for moment in missed(hits)]
    return problems


def missed(hits: Counter[str]) -> list[str]:
    """Kinds of targets and moments that no kill has hit."""
    wanted = [f"inside {moment}" for moment in INSIDE]
    wanted += [f"at {moment}" for moment in MOMENTS] + [f"of {target}" for target in TARGETS]
    return [what for what in wanted if not any(what in hit for hit in hits)]


def dying(root: Path, file: Path, moment: str, after: int, mark: Path) -> subprocess.Popen[bytes]:
    """The command, of which one process dies inside the `after`th write of its own of this kind."""
    path = os.pathsep.join([str(_DIE_INSIDE), os.environ.get("PYTHONPATH", "")])
    about = {"TEST_DIE_AT": moment, "TEST_DIE_AFTER": str(after), "TEST_DIE_MARK": str(mark)}
    return start(root, file, PYTHONPATH=path, **about)


class _Command:
    """The command, started again and again; half of the times with a write that it dies in."""

    def __init__(self, root: Path, file: Path, rng: random.Random, hits: Counter[str]) -> None:
        self.root, self.file, self.rng, self.hits = root, file, rng, hits
        self.moment: str | None = None
        self.mark = root.parent / "died"

    def start(self) -> subprocess.Popen[bytes]:
        self.count()
        self.mark.unlink(missing_ok=True)
        if self.rng.random() < 0.5:
            return start(self.root, self.file)
        self.moment = self.rng.choice(INSIDE)
        return dying(self.root, self.file, self.moment, self.rng.randint(1, 12), self.mark)

    def count(self) -> None:
        """Counts a process that has died inside a write since the last call."""
        if self.moment is not None and self.mark.exists():
            self.hits[f"inside {self.moment}"] += 1
            self.moment = None


def _life(
    root: Path, oracle: tuple[Path, Path], rng: random.Random, hits: Counter[str], kills: int
) -> list[str]:
    """One study, killed until it ends by itself or `kills` were counted; what is wrong then."""
    file = oracle[1]
    command = _Command(root, file, rng, hits)
    process = command.start()
    most = hits.total() + _KILLS_PER_LIFE
    while hits.total() < min(kills, most):
        target, moment = rng.choice(TARGETS), rng.choice(MOMENTS)
        began = _wait(partial(_training, root), process)
        delay = rng.uniform(0, 1.5)
        hit = began and moment != "any" and _wait(_moment(root, moment), process)
        if moment == "any":
            time.sleep(delay)
        if process.poll() is None and _kill(root, target, rng):
            hits[f"of {target} at {moment if hit else 'any'}"] += 1
        if target in ("driver", "session"):
            process.wait()
        command.count()
        if process.poll() is not None:
            if process.returncode in (0, 1) and target not in ("driver", "session"):
                break
            process = command.start()
    code = process.wait(600)
    command.count()
    for _ in range(3):  # it was perhaps the last kill that ended the command
        if code != 0 or flaws(root):
            code = start(root, file).wait(600)
    problems = [f"exit code {code}"] * (code != 0) + flaws(root)
    if numbers(root) != numbers(oracle[0]):
        problems.append("the numbers differ from those of the undisturbed run")
    return problems


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos"))
    problems = chaos(folder, given.kills, given.seed)
    print("\n".join(problems) or "nothing is wrong")
    if problems:
        print(f"files: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
