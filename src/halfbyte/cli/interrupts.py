"""Ctrl-C where Python would show a traceback or lose it: while modules are imported, and while the interpreter shuts down."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def end_at_once() -> bool:
    """From now on Ctrl-C ends the process with one line. False, and nothing is changed, where it is ignored or another program's."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False
    try:
        signal.signal(signal.SIGINT, _end)
    except ValueError:  # only the main thread may
        return False
    return True


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Do so within."""
    changed = end_at_once()
    try:
        yield
    finally:
        if changed:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: object) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody may listen: a closed stream, or none
        os.write(sys.stderr.fileno(), b"\nhalfbyte: interrupted\n")
    os._exit(INTERRUPTED)
