"""What no cell shows of a study file: rules that match nothing, and what they would set."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from harness.errors import UserError
from harness.study.expand import show_rule
from harness.study.protocols.common import OnFeatures
from harness.study.schema import Stages

if TYPE_CHECKING:
    from harness.study.cells import _Builder


def check_rules(builder: _Builder, is_complete: bool) -> None:
    """Fields that rules set where no cell was built with them, and rules that match nothing.

    `is_complete`: every point of the study was added; rules may match those that were not.
    """
    study, source = builder.loaded.study, builder.loaded.source
    for i, rule in enumerate(study.overrides):
        if ("overrides", i) not in builder.used and builder.loaded.raw_stages:
            builder.validate([(k, v, ("overrides", i, "set", k)) for k, v in rule.set.items()])
    roles = _roles(study.stages)
    for i, rule in enumerate(study.resources):
        if ("resources", i) in builder.used:
            continue
        builder.merged({}, i)
        named = rule.match.get("stage", [])
        for name in named if isinstance(named, list) else [named]:
            if name not in roles and builder.loaded.has_stages:
                near = difflib.get_close_matches(str(name), roles, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"stages: {', '.join(roles)}"
                where = source.where(("resources", i, "match", "stage"))
                builder.problems.append(f"{where}: resources: no stage '{name}'; {hint}")
    unused = [i for i in range(len(study.resources)) if ("resources", i) not in builder.used]
    for i in unused if is_complete and not builder.problems else ():
        where, shown = source.where(("resources", i)), show_rule(study.resources[i].match)
        builder.problems.append(
            f"{where}: resources {shown} matches no stage of a cell; fix or remove it"
        )


def check_datasets(builder: _Builder) -> None:
    """The datasets of the axes, also where no cell could be built."""
    study = builder.loaded.study
    named = [(v, ("axes", "dataset", i)) for i, v in enumerate(study.axes.get("dataset", []))]
    named += (
        [(study.defaults["dataset"], ("defaults", "dataset"))]
        if "dataset" in study.defaults
        else []
    )
    for spec, place in named:
        try:
            builder.dataset(str(spec))
        except UserError as error:
            builder.problems += [builder.at(place) + p for p in error.problems]


def _roles(stages: Stages) -> list[str]:
    """What rules may call the stages of a study."""
    found = [name for name in ("mae", "wsp") if getattr(stages, name) is not None]
    on_features = any(isinstance(t, OnFeatures) for t in stages.transfer.values())
    return [*found, *stages.transfer, *(["features"] if on_features else [])]
