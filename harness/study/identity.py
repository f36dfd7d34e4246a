"""Stage identity: a readable name and a hash over what changes the numbers, nothing else."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from harness.study.recipes import MaeRecipe, Optimization
from harness.study.stages import Images, StageConfig

VERSION = 1
"""Part of every hash. Bump it when the meaning of existing fields or a default changes."""

HASH_CHARS = 12
CELL_HASH_CHARS = 10


def semantic_fields(config: StageConfig) -> dict[str, Any]:
    """The fields that enter the hash: those not at their default, readable names left out.

    A duration is represented by the steps it came to, so `epochs: 2` of 4k images and
    `samples: 8k` are one stage.
    """
    fields = config.model_dump(mode="json", exclude_defaults=True, exclude={"size", "recipe"})
    fields["images"].pop("dataset")
    return {"version": VERSION, **fields, "recipe": _recipe_fields(config)}


def _recipe_fields(config: StageConfig) -> dict[str, Any]:
    recipe = _fields(config.recipe)
    # Discriminators are at their default in their own class, but they say which class it is.
    recipe.pop("duration", None)
    recipe.pop("dataset", None)  # its fingerprint is in `images`
    recipe.pop("image_size", None)  # it is in `model`
    recipe.pop("of", None)  # its stage is in `upstream`
    if isinstance(recipe.get("text"), dict):
        recipe["text"].pop("folder", None)  # its content's hash stands beside it
    if isinstance(config.recipe, MaeRecipe):
        # `full`, `same` and N only select images; what they selected is in `images`.
        recipe.pop("data", None)
    if isinstance(config.recipe, Optimization) and config.recipe.schedule != "wsd":
        recipe.pop("cooldown", None)
    return recipe


def canonical(fields: Any) -> str:
    """One spelling per value: sorted keys, no spaces, floats as repr."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


# A study of ten thousand cells has some dozens of recipes, models and sets of images: each is
# written out once. The objects are frozen; the cache holds them, so that an id() stays theirs.
_texts: dict[int, tuple[Any, str]] = {}
_MOST_TEXTS = 10_000


class Text:
    """A config's canonical text, but for its seed and what it starts from."""

    def __init__(self, config: StageConfig) -> None:
        images, recipe, steps = config.images, config.recipe, config.steps
        model = _text(config.model, lambda: canonical(_fields(config.model)))
        head = f'{{"images":{_text(images, lambda: canonical(_images_fields(images)))}'
        head += f',"kind":{_quoted(config.kind)},"model":{model}'
        head += f',"num_classes":{config.num_classes}' if config.num_classes else ""
        written = _text(recipe, lambda: canonical(_recipe_fields(config)))
        self._head = f'{head},"recipe":{written}'
        self.roles = sorted(config.upstream)
        """Of what it starts from, in the order of the text."""
        after = f',"steps":{steps}' if steps else ""
        before = ",".join(f"{_quoted(role)}:\0" for role in self.roles)
        after += f',"upstream":{{{before}}}' if before else ""
        weights = f',"weights":{_quoted(config.weights)}' if config.weights else ""
        after += f',"version":{VERSION}{weights}}}'
        self._after = after.replace("%", "%%").replace("\0", "%s")
        """What comes after the seed, a `%s` for each role."""
        self._begun = hashlib.sha256(self._head.encode())

    def hashed(self, seed: int, ids: Sequence[str]) -> str:
        """Hex SHA-256 of `canonical(semantic_fields(config))` of the config with this seed, and
        with `ids` in the order of `roles`. An id shows how it begins.
        """
        after = self._after % tuple(map(_quoted, ids))
        begun = self._begun.copy()  # what differs is at the end: the rest is hashed once
        begun.update((f',"seed":{seed}{after}' if seed else after).encode())
        return begun.hexdigest()

    def of_seeds(self) -> tuple[Any, str]:
        """The hash of what comes before the seed, and the rest as a form for `%`: of any seed but 0
        and of ids that JSON need not escape. For those who fill it in tens of thousands of times.
        """
        return self._begun, f',"seed":%d{self._after.replace("%s", _PLAIN_FIELD)}'


_PLAIN_FIELD = '"%s"'


def is_plain(text: str) -> bool:
    """Whether it stands in JSON as it is."""
    return _quoted(text) == f'"{text}"'


def _text(part: Any, write: Callable[[], str]) -> str:
    known = _texts.get(id(part))
    if known is None or known[0] is not part:
        if len(_texts) >= _MOST_TEXTS:
            _texts.clear()
        known = _texts[id(part)] = (part, write())
    return known[1]


def _fields(part: BaseModel) -> dict[str, Any]:
    return part.model_dump(mode="json", exclude_defaults=True)


def _images_fields(images: Images) -> dict[str, Any]:
    return images.model_dump(mode="json", exclude_defaults=True, exclude={"dataset"})


_quoted = json.encoder.encode_basestring_ascii


class CellText:
    """A cell's canonical text, but for its seed and its stages."""

    def __init__(self, axes: dict[str, Any], roles: Iterable[str]) -> None:
        """`axes`: plain values (`harness.study.cell_names.plain`); `roles`: of its stages."""
        self._roles = sorted(roles)
        shown = {k: f"{_quoted(k)}:{_value(v)}" for k, v in axes.items()} | {"seed": '"seed":\0'}
        texts = ",".join([shown[k] for k in sorted(shown)])
        ids = ",".join([f"{_quoted(role)}:\0" for role in self._roles])
        whole = f'{{"axes":{{{texts}}},"stages":{{{ids}}}}}'
        before, seed, after = whole.replace("%", "%%").partition('"seed":\0')
        self._begun = hashlib.sha256((before % ()).encode())
        self._form = (seed + after).replace("\0", "%s")
        """From the seed on, a `%s` for it and for each stage."""

    def digest(self, seed: int, stages: Mapping[str, str]) -> str:
        """The hash part of its id, of `canonical({"axes": axes, "stages": stages})`."""
        begun = self._begun.copy()
        ids = [stages[role] for role in self._roles]
        begun.update((self._form % (seed, *map(_quoted, ids))).encode())
        return begun.hexdigest()[:CELL_HASH_CHARS]


def _value(value: Any) -> str:
    return _quoted(value) if isinstance(value, str) else _spelled(type(value), value)


@functools.lru_cache(maxsize=10_000)
def _spelled(kind: type, value: Any) -> str:
    """JSON of a number or a truth; `kind` tells 1 from 1.0 and True, which are equal keys."""
    return canonical(value)


def field_diff(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two semantic-field dictionaries, a line a field: `a.b: 1 -> 2`."""
    lines: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += field_diff(before, after, f"{prefix}{key}.")
        elif before != after:
            shown = ["(default)" if v is None else json.dumps(v) for v in (before, after)]
            lines.append(f"{prefix}{key}: {shown[0]} -> {shown[1]}")
    return lines
