"""`Track`: times configurations of one layer against each other, on the device. One CUDA graph each, replayed in turn: a drift falls on all alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch

import halfbyte
from halfbyte.bench.ceilings import measure_ceilings
from halfbyte.bench.gate import GLOBAL_LIMIT, TOKEN_LIMIT, expected_output, fp8_allowance, judge, poison_free_memory
from halfbyte.bench.inputs import Call, RoutingKind, random_call, random_experts
from halfbyte.bench.timing import calls_of
from halfbyte.errors import HalfbyteError
from halfbyte.tuning.layer import Layer
from halfbyte.tuning.times import Time

_L2_MULTIPLE, _MAX_CALLS = 4, 16
_SAMPLE_MS, _MIN_ROUNDS, _MAX_ROUNDS = 15.0, 5, 24  # of one configuration
_CHECKED_TOKENS = 8


class Track:
    """The layer with random weights, on the device."""

    def __init__(self, layer: Layer, device: torch.device, seed: int = 0):
        self._layer, self._device, self._seed = layer, device, seed
        self._weights = random_experts(layer.shape, layer.format, device, seed)
        self._prepared = halfbyte.prepare(self._weights, str(layer.problem.layout), activations=layer.activations)

    def ceilings(self) -> dict[str, float | None]:
        return asdict(measure_ceilings(self._device))

    @torch.inference_mode()
    def race(self, num_tokens: int, routing: str, configs: Sequence[Hashable], starting: Callable[[Hashable], None]) -> dict[Hashable, Time]:
        """Check every configuration, then time them on the same calls; `starting` hears of each before it runs for the first time."""
        calls = self._calls(num_tokens, cast(RoutingKind, routing))
        graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        times: dict[Hashable, Time] = {}
        expected: dict[bool, torch.Tensor] = {}
        pool: Any = torch.cuda.graph_pool_handle()  # one after the other, they share their memory
        for config in configs:
            starting(config)
            try:
                defect = self._defect(calls[0], config, expected)
                if defect:
                    times[config] = Time(reason=defect)
                else:
                    graphs[config] = self._captured(calls, config, pool)
            except (HalfbyteError, RuntimeError) as error:  # a launch that the driver or Triton refuses
                torch.cuda.synchronize(self._device)  # raises where the CUDA context went with it: the end of this process, and no other's fault
                times[config] = Time(reason=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
        return times | _interleaved(graphs, len(calls))

    def _calls(self, num_tokens: int, routing: RoutingKind) -> list[Call]:
        """Calls of different routings: so many that they read several times the L2 before an expert comes again, as in a model."""
        shape, layer = self._layer.shape, self._layer
        touched = min(num_tokens * shape.top_k, shape.num_experts) * shape.expert_bytes(layer.format)
        count = max(calls_of(num_tokens), min(_MAX_CALLS, math.ceil(_L2_MULTIPLE * layer.target.l2 / touched)))
        return [random_call(shape, num_tokens, routing, self._device, self._seed + 1000 * num_tokens + index) for index in range(count)]

    def _run(self, call: Call, config: Hashable) -> torch.Tensor:
        return halfbyte.fused_moe(call.hidden, self._prepared, call.ids, call.weights, activations=self._layer.activations, config=config)

    def _defect(self, call: Call, config: Hashable, expected: dict[bool, torch.Tensor]) -> str:
        """What is wrong with a call's results, judged by a few of its tokens."""
        fp8 = self._layer.kernel.rounds_weights(config)
        step = max(1, call.hidden.shape[0] // _CHECKED_TOKENS)
        if fp8 not in expected:
            sample = Call(*(part[::step].contiguous() for part in call))
            expected[fp8] = expected_output(self._weights, sample, self._layer.activations, fp8)
        poison_free_memory(call.hidden)
        limits = fp8_allowance(self._layer.shape).limits(len(expected[fp8])) if fp8 else (GLOBAL_LIMIT, TOKEN_LIMIT)
        verdict = judge(self._run(call, config)[::step], expected[fp8], *limits)
        return "" if verdict.passed else f"the result is wrong: {verdict}"

    def _captured(self, calls: list[Call], config: Hashable, pool: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        with torch.cuda.graph(graph, pool=pool):
            for call in calls:
                self._run(call, config)
        return graph


def _interleaved(graphs: dict[Hashable, torch.cuda.CUDAGraph], num_calls: int) -> dict[Hashable, Time]:
    """Replay all graphs in turn, there and back."""

    def sample(rounds: int) -> dict[Hashable, list[float]]:
        events: dict[Hashable, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {config: [] for config in graphs}
        order = list(graphs)
        for _ in range(rounds):
            for config in order:
                first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                first.record()
                graphs[config].replay()
                last.record()
                events[config].append((first, last))
            order.reverse()
        torch.cuda.synchronize()
        return {config: [1e3 * first.elapsed_time(last) / num_calls for first, last in pairs] for config, pairs in events.items()}

    if not graphs:
        return {}
    longest_ms = max(samples[-1] for samples in sample(2).values()) * num_calls / 1e3
    rounds = int(min(_MAX_ROUNDS, max(_MIN_ROUNDS, _SAMPLE_MS / max(longest_ms, 1e-3))))
    return {config: _time(samples) for config, samples in sample(rounds).items()}


def _time(samples_us: list[float]) -> Time:
    lower, median, upper = statistics.quantiles(samples_us, n=4, method="inclusive")
    return Time(median, (upper - lower) / median)
