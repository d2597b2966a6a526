"""`Document`: a JSON object of a checkpoint, every value of which is read with its type and range. One error names file and key."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

from halfbyte.errors import CheckpointError

LARGEST = 2**31 - 1  # of any count or size that a configuration may give
_T = TypeVar("_T", bool, int, float, str)
_KINDS: dict[type, str] = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}


class Document:
    """A JSON object. A key that is absent and one that is null mean the same. A bool is no integer, and a string no number.

    >>> document = Document({"layers": 4, "ignore": ["lm_head"], "scale": None, "inner": {"size": "big"}}, "config.json")
    >>> document.get("layers", 1), document.get("scale", 1.0), document.words("ignore")
    (4, 1.0, ('lm_head',))
    >>> document.section("inner").get("size", 16)
    Traceback (most recent call last):
    halfbyte.errors.CheckpointError: config.json: inner.size does not fit (given 'big'; needed an integer from 0 to 2147483647). Correct ...
    """

    def __init__(self, values: Any, where: str, path: str = ""):
        """`where`: the file, named by errors; `path`: keys that lead to this object in it.

        Raises:
            CheckpointError: `values` is no object.
        """
        self.where, self._path = where, path
        if not isinstance(values, Mapping):
            raise _misfit(where, path or "the document", values, "an object")
        self.values = values

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str, default: _T, *, low: float = 0, high: float = LARGEST) -> _T:
        """A value of the type of `default`, which is returned where there is none; numbers from `low` to `high`.

        Raises:
            CheckpointError: another type, or out of range.
        """
        value = self.values.get(key)
        return default if value is None else self._checked(key, value, type(default), low, high)

    def value(self, *keys: str) -> int:
        """The positive integer of the first key that has one.

        Raises:
            CheckpointError: none has, or it is something else.
        """
        key = next((key for key in keys if key in self), None)
        if key is None:
            raise CheckpointError("missing value", where=self.where, needed=" or ".join(map(self._full, keys)))
        return self._checked(key, self.values[key], int, 1, LARGEST)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers from 0 on; empty where there is none."""
        return tuple(self._checked(key, value, int, 0, LARGEST) for value in self._list(key, "integers"))

    def words(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty where there is none. A string alone is an error: it is not read letter by letter."""
        return tuple(self._checked(key, value, str, 0, 0) for value in self._list(key, "strings"))

    def section(self, key: str) -> Document:
        """The object below `key`; an empty one where there is none."""
        value = self.values.get(key)
        return Document({} if value is None else value, self.where, self._full(key))

    def sections(self, key: str) -> dict[str, Document]:
        """The objects below the object below `key`, by name."""
        inner = self.section(key)
        return {name: Document(value, self.where, inner._full(name)) for name, value in inner.values.items()}

    def misfit(self, key: str, needed: str) -> CheckpointError:
        """The error for a value that only the caller can judge."""
        return _misfit(self.where, self._full(key), self.values.get(key), needed)

    def _list(self, key: str, of: str) -> list[Any]:
        value = self.values.get(key)
        if value is not None and not isinstance(value, list | tuple):
            raise self.misfit(key, f"a list of {of}")
        return list(value or ())

    def _checked(self, key: str, value: Any, kind: type[_T], low: float, high: float) -> _T:
        of_kind: bool = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
        if of_kind and (kind in (bool, str) or (low <= value <= high and math.isfinite(value))):
            return value if kind is not float else float(value)  # type: ignore[return-value]
        span = f" from {low} to {high}" if kind in (int, float) else ""
        raise _misfit(self.where, self._full(key), value, _KINDS[kind] + span)

    def _full(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key


def _misfit(where: str, key: str, given: object, needed: str) -> CheckpointError:
    return CheckpointError(
        f"{key} does not fit", where=where, given=reprlib.repr(given), needed=needed, next_step="correct the file, or download it again"
    )
