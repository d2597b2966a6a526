"""`typed`: JSON that this package wrote, read back into the dataclasses it came from, whatever has become of the file."""

from __future__ import annotations

import functools
import reprlib
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar

_T = TypeVar("_T")
_LARGEST = 1e18  # of any number: the time in nanoseconds has as many digits


def typed(kind: type[_T], value: object, path: str) -> _T:
    """`value`, out of JSON, as a `kind`: a dataclass, a tuple, list or dict, a Literal, a bool, a string, a finite number from 0 on, or a union.

    What a dataclass has a default for may be absent. The first kind of a union that fits is taken.

    Raises:
        ValueError: it is something else; says where, `path` being the way to it.

    >>> typed(dict[str, int | None], {"experts": 8, "layer": None}, "sizes")
    {'experts': 8, 'layer': None}
    >>> typed(tuple[float, ...], [0.5, "1"], "times")
    Traceback (most recent call last):
    ValueError: times[1] is '1', no float as it should be
    """
    made: _T = _typed(kind, value, path)
    return made


def _typed(kind: Any, value: Any, path: str) -> Any:
    outer, inner, has_fields = _parts(kind)
    if kind is Any or (value is None and type(None) in inner):
        return value
    if outer in (types.UnionType, typing.Union):
        return _first(inner, value, path)
    if has_fields and isinstance(value, dict):
        hints, required = _fields(kind)
        for name in sorted(required - value.keys()):
            raise ValueError(f"{path} lacks {name!r}")
        for name in sorted(value.keys() - hints.keys()):
            raise ValueError(f"{path} has {reprlib.repr(name)}, which is no part of it")
        return kind(**{name: _typed(hints[name], item, f"{path}.{name}") for name, item in value.items()})
    if outer in (tuple, list) and isinstance(value, list):
        return outer(_typed(inner[0], item, f"{path}[{index}]") for index, item in enumerate(value))
    if outer is dict and isinstance(value, dict):
        return {name: _typed(inner[1], item, f"{path}.{name}") for name, item in value.items()}
    if _is_plain(kind, value) or (outer is Literal and isinstance(value, str) and value in inner):
        return value
    raise ValueError(f"{path} is {reprlib.repr(value)}, no {getattr(kind, '__name__', kind)} as it should be")


def _is_plain(kind: Any, value: Any) -> bool:
    """Whether it is a bool, a string or a number of that very type; a whole number is a float, too."""
    is_number = kind in (int, float) and type(value) in (int, kind) and 0 <= value <= _LARGEST
    return is_number or (kind in (bool, str) and type(value) is kind)


def _first(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    """As the first of `kinds` that fits; where none does, the error is that of the first."""
    errors = []
    for kind in kinds:
        try:
            return _typed(kind, value, path)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


@functools.cache
def _parts(kind: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """What a type is made of: its origin, its arguments, and whether it is a dataclass."""
    return typing.get_origin(kind), typing.get_args(kind), is_dataclass(kind)


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], set[str]]:
    """The types of a dataclass's fields by name, and the names of those without a default."""
    hints = typing.get_type_hints(kind)
    required = {field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING}
    return {field.name: hints[field.name] for field in fields(kind)}, required
