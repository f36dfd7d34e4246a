"""The study file: every key it may have, checked all at once."""

from __future__ import annotations

import copy
import difflib
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

from harness.errors import UserError
from harness.study import source as study_source
from harness.study.protocols import TransferRecipe
from harness.study.recipes import Count, Frozen, MaeRecipe, Positive, WspRecipe
from harness.study.tuning import Tune
from harness.units import parse_seconds

CORE_AXES = ("size", "data", "init", "seed", "dataset", "image_size", "patch")
INITS = ("random", "mae")

# Names become folders, job names and parts of shell lines; a dot first would hide the folder.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")


def check_name(name: str) -> str:
    """A name that is safe as a folder and in a job name. Raises ValueError otherwise."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(
            f"{name!r} is not a usable name; letters, digits, _ . + - only, at most 64,"
            " not starting with a sign"
        )
    return name


Name = Annotated[str, AfterValidator(check_name)]


def _seconds(value: Any) -> float:
    try:
        return parse_seconds(value)
    except UserError as error:
        raise ValueError(str(error)) from None


Seconds = Annotated[float, BeforeValidator(_seconds)]


def _flops(value: Any) -> Any:
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([kKMGTPEZ])", str(value))
    power = 3 * "kMGTPEZ".index(match[2].replace("K", "k")) + 3 if match else 0
    try:
        return float(match[1]) * 10.0**power if match else float(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{value!r} is not a number of FLOPs; expected for example 3e18 or 3E"
        ) from None


def _hours(value: Any) -> Any:
    is_time = isinstance(value, str) and value.strip()[-1:] in ("s", "m", "h", "d")
    return _seconds(value) / 3600 if is_time else value


Flops = Annotated[float, BeforeValidator(_flops), Field(gt=0)]
Hours = Annotated[float, BeforeValidator(_hours), Field(gt=0)]


class Stages(Frozen):
    """The recipes. A cell passes through mae (if init is mae), wsp, then every transfer task."""

    mae: MaeRecipe | None = None
    wsp: WspRecipe | None = None
    transfer: dict[Name, TransferRecipe] = {}


class MatchSet(Frozen):
    """For the cells that `match`, set these fields: `{match: {size: l}, set: {wsp.lr: 1e-3}}`."""

    match: dict[str, Any] = {}
    set: dict[str, Any]


class Resources(Frozen):
    """How stages run; never part of a stage's identity."""

    ranks: Count = 1
    """Processes of a stage; one GPU each on CUDA."""
    nodes: Count = 1
    threads: Count = 1
    """CPU threads of one rank."""
    share: Count = 1
    """Up to so many stages of one rank use one GPU at a time; no meaning on a CPU."""
    micro_batch: Count | None = None
    head_batch: Count | None = None
    """Images whose logits are in memory at a time in wsp; fewer than the micro-batch costs a second
    pass through the head."""
    activation_checkpointing: bool = False
    """Less memory for a third more computing: a block keeps its input only."""
    time: Seconds | None = None
    """Time limit handed to a scheduler."""
    memory_gib: Positive | None = None
    """Memory of a stage, all its ranks: handed to a scheduler, and a limit on a CPU."""
    zero: str | None = None
    """DeepSpeed config: a name in ds_configs/ or a path; none picks one by device."""
    checkpoint_every: Seconds = 60.0
    hang_after: Seconds = 1800.0
    """A stage none of whose ranks' steps moves for so long is ended, with the cause `hung`."""
    eval_points: Count = 8

    @model_validator(mode="after")
    def _share_is_for_one_rank(self) -> Self:
        if self.share > 1 and self.ranks > 1:
            raise ValueError(
                f"share {self.share} with {self.ranks} ranks: only stages of one rank share a"
                " GPU; set share: 1 or ranks: 1 for them"
            )
        return self


class ResourceRule(Frozen):
    """Resources for the stages that `match` (keys: stage, size, or any axis)."""

    match: dict[str, Any] = {}
    set: dict[str, Any]


Tries = Annotated[int, Field(ge=0)]


class Retry(Frozen):
    """How often a stage is tried again, by the cause of its end. Every try goes on from the last
    checkpoint; counted are the attempts since a user last said `retry`."""

    preempted: Tries | Literal["always"] = "always"
    """Asked to stop: by a scheduler for somebody else's job, by Ctrl-C, by a requeue."""
    timeout: Tries | Literal["always"] = "always"
    """The time limit of its job."""
    patience: Count = 3
    """`always` ends when so many attempts in a row left nothing to go on from."""
    node_fail: Tries = 3
    """Its host is gone; under a scheduler the next try avoids that host."""
    killed: Tries = 2
    """Ended by a signal nobody here sent: a host's memory, `kill -9`."""
    oom: Tries = 30
    """Out of memory in a training step; each try takes the next smaller micro-batch."""
    hung: Tries = 1
    """A rank stood still for `resources.hang_after`."""
    data: Tries = 0
    code: Tries = 0
    diverged: Annotated[int, Field(ge=0, le=1)] = 0
    """On one machine the same run diverges again; on another, or with atomics, it may not."""


class Budget(Frozen):
    """`--submit` refuses a study whose remaining work exceeds any of these."""

    flops: Flops | None = None
    """A number, or with a decimal multiple: 3e18, 3E, 500T."""
    hours: Hours | None = None
    """A number of hours, or a time such as 90m, 10h or 2d."""


class Study(Frozen):
    """One study file."""

    name: Name
    question: str | None = None
    version: Literal[1] = 1
    axes: dict[str, Annotated[list[Any], Field(min_length=1)]]
    zip: list[Annotated[list[str], Field(min_length=2)]] = []
    include: list[dict[str, Any]] = []
    exclude: list[dict[str, Any]] = []
    defaults: dict[str, Any] = {}
    overrides: list[MatchSet] = []
    stages: Stages
    resources: list[ResourceRule] = []
    retry: Retry = Retry()
    budget: Budget = Budget()
    tune: Tune | None = None


class LoadedStudy(Frozen):
    """A study with the file it came from; `raw_stages` is what overrides are applied to."""

    model_config = {**Frozen.model_config, "arbitrary_types_allowed": True}

    study: Study
    raw_stages: dict[str, Any]
    bases: tuple[Path, ...]
    """Where relative dataset paths are looked for: where the command runs, beside the file."""
    source: study_source.Source
    has_stages: bool = True
    """False where `stages` is wrong: what is left of it shows further problems, but no cells."""


def load_study(path: Path, bases: Sequence[Path] | None = None) -> LoadedStudy:
    """Reads and checks a study file. Raises UserError listing every problem with file:line."""
    source = study_source.load(path)
    data = dict(source.data)
    if isinstance(data.get("resources"), dict):
        # `resources: {ranks: 2}` is the common case; the list form is for rules.
        data["resources"] = [{"set": data["resources"]}]
    found = tuple(bases or (Path.cwd(), path.absolute().parent))
    try:
        study = Study.model_validate(data)
    except ValidationError as error:
        problems = problems_of(error, Study, source)
        raise UserError(*problems, *_further(data, error, found, source, problems)) from None
    return LoadedStudy(study=study, raw_stages=data["stages"], bases=found, source=source)


def _further(
    data: dict[str, Any],
    error: ValidationError,
    bases: tuple[Path, ...],
    source: study_source.Source,
    told: list[str],
) -> list[str]:
    """The problems of the rest of a file, without the values that are wrong already."""
    from harness.study.cells import problems_in  # it needs this module

    data, has_stages = copy.deepcopy(data), True
    for _ in range(9):  # what is left of a value may be wrong in its turn
        found = {_in_file(item["loc"]): item for item in error.errors(include_url=False)}
        for location, item in found.items():
            in_stages = location[0] == "stages"
            has_stages = has_stages and not in_stages
            if item["type"] == "missing" or not _remove(data, location):
                if not in_stages:
                    return []
                data["stages"] = {}
        try:
            study = Study.model_validate(data)
        except ValidationError as another:
            error = another
            continue
        raw = data["stages"]
        loaded = LoadedStudy(
            study=study, raw_stages=raw, bases=bases, source=source, has_stages=has_stages
        )
        return [p for p in problems_in(loaded) if p not in told]
    return []


def _remove(data: Any, location: study_source.Location) -> bool:
    """Takes the value at a place out of data; False if there is none, or a list would shift."""
    node: Any = data
    try:
        for part in location[:-1]:
            node = node[part]
        if isinstance(node, dict):
            del node[location[-1]]
            return True
    except (KeyError, IndexError, TypeError):
        pass
    return False


def problems_of(
    error: ValidationError,
    model: type[BaseModel],
    source: study_source.Source | None = None,
    prefix: study_source.Location = (),
) -> list[str]:
    """One line per problem: `file:line: path: what was found, what was expected`."""
    at: dict[study_source.Location, list[Any]] = {}
    for item in error.errors(include_url=False):
        # Tags of unions ("linear_probe", "int") are in pydantic's path but not in the file.
        at.setdefault(_in_file(item["loc"]), []).append(item)
    lines: list[str] = []
    for location, items in at.items():
        if items[0]["type"] == "union_tag_invalid":
            location = (*location, str(items[0]["ctx"]["discriminator"]).strip("'"))
        where = f"{source.where((*prefix, *location))}: " if source else ""
        name = ".".join(str(p) for p in (*prefix, *location))
        # A value that fits no member of a union has an item of each member.
        words = [i for i in items if i["type"] == "literal_error"]
        others = [i for i in items if i not in words]
        said = [_describe(i, model, i["loc"]) for i in others or words[:1]]
        if words and others and str(words[0]["input"])[:1].isalpha():  # not a wrong number
            said = [_choices(words[0], "or a number")]
        lines += [f"{where}{name}: {text}" for text in said]
    return list(dict.fromkeys(lines))


def _choices(item: Any, more: str = "") -> str:
    """'expected ...' of a closed set of words, and the one that was probably meant."""
    expected = re.findall(
        r"'([^']*)'", item["ctx"].get("expected_tags", item["ctx"].get("expected"))
    )
    found = item["ctx"].get("tag", item.get("input"))
    near = difflib.get_close_matches(str(found), expected, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"expected {', '.join(expected)}{f' {more}' if more else ''}; found {found!r}{hint}"


def _in_file(location: study_source.Location) -> study_source.Location:
    """pydantic's path without the parts that only name a member of a union."""
    kept = []
    for i, part in enumerate(location):
        protocol_tag = i >= 2 and location[i - 2] in ("transfer", "profiles")
        type_tag = str(part).startswith(("literal[", "function-", "constrained-"))
        if not protocol_tag and not type_tag:
            kept.append(part)
    return tuple(kept)


def _describe(item: Any, model: type[BaseModel], location: tuple[str | int, ...]) -> str:
    kind, found = item["type"], item.get("input")
    if kind == "extra_forbidden":
        return unknown_key(str(location[-1]), _fields_at(model, location[:-1]))
    if kind == "missing":
        return "is missing"
    if kind in ("literal_error", "union_tag_invalid") and "'" in str(item.get("ctx")):
        return _choices(item)
    if kind == "union_tag_not_found":
        key = str(item["ctx"]["discriminator"]).strip("'")
        example = {"protocol": "linear_probe"}.get(key, "slurm")
        return f"{key} is missing; expected for example {key}: {example}"
    message = item["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if repr(found) in message or isinstance(found, (dict, list)):
        return message
    return f"{message}; found {found!r}"


def unknown_key(key: str, known: list[str]) -> str:
    """'unknown key' with the nearest known one, or all of them when none is near."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"unknown key; did you mean '{near[0]}'?"
    return f"unknown key; known: {', '.join(known)}"


def _fields_at(model: Any, location: tuple[str | int, ...]) -> list[str]:
    """Field names of the model that stands at `location` below `model`."""
    for part in location:
        model = _step(model, part)
    found = [m for m in _models_in(model)]
    return list(dict.fromkeys(name for m in found for name in m.model_fields))


def _step(annotation: Any, part: str | int) -> Any:
    for model in _models_in(annotation):
        if str(part) in model.model_fields:
            return model.model_fields[str(part)].annotation
        tags = [f.default for n, f in model.model_fields.items() if n in ("protocol", "kind")]
        if part in tags:
            return model
    if typing.get_origin(annotation) in (dict, list, tuple):
        return typing.get_args(annotation)[-1]
    return annotation


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [m for a in typing.get_args(annotation) for m in _models_in(a)]
    if origin is Annotated:
        return _models_in(typing.get_args(annotation)[0])
    return []
