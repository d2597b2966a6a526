"""The user's tables: a file for every layer and GPU, each whole at every moment, which several processes may write."""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from halfbyte.checkpoint.writer import make_directory, replacing
from halfbyte.device import Target
from halfbyte.errors import CheckpointError
from halfbyte.kernels.tuned import Layer, LayerKey, Table, buckets, read, user_directory


def place_of(device: Target, key: LayerKey, directory: Path | None = None) -> Path:
    """The file of a layer."""
    gated = "gated" if key.gated else "plain"
    words = (device.name, key.kernel, key.layout, key.format, key.activations, f"{key.experts}x{key.hidden}x{key.intermediate}", gated)
    return (directory or user_directory()) / (re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()) + ".json")


def known_of(device: Target, layer: Layer, directory: Path | None = None) -> Layer:
    """What the file of `layer` has of the same kernels and software, or `layer` itself: what it has of others is as good as absent."""
    try:
        known = next((other for other in read(place_of(device, layer.key, directory)).layers if other.key == layer.key), None)
    except (OSError, CheckpointError):
        return layer
    same = known is not None and (known.source, known.software, known.routings) == (layer.source, layer.software, layer.routings)
    return known if known is not None and same else layer


def write(device: Target, layer: Layer, directory: Path | None = None) -> Path:
    """Add the races of `layer` to its file; those that another process has added since stay, where they are of other buckets.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    file = place_of(device, layer.key, directory)
    make_directory(file.parent)
    with _alone(file.parent):
        races = {race.bucket: race for race in known_of(device, layer, directory).races} | {race.bucket: race for race in layer.races}
        order = [name for _, name in buckets(layer.key.experts)]
        whole = replace(layer, races=tuple(sorted(races.values(), key=lambda race: order.index(race.bucket))))
        write_table(Table(device, (whole,)), file)
    return file


def write_table(table: Table, file: Path) -> None:
    """Write a file that is whole at every moment, a race per line.

    Raises:
        CheckpointError: it cannot be written.
    """
    with replacing(file) as partial:
        text = json.dumps(table.to_json(), allow_nan=False)
        partial.write_text(text.replace('{"bucket"', '\n{"bucket"').replace('{"key"', '\n{"key"') + "\n")


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process."""
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
