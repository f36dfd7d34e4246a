"""Words of zero-shot tasks: prompts, names of classes, and the folder of a text model."""

from __future__ import annotations

import difflib
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from harness.errors import NotFoundError, UserError
from harness.study.datasets import DatasetMeta
from harness.study.recipes import Frozen
from harness.study.starting import content_hash

TEMPLATES: tuple[str, ...] = (
    "{}",
    "a picture of a {}",
    "a photo of a {}",
    "this is a {}",
    "an image showing a {}",
    "here you see a {}",
    "a close view of a {}",
)
"""Prompts that fit most pictures (ours)."""

_WORDNET_ID = re.compile(r"n\d{8}")
# What aliases of aliases stand for grows tenfold a level when it is printed whole.
_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxlist, _SHOWN.maxstring, _SHOWN.maxother = 2, 3, 60, 60
_TOKENIZER = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model")


class TextFolder(Frozen):
    """A text tower that `transformers` saved."""

    folder: str
    """Not semantic: the hash is."""
    sha256: str = ""
    """Over weights, config.json and tokenizer; set when the study is planned."""
    width: int = 0
    depth: int = 0


def text_folder(folder: str, bases: Sequence[Path]) -> TextFolder:
    """The folder as it is now. Raises NotFoundError or UserError for one that is no text model."""
    path = _found(folder, bases, "folder of a text tower")
    config = path / "config.json"
    try:
        said = json.loads(config.read_text())
        width, depth = int(said["hidden_size"]), int(said["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{config}: does not give hidden_size and num_hidden_layers; expected the folder that a"
            " `transformers` text encoder such as XLM-R was saved in"
        ) from None
    return TextFolder(folder=str(path), sha256=text_hash(path), width=width, depth=depth)


def text_hash(path: Path) -> str:
    """sha256 over the weights, config.json and tokenizer files of a folder, with their names."""
    return content_hash(path, beside=_TOKENIZER)


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """The templates. Raises ValueError unless each has {} once."""
    if not templates:
        raise ValueError("no template; give at least '{}'")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            shown = _SHOWN.repr(template)
            raise ValueError(f"template {shown}: expected {{}} once, for the name of a class")
    return tuple(templates)


def read_templates(file: str, bases: Sequence[Path]) -> tuple[str, ...]:
    """Templates of a YAML or JSON list, or of a text file with one a line."""
    path = _found(file, bases, "file of templates")
    content: Any
    if path.suffix in (".yaml", ".yml", ".json"):
        content = _read(path)
        if isinstance(content, dict):
            content = content.get("templates")
    else:
        content = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of templates")
    try:
        return check_templates(content)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def listed(value: Any) -> Any:
    """One name as a list of one."""
    return (value,) if isinstance(value, str) else value


def read_names(file: str, bases: Sequence[Path]) -> dict[str, tuple[str, ...]]:
    """Class -> names, of a YAML or JSON mapping whose values are a name or a list of names."""
    path = _found(file, bases, "file of class names")
    content = _read(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of class -> name or list of names")
    names = {}
    for key, value in content.items():
        own = listed(value)
        if not isinstance(own, list | tuple) or not all(isinstance(n, str) for n in own):
            shown = _SHOWN.repr(value)
            raise UserError(f"{path}: {key}: expected a name or a list of names, found {shown}")
        names[str(key)] = tuple(own)
    return names


def check_names(names: Mapping[str, Sequence[str]], meta: DatasetMeta) -> None:
    """Raises UserError for a class that the dataset lacks, and for classes that are no words."""
    check_known(names, meta)
    left = [name for name in meta.classes if name not in names and _is_no_word(name)]
    if left:
        raise UserError(
            f"dataset {meta.name} calls a class '{left[0]}', which is no word; give `names`, a file"
            " of class -> names"
        )


def check_known(names: Mapping[str, Sequence[str]], meta: DatasetMeta) -> None:
    """Raises UserError for an empty name, and for a class that the dataset lacks."""
    for name, own in names.items():
        if not own or not all(text.strip() for text in own):
            raise UserError(f"names: class '{name}' has no name; expected at least one word")
    if not meta.classes:  # only described
        return
    unknown = sorted(set(names) - set(meta.classes))
    if unknown:
        near = difflib.get_close_matches(unknown[0], meta.classes, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else f"; it has '{meta.classes[0]}', ..."
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(f"names: {meta.name} has no class '{unknown[0]}'{more}{hint}")


def names_of(classes: Sequence[str], names: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
    """What each class is called: its `names`, or its own name with spaces for underscores."""
    return [tuple(names.get(name) or (name.replace("_", " "),)) for name in classes]


def _is_no_word(name: str) -> bool:
    return bool(_WORDNET_ID.fullmatch(name)) or name.isdecimal()


def _found(name: str, bases: Sequence[Path], what: str) -> Path:
    wanted = Path(name).expanduser()
    places = [wanted] if wanted.is_absolute() else [base / wanted for base in bases]
    for place in places:
        if place.exists():
            return place.resolve()
    looked = ", ".join(str(place) for place in dict.fromkeys(places))
    raise NotFoundError(f"no such {what}; looked for {looked}")


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text("utf-8"))  # JSON is YAML
    except RecursionError:
        raise UserError(f"{path}: cannot be read as YAML or JSON: nested too deep") from None
    except (OSError, ValueError, LookupError, AttributeError, TypeError, yaml.YAMLError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read as YAML or JSON: {first}") from None
