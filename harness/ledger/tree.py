"""The run tree: the one place where file names are spelled."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path


def default_root() -> Path:
    """HARNESS_ROOT, or ./runs."""
    return Path(os.environ.get("HARNESS_ROOT") or "runs").expanduser().absolute()


@dataclass(frozen=True)
class StageFolder:
    """Files of one stage."""

    path: Path

    @property
    def stage(self) -> Path:
        """Identity, full config, how to run it."""
        return self.path / "stage.json"

    @property
    def status(self) -> Path:
        """State and live progress."""
        return self.path / "status.json"

    @property
    def lease(self) -> Path:
        """Who owns the stage now."""
        return self.path / "lease"

    @property
    def claim(self) -> Path:
        """Lock of whoever changes the state of a stage that no worker owns."""
        return self.path / "claim"

    @property
    def metrics(self) -> Path:
        """Rows of named numbers by step."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """What happened to the stage, in order."""
        return self.path / "events.jsonl"

    @property
    def result(self) -> Path:
        """Written last: a stage with a result is done."""
        return self.path / "result.json"

    @property
    def memory(self) -> Path:
        """The micro-batch to go on with after an attempt ran out of memory."""
        return self.path / "memory.json"

    @property
    def lineage(self) -> Path:
        """Results of which runs the stage's files rest on."""
        return self.path / "lineage.json"

    @property
    def stop(self) -> Path:
        """A note that somebody wants the stage to end: see `harness.ledger.claim`."""
        return self.path / "stop.json"

    @property
    def weights(self) -> Path:
        """Encoder weights of a finished mae or wsp stage."""
        return self.path / "weights.safetensors"

    @property
    def checkpoints(self) -> Path:
        """Resume points."""
        return self.path / "checkpoints"

    @property
    def attempts(self) -> Path:
        """One folder per try."""
        return self.path / "attempts"

    def attempt(self, number: int) -> Path:
        """Folder of one try."""
        return self.attempts / str(number)

    def job_logs(self, token: str, job: str) -> list[Path]:
        """What the batch script of a Slurm job printed, before and after the ranks; errors first.

        `token`: of the submission that the job belongs to.
        """
        folder = self.path.parents[2] / "slurm" / token / "jobs"
        return sorted(folder.glob(f"{glob.escape(job)}_*log.*"))

    def attempt_numbers(self) -> list[int]:
        """Numbers of all tries so far, ascending."""
        if not self.attempts.is_dir():
            return []
        return sorted(int(p.name) for p in self.attempts.iterdir() if p.name.isdigit())

    def new_attempt(self) -> int:
        """Makes the next attempt's folder; safe against others doing the same."""
        self.attempts.mkdir(parents=True, exist_ok=True)
        number = max(self.attempt_numbers(), default=0) + 1
        while True:
            try:
                self.attempt(number).mkdir()
                return number
            except FileExistsError:
                number += 1


@dataclass(frozen=True)
class Tree:
    """Files of one run root."""

    root: Path

    def study(self, name: str) -> Path:
        """Folder of one study."""
        return self.root / "studies" / name

    def studies(self) -> list[str]:
        """Names of the studies that were submitted here."""
        folder = self.root / "studies"
        if not folder.is_dir():
            return []
        return sorted(p.name for p in folder.iterdir() if (p / "cells.jsonl").is_file())

    def stage(self, kind: str, stage_id: str) -> StageFolder:
        """Folder of one stage."""
        return StageFolder(self.root / "stages" / kind / stage_id)

    def begun(self, kind: str) -> set[str]:
        """Ids of the stages of a kind that have a folder."""
        try:
            return set(os.listdir(self.root / "stages" / kind))
        except FileNotFoundError:
            return set()

    @property
    def index(self) -> Path:
        """Short copies of what many files say, to be read at once."""
        return self.root / "index"

    def tune(self, study: str, suffix: str) -> Path:
        """A file of a study's search: journal (optuna's), json (results), yaml (fragment)."""
        return self.root / "tune" / f"{study}.{suffix}"

    @property
    def sacred(self) -> Path:
        """Sacred's records, one per attempt."""
        return self.root / "sacred"

    @property
    def events(self) -> Path:
        """TensorBoard's files, a folder per stage, if they were asked for."""
        return self.root / "tensorboard"

    @property
    def code(self) -> Path:
        """Git state of what was run: one folder per commit and diff."""
        return self.root / "code"
