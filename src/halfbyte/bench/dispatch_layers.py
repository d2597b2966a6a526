"""The ways of `bench dispatch` for a whole layer: what engines do, dispatch, experts and combine by every transport, and the experts alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

import halfbyte
from halfbyte.bench.inputs import Call, random_call, random_experts
from halfbyte.bench.shapes import MoEShape
from halfbyte.bench.together import Way
from halfbyte.distributed.collectives import all_gatherv, gather_equal
from halfbyte.distributed.transport import CombineFormat
from halfbyte.distributed.wire import Payload, Wire
from halfbyte.formats import NVFP4
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.moe.functional import fused_moe
from halfbyte.moe.parallel import ExpertParallel

INPUT_SETS = 4  # calls with inputs of their own in a sample, so that nothing is found in a cache
PAYLOADS: dict[str, tuple[Payload, ...]] = {"bf16": ("bf16", "fp4"), "fp8": ("bf16", "fp8")}  # what the fastest kernels take; others: bf16


class Layers:
    """The experts of this rank, and layers of them."""

    def __init__(self, shape: MoEShape, ep: ExpertParallel, activations: ActivationFormat, seed: int) -> None:
        held = len(ep.local_experts)
        part = MoEShape(shape.name, shape.hidden, shape.intermediate, held, min(shape.top_k, held), shape.activation, published=shape.published)
        self.shape, self.ep, self.activations, self.seed = shape, ep, activations, seed
        self.experts = halfbyte.prepare(random_experts(part, NVFP4, ep.device, seed + ep.rank), activations=activations)

    def ways(self, sizes: Sequence[int]) -> Iterator[Way]:
        """All of them with so many tokens on each rank. Each call runs INPUT_SETS layers."""
        shape, ep = self.shape, self.ep
        inputs = [random_call(shape, sizes[ep.rank], "uniform", ep.device, self.seed + ep.rank + 100 * i) for i in range(INPUT_SETS)]
        row_bytes, most, received = 2 * shape.hidden + 8 * shape.top_k, max(sizes), sum(sizes) - min(sizes)
        padded_bytes = (ep.num_ranks - 1) * most * (row_bytes + 4 * shape.hidden)
        yield Way("layer", "padded bf16 all-gather + all-reduce", self._padded(inputs, most), padded_bytes)
        payloads = PAYLOADS.get(self.activations, ("bf16",))
        for name in ep.transports:
            for payload in payloads:
                formats: tuple[CombineFormat, ...] = ("bf16", "fp8") if name == "symmetric" else ("bf16",)
                for format in formats:
                    back = 2 * shape.hidden if format == "bf16" else shape.hidden + 4
                    moved = received * (Wire(payload, shape.hidden).row_bytes + 8 * shape.top_k) + (ep.num_ranks - 1) * most * back
                    yield Way("layer", f"{name} {payload} + {format}", self._parallel(inputs, _with(ep, name, payload, format), sizes), moved)
        yield Way("layer", f"experts alone, {payloads[-1]}", self._alone(inputs, payloads[-1], sizes), 0)

    def _parallel(self, inputs: Sequence[Call], ep: ExpertParallel, sizes: Sequence[int]) -> Callable[[], object]:
        options: dict[str, Any] = {"activations": self.activations, "sizes": sizes}
        return lambda: [ep.forward(call.hidden, self.experts, call.ids, call.weights, **options) for call in inputs]

    def _alone(self, inputs: Sequence[Call], payload: Payload, sizes: Sequence[int]) -> Callable[[], object]:
        """On tokens that have arrived already: what no exchange can be faster than."""
        wire = Wire(payload, self.shape.hidden)
        arrived = [all_gatherv([*wire.encode(call.hidden), call.ids, call.weights], sizes, group=self.ep.group) for call in inputs]
        options: dict[str, Any] = {"activations": self.activations, "expert_map": self.ep.expert_map}
        return lambda: [fused_moe(wire.decode(rows), self.experts, ids, weights, **options) for *rows, ids, weights in arrived]

    def _padded(self, inputs: Sequence[Call], most: int) -> Callable[[], object]:
        """Every rank pads to the most tokens, with ids that name no expert."""
        ep, padded = self.ep, [_padded_to(call, most) for call in inputs]
        gathered = [tensor.new_empty((ep.num_ranks * most, tensor.shape[1])) for tensor in padded[0]]

        def layer(call: Call) -> torch.Tensor:
            for out, tensor in zip(gathered, call, strict=True):
                gather_equal(out, tensor, ep.group)
            hidden, ids, weights = gathered
            partial = fused_moe(hidden, self.experts, ids, weights, activations=self.activations, expert_map=ep.expert_map)
            dist.all_reduce(partial, group=ep.group)
            return partial[ep.rank * most : (ep.rank + 1) * most]

        return lambda: [layer(call) for call in padded]


def _padded_to(call: Call, rows: int) -> Call:
    missing = rows - len(call.hidden)
    hidden, ids, weights = (torch.cat((tensor, tensor.new_zeros((missing, tensor.shape[1])))) for tensor in call)
    ids[rows - missing :] = -1
    return Call(hidden, ids, weights)


def _with(ep: ExpertParallel, transport: str, payload: Payload, format: CombineFormat) -> ExpertParallel:
    """The same ranks and buffers by one way."""
    own = ExpertParallel(ep.group, ep.num_experts, placement=ep.placement, payload=payload, combine_dtype=format)
    own.transports, own.transport = ep.transports, transport
    return own
