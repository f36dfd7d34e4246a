"""Hyper-parameter search: optuna proposes and prunes, the launcher runs each trial as a cell.

Optuna's storage is the truth about the trials, the run tree about their cells. A trial is asked
under a lock, so that many processes share one budget; who runs its stages is the stages' leases'
matter. A trial that was asked and not told, whatever happened to the process, is taken up by
every process that searches the same group.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, NopPruner, PercentilePruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from harness.errors import UserError
from harness.launch.pool import Running
from harness.launch.progress import Orders
from harness.ledger import store
from harness.ledger.files import read_json, read_jsonl
from harness.ledger.states import ACTIVE, StageState
from harness.ledger.tree import Tree
from harness.study.cells import Ablation, Cell, Grid, build_ablations
from harness.study.groups import Group
from harness.study.identity import canonical
from harness.study.stages import StageFile
from harness.study.tuning import Space, Tune

optuna.logging.set_verbosity(optuna.logging.WARNING)

PRUNED = "pruned"
"""Reason of a stage that was stopped because its trial was poor."""
_OUTCOME = "outcome"
_DIGITS = 4
"""Significant digits of a proposed number: enough for any rate, and a person can read it."""


@dataclass
class _Open:
    """A trial that was asked and not told."""

    trial: Trial
    cell: Cell
    stage: StageFile


class _Searched:
    """One group with its optuna study."""

    def __init__(self, group: Group, study: optuna.Study) -> None:
        self.group, self.study = group, study
        self.open: dict[int, _Open] = {}


class Search:
    """All groups of a study. As a driver's feed: asks, reports, prunes and tells as things end."""

    def __init__(
        self,
        grid: Grid,
        tune: Tune,
        groups: Sequence[Group],
        tree: Tree,
        url: str | None,
        slots: int,
    ) -> None:
        self.grid, self.tune, self.tree = grid, tune, tree
        self.name = grid.loaded.study.name
        self.parallel = tune.parallel or math.ceil(slots / len(groups))
        storage = _storage(tree, self.name, url)
        self.searched = [_Searched(g, self._study(g, storage)) for g in groups]
        self.stages: dict[str, StageFile] = {}
        self._states: Mapping[str, StageState] | None = None
        self._take_up()

    def _study(self, group: Group, storage: BaseStorage) -> optuna.Study:
        # A changed question, or a changed recipe (the cell's id), is another search.
        params = {k: s.model_dump(mode="json") for k, s in group.space.items()}
        asked = [group.cell.id, self.tune.metric, self.tune.maximize, params]
        digest = hashlib.sha256(canonical({"asked": asked}).encode()).hexdigest()[:10]
        return optuna.create_study(
            study_name=f"{self.name}/{group.label}/{digest}",
            storage=storage,
            direction="maximize" if self.tune.maximize else "minimize",
            pruner=_pruner(self.tune, self._points(group)),
            load_if_exists=True,
        )

    def _points(self, group: Group) -> int:
        return self.grid.stages[group.cell.stages[self.tune.role]].execution.eval_points

    @property
    def missing(self) -> int:
        """Trials that still have to be asked or told, over all groups."""
        left = 0
        for s in self.searched:
            trials = _asked(s.study)
            left += max(0, self.tune.trials - len(trials))
            left += sum(t.state == TrialState.RUNNING for t in trials)
        return left

    # -- the feed -----------------------------------------------------------------------------

    def __call__(self, states: Mapping[str, StageState], running: Mapping[str, Running]) -> Orders:
        """Tells what ended, stops what is poor, asks for more; see `launch.progress.Feed`."""
        if states is not self._states:
            self._states = states
            self._take_up()
            self._settle(states)
            # A trial may be a cell that is done already.
            while self._ask(states, running) and self._settle(states):
                pass
        return Orders(add=dict(self.stages), cancel=self._poor(running))

    def _take_up(self) -> None:
        """Trials of the storage that are not told yet: of a killed process, or of another's."""
        for s in self.searched:
            numbers = {t.number for t in _running(s.study)}
            s.open = {n: o for n, o in s.open.items() if n in numbers}
            if numbers <= s.open.keys():
                continue
            # Under the lock nobody is half way through an ask.
            with self._lock():
                for frozen in _running(s.study):
                    if frozen.number not in s.open:
                        self._open(s, Trial(self._seeded(s, frozen.number), frozen._trial_id))

    def _settle(self, states: Mapping[str, StageState]) -> bool:
        """Tells the trials whose stage ended; True if there were any."""
        told = False
        for s in self.searched:
            for number, o in list(s.open.items()):
                state = states.get(o.stage.id)
                chain = [states[i] for i in o.cell.stages.values() if i in states]
                if state is None:
                    continue
                if state.state == "done":
                    self._tell_result(s, o, state.result or {})
                elif any(c.state == "diverged" for c in chain):
                    self._tell(s, o, TrialState.FAIL, "diverged")
                elif state.state == "cancelled" and state.reason == PRUNED:
                    self._report(o)
                    self._tell(s, o, TrialState.PRUNED, PRUNED)
                else:
                    continue
                del s.open[number]
                told = True
        return told

    def _tell_result(self, s: _Searched, o: _Open, result: Mapping[str, Any]) -> None:
        metrics = result["metrics"]
        if self.tune.key not in metrics:
            known = ", ".join(metrics)
            raise UserError(f"tune.metric {self.tune.metric}: {o.stage.id} has only: {known}")
        self._report(o)
        value = metrics[self.tune.key]
        if value is None:
            self._tell(s, o, TrialState.FAIL, "diverged")
        else:
            self._tell(s, o, TrialState.COMPLETE, "finished", value)

    def _tell(
        self, s: _Searched, o: _Open, state: TrialState, outcome: str, value: float | None = None
    ) -> None:
        """Ends a trial, unless another process did, which read the same files."""
        try:
            o.trial.set_user_attr(_OUTCOME, outcome)
            s.study.tell(o.trial, value, state=state, skip_if_finished=True)
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
            if not _frozen(o.trial).state.is_finished():
                raise

    def _poor(self, running: Mapping[str, Running]) -> dict[str, str]:
        """Stages running here whose trials the pruner gives up."""
        poor = {}
        for s in self.searched:
            for o in s.open.values():
                if o.stage.id in running and self._report(o) and o.trial.should_prune():
                    poor[o.stage.id] = PRUNED
        return poor

    def _report(self, o: _Open) -> bool:
        """Hands over the metric's values at new evaluation points; True if there were any."""
        folder = self.tree.stage(o.stage.kind, o.stage.id)
        known = _frozen(o.trial).intermediate_values
        points, steps = o.stage.execution.eval_points, o.stage.config.steps
        new = False
        for row in read_jsonl(folder.metrics):
            value = row.get(self.tune.key)  # rows between evaluation points do not have it
            # Points and not steps: trials may differ in the number of steps.
            point = round(points * row["step"] / max(steps, 1))
            if value is None or point in known:
                continue
            try:
                o.trial.report(value, point)
            except optuna.exceptions.UpdateFinishedTrialError:
                return False
            new = True
        return new

    # -- asking -------------------------------------------------------------------------------

    def _ask(self, states: Mapping[str, StageState], running: Mapping[str, Running]) -> bool:
        """Asks while a group has budget and room; True if it did."""
        added = False
        for s in self.searched:
            elsewhere = {k for k, v in states.items() if v.state in ACTIVE and k not in running}
            while sum(o.stage.id not in elsewhere for o in s.open.values()) < self.parallel:
                if len(_asked(s.study)) >= self.tune.trials:
                    break
                with self._lock():
                    number = len(_asked(s.study))
                    if number >= self.tune.trials:
                        break
                    study = self._seeded(s, number)
                    if self.tune.sampler == "grid" and not _waiting(study):
                        study.enqueue_trial(self._grid_point(s.group, number))
                    self._open(s, study.ask())
                added = True
        if added:
            self.register()
        return added

    def _seeded(self, s: _Searched, number: int) -> optuna.Study:
        """The study with a sampler that depends on the trial's number, not on who asks when.

        The same seed in every group: both arms start from the same random rates.
        """
        s.study.sampler = _sampler(self.tune, number)
        return s.study

    def _grid_point(self, group: Group, number: int) -> dict[str, float]:
        ((key, space),) = group.space.items()
        assert space.low is not None and space.high is not None
        part = number / max(1, self.tune.trials - 1)
        if space.log:
            value = math.exp(math.log(space.low) * (1 - part) + math.log(space.high) * part)
        else:
            value = space.low * (1 - part) + space.high * part
        value = min(max(value, space.low), space.high)
        return {key: round(value) if space.whole else value}

    def _open(self, s: _Searched, trial: Trial) -> None:
        # Values that a trial has already are kept; only a trial cut short gets new ones.
        values = {k: _suggest(trial, k, space) for k, space in s.group.space.items()}
        grid = build_ablations(self.grid.loaded, [s.group.trial(values, self.tune)])
        (cell,) = grid.cells
        self.stages |= {k: v for k, v in grid.stages.items() if k not in self.stages}
        s.open[trial.number] = _Open(trial, cell, grid.stages[cell.stages[self.tune.role]])

    @contextmanager
    def _lock(self) -> Iterator[None]:
        lock = JournalFileOpenLock(str(self.tree.tune(self.name, "ask")))
        lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def register(self) -> None:
        """Writes the trials down as cells of the study, those of other processes too."""
        found = [a for s in self.searched for a in self._ablations(s)]
        store.add_ablations(self.tree, self.name, found)

    def _ablations(self, s: _Searched) -> list[Ablation]:
        return [s.group.trial(_values(t, s.group), self.tune) for t in _whole(s)]

    # -- what came of it ----------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """Every group with its trials, as `harness.ledger.tuned` keeps them."""
        rows = []
        for s in self.searched:
            trials = [self._row(t, s.group) for t in _whole(s)]
            rows.append(
                {
                    "label": s.group.label,
                    "match": s.group.match,
                    "cell": s.group.cell.id,
                    "params": s.group.cell.params,
                    "space": {k: v.model_dump(mode="json") for k, v in s.group.space.items()},
                    "trials": trials,
                }
            )
        return rows

    def _row(self, trial: FrozenTrial, group: Group) -> dict[str, Any]:
        ablation = group.trial(_values(trial, group), self.tune)
        (cell,) = build_ablations(self.grid.loaded, [ablation]).cells
        complete = trial.state == TrialState.COMPLETE
        return {
            "number": trial.number,
            "outcome": trial.user_attrs.get(_OUTCOME) if trial.state.is_finished() else "open",
            "set": ablation.set,
            "value": trial.value if complete else None,
            "points": {str(k): v for k, v in sorted(trial.intermediate_values.items())},
            "cell": cell.id,
            "stage": cell.stages[self.tune.role],
        }

    def failed(self) -> dict[str, str]:
        """Stages of open trials that failed (not diverged): their trials wait for a retry."""
        found = {}
        for s in self.searched:
            for o in s.open.values():
                for stage in o.cell.stages.values():
                    kind = self.stages[stage].kind
                    status = read_json(self.tree.stage(kind, stage).status) or {}
                    if status.get("state") == "failed":
                        found[stage] = str(status.get("message"))
        return found


# -- optuna's words ---------------------------------------------------------------------------


def _storage(tree: Tree, name: str, url: str | None) -> BaseStorage:
    journal = tree.tune(name, "journal")
    journal.parent.mkdir(parents=True, exist_ok=True)
    if url is None:
        # O_EXCL works on NFS from version 3 on; unlike a symlink's, the age of this lock is its
        # holder's, so that the lock of a killed process is broken and no other.
        lock = JournalFileOpenLock(str(journal))
        return JournalStorage(JournalFileBackend(str(journal), lock_obj=lock))
    try:
        return RDBStorage(url)
    except Exception as error:  # a driver's own errors have no common base
        lines = str(error).strip().splitlines() or [type(error).__name__]
        hint = ""
        if isinstance(error, ImportError) and url.startswith("postgres"):
            hint = "; pip install 'vision-scaling-harness[postgresql]'"
        place = url.split("@")[-1]
        raise UserError(f"--storage {place}: cannot be used: {lines[0]}{hint}") from error


def _pruner(tune: Tune, points: int) -> BasePruner:
    pruner = tune.pruner
    if pruner.kind == "none":
        return NopPruner()
    if pruner.kind == "hyperband":
        return HyperbandPruner(min_resource=pruner.warmup, max_resource=points)
    keep = 50.0 if pruner.kind == "median" else pruner.keep
    return PercentilePruner(keep, n_startup_trials=pruner.startup, n_warmup_steps=pruner.warmup)


def _sampler(tune: Tune, number: int) -> BaseSampler:
    seed = int(hashlib.sha256(f"{tune.seed}:{number}".encode()).hexdigest()[:8], 16)
    if tune.sampler == "tpe":
        return TPESampler(seed=seed, n_startup_trials=tune.startup)
    return RandomSampler(seed=seed)


def _suggest(trial: Trial, key: str, space: Space) -> Any:
    if space.options is not None:
        return trial.suggest_categorical(key, space.options)
    assert space.low is not None and space.high is not None
    if space.whole:
        return trial.suggest_int(key, int(space.low), int(space.high), log=space.log)
    return _rounded(trial.suggest_float(key, space.low, space.high, log=space.log))


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _values(trial: FrozenTrial, group: Group) -> dict[str, Any]:
    found = {key: trial.params[key] for key in group.space}
    return {k: _rounded(v) if isinstance(v, float) else v for k, v in found.items()}


def _asked(study: optuna.Study) -> list[FrozenTrial]:
    return [t for t in study.get_trials(deepcopy=False) if t.state != TrialState.WAITING]


def _waiting(study: optuna.Study) -> bool:
    return bool(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))


def _running(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def _whole(s: _Searched) -> list[FrozenTrial]:
    """Trials with all their values; one being asked this moment may lack some."""
    return [t for t in _asked(s.study) if s.group.space.keys() <= t.params.keys()]


def _frozen(trial: Trial) -> FrozenTrial:
    return trial.storage.get_trial(trial._trial_id)
