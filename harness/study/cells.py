"""Points -> cells and the shared stage graph: who needs which stage, each stage once."""

from __future__ import annotations

import copy
import difflib
import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from pydantic import ValidationError

from harness.errors import UserError
from harness.study import flops as count_flops
from harness.study import identity
from harness.study.cell_names import around_seed, plain, varied
from harness.study.chain import Chain
from harness.study.datasets import DatasetMeta, describe
from harness.study.expand import Point, expand, matches, normalise
from harness.study.recipe_fields import assign, cut
from harness.study.recipes import Model
from harness.study.rules import check_datasets, check_rules
from harness.study.schema import (
    CORE_AXES,
    LoadedStudy,
    Resources,
    Stages,
    problems_of,
)
from harness.study.seeds import Known, Step, repeat
from harness.study.sizes import SIZES
from harness.study.source import Location
from harness.study.stage_set import StageSet
from harness.study.stages import Execution, Images, StageFile
from harness.study.zero_files import checked_name
from harness.units import format_count


class Cell(NamedTuple):
    """One point of the study, resolved: two cells with equal stages and axes are the same.

    A tuple: there are ten thousands at a time.
    """

    id: str
    name: str
    axes: dict[str, Any]
    stages: dict[str, str]
    """Role (mae, wsp, or the name of a transfer task) -> stage id."""
    params: int
    images: int
    is_full: bool
    """Whether it uses all pretraining images of its dataset."""
    flops: float
    flops_by_role: dict[str, float]
    tag: str | None
    parent: str | None
    set: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A study expanded: its cells, and every stage once, in dependency order."""

    loaded: LoadedStudy
    cells: list[Cell]
    stages: Mapping[str, StageFile]
    feeds: dict[str, int]
    """Stage id -> number of cells that need it."""
    datasets: dict[str, DatasetMeta]


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """An existing cell with some fields set differently (`harness run CELL --set k=v`)."""

    parent: str
    values: dict[str, Any]
    """The parent's point, before `set`."""
    set: dict[str, Any]
    tag: str | None = None
    until: str | None = None
    """Role of the last stage that is wanted; what comes after it is left out. None: all."""


TUNE = "tune"
"""Tag of the trials of `harness tune`; `harness grid` neither plans nor runs them."""


def build_grid(loaded: LoadedStudy, ablations: Iterable[Ablation] = ()) -> Grid:
    """Expands and resolves a study. Raises UserError with every problem of every cell, once."""
    builder = _build(loaded)
    builder.add_ablations(ablations)
    return builder.grid()


def problems_in(loaded: LoadedStudy) -> list[str]:
    """Everything that keeps a study from being a grid, each with file:line."""
    return list(dict.fromkeys(_build(loaded).problems))


def _build(loaded: LoadedStudy) -> _Builder:
    builder = _Builder(loaded)
    points = expand(loaded, builder.problems)
    is_complete = not builder.problems
    for point in points:
        builder.add(point)
    check_datasets(builder)
    check_rules(builder, is_complete)
    return builder


def build_ablations(loaded: LoadedStudy, ablations: Iterable[Ablation]) -> Grid:
    """Cells of these ablations only, in their order. Raises UserError with every problem."""
    builder = _Builder(loaded)
    builder.add_ablations(ablations)
    return builder.grid()


def _ablation_point(ablation: Ablation, loaded: LoadedStudy, problems: list[str]) -> Point:
    for key in ablation.set:
        if key not in CORE_AXES and "." not in key:
            near = difflib.get_close_matches(key, CORE_AXES, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"axes: {', '.join(CORE_AXES)}"
            problems.append(f"--set {key}: unknown; {hint} (a stage field is written like wsp.lr)")
    values = {**ablation.values, **ablation.set}
    point = Point(values=values, origin=dict.fromkeys(ablation.set, ("--set",)))
    return normalise(point, loaded, problems)


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What cells that differ in the seed alone have in common."""

    name: tuple[str, str]
    """Before and after the seed."""
    text: identity.CellText
    steps: list[Step]
    params: int
    images: int
    is_full: bool
    flops: float
    flops_by_role: dict[str, float]
    ablation: Ablation | None


class _Builder:
    def __init__(self, loaded: LoadedStudy) -> None:
        self.loaded = loaded
        self.problems: list[str] = []
        self.cells: dict[str, Cell] = {}
        self.stages = StageSet()
        self.datasets: dict[str, DatasetMeta] = {}
        self._stages_cache: dict[str, Stages | None] = {}
        self._origins: dict[int, dict[Location, Location]] = {}
        """id of recipes -> field -> where in the file it was set, if not in `stages`."""
        self._resources: dict[str, Resources] = {}
        self.used: set[tuple[str, int]] = set()
        """Rules that matched something, as (section, place)."""
        self._images: dict[tuple[str, str, int, bool], Images] = {}
        self._models: dict[tuple[str, int, int], Model] = {}
        self.schedules: dict[tuple[int, int, int], Any] = {}
        self.executions: dict[tuple[Any, ...], tuple[Any, Any, Execution]] = {}
        self.features: dict[tuple[Any, ...], Any] = {}
        self.varied = varied(loaded)
        self._families: dict[Hashable, _Family] = {}
        """Cells that differ in the seed alone, by `Point.family`."""
        self._known: Known = {}
        rules = (*loaded.study.overrides, *loaded.study.resources)
        self._seed_matters = any("seed" in rule.match for rule in rules)

    def grid(self) -> Grid:
        if self.problems:
            raise UserError(*dict.fromkeys(self.problems))
        return Grid(
            loaded=self.loaded,
            cells=list(self.cells.values()),
            stages=self.stages,
            feeds=_feeds(self.cells.values()),
            datasets=self.datasets,
        )

    def add_ablations(self, ablations: Iterable[Ablation]) -> None:
        for ablation in ablations:
            before = len(self.problems)
            point = _ablation_point(ablation, self.loaded, self.problems)
            if len(self.problems) == before:
                self.add(point, ablation)

    # -- one cell ---------------------------------------------------------------------------

    def add(self, point: Point, ablation: Ablation | None = None) -> None:
        others = None if self._seed_matters else point.family
        family = None if others is None else self._families.get(others)
        if family is not None:
            ids = repeat(family.steps, point.values["seed"], self.stages, self._known)
            self._keep(family, point, ids)
            return
        recipes = self._recipes(point) if self.loaded.has_stages else None
        try:
            meta = self.dataset(str(point.values["dataset"]))
            if recipes is not None:
                family, ids = self._new(point, meta, recipes, ablation)
                if others is not None:
                    self._families[others] = family
                self._keep(family, point, ids)
        except UserError as error:
            self.problems += [self._located(p, point, recipes) for p in error.problems]

    def _located(self, problem: str, point: Point, recipes: Stages | None) -> str:
        """A problem with file:line of the field or the axis that it begins with."""
        if problem.startswith(("--set", f"{self.loaded.source.path}:")):
            return problem
        words = problem.split(" ", 1)[0].rstrip(":,").split(".")
        if words[0] == "stages" and len(words) > 1:
            return self.at(self._origin(tuple(words[1:]), recipes)) + problem
        place = self._where(point, words[0])
        return f"{place or f'{self.loaded.source.path}: '}{problem}"

    def _origin(self, field: Location, recipes: Stages | None) -> Location:
        """Where a field of the recipes was set, such as (wsp, lr)."""
        known = self._origins.get(id(recipes), {})
        found = [
            p for p in known if field[: len(p)] == p or (field[1:] and p[: len(field)] == field)
        ]
        return known[max(found, key=len)] if found else ("stages", *field)

    def _new(
        self, point: Point, meta: DatasetMeta, recipes: Stages, ablation: Ablation | None
    ) -> tuple[_Family, dict[str, str]]:
        """A cell's family, and the stages that were made for the cell: role -> stage id."""
        values = point.values
        if ablation and ablation.until:
            recipes = cut(recipes, ablation.until)
        available = meta.count("pretrain")
        images = available if values["data"] == "full" else int(values["data"])
        if images > available:
            raise UserError(
                f"{self._where(point, 'data')}data {format_count(images)}: dataset {meta.name} has"
                f" {format_count(available)} pretraining images; use at most that, or 'full'"
            )
        axes = {**values, "data": images}
        model = self._model(point, meta)
        chain = Chain(self, meta, model, axes, images)
        chain.build(recipes)
        flops = {role: self.stages[s].flops for role, s in chain.ids.items()}
        family = _Family(
            name=around_seed(axes, self.varied, ablation),
            text=identity.CellText(plain(axes), chain.ids),
            steps=[Step(link) for link in chain.links],
            params=count_flops.encoder_params(model),
            images=images,
            is_full=images == available,
            flops=sum(flops.values()),
            flops_by_role=flops,
            ablation=ablation,
        )
        return family, chain.ids

    def _keep(self, family: _Family, point: Point, ids: dict[str, str]) -> None:
        """Keeps the family's cell of a point, whose stages are `ids`, once."""
        seed = point.values["seed"]
        before, after = family.name
        ablation = family.ablation
        name = f"{before}{seed}{after}"
        cell_id = f"{name}-{family.text.digest(seed, ids)}"
        if cell_id in self.cells:
            return
        self.cells[cell_id] = Cell(
            id=cell_id,
            name=name,
            axes={**point.values, "data": family.images},
            stages=ids,
            params=family.params,
            images=family.images,
            is_full=family.is_full,
            flops=family.flops,
            flops_by_role=family.flops_by_role,
            tag=ablation.tag if ablation else None,
            parent=ablation.parent if ablation else None,
            set=dict(ablation.set) if ablation else {},
        )

    def _where(self, point: Point, axis: str) -> str:
        origin = point.origin.get(axis)
        if origin == ("--set",):
            return "--set: "
        return f"{self.loaded.source.where(origin)}: " if origin else ""

    def dataset(self, spec: str) -> DatasetMeta:
        if spec not in self.datasets:
            self.datasets[spec] = describe(spec, self.loaded.bases)
        return self.datasets[spec]

    def _model(self, point: Point, meta: DatasetMeta) -> Model:
        size = SIZES[point.values["size"]]
        image_size = int(point.values.get("image_size", meta.image_size))
        patch = int(point.values.get("patch", size.patch))
        if image_size % patch:
            raise UserError(
                f"{self._where(point, 'size')}size {point.values['size']}: image_size {image_size}"
                f" is not a multiple of patch {patch}; set image_size or patch in defaults"
            )
        key = (str(point.values["size"]), patch, image_size)
        if key not in self._models:
            self._models[key] = Model(
                width=size.width,
                depth=size.depth,
                heads=size.heads,
                patch=patch,
                image_size=image_size,
            )
        return self._models[key]

    # -- recipes: stages < dotted defaults < overrides < dotted axes < --set -----------------

    def _recipes(self, point: Point) -> Stages | None:
        sets: list[tuple[str, Any, Location]] = []
        dotted = {k: v for k, v in point.values.items() if "." in k}
        early = [k for k in dotted if point.origin.get(k, ())[:1] == ("defaults",)]
        sets += [(k, dotted[k], ("defaults", k)) for k in early]
        for i, rule in enumerate(self.loaded.study.overrides):
            if matches(rule.match, point.values):
                self.used.add(("overrides", i))
                sets += [(k, v, ("overrides", i, "set", k)) for k, v in rule.set.items()]
        sets += [(k, v, point.origin.get(k, ())) for k, v in dotted.items() if k not in early]
        key = repr([(k, v) for k, v, _ in sets])
        if key not in self._stages_cache:
            self._stages_cache[key] = self.validate(sets)
        return self._stages_cache[key]

    def validate(self, sets: list[tuple[str, Any, Location]]) -> Stages | None:
        raw = copy.deepcopy(self.loaded.raw_stages)
        origin: dict[Location, Location] = {}
        for path, value, location in sets:
            parts = tuple(path.split("."))
            if not assign(raw, parts, value):
                known = ", ".join(k for k in raw)
                self.problems.append(
                    f"{self.at(location)}'{path}': the study has no such stage; it has: {known}"
                )
                return None
            origin[parts] = location
        try:
            stages = Stages.model_validate(raw)
            self._origins[id(stages)] = origin  # the cache holds the stages: ids stay theirs
            return stages
        except ValidationError as error:
            for line in problems_of(error, Stages):
                path = tuple(line.split(": ", 1)[0].split("."))
                cause = next((o for p, o in origin.items() if path[: len(p)] == p), None)
                self.problems.append(self.at(cause or ("stages", *path)) + line)
            return None

    def at(self, location: Location) -> str:
        if location == ("--set",):
            return "--set: "
        return f"{self.loaded.source.where(location)}: "

    # -- stages -----------------------------------------------------------------------------

    def put(self, stage: StageFile, hashed: str) -> str:
        self.stages.add(stage, hashed)
        return stage.id

    def images(self, meta: DatasetMeta, split: str, images: int, one_window: bool) -> Images:
        key = (meta.fingerprint, split, images, one_window)
        if key not in self._images:
            self._images[key] = Images(
                dataset=meta.name,
                fingerprint=meta.fingerprint,
                split=split,
                images=images,
                layout="" if one_window else meta.layout.get(split, ""),
            )
        return self._images[key]

    def resources(self, stage: str, axes: dict[str, Any]) -> Resources:
        merged: dict[str, Any] = {}
        asked = {**axes, "stage": stage}
        for i, rule in enumerate(self.loaded.study.resources):
            if matches(rule.match, asked):
                self.used.add(("resources", i))
                merged = self.merged(merged, i)
        found = self._resources.get(repr(merged))
        if found is None:
            found = self._resources[repr(merged)] = Resources.model_validate(merged)
        return found

    def merged(self, merged: dict[str, Any], rule: int) -> dict[str, Any]:
        """With what a rule sets, if that can be set; what cannot is a problem."""
        new = merged | self.loaded.study.resources[rule].set
        if repr(new) in self._resources:
            return new
        is_plain = isinstance(self.loaded.source.data.get("resources"), dict)
        place: Location = ("resources",) if is_plain else ("resources", rule, "set")
        try:
            found = Resources.model_validate(new)
            if found.zero is not None:
                zero = checked_name(found.zero, self.loaded.bases)
                found = found.model_copy(update={"zero": zero})
        except ValidationError as error:
            self.problems += problems_of(error, Resources, self.loaded.source, place)
            return merged
        except UserError as error:
            where = self.at((*place, "zero"))
            self.problems += [f"{where}resources: {p}" for p in error.problems]
            return merged
        self._resources[repr(new)] = found
        return new


def only(grid: Grid, cells: list[Cell]) -> Grid:
    """The same grid with just these cells and the stages they need."""
    if len(cells) == len(grid.cells):
        return grid
    feeds = _feeds(cells)
    if isinstance(grid.stages, StageSet):
        stages: Mapping[str, StageFile] = grid.stages.only(feeds)
    else:
        stages = {k: v for k, v in grid.stages.items() if k in feeds}
    return replace(grid, cells=cells, stages=stages, feeds=feeds)


def _feeds(cells: Iterable[Cell]) -> dict[str, int]:
    """How many cells need a stage, by stage id."""
    return dict(Counter(itertools.chain.from_iterable([c.stages.values() for c in cells])))
