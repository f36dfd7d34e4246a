"""Study file -> points of the grid: which axis values go together."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Hashable
from typing import Any, NamedTuple

from harness.errors import UserError
from harness.study.schema import CORE_AXES, INITS, LoadedStudy
from harness.study.sizes import SIZES
from harness.study.source import Location
from harness.study.starting import find, is_checkpoint
from harness.units import parse_count


class Point(NamedTuple):
    """One combination of axis values, `defaults` filled in."""

    values: dict[str, Any]
    origin: dict[str, Location]
    """Where in the study file each value stands."""
    family: Hashable = None
    """Equal for points of the axes' product that differ in the seed alone; None for others."""


def expand(loaded: LoadedStudy, problems: list[str]) -> list[Point]:
    """All points: product of the axes (zipped groups together), less exclude, plus include.

    What is wrong is added to `problems`: unknown axis, unequal zip, a rule matching nothing, a
    value nobody knows. The points that are left out for it are those that hold it.
    """
    study = loaded.study
    shapeless = _check_axis_names(loaded) + _check_zip(loaded)
    problems += shapeless + _check_rule_keys(loaded)
    if shapeless:  # there is no product, but its values can be looked at one by one
        for point in _single_values(loaded):
            normalise(point, loaded, problems, is_whole=False)
        return []
    points = []
    default_origin: dict[str, Location] = {k: ("defaults", k) for k in study.defaults}
    groups = _groups(loaded)
    places = [i for i, choices in enumerate(groups) if [n for n, _ in choices[0]] != ["seed"]]
    chosen = [[{n: study.axes[n][i] for n, i in c} for c in choices] for choices in groups]
    origins: list[list[dict[str, Location]]]
    origins = [[{n: ("axes", n, i) for n, i in c} for c in choices] for choices in groups]
    for combination in itertools.product(*[range(len(choices)) for choices in groups]):
        values, origin = dict(study.defaults), dict(default_origin)
        for group, choice in enumerate(combination):
            values.update(chosen[group][choice])
            origin.update(origins[group][choice])
        family = tuple([combination[i] for i in places])
        points.append(Point(values, origin, family))
    for i, rule in enumerate(study.exclude):
        kept = [p for p in points if not matches(rule, p.values)]
        if len(kept) == len(points) and not _strange_keys(loaded, rule):
            where = loaded.source.where(("exclude", i))
            problems.append(f"{where}: exclude {show_rule(rule)} matches no cell; fix or remove it")
        points = kept
    for i, extra in enumerate(study.include):
        values = {**study.defaults, **extra}
        origin = {**default_origin, **{k: ("include", i, k) for k in extra}}
        missing = [a for a in study.axes if a not in values]
        if missing:
            where = loaded.source.where(("include", i))
            problems.append(f"{where}: include has no value for {', '.join(missing)}")
            continue
        points.append(Point(values=values, origin=origin))
    if not points:
        problems.append(f"{loaded.source.path}: the grid has no cells; check axes and exclude")
    for section in ("overrides", "resources"):
        for i, rule in enumerate(getattr(study, section)):
            match = {k: v for k, v in rule.match.items() if (section, k) != ("resources", "stage")}
            idle = not any(matches(match, p.values) for p in points)
            if points and idle and not _strange_keys(loaded, match):
                where, shown = loaded.source.where((section, i)), show_rule(rule.match)
                problems.append(f"{where}: {section} {shown} matches no cell; fix or remove it")
    good: list[Point] = []
    checked: dict[Hashable, dict[str, Any]] = {}
    for point in points:
        known, before = checked.get(point.family), len(problems)
        if known is not None and _is_seed(point.values.get("seed", 0)):
            values = {**known, "seed": point.values.get("seed", 0)}
            good.append(Point(values, point.origin, point.family))
            continue
        normal = normalise(point, loaded, problems)
        if len(problems) == before:
            good.append(normal)
            if point.family is not None:
                checked[point.family] = normal.values
    return good


def _single_values(loaded: LoadedStudy) -> list[Point]:
    """Every value of every axis on its own, as points of that one value."""
    study = loaded.study
    found = [
        ((name, v), ("axes", name, i)) for name, vs in study.axes.items() for i, v in enumerate(vs)
    ]
    found += [((name, v), ("defaults", name)) for name, v in study.defaults.items()]
    found += [
        ((name, v), ("include", i, name))
        for i, e in enumerate(study.include)
        for name, v in e.items()
    ]
    return [Point(values={k: v}, origin={k: location}) for (k, v), location in found]


def matches(rule: dict[str, Any], values: dict[str, Any]) -> bool:
    """True if every key of the rule has that value, or one of that list of values."""
    for key, wanted in rule.items():
        options = wanted if isinstance(wanted, list) else [wanted]
        if key not in values or not any(same(values[key], o) for o in options):
            return False
    return True


def same(value: Any, wanted: Any) -> bool:
    """Equality that reads '4k' and 4000, 1 and '1', 1e-3 and '0.001' as equal."""
    if value == wanted or str(value) == str(wanted):
        return True
    if value is None or wanted is None:
        return False
    try:
        return float(value) == float(wanted)
    except (TypeError, ValueError):
        pass
    try:
        return parse_count(value) == parse_count(wanted)
    except UserError:
        return False


_Choice = tuple[tuple[str, int], ...]


def _groups(loaded: LoadedStudy) -> list[list[_Choice]]:
    """Per zipped group (or lone axis) its choices; a choice is (axis, index) pairs."""
    zipped = {name: tuple(group) for group in loaded.study.zip for name in group}
    groups, done = [], set()
    for axis, axis_values in loaded.study.axes.items():
        group = zipped.get(axis, (axis,))
        if group in done:
            continue
        done.add(group)
        groups.append([tuple((name, i) for name in group) for i in range(len(axis_values))])
    return groups


def _check_zip(loaded: LoadedStudy) -> list[str]:
    problems, seen = [], set()
    for i, group in enumerate(loaded.study.zip):
        where = loaded.source.where(("zip", i))
        for name in group:
            if name not in loaded.study.axes:
                problems.append(f"{where}: zip names '{name}', which is not an axis")
            if name in seen:
                problems.append(f"{where}: axis '{name}' is zipped twice")
            seen.add(name)
        lengths = {n: len(loaded.study.axes[n]) for n in group if n in loaded.study.axes}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{n} has {length}" for n, length in lengths.items())
            problems.append(f"{where}: zipped axes need equally many values; {shown}")
    return problems


def _check_axis_names(loaded: LoadedStudy) -> list[str]:
    """Every name is a core axis, a dotted stage field, or a label that some rule matches."""
    study, problems = loaded.study, []
    rules = [*(o.match for o in study.overrides), *(r.match for r in study.resources)]
    matched = {key for rule in [*rules, *study.exclude] for key in rule}
    for section, names in (("axes", study.axes), ("defaults", study.defaults)):
        for name in names:
            if name in CORE_AXES or "." in name or name in matched:
                continue
            near = difflib.get_close_matches(name, CORE_AXES, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(CORE_AXES)}"
            problems.append(
                f"{loaded.source.where((section, name))}: {section}.{name}: unknown axis; {hint}"
                " (a stage field is written like wsp.lr; a label needs an override that matches it)"
            )
    return problems


def _check_rule_keys(loaded: LoadedStudy) -> list[str]:
    """Rules match on axes, those of resources also on the stage."""
    study, problems = loaded.study, []
    for section, found in (
        ("overrides", [o.match for o in study.overrides]),
        ("resources", [r.match for r in study.resources]),
        ("exclude", study.exclude),
    ):
        for i, rule in enumerate(found):
            for key in _strange_keys(loaded, rule):
                if section == "resources" and key == "stage":
                    continue
                place = (section, i) if section == "exclude" else (section, i, "match", key)
                near = difflib.get_close_matches(key, study.axes, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"axes: {', '.join(study.axes)}"
                problems.append(
                    f"{loaded.source.where(place)}: {section} matches on '{key}', which is not an"
                    f" axis; {hint}"
                )
    return problems


def _strange_keys(loaded: LoadedStudy, rule: dict[str, Any]) -> list[str]:
    """Keys of a rule that no cell has."""
    study = loaded.study
    known = {*study.axes, *study.defaults, *CORE_AXES, *(k for i in study.include for k in i)}
    return [key for key in rule if key not in known]


def normalise(
    point: Point, loaded: LoadedStudy, problems: list[str], is_whole: bool = True
) -> Point:
    """Core axes checked and spelled one way; what is wrong is added to `problems`.

    `is_whole`: the point has a value of every axis.
    """
    values = dict(point.values)

    def bad(axis: str, message: str) -> None:
        origin = point.origin.get(axis, ("axes", axis))
        where = "--set" if origin == ("--set",) else loaded.source.where(origin)
        problems.append(f"{where}: {axis} {point.values.get(axis)!r}: {message}")

    values.setdefault("seed", 0)
    values.setdefault("dataset", "scenes")
    for axis in ("size", "data", "init"):
        if axis not in values and is_whole:
            problems.append(
                f"{loaded.source.path}: no value for '{axis}'; add it to axes or defaults"
            )
    size = str(values.get("size", "b")).lower()
    if size not in SIZES:
        near = difflib.get_close_matches(size, SIZES, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        bad("size", f"unknown; {hint}known sizes: {', '.join(SIZES)}")
    values["size"] = size
    init = str(values.get("init", "random"))
    if is_checkpoint(init):
        try:
            find(init, loaded.bases)
        except UserError as error:
            bad("init", str(error))
    elif init not in INITS:
        near = difflib.get_close_matches(init, INITS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        bad("init", f"unknown; {hint}known: {', '.join(INITS)}, checkpoint:PATH")
    if values.get("data", "full") != "full":
        values["data"] = _whole(values["data"], "data", bad)
    for axis in ("image_size", "patch"):
        if axis in values:
            values[axis] = _whole(values[axis], axis, bad)
    seed = values["seed"]
    if not _is_seed(seed):
        bad("seed", "expected a whole number, 0 or more")
    return Point(values=values, origin=point.origin, family=point.family)


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _whole(value: Any, axis: str, bad: Any) -> Any:
    try:
        return parse_count(value)
    except UserError as error:
        bad(axis, str(error) + (" or 'full'" if axis == "data" else ""))
        return value


def show_rule(rule: dict[str, Any]) -> str:
    """A rule as the study file writes it."""
    return "{" + ", ".join(f"{k}: {v}" for k, v in rule.items()) + "}"
