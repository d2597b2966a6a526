"""A progress bar for work that reports (done, in all)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


class Bar:
    """A tqdm bar on stderr; silent, after one line, where tqdm is not installed."""

    def __init__(self, label: str, unit: str = "B") -> None:
        self._label, self._unit = label, unit
        self._bar: Any = None
        self._make: Callable[..., Any] | None = None

    def __enter__(self) -> Bar:
        try:
            from tqdm import tqdm
        except ImportError:
            print("halfbyte: no progress bar, tqdm is not installed", file=sys.stderr)
        else:
            self._make = tqdm
        return self

    def update(self, done: int, total: int) -> None:
        if self._make is None:
            return
        if self._bar is None:
            self._bar = self._make(total=total, unit=self._unit, unit_scale=self._unit == "B", desc=self._label, file=sys.stderr)
        self._bar.update(done - self._bar.n)

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
