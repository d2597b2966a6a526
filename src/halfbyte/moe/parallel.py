"""`ExpertParallel`: experts spread over ranks. Tokens travel to where their experts are, and the sums of their rows back.

    dispatch    quantise own rows, move them with ids and weights: Dispatched, the rows of all ranks
    (experts)   each rank runs the experts that it holds, on rows that arrived quantised: partial sums [all rows, H]
    combine     the partial sums of own rows from all ranks, added up in fp32 in the order of ranks

Ids and weights travel, never logits. Every rank may have another number of tokens, none too. Whatever carries them, the result has the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Literal

import torch
import torch.distributed as dist

from halfbyte.arguments import check_integers, check_name, check_tensors, check_type
from halfbyte.distributed.collectives import all_gatherv, as_sizes, check_sizes, gather_equal
from halfbyte.distributed.costs import Costs, cheapest
from halfbyte.distributed.failures import backend_of, naming_the_failed, ranks_of, tell_others
from halfbyte.distributed.peer_memory import Capacity, PeerMemory, why_not
from halfbyte.distributed.placement import Placement, contiguous
from halfbyte.distributed.transport import COMBINE_FORMATS, CollectiveTransport, CombineFormat, Tokens, Transport
from halfbyte.distributed.wire import PAYLOADS, Payload, Wire
from halfbyte.errors import InputError, UnsupportedError
from halfbyte.experts import ExpertMap, id_lists
from halfbyte.formats import Fp8Tensor, QuantTensor
from halfbyte.formats.activation_formats import ActivationFormat, check_activations
from halfbyte.kernels.problem import Hidden
from halfbyte.moe.checks import FLOATS, IDS, check_prepared, check_sums, check_tensor
from halfbyte.moe.functional import fused_moe
from halfbyte.weights import PreparedExperts

logger = logging.getLogger(__name__)
WHERE = "ExpertParallel"


@dataclass(frozen=True)
class Dispatched:
    """The rows of all ranks, in the order of ranks, as they have arrived on this one.

    Attributes:
        hidden: what `fused_moe` takes, [R, H].
        topk_ids: int32 [R, k], ids of the whole layer; -1 in rows that hold no token.
        topk_weights: fp32 [R, k].
        sizes: rows of every rank; R is their sum.
        dtype: of the result of `combine`.
        transport, payload: which way they came.
    """

    hidden: Hidden
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    sizes: tuple[int, ...]
    dtype: torch.dtype
    transport: str
    payload: Payload


class ExpertParallel:
    """The experts of a layer spread over the ranks of a process group; one object serves all layers of a kind."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_experts: int,
        *,
        placement: Placement | None = None,
        payload: Payload | Literal["auto"] = "auto",
        combine_dtype: CombineFormat = "bf16",
        transport: str = "auto",
        capacity: Capacity | None = None,
        costs: Costs | None = None,
    ) -> None:
        """Made on all ranks, with the same arguments. Hidden states are on the current CUDA device with NCCL, else on the CPU.

        Args:
            group: a torch.distributed group, None for all ranks.
            num_experts: of the whole layer.
            placement: the experts of each rank (`distributed.placement`), in the order in which it holds them; by default neighbours together. An
                expert on several ranks takes its tokens in turn.
            payload: how hidden states travel: "bf16" (as they are), "fp8" (e4m3, one scale per token), "fp4" (NVFP4). "auto" takes the cheapest that
                changes nothing: as they are, or, of bf16, in the format into which the layer's `activations` would round them anyway.
            combine_dtype: how partial sums travel: as they are, or "fp8": e4m3 with one scale per row.
            transport: "auto", or the only one allowed: the group's backend ("nccl", "gloo"), or "symmetric": kernels that reach the memory of the
                other GPUs of the host.
            capacity: what the buffers of "symmetric" have room for, which are made here; without it, and where a call exceeds it, "auto" takes the
                group's backend.
            costs: what the choice goes by; the same on all ranks.

        Raises:
            InputError: no process group; an argument does not fit.
            UnsupportedError: "symmetric" where the ranks do not reach each other's memory, with the reason. "auto" logs it.

        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        >>> ep = ExpertParallel(None, num_experts=4)
        >>> w = halfbyte.ExpertWeights(torch.randn(4, 64, 32), torch.randn(4, 32, 32))
        >>> hidden, routing = torch.randn(3, 32), halfbyte.route(torch.randn(3, 4), top_k=2)
        >>> ep.forward(hidden, halfbyte.prepare(w), *routing).shape
        torch.Size([3, 32])
        >>> dist.destroy_process_group()
        """
        self.rank, self.num_ranks = ranks_of(group, WHERE)
        check_integers(WHERE, 1, num_experts=num_experts)
        check_name("payload", payload, (*PAYLOADS, "auto"), WHERE)
        check_name("combine_dtype", combine_dtype, COMBINE_FORMATS, WHERE)
        check_type(WHERE, (Costs, NoneType), costs=costs)
        check_type(WHERE, (Capacity, NoneType), capacity=capacity)
        self.group, self.num_experts, self.payload, self.combine_dtype = group, num_experts, payload, combine_dtype
        self.costs = Costs() if costs is None else costs
        on_cuda = backend_of(group, "cuda") == "nccl" and torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
        backend = backend_of(group, self.device.type)
        self.placement = contiguous(num_experts, self.num_ranks) if placement is None else id_lists(placement, WHERE)
        if len(self.placement) != self.num_ranks:
            raise InputError("placement does not fit the group", where=WHERE, given=f"{len(self.placement)} ranks", needed=f"{self.num_ranks}")
        self.expert_map = self._map()
        check_name("transport", transport, ("auto", backend, "symmetric"), WHERE)
        self.transport = transport
        self.transports: dict[str, Transport] = {backend: CollectiveTransport(group, self.device)}
        if transport != backend and capacity is not None:
            self._reach_peers(capacity)
        elif transport == "symmetric":
            raise InputError("no room for symmetric memory", where=WHERE, given=None, needed="capacity=")
        self._agreed: dict[int, torch.Tensor] = {}

    @property
    def local_experts(self) -> list[int]:
        """The ids of the experts that this rank holds, in their order."""
        return self.placement[self.rank]

    @property
    def local_range(self) -> range:
        """The same as a range, for `load_prepared`.

        Raises:
            UnsupportedError: they are not neighbours.
        """
        held = self.local_experts
        if not held or held != list(range(held[0], held[0] + len(held))):
            raise UnsupportedError("the experts of this rank are not neighbours", where=WHERE, given=held, next_step="load them one by one")
        return range(held[0], held[0] + len(held))

    def dispatch(
        self,
        hidden: Hidden,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        sizes: Sequence[int] | None = None,
        num_tokens: torch.Tensor | None = None,
        activations: ActivationFormat = "bf16",
        global_scale: torch.Tensor | None = None,
    ) -> Dispatched:
        """Move this rank's tokens to the ranks of their experts: all ranks call it, those without tokens too.

        Args:
            hidden: [T, H] floats, or quantised already: NVFP4, or fp8 with one scale per token or MXFP8 blocks.
            topk_ids: int [T, k], ids of the whole layer; -1 for none.
            topk_weights: float [T, k].
            sizes: T of every rank. By default the ranks tell each other, for which they wait; in a CUDA graph they must be given.
            num_tokens: int32 [1] on the device: how many of the T rows hold a token, where T is a capacity (in a CUDA graph).
            activations: what the layer will be called with; "auto" payloads follow it.
            global_scale: fp32 [], of "fp4": the decode multiplier that all ranks use, compared once; by default every row has its own.

        Raises:
            InputError: an argument does not fit; the ranks disagree.
            PeerError: another rank failed.
        """
        check_activations(activations, WHERE)
        tokens = self._tokens(hidden, topk_ids, topk_weights)
        rows = len(tokens.topk_ids)
        if num_tokens is not None:
            check_tensors(WHERE, num_tokens=num_tokens)
            if num_tokens.dtype != torch.int32 or num_tokens.shape != (1,) or num_tokens.device != self.device:
                given = f"{num_tokens.dtype} {tuple(num_tokens.shape)} on {num_tokens.device}"
                raise InputError("num_tokens does not fit", where=WHERE, given=given, needed=f"int32 (1,) on {self.device}")
        sizes = self._exchanged(rows) if sizes is None else as_sizes(sizes, WHERE)
        check_sizes(sizes, self.num_ranks, WHERE)
        if self.device.type != "cpu" and sizes[self.rank] != rows:  # on CPUs the ranks find out together
            raise InputError("sizes do not fit", where=WHERE, given=list(sizes), needed=f"{self.num_ranks} ranks, this one with {rows} rows")
        if global_scale is not None:
            self._agree_on(global_scale, global_scale)
        transport, wire = self._way(hidden, activations, global_scale, sizes)
        arrived = self.transports[transport].dispatch(wire, tokens, sizes, num_tokens)
        dtype = hidden.dtype if isinstance(hidden, torch.Tensor) else torch.bfloat16
        return Dispatched(*arrived, sizes, dtype, transport, wire.payload)

    def partial(self, sent: Dispatched, hidden: int) -> torch.Tensor | None:
        """Where the experts had best write their partial sums [R, hidden], so that `combine` copies nothing; None where it does not matter."""
        dtype = torch.bfloat16 if sent.payload != "bf16" else sent.dtype
        return self.transports[sent.transport].partial(sum(sent.sizes), hidden, dtype, self.combine_dtype)

    def combine(self, partial: torch.Tensor, sent: Dispatched, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of all ranks' partial [R, H] for this rank's tokens: [T, H]; all ranks call it.

        Args:
            partial: what `fused_moe` made of `sent`, with `expert_map` of this object; of one dtype on all ranks.
            sent: from `dispatch`.
            out: [T, H] contiguous, of any float dtype; by default of the dtype that `dispatch` was given.

        Raises:
            InputError: a shape, dtype or device does not fit.
            PeerError: another rank failed.
        """
        check_type("combine", Dispatched, sent=sent)
        check_tensor("partial", partial, FLOATS, sum(sent.sizes), None, self.device, "combine")
        rows = sent.sizes[self.rank]
        if out is None:
            out = partial.new_empty((rows, partial.shape[1]), dtype=sent.dtype)
        check_sums(out, rows, partial.shape[1], self.device, "combine")
        self.transports[sent.transport].combine(partial.contiguous(), sent.sizes, self.combine_dtype, out)
        return out

    def forward(
        self,
        hidden: Hidden,
        experts: PreparedExperts,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        activations: ActivationFormat | None = None,
        sizes: Sequence[int] | None = None,
        num_tokens: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The whole layer for this rank's tokens: dispatch, `fused_moe` of the experts held here, combine. All ranks call it.

        Args:
            experts: those that this rank holds, in the order of `local_experts`.
            activations: as in `fused_moe`, by default what the experts were prepared for.
            hidden, topk_ids, topk_weights, sizes, num_tokens: as in `dispatch`.
            out: as in `combine`.

        A payload of "fp4" takes the largest input scale of the experts as its global scale, where they have any.

        Raises:
            InputError, UnsupportedError: as `dispatch`, `fused_moe` and `combine`. The other ranks then raise PeerError with the same text.
        """
        with tell_others(self.group):
            check_prepared(experts, WHERE)
            if experts.num_experts != len(self.local_experts):
                given = f"{experts.num_experts} experts"
                raise InputError(
                    "experts do not fit the placement", where=WHERE, given=given, needed=f"{len(self.local_experts)} on rank {self.rank}"
                )
            activations = experts.activations if activations is None else activations
            scale = self.global_scale(experts)
            sent = self.dispatch(hidden, topk_ids, topk_weights, sizes=sizes, num_tokens=num_tokens, activations=activations, global_scale=scale)
            ids, weights, partial = sent.topk_ids, sent.topk_weights, self.partial(sent, experts.hidden)
            partial = fused_moe(sent.hidden, experts, ids, weights, activations=activations, expert_map=self.expert_map, out=partial)
            return self.combine(partial, sent, out=out)

    def global_scale(self, experts: PreparedExperts) -> torch.Tensor | None:
        """fp32 []: the largest input scale over all experts of the layer, which every rank has; None where there are none.

        Compared between the ranks the first time, for which they wait.
        """
        scales = experts.storage.tensors.get("w13_input_scale")
        if scales is None or self.payload in ("bf16", "fp8"):
            return None
        largest = scales.max()
        self._agree_on(scales, largest)
        return largest

    def _reach_peers(self, capacity: Capacity) -> None:
        reason = why_not(self.group, self.device)
        if reason is None:
            from halfbyte.distributed.symmetric import SymmetricTransport  # imports Triton

            memory = PeerMemory.allocate(self.group, self.device, capacity)
            self.transports["symmetric"] = SymmetricTransport(memory, self.placement, self.num_experts)
            return
        if self.transport == "symmetric":
            raise UnsupportedError("no symmetric memory", where=WHERE, given=reason, next_step="let transport be 'auto'")
        logger.warning("ExpertParallel: no symmetric memory, %s carries tokens instead: %s", backend_of(self.group, self.device.type), reason)

    def _map(self) -> ExpertMap:
        first, expected = 0, 0
        for rank, held in enumerate(self.placement):
            first = expected if rank == self.rank else first
            if held != list(range(expected, expected + len(held))):
                return ExpertMap.placed(self.placement, self.rank, self.num_experts, self.device)
            expected += len(held)
        if expected != self.num_experts:
            return ExpertMap.placed(self.placement, self.rank, self.num_experts, self.device)
        return ExpertMap(first)

    def _tokens(self, hidden: Hidden, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> Tokens:
        if not isinstance(hidden, QuantTensor | Fp8Tensor):
            check_tensor("hidden", hidden, FLOATS, None, None, self.device, WHERE)
        rows = len(hidden) if isinstance(hidden, torch.Tensor) else len(hidden.codes)
        check_tensor("topk_ids", topk_ids, IDS, rows, None, self.device, WHERE)
        check_tensor("topk_weights", topk_weights, FLOATS, rows, topk_ids.shape[1], self.device, WHERE)
        return Tokens(hidden, topk_ids.to(torch.int32), topk_weights.to(torch.float32))

    def _way(self, hidden: Hidden, activations: ActivationFormat, global_scale: torch.Tensor | None, sizes: Sequence[int]) -> tuple[str, Wire]:
        """Transport and wire of this call: the same on all ranks, because all that they depend on is."""
        own = Wire.of(hidden)
        wires = [own]
        if isinstance(hidden, torch.Tensor) and self.payload != "bf16":
            scaling: Literal["token", "mx"] = "mx" if activations == "mxfp8" else "token"
            equal: dict[str, Payload] = {"fp8": "fp8", "mxfp8": "fp8", "nvfp4": "fp4"}  # the format in which the first product sees them anyway
            if self.payload != "auto":
                payload: Payload | None = self.payload
            else:  # of rows that arrive quantised, h and the partial sums are in bf16
                payload = equal.get(activations) if hidden.dtype == torch.bfloat16 else None
            if payload is not None:
                quantised = Wire(payload, own.hidden, own.dtype, scaling, global_scale if payload == "fp4" else None)
                wires = [own, quantised] if self.payload == "auto" else [quantised]
        partial_bytes = own.hidden + 4 if self.combine_dtype == "fp8" else own.hidden * 2
        ways = {
            (name, wire): transport.why_not(wire, hidden, sizes)
            for name, transport in self.transports.items()
            for wire in wires
            if self.transport in ("auto", name)
        }
        possible = [way for way, reason in ways.items() if reason is None]
        if not possible:
            reasons = "; ".join(f"{name}, {wire.payload}: {reason}" for (name, wire), reason in ways.items())
            raise InputError("no way to send these tokens", where=WHERE, given=reasons, next_step="a larger capacity, or let transport be 'auto'")
        return cheapest(self.costs, possible, sizes, partial_bytes)

    def _exchanged(self, rows: int) -> tuple[int, ...]:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise InputError("sizes are needed in a CUDA graph", where=WHERE, given=None, needed="sizes=, rows of every rank")
        count = torch.tensor([rows], dtype=torch.int64, device=self.device)
        counts = count.new_empty(self.num_ranks)
        with naming_the_failed(self.group, WHERE):
            gather_equal(counts, count, self.group)
        return tuple(counts.tolist())

    def _agree_on(self, source: torch.Tensor, scale: torch.Tensor) -> None:
        """Compare a global scale between the ranks, once for each `source` of scales."""
        if self._agreed.get(id(source)) is source:
            return
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise InputError("global scales were not compared yet", where=WHERE, next_step="call the layer once before the CUDA graph is captured")
        check_tensors(WHERE, global_scale=scale)
        if scale.dtype != torch.float32 or scale.numel() != 1 or scale.device != self.device:
            given = f"{scale.dtype} {tuple(scale.shape)} on {scale.device}"
            raise InputError("global_scale does not fit", where=WHERE, given=given, needed=f"one float32 on {self.device}")
        gathered = all_gatherv(scale.reshape(1), [1] * self.num_ranks, group=self.group)
        assert isinstance(gathered, torch.Tensor)
        values = gathered.tolist()
        if any(value != values[0] for value in values):
            given = "; ".join(f"rank {rank}: {value:g}" for rank, value in enumerate(values))
            next_step = "load the input scales of all experts on every rank"
            raise InputError("ranks quantise by different global scales", where=WHERE, given=given, needed="one for all", next_step=next_step)
        self._agreed[id(source)] = source
