"""The MoE layer against its floor: for each layer, system and number of tokens a correctness gate, then a time."""

from __future__ import annotations

import copy
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

import halfbyte
from halfbyte.bench.ceilings import Ceilings
from halfbyte.bench.gate import (
    GLOBAL_LIMIT,
    PEER_LIMIT,
    PEER_SPREAD,
    TOKEN_LIMIT,
    Allowance,
    expected_output,
    fp8_allowance,
    judge,
    poison_free_memory,
)
from halfbyte.bench.inputs import Call, RoutingKind, random_call
from halfbyte.bench.peers import Build, Layer, Peer
from halfbyte.bench.records import Column, Status
from halfbyte.bench.shapes import MoEShape, floor_of
from halfbyte.bench.timing import calls_of, time_calls, weight_sets_of
from halfbyte.checkpoint.typed_json import typed
from halfbyte.device import Target
from halfbyte.errors import HalfbyteError
from halfbyte.experts import ExpertWeights
from halfbyte.formats import BlockFormat
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.kernels.problem import Size, layer_problem
from halfbyte.kernels.table import choose

# Makes the experts of one layer on a device; called only when it is that layer's turn.
LayerSource = Callable[[torch.device], tuple[MoEShape, ExpertWeights]]


@dataclass(frozen=True)
class MoERow:
    """One system on one layer with one number of tokens: a `records.Row`.

    Attributes:
        kernel: what ran, as far as the system says.
        experts_touched: distinct experts of a call, mean over the calls.
        floor_us, bound: the shortest possible time, and whether "memory" or "compute" sets it.
        median_us, spread, samples, timer: as `timing.Timing`; fraction: floor_us / median_us.
        calls, weight_sets: calls with different routings in a sample, and copies of the weights that they take in turn.
        token_error, global_error: relative L2 against the fp32 reference; None where the result is not finite or there is none;
            global_limit: what the gate allowed of the second.
        peak_extra_bytes: memory of one call beside weights and inputs, its result included; None on a CPU.
    """

    shape: str
    format: str
    activations: str
    routing: str
    num_tokens: int
    system: str
    status: Status
    experts_touched: float
    floor_us: float
    bound: str
    global_limit: float
    calls: int
    weight_sets: int
    reason: str = ""
    kernel: str = ""
    median_us: float | None = None
    spread: float | None = None
    samples: int | None = None
    timer: str | None = None
    fraction: float | None = None
    token_error: float | None = None
    global_error: float | None = None
    peak_extra_bytes: int | None = None

    unit: ClassVar[str] = "tokens"
    remark: ClassVar[str] = ""
    columns: ClassVar[tuple[Column, ...]] = (
        Column("us", "median_us", ".1f"),
        Column("spread", "spread", ".1%"),
        Column("floor us", "floor_us", ".1f"),
        Column("of floor", "fraction", ".1%"),
        Column("bound", "bound"),
        Column("error", "global_error", ".1e"),
        Column("allowed", "global_limit", ".1e"),
        Column("experts", "experts_touched", ".4g"),
        Column("extra MiB", "peak_extra_bytes", ".1f", 2**20),
        Column("kernel", "kernel"),
    )

    @property
    def size(self) -> int:
        return self.num_tokens

    @property
    def subject(self) -> str:
        return f"{self.shape} {self.format.upper()}, {self.activations} activations, {self.routing} routing"

    @property
    def result(self) -> str:
        return f"{self.median_us:.1f} us, {self.fraction:.1%} of the {self.bound} floor"


def row_of(fields: object) -> MoERow:
    """The row that a results file kept. Raises ValueError where it is something else."""
    return typed(MoERow, fields, "row")


@dataclass(frozen=True)
class Options:
    """How layers are measured: `backend` is the only kernel halfbyte may use (None: the table chooses), `peer_limit` the error over
    many tokens that peers are allowed (halfbyte's own limit is fixed); no row starts after `budget_s` seconds."""

    tokens: tuple[int, ...]
    activations: ActivationFormat = "bf16"
    routing: RoutingKind = "uniform"
    backend: str | None = None
    peer_limit: float = PEER_LIMIT
    seed: int = 0
    budget_s: float = math.inf


@dataclass(frozen=True)
class System:
    """What is measured. An error of a `tolerated` type is its reason for having no time; any other is a mistake of ours and ends the run.

    `allowance`: what its results may lose; None: the standard limits."""

    name: str
    build: Build
    activations: ActivationFormat
    allowance: Allowance | None
    tolerated: tuple[type[Exception], ...]


class HalfbyteLayer:
    """`fused_moe` on prepared weights, with the kernel that the table chooses."""

    def __init__(self, weights: ExpertWeights, activations: ActivationFormat, backend: str | None):
        self._prepared = halfbyte.prepare(weights, activations=activations)
        self._activations: ActivationFormat = activations
        self._backend = backend
        prepared = self._prepared
        self._problem = layer_problem("fused_moe", prepared.storage, prepared.target, prepared.layout, activations)
        self._choice = choose(self._problem, backend)
        self.kernel = ", ".join(filter(None, (self._choice.name, prepared.layout, self._choice.tables)))
        self.graph = self._choice.capturable

    def __call__(self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        return halfbyte.fused_moe(hidden, self._prepared, topk_ids, topk_weights, activations=self._activations, backend=self._backend)

    def rounds_weights(self, topk_ids: torch.Tensor) -> bool:
        """Whether the kernel that serves these ids multiplies by weights rounded to e4m3."""
        return self._choice.rounds_weights(self._choice.choose_config(self._problem, Size(*topk_ids.shape)))


@dataclass(frozen=True)
class Case:
    """One number of tokens on one layer: the inputs of its calls, the sets of weights they take in turn, and the mean of distinct experts a call."""

    calls: list[Call]
    weight_sets: int
    experts_touched: float

    @staticmethod
    def draw(shape: MoEShape, format: BlockFormat, num_tokens: int, options: Options, device: torch.device) -> Case:
        """Draw as many calls as a sample needs, and at least one for each set of weights."""

        def call(index: int) -> Call:
            return random_call(shape, num_tokens, options.routing, device, seed=options.seed + 1000 * num_tokens + index)

        calls = [call(index) for index in range(calls_of(num_tokens))]
        touched = statistics.mean(call.ids.unique().numel() for call in calls)
        weight_sets = weight_sets_of(touched * shape.expert_bytes(format), Target.of(device).l2)
        calls += [call(index) for index in range(len(calls), weight_sets)]
        return Case(calls, weight_sets, statistics.mean(call.ids.unique().numel() for call in calls))


def bench_moe(sources: Sequence[LayerSource], peers: Sequence[Peer], options: Options, device: torch.device, ceilings: Ceilings) -> Iterator[MoERow]:
    """Measure halfbyte and `peers` on every layer with every number of tokens, yielding each row as it is ready.

    Memory: as many copies of a layer's weights as `weight_sets_of` asks for, once packed and once in the arrangement of the system under
    measurement; the inputs; the expected results in fp32.

    Raises:
        InputError, CheckpointError, UnsupportedError: a source cannot make its layer.
    """
    ours = System("halfbyte", lambda w, _: HalfbyteLayer(w, options.activations, options.backend), options.activations, None, _OUR_ERRORS)
    systems = [ours, *(_peer_system(peer, options.peer_limit) for peer in peers)]
    deadline = time.monotonic() + options.budget_s
    for source in sources:
        shape, weights = source(device)
        yield from _bench_layer(shape, weights, systems, options, ceilings, deadline)
        del weights  # before the next layer is made


# A kernel that does not exist, memory that is not there: facts to report. Third-party code may raise anything, and one peer must not end the run.
_OUR_ERRORS = (HalfbyteError, torch.OutOfMemoryError)
_PEER_ERRORS = (Exception,)


def _peer_system(peer: Peer, limit: float) -> System:
    return System(peer.name, lambda weights, shape: peer.load()(weights, shape), "bf16", Allowance(limit, PEER_SPREAD), _PEER_ERRORS)


def _bench_layer(
    shape: MoEShape, weights: ExpertWeights, systems: Sequence[System], options: Options, ceilings: Ceilings, deadline: float
) -> Iterator[MoERow]:
    format, device = weights.format, weights.device
    assert format is not None  # sources make FP4 experts
    cases = {num_tokens: Case.draw(shape, format, num_tokens, options, device) for num_tokens in options.tokens}
    weight_sets = [weights, *(copy.deepcopy(weights) for _ in range(1, max(case.weight_sets for case in cases.values())))]

    @functools.cache
    def expected(activations: ActivationFormat, fp8_weights: bool) -> dict[int, torch.Tensor]:
        """One pass over the experts for all cases."""
        first = [case.calls[0] for case in cases.values()]
        together = Call(*(torch.cat(parts) for parts in zip(*first, strict=True)))
        return dict(zip(cases, expected_output(weights, together, activations, fp8_weights).split(list(cases)), strict=True))

    for system in systems:
        layers: list[Layer] = []
        obstacle = _BUDGET_SPENT if time.monotonic() > deadline else ""
        if not obstacle:
            try:
                layers += [system.build(each, shape) for each in weight_sets]
            except system.tolerated as error:
                obstacle = _reason(error)
        for num_tokens, case in cases.items():
            floor = floor_of(shape, format, num_tokens, case.experts_touched, ceilings, system.activations)
            row = MoERow(
                shape=shape.name,
                format=format.name,
                activations=system.activations,
                routing=options.routing,
                num_tokens=num_tokens,
                system=system.name,
                status="skipped",
                experts_touched=case.experts_touched,
                floor_us=floor.us,
                bound=floor.bound,
                global_limit=_limits(system.allowance, num_tokens)[0],
                calls=len(case.calls),
                weight_sets=case.weight_sets,
                reason=obstacle or (_BUDGET_SPENT if time.monotonic() > deadline else ""),
            )
            if row.reason:
                yield row
                continue
            fp8_weights = isinstance(layers[0], HalfbyteLayer) and layers[0].rounds_weights(case.calls[0].ids)
            limits = _limits(fp8_allowance(shape) if fp8_weights else system.allowance, num_tokens)
            yield _measure(row, system, layers, case, expected(system.activations, fp8_weights)[num_tokens], limits)


def _limits(allowance: Allowance | None, num_tokens: int) -> tuple[float, float]:
    """For all tokens, and for the worst one."""
    return (GLOBAL_LIMIT, TOKEN_LIMIT) if allowance is None else allowance.limits(num_tokens)


_BUDGET_SPENT = "the time budget is spent"


def _measure(row: MoERow, system: System, layers: Sequence[Layer], case: Case, expected: torch.Tensor, limits: tuple[float, float]) -> MoERow:
    """Gate, then time; without a time the row says why."""
    layer, call = layers[0], case.calls[0]
    row = replace(row, kernel=getattr(layer, "kernel", ""), global_limit=limits[0])
    device = call.hidden.device
    try:
        with torch.inference_mode():
            poison_free_memory(call.hidden)
            verdict = judge(layer(*call), expected, *limits)
            row = replace(row, token_error=_finite(verdict.token_error), global_error=_finite(verdict.global_error))
            if not verdict.passed:
                return replace(row, status="refused", reason=f"the result is wrong: {verdict}")
            row = replace(row, peak_extra_bytes=_peak_extra_bytes(layer, call))
            calls = [functools.partial(layers[index % case.weight_sets], *each) for index, each in enumerate(case.calls)]
            timing = time_calls(calls, device, graph=getattr(layer, "graph", True))
    except system.tolerated as error:
        return replace(row, reason=_reason(error))
    return replace(
        row,
        status="ok",
        median_us=timing.median_us,
        spread=timing.spread,
        samples=timing.samples,
        timer=timing.timer,
        fraction=row.floor_us / timing.median_us,
    )


def _peak_extra_bytes(layer: Layer, call: Call) -> int | None:
    """Memory one call needs beside what is there; None on a CPU, which keeps no such count."""
    device = call.hidden.device
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before_bytes = torch.cuda.memory_allocated(device)
    layer(*call)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before_bytes


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None  # JSON has no infinity


def _reason(error: Exception) -> str:
    """One line: the message, with the type before it unless it is an error of halfbyte's, which speaks for itself."""
    text = next(iter(str(error).splitlines()), "")
    return text if isinstance(error, HalfbyteError) else f"{type(error).__name__}: {text}"
