"""The ways of `bench dispatch` for one step alone: dispatch and combine by every transport, checked against each other, and what engines do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from halfbyte.bench.inputs import Call
from halfbyte.bench.shapes import MoEShape
from halfbyte.bench.together import Way
from halfbyte.distributed.collectives import gather_equal, reduce_scatterv
from halfbyte.distributed.transport import CombineFormat, Tokens, Transport
from halfbyte.distributed.wire import Payload, Wire
from halfbyte.experts import ExpertMap
from halfbyte.moe.parallel import ExpertParallel


def _wires(ep: ExpertParallel, hidden: int, dtype: torch.dtype) -> list[Wire]:
    scale = torch.tensor(0.002, dtype=torch.float32, device=ep.device)
    return [Wire("bf16", hidden, dtype), Wire("fp8", hidden, dtype), Wire("fp4", hidden, dtype, global_scale=scale)]


def dispatches(shape: MoEShape, ep: ExpertParallel, call: Call, sizes: Sequence[int]) -> Iterator[Way]:
    """The padded all-gather of three tensors that engines use, then every transport with every wire."""
    most, received = max(sizes), sum(sizes) - min(sizes)
    padded = [torch.zeros((most, tensor.shape[1]), dtype=tensor.dtype, device=tensor.device) for tensor in call]
    gathered = [tensor.new_empty((ep.num_ranks * most, tensor.shape[1])) for tensor in padded]

    def padded_gather() -> None:
        for out, tensor in zip(gathered, padded, strict=True):
            gather_equal(out, tensor, ep.group)

    row_bytes = 2 * shape.hidden + 8 * shape.top_k
    yield Way("dispatch", "padded bf16 all-gather", padded_gather, (ep.num_ranks - 1) * most * row_bytes)
    tokens = Tokens(*call)
    for wire in _wires(ep, shape.hidden, call.hidden.dtype):
        moved = received * (wire.row_bytes + 8 * shape.top_k)
        arrived = {name: transport.dispatch(wire, tokens, sizes, None) for name, transport in ep.transports.items()}
        first = next(iter(arrived.values()))
        for name, transport in ep.transports.items():
            _check_dispatch(arrived[name], first, ep.expert_map, wire.payload, name)
            if name == "symmetric":
                _finish(transport, shape, sizes, ep.device)
            yield Way("dispatch", f"{name} {wire.payload}", _pushes(transport, wire, tokens, sizes), moved)


def _pushes(transport: Transport, wire: Wire, tokens: Tokens, sizes: Sequence[int]) -> Callable[[], object]:
    if transport.name != "symmetric":
        return lambda: transport.dispatch(wire, tokens, sizes, None)
    # Nobody reads what arrives, so there need be no combine between two of them.
    return lambda: transport.push(wire, tokens, sizes, None)  # type: ignore[attr-defined]


def _finish(transport: Transport, shape: MoEShape, sizes: Sequence[int], device: torch.device) -> None:
    """The combine that every dispatch over peers needs."""
    partial = torch.zeros((sum(sizes), shape.hidden), dtype=torch.bfloat16, device=device)
    transport.combine(partial, sizes, "bf16", partial.new_empty((sizes[dist.get_rank()], shape.hidden)))


def combines(shape: MoEShape, ep: ExpertParallel, sizes: Sequence[int]) -> Iterator[Way]:
    """The all-reduce of padded partial sums that engines use, the library's own reduce-scatter, then every transport."""
    rows, own, most = sum(sizes), sizes[ep.rank], max(sizes)
    partial = torch.randn(
        (rows, shape.hidden), dtype=torch.float32, device=ep.device, generator=torch.Generator(ep.device).manual_seed(ep.rank)
    ).bfloat16()
    padded = torch.zeros((ep.num_ranks * most, shape.hidden), dtype=torch.bfloat16, device=ep.device)
    bf16_bytes = (ep.num_ranks - 1) * most * 2 * shape.hidden
    yield Way("combine", "padded bf16 all-reduce", lambda: dist.all_reduce(padded, group=ep.group), 2 * bf16_bytes)
    if ep.device.type == "cuda":
        yield Way("combine", "nccl reduce-scatter, its own sum", lambda: reduce_scatterv(partial, sizes, group=ep.group), bf16_bytes)
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
            yield Way("combine", f"{name} {format}", _combine(transport, given, sizes, format, results[name]), moved)


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
