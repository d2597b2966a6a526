"""The progress bar of long work, on stderr."""

from __future__ import annotations

import math
import sys
import time

from tqdm import tqdm

_LINE_EVERY_S = 10.0


class Bar:
    """A tqdm bar on a terminal; elsewhere, in a pipe or a log, a plain line every ten seconds. A context: leaving it closes the bar.

    Args:
        label: what is going on.
        total: how much there is to do, where it is known before the first `reach`.
        unit: what is counted; bytes, "B", get prefixes.
        shown: False on ranks that leave it to another one to tell.
    """

    def __init__(self, label: str, total: int | None = None, unit: str = "it", *, shown: bool = True):
        self._label, self._total, self._done, self._unit = label, total, 0, unit
        self._next_line = time.monotonic() + _LINE_EVERY_S if shown else math.inf
        self._bar = tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", leave=False) if shown and sys.stderr.isatty() else None

    def __enter__(self) -> Bar:
        return self

    def update(self, count: int) -> None:
        """So much more is done."""
        self._show(self._done + count)

    def reach(self, done: int, total: int) -> None:
        """So much is done, of so much."""
        self._total = total
        self._show(done)

    def _show(self, done: int) -> None:
        if self._bar is not None:
            self._bar.total = self._total
            self._bar.update(done - self._done)
        elif time.monotonic() >= self._next_line:
            share = f"{done / self._total:.0%} of {self._total:,}" if self._total else f"{done:,}"
            print(f"{self._label}: {share} {self._unit}", file=sys.stderr, flush=True)
            self._next_line = time.monotonic() + _LINE_EVERY_S
        self._done = done

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
