"""Dispatch, combine and the whole expert-parallel layer, by every way that carries tokens: a check of the bits first, then a time.

All ranks run everything together; a time is that of the slowest rank. Ways that move the same rows must bring the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from halfbyte.bench.dispatch_layers import INPUT_SETS, Layers
from halfbyte.bench.dispatch_peers import MinimalAsyncEP, symmetric_collectives
from halfbyte.bench.dispatch_steps import combines, dispatches
from halfbyte.bench.inputs import random_call
from halfbyte.bench.records import Column, Status
from halfbyte.bench.shapes import MoEShape
from halfbyte.bench.together import Step, Way, time_together
from halfbyte.checkpoint.typed_json import typed
from halfbyte.distributed.costs import Costs, Line
from halfbyte.errors import HalfbyteError
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.moe.parallel import ExpertParallel

Spread = Literal["even", "skewed", "partly-empty"]
SPREADS: tuple[str, ...] = get_args(Spread)


@dataclass(frozen=True)
class DispatchRow:
    """One way for one step with so many tokens per rank: a `records.Row`.

    Attributes:
        num_tokens: of the rank that has most; sizes: of every rank.
        received_bytes: by the rank that receives most, from others. Of a layer: in both directions together.
        median_us: of the slowest rank; spread, samples, timer as `timing.Timing`.
        gbps: received_bytes over the time; fraction: of the peer-to-peer ceiling that was measured in the same run.
        tflops: of a layer: operations of a rank's share of the products, where experts are used evenly, over the time.
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


def row_of(fields: object) -> DispatchRow:
    """The row that a results file kept. Raises ValueError where it is something else."""
    return typed(DispatchRow, fields, "row")


@dataclass(frozen=True)
class Options:
    """What is measured: `tokens` of the rank that has most; `layer_tokens` for whole layers."""

    tokens: tuple[int, ...]
    layer_tokens: tuple[int, ...] = ()
    spreads: tuple[Spread, ...] = ("even",)
    activations: tuple[ActivationFormat, ...] = ("bf16", "fp8")
    seed: int = 0
    graph: bool = True


def sizes_of(spread: Spread, num_tokens: int, world: int) -> list[int]:
    """Tokens of every rank, at most `num_tokens`.

    >>> sizes_of("even", 8, 2), sizes_of("skewed", 8, 4), sizes_of("partly-empty", 8, 4)
    ([8, 8], [8, 4, 2, 1], [8, 0, 8, 0])
    """
    if spread == "skewed":
        return [max(1, num_tokens >> rank) for rank in range(world)]
    return [0 if spread == "partly-empty" and rank % 2 else num_tokens for rank in range(world)]


def bench_dispatch(
    shape: MoEShape, ep: ExpertParallel, options: Options, ceiling: float | None, peer: MinimalAsyncEP | None = None
) -> Iterator[DispatchRow]:
    """Measure every way of `ep`'s transports, and the peer; all ranks iterate together and see the same rows."""
    for spread in options.spreads:
        for num_tokens in options.tokens:
            yield from _steps(shape, ep, options, ceiling, spread, num_tokens)
    for activations in options.activations if options.layer_tokens else ():
        layers = Layers(shape, ep, activations, options.seed)
        for spread in options.spreads:
            for num_tokens in options.layer_tokens:
                yield from _layers(layers, options, ceiling, spread, num_tokens)
    if peer is not None and "even" in options.spreads:
        for num_tokens in options.tokens:
            about = _about(shape, ep, "even", num_tokens)
            call = random_call(shape, num_tokens, "uniform", ep.device, options.seed + ep.rank)
            for way in peer.ways(call):
                yield _measured(way, about, ep, options, ceiling)


def _steps(shape: MoEShape, ep: ExpertParallel, options: Options, ceiling: float | None, spread: Spread, num_tokens: int) -> Iterator[DispatchRow]:
    """Dispatch and combine by every way of ours, and by what NCCL has for equal sizes in memory that it knows."""
    about = _about(shape, ep, spread, num_tokens)
    sizes = about["sizes"]
    call = random_call(shape, sizes[ep.rank], "uniform", ep.device, options.seed + ep.rank)
    for ways in (dispatches(shape, ep, call, sizes), combines(shape, ep, sizes)):
        for way in ways:
            yield _measured(way, about, ep, options, ceiling)
    if spread == "even" and ep.device.type == "cuda":
        for way in symmetric_collectives(ep.device, call.hidden):
            yield _measured(way, about, ep, options, ceiling)


def _layers(layers: Layers, options: Options, ceiling: float | None, spread: Spread, num_tokens: int) -> Iterator[DispatchRow]:
    ep = layers.ep
    about = _about(layers.shape, ep, spread, num_tokens) | {"activations": layers.activations}
    flops = layers.shape.call_flops(sum(about["sizes"])) / ep.num_ranks
    for way in layers.ways(about["sizes"]):
        row = _measured(way, about, ep, options, ceiling, calls=INPUT_SETS)
        yield row if row.median_us is None else replace(row, tflops=flops / row.median_us / 1e6)


def _about(shape: MoEShape, ep: ExpertParallel, spread: Spread, num_tokens: int) -> dict[str, Any]:
    sizes = tuple(sizes_of(spread, num_tokens, ep.num_ranks))
    return {"shape": shape.name, "world": ep.num_ranks, "tokens_spread": spread, "num_tokens": num_tokens, "sizes": sizes}


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


def _measured(way: Way, about: dict[str, Any], ep: ExpertParallel, options: Options, ceiling: float | None, calls: int = 1) -> DispatchRow:
    row: dict[str, Any] = {**about, "step": way.step, "system": way.name}
    try:
        us, spread, samples, timer = time_together([way.call] * (8 if about["num_tokens"] <= 512 else 2), ep.device, graph=options.graph)
    except HalfbyteError as error:  # before anything was sent: all ranks say the same
        return DispatchRow(**row, status="skipped", reason=str(error))
    us /= calls
    gbps = way.moved / us / 1e3
    measured: dict[str, Any] = {"median_us": us, "spread": spread, "samples": samples, "timer": timer, "received_bytes": way.moved, "gbps": gbps}
    return DispatchRow(**row, status="ok", fraction=None if ceiling is None else gbps / ceiling, **measured)
