"""One submission to Slurm while it is under way: claims, arrays in the queue, the caretaker.

What is refused, or cut short, is taken back: the stages are as they were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import HarnessError, UserError
from harness.launch import batch, commands, queue
from harness.launch.arrays import Array, needs
from harness.launch.settings import Slurm
from harness.ledger.claim import claim, set_job, unclaim
from harness.ledger.files import write_json
from harness.ledger.states import StageState
from harness.ledger.tree import Tree
from harness.study.stages import StageFile

_ENOUGH = 3
"""Arrays in a row, of equal needs, that sbatch refuses: the next is not asked for."""


@dataclass
class Submission:
    """One submission while it is under way: what it claimed, and what of it is in the queue."""

    tree: Tree
    study: str
    stages: Mapping[str, StageFile]
    profile: Slurm
    token: str
    claimed: dict[str, int] = field(default_factory=dict)
    found: list[list[str]] = field(default_factory=list)
    """Job ids by array."""
    jobs: dict[str, str] = field(default_factory=dict)
    caretaker: str | None = None
    no_caretaker: str | None = None
    refusals: list[batch.RefusedError] = field(default_factory=list)
    gone: int = 0
    """Stages that others took meanwhile."""
    code: Path = Path()
    _number: int = 0
    _refusals_of: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    _refused: set[str] = field(default_factory=set)
    """Stages that sbatch did not take, and those behind them."""

    @property
    def folder(self) -> Path:
        """Its own: what the jobs need, and their logs."""
        return self.tree.root / "slurm" / self.token

    def watch(self) -> None:
        """Submits the caretaker, to start after a while if nobody puts it behind jobs till then.

        Before the others also for sites that take only so many jobs (MaxSubmitJobs): it submits
        the rest when these are over.
        """
        try:
            self.caretaker = batch.submit_caretaker(
                self.folder, self.profile, self.study, self.code
            )
        except UserError as error:
            self.no_caretaker = str(error)  # the study goes without; the summary says so

    def may_run(self, stage_id: str) -> bool:
        """False behind a stage that was refused, and where enough of its like were."""
        stage = self.stages[stage_id]
        is_behind = not self._refused.isdisjoint(stage.config.upstream.values())
        if not is_behind and self._refusals_of[needs(stage)] < _ENOUGH:
            return True
        self._refused.add(stage_id)
        return False

    def take(self, stage_id: str, seen: StageState, owner: Mapping[str, str]) -> bool:
        """Claims a stage; False if somebody else was quicker."""
        attempt = claim(self.tree, self.stages[stage_id], seen, owner)
        if attempt is None:
            self.gone += 1
            return False
        self.claimed[stage_id] = attempt
        return True

    def put_all(self, arrays: Sequence[Array], avoid: Mapping[str, tuple[str, ...]]) -> None:
        """Submits the arrays of a plan. What is refused does not hold up what does not wait for it
        and asks for something else: there are few kinds, also where a site's limit refuses all."""
        ids: dict[int, list[str]] = {}
        for place, array in enumerate(arrays):
            # Of an array all wait for tasks of one other, or for the same ones.
            if not all([self.may_run(s) for s in array.stages]):
                self._refused.update(array.stages)
                continue
            kind = needs(self.stages[array.stages[0]])
            try:
                ids[place] = self._put(array, avoid.get(array.stages[0], ()), ids)
                self._refusals_of.pop(kind, None)
            except batch.RefusedError as error:
                self.refusals.append(error)
                self._refused.update(array.stages)
                self._refusals_of[kind] += 1

    def _put(
        self, array: Array, avoid: tuple[str, ...], ids_of: Mapping[int, list[str]]
    ) -> list[str]:
        """Submits one array, of a plan whose earlier ones have these ids."""
        number, self._number = self._number, self._number + 1
        tasks = self.folder / f"tasks.{number}.json"
        rows = [{"kind": self.stages[s].kind, "stage": s} for s in array.stages]
        # Before sbatch: by this file a job is known whose number nobody could write down.
        write_json(tasks, {"schema": 1, "submission": str(self.folder), "tasks": rows})
        after = _numbered(array.after, ids_of)
        first = self.stages[array.stages[0]]
        options = batch.options_of(first, self.profile, self.study, self.token, number, after)
        if avoid:
            options["exclude"] = ",".join(avoid)
        lines = batch.lines_of(self.tree, tasks, self.profile, self.code)
        ids = batch.sbatch(self.folder, tasks, options, len(rows), lines)
        self.found.append(ids)
        self.jobs |= zip(array.stages, ids, strict=True)  # all, before anything can interrupt this
        for stage_id, job_id in zip(array.stages, ids, strict=True):
            set_job(self.tree, self.stages[stage_id], self.claimed[stage_id], job_id)
        queue.remember(ids)
        return ids

    def drop(self, stages: Iterable[str], why: str) -> None:
        """Takes claims back."""
        for stage_id in stages:
            folder = self.tree.stage(self.stages[stage_id].kind, stage_id)
            unclaim(folder, self.claimed[stage_id], why)

    def finish(self, why: str | None, *, keep_caretaker: bool = False) -> None:
        """Takes back what is not in the queue, and puts the caretaker behind what is.

        Without jobs it is taken back too, unless it shall be kept, to try again.
        """
        self.drop([s for s in self.claimed if s not in self.jobs], why or "")
        if self.caretaker is None and why is not None:  # sbatch may have been interrupted
            self.caretaker = next(iter(queue.caretakers(self.token)), None)
        if self.caretaker is not None:
            self.no_caretaker = None
        if self.caretaker is None:
            return
        if self.found:
            self._put_behind(self.caretaker)
        elif not keep_caretaker:
            # Slurm may answer no more; the caretaker finds nothing to do then.
            with suppress(HarnessError, OSError):
                commands.cancel_jobs([{"job": self.caretaker}])
            self.caretaker = None

    def _put_behind(self, caretaker: str) -> None:
        after = [numbers[0] for numbers in self.found]
        update = (
            "update",
            f"JobId={caretaker}",
            f"Dependency={batch.after_end(after)}",
            "StartTime=now",
        )
        if commands.scontrol(*update) is None and not queue.caretakers(self.token):
            # The submission took so long that the caretaker has given up waiting for it.
            with suppress(UserError):
                self.caretaker = batch.submit_caretaker(
                    self.folder, self.profile, self.study, self.code, after
                )


def _numbered(after: str, found: Mapping[int, list[str]]) -> str:
    """A plan's dependency with the numbers of real jobs."""
    terms = []
    for term in filter(None, after.split(",")):
        how, _, what = term.partition(":")
        if what.startswith("job:"):
            terms.append(f"{how}:{what.removeprefix('job:')}")
        elif how == "aftercorr":
            terms.append(f"{how}:{found[int(what)][0].partition('_')[0]}")
        else:
            array, _, task = what.partition("_")
            terms.append(f"{how}:{found[int(array)][int(task)]}")
    return ",".join(terms)
