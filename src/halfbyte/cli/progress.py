"""The progress bar of long work, on stderr."""

from __future__ import annotations

import sys
from typing import Any


class Bar:
    """A tqdm bar; nothing when stderr is no terminal, one line where tqdm is not installed. A context: leaving it closes the bar.

    Args:
        label: what is going on.
        total: how much there is to do, where it is known before the first `reach`.
        unit: what is counted; bytes, "B", get prefixes.
    """

    def __init__(self, label: str, total: int | None = None, unit: str = "it"):
        self._bar: Any = None
        try:
            from tqdm import tqdm
        except ImportError:
            print("halfbyte: no progress bar, tqdm is not installed", file=sys.stderr)
        else:
            self._bar = tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", leave=False, disable=None)

    def __enter__(self) -> Bar:
        return self

    def update(self, count: int) -> None:
        """So much more is done."""
        if self._bar is not None:
            self._bar.update(count)

    def reach(self, done: int, total: int) -> None:
        """So much is done, of so much."""
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
