"""What other processes do to the cache of prepared experts in tests/loading/test_cache.py; a module of its own, which they can import."""

from __future__ import annotations

import time
from pathlib import Path

from halfbyte.checkpoint import Checkpoint
from halfbyte.loading import tensor_files
from halfbyte.loading.prepared import CachedLayer, Wanted, prepare_on_disk

LAYOUT = "hopper"


def prepare(model: Path, directory: Path, **options: object) -> CachedLayer:
    flags = {name: options.pop(name) for name in ("force", "verify", "progress") if name in options}
    return prepare_on_disk(Checkpoint.open(model), 1, Wanted(**{"layout": LAYOUT, "cache_dir": directory, **options}), **flags)


def write_and_wait(model: Path, directory: Path, started: object) -> None:
    """A process that stops in the middle of its file."""
    original = tensor_files._write
    calls = []

    def write(stream: object, memory: memoryview) -> None:
        original(stream, memory)
        calls.append(len(memory))
        if len(calls) == 3:
            started.set()
            time.sleep(60)

    tensor_files._write = write
    prepare(model, directory)


def write_often(model: Path, directory: Path, barrier: object, failures: object) -> None:
    barrier.wait(timeout=1800)
    for _ in range(20):
        prepare(model, directory, force=True)
        if prepare(model, directory, verify=True).written:
            failures.put("a file that was not whole")
