"""The cells a study could run next, what each still costs, and a study file of the advised ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from analysis.design import Advice, Candidate, Step, advise
from analysis.fit import DELTA, fit
from analysis.forms import CHINCHILLA
from analysis.information import Arm
from analysis.load import StudyData
from analysis.metrics import Metric
from analysis.surface import Surface, draws_for
from harness.errors import UserError
from harness.ledger import store
from harness.ledger.files import write_bytes
from harness.ledger.speeds import measured_speeds
from harness.ledger.states import read_state
from harness.ledger.tree import Tree
from harness.study.cells import Grid, build_grid
from harness.study.cost import Speeds
from harness.study.expand import matches
from harness.study.schema import LoadedStudy, Study, load_study
from harness.study.sizes import SIZES
from harness.study.stages import StageFile

_STEPS_UP = 2
"""New levels of data, and new model sizes, above the study's largest."""
_USUAL_RATIO = 4.0
"""Of data levels, for a study with one level."""
_SUFFIX = "_next"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Cells to choose from, in what unit they cost, and what was left out."""

    candidates: tuple[Candidate, ...]
    unit: str
    notes: tuple[str, ...]


def advise_study(
    study: StudyData,
    metric: Metric,
    *,
    cells: int = 4,
    delta: float = DELTA,
    bootstrap: int = 400,
    seed: int = 0,
    fitted: Mapping[str, Surface] | None = None,
) -> Advice:
    """Advice for a metric's L(N, D), of every init in the study's main setting.

    `fitted` has the laws of this metric that are fitted already, by init. Raises UserError if the
    study's own file no longer reads.
    """
    loaded = load_registered(study)
    choice = choices(study, loaded, _speeds(study))
    if fitted:
        done = [_arm_of(surface) for surface in fitted.values()]
        return advise(done, choice.candidates, cells=cells, unit=choice.unit, notes=choice.notes)
    rows = metric.rows(study.grid_results).drop_duplicates("cell")
    main = rows[rows["variant"] == _main_variant(study)]
    arms = []
    for init, group in main.groupby("init", sort=False):
        y = metric.error(group["value"]).to_numpy(float)
        good = np.isfinite(y) & (y > 0)
        n, d = (group[k].to_numpy(float)[good] for k in ("params", "data"))
        names = list(map(str, group["cell"][good]))
        draws = draws_for(len(group), bootstrap)
        options: dict[str, Any] = {"delta": delta, "bootstrap": draws, "seed": seed}
        law = fit(CHINCHILLA, {"N": n, "D": d}, y[good], groups=names, **options)
        arms.append(Arm(init=str(init), law=law, form=CHINCHILLA, n=n, d=d, y=y[good]))
    return advise(arms, choice.candidates, cells=cells, unit=choice.unit, notes=choice.notes)


def _arm_of(surface: Surface) -> Arm:
    n, d, y = (surface.rows[k].to_numpy(float) for k in ("params", "data", "y"))
    return Arm(init=surface.init, law=surface.fit, form=CHINCHILLA, n=n, d=d, y=y)


def load_registered(study: StudyData) -> LoadedStudy:
    """The study file as it was registered in the run root."""
    tree = Tree(study.root)
    return load_study(tree.study(study.name) / "study.yaml", store.base_folders(tree, study.name))


def _speeds(study: StudyData) -> Speeds:
    devices = Counter(
        str(s.result["device"]) for s in study.stages.values() if "device" in s.result
    )
    device = "cuda" if devices and devices.most_common(1)[0][0].startswith("cuda") else "cpu"
    return measured_speeds(Tree(study.root), device)


def _main_variant(study: StudyData) -> str:
    return str(study.grid["variant"].iloc[0]) if len(study.grid) else ""


# -- what could be run ----------------------------------------------------------------------


def choices(study: StudyData, loaded: LoadedStudy, speeds: Speeds) -> Choice:
    """Sizes x data x inits: the study's levels, the next ones up, one more seed where it has runs.

    Model sizes are those of the size table at most a tenfold above the largest; data levels go on
    by the ratio of the study's last two, as far as the dataset does. What cannot be built is left
    out with the reason.
    """
    main = study.grid[study.grid["variant"] == _main_variant(study)]
    if not len(main):
        return Choice(candidates=(), unit="hours", notes=("the study has no cells",))
    base = {k: v for k, v in main.iloc[0]["axes"].items() if k not in _MOVED}
    seeds = sorted(set(main["seed"]))
    has: dict[tuple[str, int, str], set[int]] = {}
    done: set[tuple[str, int, str, int]] = set()
    columns = [main[name].tolist() for name in (*_MOVED, "state")]
    for size, data, init, seed, state in zip(*columns, strict=True):
        key = (str(size), int(data), str(init))
        has.setdefault(key, set()).add(int(seed))
        if state == "done":
            done.add((*key, int(seed)))
    wanted: list[tuple[dict[str, Any], str]] = []
    levels = _levels(sorted({int(v) for v in columns[1]}))
    inits = list(dict.fromkeys(map(str, columns[2])))
    for size in _sizes(main):
        for data in levels:
            for init in inits:
                key = (size, data, init)
                own = has.get(key, set())
                open_seeds = sorted(s for s in own if (*key, s) not in done)
                kind, seed = "new cell", seeds[0]
                if open_seeds:
                    kind, seed = "planned cell", open_seeds[0]
                elif own:
                    kind, seed = "extra seed", max(own) + 1
                axes = {**base, "size": size, "data": data, "init": init, "seed": seed}
                wanted.append((axes, kind))
    return _priced(study, loaded, speeds, wanted, float(main["params"].max()))


_MOVED = ("size", "data", "init", "seed")


def _sizes(main: Any) -> list[str]:
    """The study's sizes, and those of the table with the same patch from its smallest up."""
    own = list(dict.fromkeys(map(str, main["size"])))
    known = [s for s in own if s in SIZES]
    patches = {SIZES[s].patch for s in known}
    least = min((_bulk(s) for s in known), default=0.0)
    more = [s for s, v in SIZES.items() if v.patch in patches and _bulk(s) >= least]
    return list(dict.fromkeys([*own, *more]))


def _bulk(size: str) -> float:
    return float(SIZES[size].depth * SIZES[size].width ** 2)


def _levels(own: list[int]) -> list[int]:
    ratio = own[-1] / own[-2] if len(own) > 1 else _USUAL_RATIO
    return [*own, *(round(own[-1] * ratio**k) for k in range(1, _STEPS_UP + 1))]


def _priced(
    study: StudyData,
    loaded: LoadedStudy,
    speeds: Speeds,
    wanted: list[tuple[dict[str, Any], str]],
    largest: float,
) -> Choice:
    found: list[Candidate] = []
    out: Counter[str] = Counter()
    measured = total = 0.0
    for axes, kind in wanted:
        try:
            grid = build_grid(with_cells(loaded, [axes], loaded.study.name))
        except UserError as error:
            out[str(error.problems[0]).rpartition(": ")[2]] += 1
            continue
        (cell,) = grid.cells
        if cell.params > 10 * largest:
            out["more than ten times the parameters of the largest model"] += 1
            continue
        hours = {}
        for stage in cell.stages.values():
            file = grid.stages[stage]
            if _is_done(study, file):
                continue
            hours[stage] = speeds.seconds(file) * file.execution.ranks / 3600
            total += file.flops
            measured += file.flops if speeds.is_measured(file) else 0.0
        found.append(
            Candidate(
                init=str(axes["init"]),
                size=str(axes["size"]),
                n=float(cell.params),
                d=float(cell.images),
                seed=int(axes["seed"]),
                hours=hours,
                kind=kind,
                axes=axes,
            )
        )
    share = measured / total if total else 1.0
    notes = [
        f"{100 * share:.0f} % of the FLOPs at speeds measured on this run root, the rest guessed"
    ]
    notes += [f"left out: {num} cells: {why}" for why, num in out.items()]
    unit = "GPU-hours" if speeds.device == "cuda" else "process-hours"
    return Choice(candidates=tuple(found), unit=unit, notes=tuple(notes))


def _is_done(study: StudyData, stage: StageFile) -> bool:
    """Whether the run root has it, by this study or another."""
    facts = study.stages.get(stage.id)
    if facts is not None:
        return facts.state == "done"
    return read_state(Tree(study.root).stage(stage.kind, stage.id)).state == "done"


# -- as a study file ------------------------------------------------------------------------


def with_cells(loaded: LoadedStudy, cells: Sequence[Mapping[str, Any]], name: str) -> LoadedStudy:
    """The study with exactly these cells (axes each), all else as it is."""
    raw = _raw(loaded, cells, name)
    return LoadedStudy(
        study=Study.model_validate(raw),
        raw_stages=raw["stages"],
        bases=loaded.bases,
        source=loaded.source,
    )


def _raw(loaded: LoadedStudy, cells: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The first cell is the product of axes of one value each; the others are included."""
    raw = dict(loaded.source.data)
    defaults = loaded.study.defaults
    # An axis for what differs from the defaults, so that names of cells stay what they were.
    given = {*loaded.study.axes, *_MOVED}
    names = [k for k in cells[0] if k in given or k not in {*defaults, *_IMPLIED}]
    rows = [{k: _plain(cell[k]) for k in names if k in cell} for cell in cells]
    for key in ("exclude", "zip", "include", "tune"):
        raw.pop(key, None)
    raw["name"] = name
    raw["axes"] = {k: [v] for k, v in rows[0].items()}
    if rows[1:]:
        raw["include"] = rows[1:]
    # Rules for what only other cells had would match nothing, and be refused.
    raw["overrides"] = [r for r in raw.get("overrides") or [] if _serves(r, defaults, cells)]
    resources = raw.get("resources") or []
    if isinstance(resources, dict):
        resources = [{"set": resources}]
    raw["resources"] = [r for r in resources if _serves(r, defaults, cells)]
    return {k: v for k, v in raw.items() if v not in ([], {})}


def _serves(
    rule: Mapping[str, Any], defaults: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether a rule matches one of the cells, and a stage that it has."""
    match = dict(rule.get("match") or {})
    stages = match.pop("stage", None)
    only_mae = stages in ("mae", ["mae"])
    return any(
        matches(match, {**defaults, **cell}) and not (only_mae and cell["init"] != "mae")
        for cell in cells
    )


_IMPLIED = ("dataset", "image_size", "patch")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def fragment(advice: Advice, loaded: LoadedStudy) -> str:
    """A study file (YAML) whose cells are the advised ones, and no others.

    Its stages have the ids of the study's own, so that those which are done are not run again. Its
    name is its own: under the study's name it would replace the study. Raises UserError if nothing
    was advised.
    """
    if not advice.steps:
        raise UserError(f"no cells advised: {advice.reason}; nothing to write")
    name = f"{loaded.study.name}{_SUFFIX}"
    raw = _raw(loaded, [s.cell.axes for s in advice.steps], name)
    raw = _absolute(raw, loaded.bases)
    head = [
        f"# Cells advised after {loaded.study.name}, the most useful first; about"
        f" {advice.hours:.3g} {advice.unit}.",
        "# Finished stages of that study are used again: run it with the same --root.",
        *(f"# {i}. {s.cell.label}: {_worth(s)}" for i, s in enumerate(advice.steps, 1)),
    ]
    body = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True, width=100)
    return "\n".join(head) + "\n" + body


def write_fragment(advice: Advice, loaded: LoadedStudy, path: Path) -> Grid:
    """Writes the file and reads it back as `harness grid` does; the grid it stands for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, fragment(advice, loaded).encode())
    grid = build_grid(load_study(path, loaded.bases))
    wanted = len(advice.steps)
    assert len(grid.cells) == wanted, f"{path}: {len(grid.cells)} cells, {wanted} advised"
    return grid


def _worth(step: Step) -> str:
    cost = f"{step.hours:.3g} hours"
    if step.ratio is None or not math.isfinite(step.ratio):
        return f"{cost}; {step.note}".replace("\n", " ")
    return f"{cost}; intervals then {step.ratio:.2f} of today's"


def _absolute(value: Any, bases: Sequence[Path]) -> Any:
    """Relative paths that exist beside the study's file, as absolute ones: the fragment lies
    elsewhere. Paths are no part of a stage's identity.
    """
    if isinstance(value, Mapping):
        return {k: _absolute(v, bases) for k, v in value.items()}
    if isinstance(value, list):
        return [_absolute(v, bases) for v in value]
    if not isinstance(value, str) or "/" not in value or "://" in value or "\n" in value:
        return value
    kind, colon, path = value.rpartition(":")
    for base in bases:
        if len(path) < 300 and not Path(path).is_absolute() and (base / path).exists():
            return f"{kind}{colon}{(base / path).absolute()}"
    return value
