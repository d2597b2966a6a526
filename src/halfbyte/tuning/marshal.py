"""`Marshal`: has races run in another process, and ends it where a configuration hangs or takes the process with it.

A kernel that hangs cannot be stopped from within, and one that reads where it must not takes the CUDA context with it: both are the end of a process.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Hashable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

from halfbyte.tuning.times import Time

PATIENCE_S = 60.0  # between two signs of life: the longest is the making of a layer, of some 10 s


class Races(Protocol):
    """What `race.Track` is."""

    def ceilings(self) -> dict[str, float | None]: ...

    def race(self, num_tokens: int, routing: str, configs: Sequence[Hashable], starting: Callable[[Hashable], None]) -> dict[Hashable, Time]: ...


class Marshal:
    """A `search.Measure`, of one layer after the other: a process takes longer to start than to race a layer of few buckets."""

    def __init__(self, patience_s: float = PATIENCE_S):
        self._patience_s = patience_s
        self._make_track: Callable[[], Races] | None = None
        self._excluded: dict[Hashable, Time] = {}
        self._process: Any = None
        self._connection: Connection | None = None

    def open(self, make_track: Callable[[], Races]) -> Marshal:
        """Race what `make_track`, which other processes can import, makes there. Configurations that fail once stay out until the next `open`."""
        self._make_track, self._excluded = make_track, {}
        if self._process and not self._process.is_alive():
            self._stop()
        if self._connection:
            self._connection.send(("open", make_track))
        return self

    def close(self) -> None:
        """End the process."""
        self._stop()

    def ceilings(self) -> dict[str, float | None]:
        """Of the device; empty where they could not be measured."""
        reply, _ = self._ask("ceilings")
        if reply is None:
            self._stop()
        return reply or {}

    def __call__(self, num_tokens: int, routing: str, configs: Sequence[Hashable]) -> Mapping[Hashable, Time]:
        while running := [config for config in configs if config not in self._excluded]:
            times, culprit = self._ask("race", num_tokens, routing, running)
            if times is None:
                self._excluded[running[0] if culprit is None else culprit] = Time(reason=self._stop())
                continue
            self._excluded.update({config: time for config, time in times.items() if time.reason})
            return {config: self._excluded.get(config) or times[config] for config in configs}
        return {config: self._excluded[config] for config in configs}

    def _ask(self, *question: Any) -> tuple[Any, Hashable | None]:
        """The answer, or None and the configuration that was running when no more was heard."""
        running = None
        try:
            connection = self._connection or self._start()
            connection.send(question)
            while connection.poll(self._patience_s):
                kind, value = connection.recv()
                if kind == "answer":
                    return value, None
                running = value
        except (EOFError, OSError):  # the process is gone
            pass
        return None, running

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.send(("open", self._make_track))
        return self._connection

    def _stop(self) -> str:
        """End the process; what became of it."""
        if self._process is None or self._connection is None:
            return ""
        self._connection.close()
        self._process.join(timeout=1.0)
        outcome = f"hung: nothing was heard for {self._patience_s:.0f} s"
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        else:
            outcome = f"ended the process with exit code {self._process.exitcode}"
        self._process = self._connection = None
        return outcome


def _serve(connection: Connection) -> None:
    track: Any = None
    while True:
        try:
            question, *arguments = connection.recv()
        except EOFError:
            return
        if question == "open":
            track = None  # the memory of the layer before
            track = arguments[0]()
        elif question == "ceilings":
            connection.send(("answer", track.ceilings()))
        else:
            num_tokens, routing, configs = arguments
            connection.send(("answer", track.race(num_tokens, routing, configs, lambda config: connection.send(("running", config)))))
