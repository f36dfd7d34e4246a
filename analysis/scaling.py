"""The computations of a report that take seconds each, side by side."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from analysis import beside
from analysis.design import Advice
from analysis.design_cells import advise_study
from analysis.load import StudyData
from analysis.metrics import Metric
from analysis.surface import InitWorth, Surface, SurfaceTask, init_worth, surface_tasks
from analysis.task_laws import LOSS, TaskLaw, in_order, task_laws
from harness.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Laws over size and data, what MAE is worth by them, laws of the tasks, cells to run next."""

    surfaces: list[Surface]
    worth: list[InitWorth]
    task_laws: list[TaskLaw]
    advice: Advice | UserError | None
    """None where the study has no metric to give advice on."""


@contextlib.contextmanager
def begun(
    study: StudyData, metrics: list[Metric], judged: list[Metric], *, compares_mae: bool
) -> Iterator[Callable[[], Scaling]]:
    """Begins all of it, and gives a function that waits for it.

    `judged` are the metrics of the laws, of which advice is given on the first. Where there are
    several cores, it goes on in processes of its own: none of it needs the curves, which may be
    read meanwhile.
    """
    surfaces = surface_tasks(study, judged)
    loss = next((m for m in judged if (m.kind, m.name) == LOSS), None)
    alone = [task for task in surfaces if task.metric is not loss]
    shared = [task for task in surfaces if task.metric is loss]
    rest = (
        {*map(str, study.grid["init"])} - {task.init for task in shared} if len(study.grid) else {}
    )
    # The longest first. Laws of tasks begin with those of the loss, so they are fitted with them.
    work: list[Callable[[], Any]] = [
        *(partial(_with_tasks, study, metrics, task) for task in shared),
        *(partial(init_worth, study, metric) for metric in judged if compares_mae),
        *(task.compute for task in alone),
        partial(task_laws, study, metrics, inits=rest),
    ]
    with beside.forked(work) as run:
        results = run()

        def wait() -> Scaling:
            found = list(results)
            pairs = found[: len(shared)]
            worth = found[len(shared) : -len(alone) - 1]
            fitted = [surface for surface, _ in pairs] + found[-len(alone) - 1 : -1]
            laws = [law for _, own in pairs for law in own] + found[-1]
            return Scaling(
                surfaces=fitted,
                worth=worth,
                task_laws=in_order(study, metrics, laws),
                advice=_advice(study, judged[0], fitted) if judged else None,
            )

        yield functools.cache(wait)


def _with_tasks(
    study: StudyData, metrics: list[Metric], task: SurfaceTask
) -> tuple[Surface, list[TaskLaw]]:
    surface = task.compute()
    return surface, task_laws(study, metrics, inits={task.init}, known=surface)


def _advice(study: StudyData, metric: Metric, fitted: list[Surface]) -> Advice | UserError:
    own: Mapping[str, Surface] = {s.init: s for s in fitted if s.metric is metric}
    try:
        return advise_study(study, metric, fitted=own)
    except UserError as error:
        return error
