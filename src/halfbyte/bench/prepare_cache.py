"""How fast prepared experts come from disk, beside a plain read of the same files into the same device."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.checkpoint.source import Checkpoint
from halfbyte.loading.prepared import load_prepared, prepare_on_disk
from halfbyte.loading.tensor_files import memory_of

_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class CachedStart:
    """Seconds for all layers, medians of the repeats.

    Attributes:
        nbytes: of the cached files.
        open_s: opening the checkpoint and taking its fingerprint, once a start; part of neither time below.
        plain_s: one thread reads the files from first byte to last, 16 MiB at a time, and copies each block to new memory on the device.
        cached_s: `load_prepared`, every byte verified, into new memory on the device.
        streamed_s: `load_prepared` without the cache.
    """

    nbytes: int
    open_s: float
    plain_s: float
    cached_s: float
    streamed_s: float

    @property
    def plain_gbps(self) -> float:
        return self.nbytes / self.plain_s / 1e9

    @property
    def cached_gbps(self) -> float:
        return self.nbytes / self.cached_s / 1e9

    @property
    def fraction(self) -> float:
        """Cached over plain speed."""
        return self.plain_s / self.cached_s


def measure_cached_start(
    model: str | Path,
    device: torch.device | str,
    *,
    layers: Sequence[int] | None = None,
    layout: str = "auto",
    cache_dir: Path | None = None,
    cold: bool = False,
    repeats: int = 5,
) -> CachedStart:
    """Prepare what is not cached yet, then time plain reads, cached loads and loads from the checkpoint in turn.

    Args:
        model: directory or Hub name.
        device: where the weights go.
        layers, layout, cache_dir: as in `iter_prepared`.
        cold: drop the files from the system's page cache before each read; else they are in it, if they fit.
        repeats: of each.

    >>> start = measure_cached_start("demo", "cpu", layers=[0, 1], layout="canonical", cache_dir=Path(os.environ["HALFBYTE_CACHE_DIR"]), repeats=1)
    >>> start.nbytes > 2 * 16 * 3 * 256 * 128 and start.fraction > 0
    True
    """
    device = torch.device(device)
    started = time.perf_counter()
    checkpoint = Checkpoint.open(model)
    checkpoint.fingerprint  # noqa: B018  # cached by the checkpoint
    open_s = time.perf_counter() - started
    chosen = checkpoint.moe.moe_layers if layers is None else tuple(layers)
    kept = [prepare_on_disk(checkpoint, layer, device=device, layout=layout, cache_dir=cache_dir, verify=True) for layer in chosen]
    files = [layer.file for layer in kept]
    sources = {checkpoint.file_of(name) for name in checkpoint.names}

    def load(cache: str) -> None:
        for layer in chosen:
            load_prepared(checkpoint, layer, device=device, layout=layout, cache=cache, cache_dir=cache_dir)  # type: ignore[arg-type]

    def timed(function: Callable[[], None], reads: Sequence[Path]) -> float:
        if cold:
            _drop_from_page_cache(reads)
        _synchronize(device)
        begin = time.perf_counter()
        function()
        _synchronize(device)
        return time.perf_counter() - begin

    rounds = [
        (timed(lambda: _read_plainly(files, device), files), timed(lambda: load("read"), files), timed(lambda: load("off"), sorted(sources)))
        for _ in range(repeats)
    ]
    plain_s, cached_s, streamed_s = (statistics.median(times) for times in zip(*rounds, strict=True))
    return CachedStart(sum(layer.nbytes for layer in kept), open_s, plain_s, cached_s, streamed_s)


def _read_plainly(files: Sequence[Path], device: torch.device) -> None:
    buffer = torch.empty(_BLOCK_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for file in files:
        with file.open("rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            target = torch.empty(size, dtype=torch.uint8, device=device)
            for block in target.split(_BLOCK_BYTES):
                place = buffer[: len(block)] if device.type == "cuda" else block
                stream.readinto(memory_of(place))
                if place is not block:
                    block.copy_(place)


def _drop_from_page_cache(files: Sequence[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
