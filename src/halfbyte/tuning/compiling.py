"""`Compilation`: compiles kernels in parallel processes that do not touch the device, into Triton's cache on disk, which serves every process.

A process makes the calls that need the kernels, with a stand-in for Triton's driver that compiles and launches nothing. Threads would share Python's
lock, which the code generator holds; with the real driver every process would hold a CUDA context.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from halfbyte.kernels.problem import Size
from halfbyte.tuning.layer import Layer

_SHARED_BYTES = 232448  # of a block on Hopper, whose kernels are those with a choice
_serial = itertools.count()


class NoDevice:
    """The part of Triton's driver interface that compiling and launching go through, for a GPU of compute capability `capability` / 10."""

    def __init__(self, capability: int, shared_bytes: int):
        self.capability = capability
        self.utils = self  # Triton keeps two of the methods below in an object of their own
        self._properties = {"max_shared_mem": shared_bytes}
        # Triton keeps compiled kernels by device: a new name each time, so that none is taken from, or left to, a real device.
        self._device = f"compile-only {next(_serial)}"

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> str:
        return self._device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: str) -> dict[str, int]:
        return self._properties

    def load_binary(self, name: str, cubin: bytes, shared_bytes: int, device: str) -> tuple[None, None, int, int, int]:
        """Module, function, registers, spills, threads per block. No module: nothing to unload once the real driver is back."""
        return None, None, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None


@contextmanager
def without_device(capability: int, shared_bytes: int) -> Iterator[None]:
    """Within, Triton believes in this GPU: launches compile and do nothing. Raises what Triton raises, `OutOfResources` among it."""
    config = triton.runtime.driver
    before = config._active  # not `.active`, which looks for a GPU and fails without one
    config.set_active(NoDevice(capability, shared_bytes))
    try:
        yield
    finally:
        config._active = before


@contextmanager
def kernels_passed_over(passes: Callable[[str], bool]) -> Iterator[None]:
    """Within, Triton does not compile a kernel that it does not have if `passes(its key)`."""
    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = lambda *, key, **others: passes(key)
    try:
        yield
    finally:
        triton.knobs.runtime.jit_cache_hook = before


class Job(NamedTuple):
    """One kernel, by a call that needs it."""

    layer: Layer
    config: Hashable
    num_tokens: int
    key: str


def jobs_of(layer: Layer, calls: Iterable[tuple[Hashable, int]]) -> list[Job]:
    """The kernels that calls (configuration, number of tokens) of a layer need, each once, those of the largest tiles first: they take longest."""
    jobs: dict[str, Job] = {}
    for config, num_tokens in _different(layer, calls):

        def note(key: str, config: Hashable = config, num_tokens: int = num_tokens) -> bool:
            jobs.setdefault(key, Job(layer, config, num_tokens, key))
            return True

        with kernels_passed_over(note):
            _call(layer, config, num_tokens)
    return sorted(jobs.values(), key=lambda job: -getattr(job.config, "max_rows", 0))


def _different(layer: Layer, calls: Iterable[tuple[Hashable, int]]) -> Iterator[tuple[Hashable, int]]:
    """Those of the calls that need a kernel which no call before them does."""
    seen: set[Hashable] = set()
    for config, num_tokens in calls:
        variants = {config, *((config, variant) for variant in layer.kernel.variants(layer.problem, Size(num_tokens, layer.shape.top_k), config))}
        if not variants <= seen:
            seen |= variants
            yield config, num_tokens


class Compilation:
    """Processes that compile what they are given, in that order: one per core, but for that of the races."""

    def __init__(self, processes: int | None = None):
        self._pool = ProcessPoolExecutor(processes or max(1, len(os.sched_getaffinity(0)) - 1), multiprocessing.get_context("spawn"))

    def start(self, layer: Layer, calls: Iterable[tuple[Hashable, int]]) -> list[Future[None]]:
        """Compile the kernels of calls (configuration, number of tokens). A future fails with what Triton says of a kernel."""
        return [self._pool.submit(_compile, job) for job in jobs_of(layer, calls)]

    def stop(self) -> None:
        """Leave undone what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _compile(job: Job) -> None:
    with kernels_passed_over(lambda key: key != job.key):
        _call(job.layer, job.config, job.num_tokens)


def _call(layer: Layer, config: Hashable, num_tokens: int) -> None:
    """A call in which no token chose an expert."""
    shape = layer.shape
    hidden = torch.zeros((num_tokens, shape.hidden), dtype=torch.bfloat16)
    ids = torch.full((num_tokens, shape.top_k), -1, dtype=torch.int32)
    weights = torch.zeros((num_tokens, shape.top_k), dtype=torch.float32)
    with without_device(int(layer.target.arch.removeprefix("sm_")), _SHARED_BYTES), torch.no_grad():
        layer.kernel.run(hidden, _storage(layer), ids, weights, activations=layer.activations, config=config)


@functools.cache
def _storage(layer: Layer) -> Any:
    """Of the CPU and never touched, so that it takes address space alone."""
    return layer.empty_storage("cpu")
