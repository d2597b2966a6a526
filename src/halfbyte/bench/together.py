"""Timing on all ranks at once: they run everything together, and a time is that of the slowest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from halfbyte.distributed.transport import Transport

Step = Literal["dispatch", "combine", "layer"]
_SAMPLES, _WARM_UP = 20, 3
_CEILING_BYTES = 256 << 20


@dataclass(frozen=True)
class Way:
    """One system for one step: `call` launches it, `moved` counts the bytes that the busiest rank receives."""

    step: Step
    name: str
    call: Callable[[], object]
    moved: int


def peer_gbps(transport: Transport, device: torch.device) -> float | None:
    """GB/s at which every rank reads the next one's memory, all at once: the least of them. None where they do not reach each other."""
    if transport.name != "symmetric":
        return None
    import torch.distributed._symmetric_memory as symmetric_memory

    group = dist.group.WORLD
    assert group is not None
    block = symmetric_memory.empty(_CEILING_BYTES, dtype=torch.uint8, device=device)
    handle = symmetric_memory.rendezvous(block, group)
    other = handle.get_buffer((handle.rank + 1) % handle.world_size, (_CEILING_BYTES,), torch.uint8)
    target = torch.empty_like(other)
    us, *_ = time_together([lambda: target.copy_(other)], device, graph=False)
    return _CEILING_BYTES / us / 1e3


def time_together(calls: Sequence[Callable[[], object]], device: torch.device, *, graph: bool) -> tuple[float, float, int, str]:
    """Median time of one call on the slowest rank, its spread, samples and timer; every rank takes as many samples."""
    for call in calls:
        call()
    run: Callable[[], object] = lambda: [call() for call in calls]  # noqa: E731
    if device.type != "cuda":
        return _wall_time(run, len(calls))
    torch.cuda.synchronize(device)
    dist.barrier()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        run = captured.replay
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_SAMPLES + _WARM_UP + 1)]
    dist.barrier()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize(device)
    samples = torch.tensor(
        [1e3 * a.elapsed_time(b) for a, b in zip(events[_WARM_UP:], events[_WARM_UP + 1 :], strict=False)], dtype=torch.float32, device=device
    )
    return _summary(samples, len(calls), "cuda graph" if graph else "cuda events")


def _wall_time(run: Callable[[], object], calls: int) -> tuple[float, float, int, str]:
    samples = []
    for _ in range(_SAMPLES // 2):
        dist.barrier()
        start = time.perf_counter()
        run()
        samples.append(1e6 * (time.perf_counter() - start))
    return _summary(torch.tensor(samples, dtype=torch.float32), calls, "wall clock")


def _summary(samples: torch.Tensor, calls: int, timer: str) -> tuple[float, float, int, str]:
    dist.all_reduce(samples, op=dist.ReduceOp.MAX)
    lower, median, upper = statistics.quantiles(samples.tolist(), n=4, method="inclusive")
    return median / calls, (upper - lower) / median, len(samples), timer
