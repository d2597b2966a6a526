"""`tune`: compile, race and keep what wins, for several layers, within a budget of seconds. A second run goes on where the first one stopped."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import torch

from halfbyte.errors import UnsupportedError
from halfbyte.kernels import tuned
from halfbyte.kernels.tuned import Race, Table
from halfbyte.tuning import store
from halfbyte.tuning.layer import Layer
from halfbyte.tuning.marshal import Marshal
from halfbyte.tuning.search import ROUTINGS, Heat, merge, plan, search


class Racing(Protocol):
    """Where races are run: `OnDevice`, or something else in a test."""

    def announce(self, layer: Layer, heats: Sequence[Heat]) -> None:
        """Say what will be raced, before anything is."""

    def open(self, layer: Layer, deadline: float) -> Marshal:
        """What times the candidates of a layer that was announced, until the next is opened."""

    def close(self) -> None:
        """No more races."""


def tune(
    layers: Sequence[Layer], racing: Racing, *, budget_s: float = math.inf, again: bool = False, directory: Path | None = None
) -> Iterator[tuple[Layer, Race]]:
    """Race what the user's tables do not know of these layers (all of it `again`), and write each race there as soon as it is decided.

    At the end of a layer neighbouring buckets are merged (`search.merge`).

    Raises:
        UnsupportedError: a layer whose kernel has nothing to choose from.
        CheckpointError: the directory of the tables cannot be written.
    """
    deadline = time.monotonic() + budget_s
    known = {layer: record_of(layer) if again else store.known_of(layer.target, record_of(layer), directory) for layer in layers}
    heats = {layer: missing(layer, record) for layer, record in known.items()}
    ceilings: dict[str, float | None] = {}
    for layer in layers:
        racing.announce(layer, heats[layer])
    for layer in layers:
        if not heats[layer] or time.monotonic() >= deadline:
            continue
        measure = racing.open(layer, deadline)
        ceilings = ceilings or measure.ceilings()
        record = replace(known[layer], ceilings=ceilings)
        for race in search(heats[layer], measure, deadline):
            record = replace(record, races=(*record.races, race))
            store.write(layer.target, record, directory)
            yield layer, race
        whole = store.known_of(layer.target, record, directory)
        store.write(layer.target, replace(whole, races=tuple(merge(whole.races))), directory)


def missing(layer: Layer, record: tuned.Layer) -> list[Heat]:
    """The heats of a layer that its record has no race of."""
    done = {race.bucket for race in record.races}
    return [heat for heat in plan(layer.kernel, layer.problem, layer.shape.top_k) if heat.bucket not in done]


def record_of(layer: Layer) -> tuned.Layer:
    """What a table says of `layer` before anything was raced."""
    if not layer.kernel.sources:
        raise UnsupportedError(f"kernel {layer.kernel.name!r} is not tuned", where=str(layer), needed="a kernel with configurations to race")
    today = datetime.now(UTC).date().isoformat()
    source = tuned.source_hash(layer.kernel.sources)
    return tuned.Layer(layer.key, source, tuned.versions(), today, layer.shape.name, layer.shape.top_k, ROUTINGS, {}, ())


class OnDevice:
    """Races on a device, in a process of their own, while the kernels of the layers after are compiled."""

    def __init__(self, device: torch.device):
        from halfbyte.tuning.compiling import Compilation  # needs Triton

        self._device, self._compilation, self._marshal = device, Compilation(), Marshal()
        self._kernels: dict[Layer, list[Future[None]]] = {}

    def announce(self, layer: Layer, heats: Sequence[Heat]) -> None:
        self._kernels[layer] = self._compilation.start(layer, [(config, heat.num_tokens) for heat in heats for config in heat.candidates])

    def open(self, layer: Layer, deadline: float) -> Marshal:
        from halfbyte.tuning.race import Track

        # A kernel that does not compile is found again, and named, by the race that needs it.
        wait(self._kernels.pop(layer), None if math.isinf(deadline) else max(0.0, deadline - time.monotonic()))
        return self._marshal.open(functools.partial(Track, layer, self._device))

    def close(self) -> None:
        self._marshal.close()
        self._compilation.stop()


def load(layers: Sequence[Layer], directory: Path | None = None) -> list[Table]:
    """What the user's tables have of `layers`."""
    tables = []
    for layer in layers:
        record = store.known_of(layer.target, record_of(layer), directory)
        tables.append(Table(layer.target, (record,)))
    return tables
