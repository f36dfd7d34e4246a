"""Hyper-parameter search on one cell: optuna proposes, the harness runs each trial as an ablation.

Trials are ordinary cells: they share every stage the changed fields do not touch, survive kills,
and stay in the run tree. Optuna's own record is a journal file, which works on network folders
where SQLite does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from harness.errors import UserError

_RANGE = re.compile(r"^([-+.0-9e]+)\.\.([-+.0-9e]+)(:log)?$")

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best trial so far."""

    values: dict[str, Any]
    metric: float
    finished: int
    """Trials with a number, over all calls; diverged and failed ones have none."""


def parse_space(text: str) -> tuple[str, BaseDistribution]:
    """'wsp.lr=1e-4..1e-2:log' or 'wsp.batch=64|128' as field and distribution.

    Raises UserError for other shapes.
    """
    field, equals, values = text.partition("=")
    if not equals or "." not in field:
        raise UserError(f"--param {text!r}: expected field=low..high[:log] or field=a|b|c")
    match = _RANGE.match(values)
    if match:
        try:
            low, high = float(match[1]), float(match[2])
            return field, FloatDistribution(low, high, log=bool(match[3]))
        except ValueError as error:
            raise UserError(f"--param {text!r}: {error}") from None
    options = [v for v in values.split("|") if v]
    if len(options) < 2:
        raise UserError(f"--param {text!r}: give a range low..high[:log] or at least two values")
    return field, CategoricalDistribution(options)


def search(
    journal: Path,
    name: str,
    space: dict[str, BaseDistribution],
    *,
    maximize: bool,
    trials: int,
    parallel: int,
    seed: int,
    run: Callable[[Sequence[dict[str, Any]]], list[float | None]],
) -> Best:
    """Runs up to `trials` more trials, `parallel` at a time, and returns the best of all so far.

    `run` gets the proposed values of a round and returns a metric for each, None for a trial that
    gave no number. Raises UserError if no trial ever gave one.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=name,
        storage=JournalStorage(JournalFileBackend(str(journal))),
        direction="maximize" if maximize else "minimize",
        # Seeded by how many trials there are, so that a second call does not repeat the first.
        load_if_exists=True,
    )
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials), multivariate=True)
    left = trials
    while left > 0:
        asked = [study.ask(space) for _ in range(min(parallel, left))]
        left -= len(asked)
        for trial, value in zip(asked, run([t.params for t in asked]), strict=True):
            if value is None:
                study.tell(trial, state=TrialState.FAIL)
            else:
                study.tell(trial, value)
    finished = [t for t in study.trials if t.state == TrialState.COMPLETE]
    if not finished:
        raise UserError(f"{name}: none of {len(study.trials)} trials gave a number; see status")
    return Best(
        values=dict(study.best_params), metric=float(study.best_value), finished=len(finished)
    )
