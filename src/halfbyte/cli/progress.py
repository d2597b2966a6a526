"""A progress bar over bytes, for work that reports (bytes done, bytes in all)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


class ByteBar:
    """A tqdm bar on stderr; silent, after one line, where tqdm is not installed."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._bar: Any = None
        self._make: Callable[..., Any] | None = None

    def __enter__(self) -> ByteBar:
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
            self._bar = self._make(total=total, unit="B", unit_scale=True, desc=self._label, file=sys.stderr)
        self._bar.update(done - self._bar.n)

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
