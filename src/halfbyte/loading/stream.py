"""`stream_experts`: from the files of a checkpoint straight into prepared storage, never holding more than a few experts beside it.

A chunk of experts passes through three stages that overlap: a thread reads it from the mapped files into one of two host buffers (pinned, for a GPU);
a copy stream brings it into one of two buffers on the GPU; the layout arranges it, on the current stream. On a CPU the layout reads the host buffer.
Canonical storage needs no arranging: it is read, or copied, to where it stays.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import torch

from halfbyte.checkpoint.load import ExpertReader
from halfbyte.experts import ExpertWeights

Pack = Callable[[ExpertWeights, Any, int], None]
Progress = Callable[[int, int], None]  # bytes done, bytes in all

# Small experts go together until a chunk is worth a hand-over between threads and streams (some 100 us), but never many of them.
_CHUNK_BYTES = 32 << 20
_MAX_CHUNK_EXPERTS = 4


def stream_experts(reader: ExpertReader, storage: Any, pack: Pack | None, progress: Progress | None = None) -> None:
    """Fill all of `storage` with the experts of `reader`.

    Peak memory beside `storage`: two chunks of at most four experts (one, when an expert has 32 MiB) on the host and, for a layout on a GPU, as many
    there, plus what `pack` needs.

    Args:
        reader: the experts.
        storage: what the layout allocated for them; canonical storage is an ExpertWeights.
        pack: the layout's, None for canonical storage.
        progress: called after each chunk.

    Raises:
        CheckpointError, InputError: as `load_experts` and `pack`; the storage is then filled in part.
    """
    expert_bytes = max(1, reader.allocate("meta", 1).nbytes)
    step = max(1, min(_MAX_CHUNK_EXPERTS, _CHUNK_BYTES // expert_bytes))
    experts = reader.experts
    chunks = [experts[first : first + step] for first in range(0, len(experts), step)]

    def report(chunk: range) -> None:
        if progress is not None:
            progress((chunk.stop - experts.start) * expert_bytes, len(experts) * expert_bytes)

    if pack is None and storage.device.type == "cpu":
        for chunk in chunks:
            reader.read(chunk, storage[chunk.start - experts.start : chunk.stop - experts.start])
            report(chunk)
    elif storage.device.type == "cpu":
        assert pack is not None
        _pipeline(reader, chunks, _HostRoute(reader, storage, pack, step), report)
    else:
        with torch.cuda.device(storage.device):
            route = _CudaRoute(reader, storage, pack, step)
            try:
                _pipeline(reader, chunks, route, report)
            finally:
                route.finish()


class _Route(Protocol):
    """Two host buffers, and what happens to a chunk in one of them."""

    buffers: tuple[ExpertWeights, ...]

    def wait_until_free(self, stage: int) -> None: ...

    def place(self, stage: int, chunk: ExpertWeights, first: int) -> None: ...


def _pipeline(reader: ExpertReader, chunks: list[range], route: _Route, report: Callable[[range], None]) -> None:
    def read(index: int) -> ExpertWeights:
        chunk = replace(route.buffers[index % 2][: len(chunks[index])], first_expert=chunks[index].start)
        reader.read(chunks[index], chunk)
        return chunk

    with ThreadPoolExecutor(1, "halfbyte-read") as thread:
        reading = thread.submit(read, 0) if chunks else None
        for index, experts in enumerate(chunks):
            assert reading is not None
            chunk = reading.result()
            if index + 1 < len(chunks):
                route.wait_until_free((index + 1) % 2)
                reading = thread.submit(read, index + 1)
            route.place(index % 2, chunk, experts.start - reader.experts.start)
            report(experts)


class _HostRoute:
    def __init__(self, reader: ExpertReader, storage: Any, pack: Pack, step: int):
        self.buffers = tuple(reader.allocate("cpu", step) for _ in range(2))
        self._storage, self._pack = storage, pack

    def wait_until_free(self, stage: int) -> None:
        """A chunk is packed before `place` returns."""

    def place(self, stage: int, chunk: ExpertWeights, first: int) -> None:
        self._pack(chunk, self._storage, first)


class _CudaRoute:
    def __init__(self, reader: ExpertReader, storage: Any, pack: Pack | None, step: int):
        pageable = (reader.allocate("cpu", step) for _ in range(2))
        self.buffers = tuple(w.with_tensors({name: tensor.pin_memory() for name, tensor in w.tensors.items()}) for w in pageable)
        self._arrived = tuple(reader.allocate(storage.device, step) for _ in range(2)) if pack else ()
        self._storage, self._pack = storage, pack
        self._current, self._copies = torch.cuda.current_stream(), torch.cuda.Stream()
        self._copies.wait_stream(self._current)  # the memory may have been another tensor's a moment ago
        self._copied, self._packed = (tuple(torch.cuda.Event() for _ in range(2)) for _ in range(2))

    def wait_until_free(self, stage: int) -> None:
        self._copied[stage].synchronize()

    def place(self, stage: int, chunk: ExpertWeights, first: int) -> None:
        count = chunk.num_experts
        arrived = replace(self._arrived[stage][:count], first_expert=chunk.first_expert) if self._pack else self._storage[first : first + count]
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._packed[stage])
            for name, tensor in arrived.tensors.items():
                tensor.copy_(chunk.tensors[name], non_blocking=True)
            self._copied[stage].record()
        if self._pack:
            self._current.wait_event(self._copied[stage])
            self._pack(arrived, self._storage, first)
            self._packed[stage].record(self._current)

    def finish(self) -> None:
        """Whatever comes next on the current stream finds the storage filled, and no copy on its way to memory that has gone to somebody else."""
        self._current.wait_stream(self._copies)
