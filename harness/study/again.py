"""Models of parts that were validated before: once more with some fields changed, or new."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from pydantic import BaseModel

T = TypeVar("T", bound=BaseModel)


def renewed(model: T, fields: dict[str, Any]) -> T:
    """`model.model_copy(update=fields)`, of a model without private or extra fields.

    Set up as pydantic's own `model_construct` does it; its general copy takes ten times as long.
    """
    told = model.__pydantic_fields_set__
    told = told if fields.keys() <= told else {*told, *fields}
    return _put_together(model.__class__, {**model.__dict__, **fields}, told)


def made(model: type[T], fields: dict[str, Any]) -> T:
    """`model.model_construct(**fields)`: nothing is checked, and pydantic need not prepare to.

    `fields` by name, in the order of the model's, all but some that have a default that is no dict
    or list.
    """
    return _put_together(model, {**_all_fields(model), **fields}, set(fields))


@functools.cache
def _all_fields(model: type[BaseModel]) -> dict[str, Any]:
    """Every field, in order, with its default."""
    return {name: field.default for name, field in model.model_fields.items()}


def _put_together(model: type[T], fields: dict[str, Any], told: set[str]) -> T:
    made = model.__new__(model)
    put = object.__setattr__
    put(made, "__dict__", fields)
    put(made, "__pydantic_fields_set__", told)
    put(made, "__pydantic_extra__", None)
    put(made, "__pydantic_private__", None)
    return made
