"""Dataclasses as JSON and back, so that what is read has the types that the class declares, whoever wrote the file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

T = TypeVar("T")
#: Types of the fields, by class.
_known: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> Mapping[str, Any]:
    found = _known.get(cls)
    if found is None:
        found = _known[cls] = get_type_hints(cls)
    return found


def to_json(record: Any) -> dict[str, Any]:
    """The fields of a dataclass; JSON has no NaN and no infinity: they become null, "inf" and "-inf"."""
    return {key: _plain(value) for key, value in dataclasses.asdict(record).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        number = float(value)
        return number if math.isfinite(number) else None if math.isnan(number) else str(number)
    return value.item() if isinstance(value, np.generic) else value


def from_json(cls: type[T], data: Mapping[str, Any]) -> T:
    """Build the dataclass `cls`: lists become tuples, null becomes NaN in float fields, unknown keys are passed over.

    Raises:
        TypeError: When a field is missing, or its value is not of its type.
        ValueError: When a number is none.
    """
    values = {}
    for name, kind in _hints(cls).items():
        if name in data:
            value: Any = tuple(data[name]) if isinstance(data[name], list) else data[name]
            if kind is float:
                value = math.nan if value is None else float(value)
            if not _is(value, kind):
                raise TypeError(f"{name!r} is no {kind}: {value!r:.80}")
            values[name] = value
    return cls(**values)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, as far as the records use types; integers are those of 64 bits."""
    origin, of = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in of
    if origin is UnionType:
        return any(_is(value, each) for each in of)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is(item, of[0]) for item in value)
    if kind is int:
        return isinstance(value, int) and -(1 << 63) <= value < 1 << 63
    return isinstance(value, (int, float) if kind is float else origin or kind)
