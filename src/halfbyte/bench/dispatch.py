"""Dispatch, combine and the whole expert-parallel layer, by every way that carries tokens: a check of the bits first, then a time.

All ranks run everything together; a time is that of the slowest rank. Ways that move the same rows must bring the same bits.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist

import halfbyte
from halfbyte.bench.dispatch_peers import MinimalAsyncEP
from halfbyte.bench.inputs import Call, random_call, random_experts
from halfbyte.bench.records import Column, Status
from halfbyte.bench.shapes import MoEShape
from halfbyte.distributed.collectives import gather_equal, reduce_scatterv
from halfbyte.distributed.costs import Costs, Line
from halfbyte.distributed.transport import CombineFormat, Tokens, Transport
from halfbyte.distributed.wire import Payload, Wire
from halfbyte.errors import HalfbyteError
from halfbyte.experts import ExpertMap
from halfbyte.formats import NVFP4
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.moe.functional import fused_moe
from halfbyte.moe.parallel import ExpertParallel
from halfbyte.weights import PreparedExperts

Spread = Literal["even", "skewed", "partly-empty"]
SPREADS: tuple[str, ...] = get_args(Spread)
Step = Literal["dispatch", "combine", "layer"]
STEPS: tuple[str, ...] = get_args(Step)
_SAMPLES, _WARM_UP = 20, 3
_CEILING_BYTES = 256 << 20
_INPUT_SETS = 4  # calls with inputs of their own in a sample of the layer, so that nothing is found in a cache


@dataclass(frozen=True)
class DispatchRow:
    """One way for one step with so many tokens per rank: a `records.Row`.

    Attributes:
        num_tokens: of the rank that has most; sizes: of every rank.
        received_bytes: by the rank that receives most, from others. Of a layer: in both directions together.
        median_us: of the slowest rank; spread, samples, timer as `timing.Timing`.
        gbps: received_bytes over the time; fraction: of the peer-to-peer ceiling that was measured in the same run.
        tflops: of a layer: operations of this rank's share of the products over the time.
    """

    shape: str
    world: int
    step: Step
    tokens_spread: Spread
    num_tokens: int
    sizes: tuple[int, ...]
    system: str
    status: Status
    reason: str = ""
    activations: str = ""
    received_bytes: int | None = None
    median_us: float | None = None
    spread: float | None = None
    samples: int | None = None
    timer: str | None = None
    gbps: float | None = None
    fraction: float | None = None
    tflops: float | None = None

    unit: ClassVar[str] = "tokens"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("us", "median_us", ".1f"),
        Column("spread", "spread", ".1%"),
        Column("MB received", "received_bytes", ".2f", 10**6),
        Column("GB/s", "gbps", ".0f"),
        Column("of peer-to-peer", "fraction", ".1%"),
        Column("TFLOP/s", "tflops", ".0f"),
    )

    @property
    def size(self) -> int:
        return self.num_tokens

    @property
    def subject(self) -> str:
        activations = f", {self.activations} activations" if self.activations else ""
        return f"{self.step}, {self.shape}, {self.world} ranks, {self.tokens_spread}{activations}"

    @property
    def result(self) -> str:
        rate = f", {self.fraction:.0%} of peer-to-peer" if self.fraction is not None else ""
        return f"{self.median_us:.1f} us{rate}" + (f", {self.tflops:.0f} TFLOP/s" if self.tflops is not None else "")

    @property
    def remark(self) -> str:
        return ""


def row_of(fields: dict[str, Any]) -> DispatchRow:
    """The row that a results file kept. Raises TypeError when the fields are others."""
    return DispatchRow(**{**fields, "sizes": tuple(fields["sizes"])})


@dataclass(frozen=True)
class Options:
    """What is measured: `tokens` of the rank that has most; `layer_tokens` for whole layers."""

    tokens: tuple[int, ...]
    layer_tokens: tuple[int, ...] = ()
    spreads: tuple[Spread, ...] = ("even",)
    activations: tuple[ActivationFormat, ...] = ("bf16", "fp8")
    seed: int = 0
    graph: bool = True


@dataclass(frozen=True)
class Way:
    """One system: `call` launches it, `moved` counts the bytes that the busiest rank receives."""

    name: str
    call: Callable[[], object]
    moved: int


def sizes_of(spread: Spread, num_tokens: int, world: int) -> list[int]:
    """Tokens of every rank, at most `num_tokens`.

    >>> sizes_of("even", 8, 2), sizes_of("skewed", 8, 4), sizes_of("partly-empty", 8, 4)
    ([8, 8], [8, 4, 2, 1], [8, 0, 8, 0])
    """
    if spread == "skewed":
        return [max(1, num_tokens >> rank) for rank in range(world)]
    return [0 if spread == "partly-empty" and rank % 2 else num_tokens for rank in range(world)]


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
    import time

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


def bench_dispatch(
    shape: MoEShape, ep: ExpertParallel, options: Options, ceiling: float | None, peer: MinimalAsyncEP | None = None
) -> Iterator[DispatchRow]:
    """Measure every way of `ep`'s transports, and the peer; all ranks iterate together and see the same rows."""
    for spread in options.spreads:
        for num_tokens in options.tokens:
            yield from _steps(shape, ep, options, ceiling, spread, num_tokens, None)
    for activations in options.activations if options.layer_tokens else ():
        yield from _layers(shape, ep, options, activations, ceiling)
    if peer is not None and "even" in options.spreads:
        for num_tokens in options.tokens:
            yield from _steps(shape, ep, options, ceiling, "even", num_tokens, peer)


def _steps(
    shape: MoEShape, ep: ExpertParallel, options: Options, ceiling: float | None, spread: Spread, num_tokens: int, peer: MinimalAsyncEP | None
) -> Iterator[DispatchRow]:
    """Dispatch and combine by every way of ours, or of the peer."""
    sizes = sizes_of(spread, num_tokens, ep.num_ranks)
    call = random_call(shape, sizes[ep.rank], "uniform", ep.device, options.seed + ep.rank)
    about: dict[str, Any] = {"shape": shape.name, "world": ep.num_ranks, "tokens_spread": spread, "num_tokens": num_tokens, "sizes": tuple(sizes)}
    for step, way in _systems(shape, ep, call, sizes) if peer is None else _peer_ways(peer, shape, call):
        yield _measured(way, {**about, "step": step}, ep, options, ceiling)


def costs_of(rows: Iterable[Any], transports: Iterable[str]) -> Costs:
    """The constants of the choice between ways, from the smallest and the largest measured size; the same on all ranks, whose times are one.

    Transports of which there are fewer than two sizes keep the defaults.
    """
    even: list[Any] = [row for row in rows if row.tokens_spread == "even" and row.median_us is not None]
    costs = Costs()
    for name in transports:
        for step, lines in (("dispatch", costs.dispatch), ("combine", costs.combine)):
            found = sorted((row.num_tokens, row.median_us, row.received_bytes) for row in even if (row.step, row.system) == (step, f"{name} bf16"))
            if len(found) > 1 and found[-1][1] > found[0][1]:
                (_, least_us, least), (_, most_us, most) = found[0], found[-1]
                gbps = (most - least) / (most_us - least_us) / 1e3
                lines[name] = Line(max(0.0, least_us - least / gbps / 1e3), gbps)
        of = {row.system: row.median_us for row in even if row.step == "dispatch" and row.num_tokens == min(other.num_tokens for other in even)}
        if f"{name} fp8" in of:
            costs.encode[name] = Line(max(0.0, of[f"{name} fp8"] - of[f"{name} bf16"]), costs.encode[name].gbps)
    return costs


def _systems(shape: MoEShape, ep: ExpertParallel, call: Call, sizes: Sequence[int]) -> Iterator[tuple[Step, Way]]:
    for way in _dispatches(shape, ep, call, sizes):
        yield "dispatch", way
    for way in _combines(shape, ep, sizes):
        yield "combine", way


def _peer_ways(peer: MinimalAsyncEP, shape: MoEShape, call: Call) -> Iterator[tuple[Step, Way]]:
    counts = torch.bincount(call.ids.flatten(), minlength=shape.num_experts)
    moved = peer.received_bytes(len(call.ids))
    sent = peer.dispatch(call, counts)
    rows = sent[0].clone()
    got = peer.combine(rows, sent, call)
    expected = call.hidden.float() * call.weights.sum(dim=1, keepdim=True)  # its experts here give back what they are given
    if not torch.allclose(got.float(), expected, rtol=2e-2, atol=2e-2):
        raise AssertionError(f"{peer.name} loses tokens")
    yield "dispatch", Way(peer.name, lambda: peer.dispatch(call, counts), moved)
    yield "combine", Way(peer.name, lambda: peer.combine(rows, sent, call), moved)


def _measured(way: Way, about: dict[str, Any], ep: ExpertParallel, options: Options, ceiling: float | None, calls: int = 1) -> DispatchRow:
    row: dict[str, Any] = {**about, "system": way.name}
    try:
        us, spread, samples, timer = time_together([way.call] * (8 if about["num_tokens"] <= 512 else 2), ep.device, graph=options.graph)
    except HalfbyteError as error:  # before anything was sent: all ranks say the same
        return DispatchRow(**row, status="skipped", reason=str(error))
    us /= calls
    gbps = way.moved / us / 1e3
    measured: dict[str, Any] = {"median_us": us, "spread": spread, "samples": samples, "timer": timer, "received_bytes": way.moved, "gbps": gbps}
    return DispatchRow(**row, status="ok", fraction=None if ceiling is None else gbps / ceiling, **measured)


def _wires(ep: ExpertParallel, hidden: int, dtype: torch.dtype) -> list[Wire]:
    scale = torch.tensor(0.002, dtype=torch.float32, device=ep.device)
    return [Wire("bf16", hidden, dtype), Wire("fp8", hidden, dtype), Wire("fp4", hidden, dtype, global_scale=scale)]


def _dispatches(shape: MoEShape, ep: ExpertParallel, call: Call, sizes: Sequence[int]) -> Iterator[Way]:
    """The padded all-gather of three tensors that engines use, then every transport with every wire."""
    most, received = max(sizes), sum(sizes) - min(sizes)
    padded = [torch.zeros((most, tensor.shape[1]), dtype=tensor.dtype, device=tensor.device) for tensor in call]
    gathered = [tensor.new_empty((ep.num_ranks * most, tensor.shape[1])) for tensor in padded]

    def padded_gather() -> None:
        for out, tensor in zip(gathered, padded, strict=True):
            gather_equal(out, tensor, ep.group)

    row_bytes = 2 * shape.hidden + 8 * shape.top_k
    yield Way("padded bf16 all-gather", padded_gather, (ep.num_ranks - 1) * most * row_bytes)
    tokens = Tokens(*call)
    for wire in _wires(ep, shape.hidden, call.hidden.dtype):
        moved = received * (wire.row_bytes + 8 * shape.top_k)
        arrived = {name: transport.dispatch(wire, tokens, sizes, None) for name, transport in ep.transports.items()}
        first = next(iter(arrived.values()))
        for name, transport in ep.transports.items():
            _check_dispatch(arrived[name], first, ep.expert_map, wire.payload, name)
            if name == "symmetric":
                _finish(transport, shape, sizes, ep.device)
            yield Way(f"{name} {wire.payload}", _pushes(transport, wire, tokens, sizes), moved)


def _pushes(transport: Transport, wire: Wire, tokens: Tokens, sizes: Sequence[int]) -> Callable[[], object]:
    if transport.name != "symmetric":
        return lambda: transport.dispatch(wire, tokens, sizes, None)
    # Nobody reads what arrives, so there need be no combine between two of them.
    return lambda: transport.push(wire, tokens, sizes, None)  # type: ignore[attr-defined]


def _finish(transport: Transport, shape: MoEShape, sizes: Sequence[int], device: torch.device) -> None:
    """The combine that every dispatch over peers needs."""
    partial = torch.zeros((sum(sizes), shape.hidden), dtype=torch.bfloat16, device=device)
    transport.combine(partial, sizes, "bf16", partial.new_empty((sizes[dist.get_rank()], shape.hidden)))


def _combines(shape: MoEShape, ep: ExpertParallel, sizes: Sequence[int]) -> Iterator[Way]:
    """The all-reduce of padded partial sums that engines use, the library's own reduce-scatter, then every transport."""
    rows, own, most = sum(sizes), sizes[ep.rank], max(sizes)
    partial = torch.randn(
        (rows, shape.hidden), dtype=torch.float32, device=ep.device, generator=torch.Generator(ep.device).manual_seed(ep.rank)
    ).bfloat16()
    padded = torch.zeros((ep.num_ranks * most, shape.hidden), dtype=torch.bfloat16, device=ep.device)
    bf16_bytes = (ep.num_ranks - 1) * most * 2 * shape.hidden
    yield Way("padded bf16 all-reduce", lambda: dist.all_reduce(padded, group=ep.group), 2 * bf16_bytes)
    if ep.device.type == "cuda":
        yield Way("nccl reduce-scatter, its own sum", lambda: reduce_scatterv(partial, sizes, group=ep.group), bf16_bytes)
    formats: tuple[CombineFormat, ...] = ("bf16", "fp8")
    for format in formats:
        results: dict[str, torch.Tensor] = {}
        for name, transport in ep.transports.items():
            results[name] = torch.full((own, shape.hidden), torch.nan, dtype=torch.bfloat16, device=ep.device)
            transport.combine(partial, sizes, format, results[name])
        first = next(iter(results.values()))
        for name, transport in ep.transports.items():
            if not torch.equal(results[name].view(torch.int16), first.view(torch.int16)) or results[name].isnan().any():
                raise AssertionError(f"{name} {format} combine brings other bits")
            buffer = transport.partial(rows, shape.hidden, torch.bfloat16, format)
            given = partial if buffer is None else buffer.copy_(partial)
            moved = (ep.num_ranks - 1) * most * (2 * shape.hidden if format == "bf16" else shape.hidden + 4)
            yield Way(f"{name} {format}", _combine(transport, given, sizes, format, results[name]), moved)


def _combine(transport: Transport, given: torch.Tensor, sizes: Sequence[int], format: CombineFormat, out: torch.Tensor) -> Callable[[], object]:
    return lambda: transport.combine(given, sizes, format, out)


def _check_dispatch(got: Tokens, wanted: Tokens, expert_map: ExpertMap, payload: Payload, name: str) -> None:
    """Raise AssertionError unless the rows that matter here are the same bits."""
    local = expert_map.local(wanted.topk_ids)
    rows = (local >= 0).any(dim=1)

    def bits(tokens: Tokens) -> list[torch.Tensor]:
        hidden = tokens.hidden
        parts = [hidden] if isinstance(hidden, torch.Tensor) else [hidden.codes, hidden.scales]
        return [tokens.topk_ids, tokens.topk_weights.view(torch.int32), *(part.view(torch.uint8)[rows] for part in parts)]

    if not all(torch.equal(ours, theirs) for ours, theirs in zip(bits(got), bits(wanted), strict=True)):
        raise AssertionError(f"{name} {payload} dispatch brings other bits")


def _layers(shape: MoEShape, ep: ExpertParallel, options: Options, activations: ActivationFormat, ceiling: float | None) -> Iterator[DispatchRow]:
    """Whole layers: padded all-gather, fused_moe and all-reduce; then dispatch, fused_moe and combine by every way."""
    held = len(ep.local_experts)
    part = MoEShape(shape.name, shape.hidden, shape.intermediate, held, min(shape.top_k, held), shape.activation, published=shape.published)
    weights = random_experts(part, NVFP4, ep.device, options.seed + ep.rank)
    experts = halfbyte.prepare(weights, activations=activations)
    payloads: dict[str, list[Payload]] = {"bf16": ["bf16", "fp4"], "fp8": ["bf16", "fp8"]}  # what the fastest kernels take
    for num_tokens in options.layer_tokens:
        sizes = sizes_of("even", num_tokens, ep.num_ranks)
        inputs = [random_call(shape, num_tokens, "uniform", ep.device, options.seed + ep.rank + 100 * i) for i in range(_INPUT_SETS)]
        about: dict[str, Any] = {"shape": shape.name, "world": ep.num_ranks, "tokens_spread": "even", "num_tokens": num_tokens, "sizes": tuple(sizes)}
        about |= {"step": "layer", "activations": activations}
        flops = shape.call_flops(num_tokens)
        row_bytes = 2 * shape.hidden + 8 * shape.top_k
        others = (ep.num_ranks - 1) * num_tokens
        ways = [Way("padded bf16 all-gather + all-reduce", _padded_layer(ep, experts, inputs, activations), others * (row_bytes + 4 * shape.hidden))]
        for name in ep.transports:
            for payload in payloads.get(activations, ["bf16"]):
                for format in ("bf16", "fp8") if name == "symmetric" else ("bf16",):
                    own = _with(ep, name, payload, format)
                    wire = Wire(payload, shape.hidden)
                    back = 2 * shape.hidden if format == "bf16" else shape.hidden + 4
                    moved = others * (wire.row_bytes + 8 * shape.top_k + back)
                    ways.append(Way(f"{name} {payload} + {format}", _parallel_layer(own, experts, inputs, activations, sizes), moved))
        for way in ways:
            row = _measured(way, about, ep, options, ceiling, calls=_INPUT_SETS)
            if row.median_us is not None:
                row = DispatchRow(**{**row.__dict__, "tflops": flops / row.median_us / 1e6})
            yield row


def _with(ep: ExpertParallel, transport: str, payload: Payload, format: CombineFormat) -> ExpertParallel:
    """The same ranks and buffers by one way."""
    own = ExpertParallel(ep.group, ep.num_experts, placement=ep.placement, payload=payload, combine_dtype=format)
    own.transports, own.transport = ep.transports, transport
    return own


def _parallel_layer(
    ep: ExpertParallel, experts: PreparedExperts, inputs: Sequence[Call], activations: ActivationFormat, sizes: Sequence[int]
) -> Callable[[], object]:
    return lambda: [ep.forward(call.hidden, experts, call.ids, call.weights, activations=activations, sizes=sizes) for call in inputs]


def _padded_layer(ep: ExpertParallel, experts: PreparedExperts, inputs: Sequence[Call], activations: ActivationFormat) -> Callable[[], object]:
    rows = len(inputs[0].hidden)
    gathered = [tensor.new_empty((ep.num_ranks * rows, tensor.shape[1])) for tensor in inputs[0]]

    def layer(call: Call) -> torch.Tensor:
        for out, tensor in zip(gathered, call, strict=True):
            gather_equal(out, tensor, ep.group)
        hidden, ids, weights = gathered
        partial = fused_moe(hidden, experts, ids, weights, activations=activations, expert_map=ep.expert_map)
        dist.all_reduce(partial, group=ep.group)
        return partial[ep.rank * rows : (ep.rank + 1) * rows]

    return lambda: [layer(call) for call in inputs]
