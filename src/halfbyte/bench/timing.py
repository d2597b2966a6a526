"""How long a call takes: on CUDA the replays of one graph, elsewhere the clock on the wall."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_MIN_SAMPLES, _MAX_SAMPLES = 8, 40
_MAX_WEIGHT_SETS = 16
_L2_MULTIPLE = 4

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Median time of one call; `spread` is (upper quartile - lower quartile) / median; `timer` says what was timed."""

    median_us: float
    spread: float
    samples: int
    timer: str


def calls_of(num_tokens: int) -> int:
    """Calls with different routings in one sample: short calls are many, so that launching the sample does not count."""
    return 8 if num_tokens <= 64 else 4 if num_tokens <= 256 else 1


def weight_sets_of(touched_bytes: float, l2_bytes: int) -> int:
    """Copies of the weights that calls take in turn, like a model's layers: together they read 4 x L2 before one comes again; at most 16.

    >>> weight_sets_of(21e6, 50 << 20), weight_sets_of(340e6, 50 << 20), weight_sets_of(1e3, 0)
    (10, 1, 1)
    """
    return min(_MAX_WEIGHT_SETS, max(1, -int(-_L2_MULTIPLE * l2_bytes // touched_bytes)))


def time_calls(calls: Sequence[Call], device: torch.device, *, graph: bool = True, sample_ms: float = 60.0) -> Timing:
    """Time `calls`, in turn, as one sample; 8 to 40 samples after a warm-up, about `sample_ms` in all where that allows.

    Args:
        calls: what to time; the result is of one of them, on average.
        device: where they run.
        graph: on CUDA, capture all calls in one graph. False for calls that wait for the device; their time then includes the host's.
        sample_ms: how long to sample.
    """
    for call in calls:  # compile, tune, allocate
        call()
    if device.type == "cuda":
        with torch.cuda.device(device):
            samples_us = _cuda_samples_us(_captured(calls) if graph else lambda: _run(calls), sample_ms)
    else:
        samples_us = _wall_samples_us(lambda: _run(calls), sample_ms)
    lower, median, upper = statistics.quantiles(samples_us, n=4, method="inclusive")
    timer = "wall clock" if device.type != "cuda" else "cuda graph" if graph else "cuda events"
    return Timing(median / len(calls), (upper - lower) / median, len(samples_us), timer)


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _captured(calls: Sequence[Call]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        _run(calls)
    return graph.replay


def _cuda_samples_us(run: Callable[[], None], sample_ms: float) -> list[float]:
    def sample(count: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        return [1e3 * first.elapsed_time(second) for first, second in itertools.pairwise(events)]

    return sample(_count(sample(2)[1], sample_ms))


def _wall_samples_us(run: Callable[[], None], sample_ms: float) -> list[float]:
    def sample() -> float:
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start)

    return [sample() for _ in range(_count(sample(), sample_ms))]


def _count(sample_us: float, sample_ms: float) -> int:
    return int(min(_MAX_SAMPLES, max(_MIN_SAMPLES, 1e3 * sample_ms / max(sample_us, 1.0))))
