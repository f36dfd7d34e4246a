"""A study file as data plus the line every value stands on, so that errors can point at it."""

from __future__ import annotations

import os
import re
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from harness.errors import NotFoundError, UserError

Location = tuple[str | int, ...]

# A study of ten thousand cells is a few hundred lines; anything larger after aliases are
# expanded is a mistake or an attack ("YAML bomb").
_MAX_BYTES = 1_000_000
_MAX_NODES = 50_000
_MAX_DEPTH = 40
_MAX_TEXT = 4_000_000
"""Characters, after references are replaced."""
_MAX_BITS = 63
"""Of a whole number; nothing of a study is larger, and Python prints far larger ones with pain."""

# YAML 1.1 reads 1e-3 as a string and 0o17 or 1_000 in ways nobody means; one float rule is added.
_FLOAT = re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")
_REFERENCE = re.compile(r"\$\{([^${}]+)\}")


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


@dataclass
class Source:
    """The parsed file and where everything in it stands."""

    path: Path
    raw: bytes = b""
    """The file as it was read."""
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[Location, int] = field(default_factory=dict)

    def where(self, location: Location) -> str:
        """`file:line` of the value, or of its nearest parent that stands in the file."""
        while location and location not in self.lines:
            location = location[:-1]
        return f"{self.path}:{self.lines.get(location, 1)}"


def load(path: Path) -> Source:
    """Reads a study file. Raises UserError with file:line for anything that is not plain YAML."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file; expected a study file (YAML)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > _MAX_BYTES:
        raise UserError(f"{path}: {len(raw)} bytes; a study file has at most {_MAX_BYTES}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    source = Source(path, raw)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            builder = _Builder(source, loader)
            data = builder.build(node, (), 0)
            if not isinstance(data, dict):
                raise UserError(f"{path}:1: expected a mapping with name, axes, stages")
            source.data = data
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}:1: not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise UserError(f"{path}:1: nested deeper than {_MAX_DEPTH} levels") from None
    source.data = _interpolate(source)
    return source


def parse_value(text: str) -> Any:
    """One value as a study file would read it: 3e-4 is a number, [1, 2] a list.

    Raises UserError for text that is no value.
    """
    source = Source(Path("--set"))
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _Builder(source, loader).build(node, (), 0)
    except yaml.YAMLError:
        raise UserError(f"{reprlib.repr(text)} is not a value") from None
    except RecursionError:
        raise UserError(f"--set: nested deeper than {_MAX_DEPTH} levels") from None


class _Builder:
    """Node tree -> plain data, noting lines, refusing duplicates and oversized expansions."""

    def __init__(self, source: Source, loader: _Loader) -> None:
        self.source = source
        self.loader = loader
        self.num_nodes = 0

    def build(self, node: yaml.Node, location: Location, depth: int) -> Any:
        line = node.start_mark.line + 1
        self.source.lines.setdefault(location, line)
        self.num_nodes += 1
        if self.num_nodes > _MAX_NODES or depth > _MAX_DEPTH:
            raise UserError(
                f"{self.source.path}:{line}: too much data after aliases are expanded"
                f" (more than {_MAX_NODES} values or {_MAX_DEPTH} levels)"
            )
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, location, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(n, (*location, i), depth + 1) for i, n in enumerate(node.value)]
        return self._scalar(node)

    def _scalar(self, node: yaml.Node) -> Any:
        """One plain value. Texts that only look like a date or a number raise all kinds of errors
        in the library."""
        where = f"{self.source.path}:{node.start_mark.line + 1}"
        try:
            value = self.loader.construct_object(node)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError):
            kind = node.tag.rpartition(":")[2]
            raise UserError(
                f"{where}: {reprlib.repr(node.value)} cannot be read as {kind}; put text in quotes"
            ) from None
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise UserError(f"{where}: a whole number of more than {_MAX_BITS} bits")
        return value

    def _mapping(self, node: yaml.MappingNode, location: Location, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{self.source.path}:{line}: a key must be plain text")
            name = str(self._scalar(key_node))
            if name in result:
                raise UserError(f"{self.source.path}:{line}: key '{name}' is given twice")
            self.source.lines[(*location, name)] = line
            result[name] = self.build(value_node, (*location, name), depth + 1)
        return result


class _TooMuchError(UserError):
    """Ends the reading at once: the other problems of a file are looked for, but not this one's."""


def _interpolate(source: Source) -> dict[str, Any]:
    """Replaces ${a.b.c} by the value at that place of the file, ${env:NAME} by the environment."""
    problems: list[str] = []
    budget, room = _MAX_NODES, _MAX_TEXT

    def spend(text: str) -> str:
        nonlocal room
        room -= len(text)
        if room < 0:
            raise _TooMuchError(
                f"{source.path}:1: too much text after interpolation (more than {_MAX_TEXT}"
                " characters)"
            )
        return text

    def look_up(name: str, location: Location, trail: tuple[str, ...]) -> Any:
        if name in trail:
            raise UserError(f"{source.where(location)}: ${{{name}}} refers to itself")
        if len(trail) >= _MAX_DEPTH:
            raise UserError(
                f"{source.where(location)}: ${{{name}}}: more than {_MAX_DEPTH} references, one to"
                " the next"
            )
        if name.startswith("env:"):
            value = os.environ.get(name[4:])
            if value is None:
                raise UserError(f"{source.where(location)}: environment has no {name[4:]}")
            return spend(value)
        value: Any = source.data
        for part in name.split("."):
            if isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            elif isinstance(value, dict) and part in value:
                value = value[part]
            else:
                raise UserError(
                    f"{source.where(location)}: ${{{name}}}: the file has no '{part}' there"
                )
        return resolve(value, location, (*trail, name))

    def resolve(value: Any, location: Location, trail: tuple[str, ...]) -> Any:
        nonlocal budget
        budget -= 1
        if budget < 0:
            raise _TooMuchError(f"{source.path}:1: too much data after interpolation")
        if isinstance(value, dict):
            return {k: resolve(v, (*location, k), trail) for k, v in value.items()}
        if isinstance(value, list):
            return [resolve(v, (*location, i), trail) for i, v in enumerate(value)]
        if not isinstance(value, str):
            return value
        whole = _REFERENCE.fullmatch(value)
        try:
            if whole:
                return look_up(whole[1].strip(), location, trail)
            return spend(
                _REFERENCE.sub(lambda m: str(look_up(m[1].strip(), location, trail)), value)
            )
        except _TooMuchError:
            raise
        except UserError as error:
            problems.extend(error.problems)
            return value

    data = resolve(source.data, (), ())
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return data
