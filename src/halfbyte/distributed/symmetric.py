"""`SymmetricTransport`: dispatch and combine as kernels that write to and read from the memory of the other GPUs of the host.

    dispatch   one kernel: quantise a row, store it in every rank's buffer, say so, wait for the rows of the others
    combine    one kernel: say that the partial sums are ready, wait for the others, read their rows of own tokens and add them up in order
               ("fp8": quantise each row, store it in its owner's buffer, and add up those that arrive)

Nothing waits on the host, sizes may be given on the device, and no address changes: a call can be captured in a CUDA graph. Hidden states, ids and
weights that arrive, and the partial sums that experts write, lie in the buffers: they are good until the next dispatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

from halfbyte.arguments import dense_rows
from halfbyte.device import Target, current
from halfbyte.distributed.exchange import exchange_codes
from halfbyte.distributed.kernels import pull_rows, push_rows
from halfbyte.distributed.peer_memory import PeerMemory
from halfbyte.distributed.placement import Placement
from halfbyte.distributed.transport import CombineFormat, Tokens
from halfbyte.distributed.wire import Wire
from halfbyte.errors import InputError
from halfbyte.kernels.problem import Hidden
from halfbyte.kernels.quantizers.blocks import INTERPRETED, converts_e4m3

PUSH_PROGRAMS, PULL_PROGRAMS = 4, 8  # per multiprocessor, at most; of the first kind all are on it together (`_row_options`)
SENDERS, ADDERS = 3, 2  # per multiprocessor, at most, where partial sums travel in e4m3: all are on it together (`_exchange`)
PULL_BLOCK = 1024  # columns per program and step: eight per thread, one load of 16 bytes from each rank
WORTH_CHOOSING = 0.95  # below this share of ranks that an average token needs, rows go only to those


class SymmetricTransport:
    """Over `PeerMemory`; one per group serves all layers."""

    name = "symmetric"

    def __init__(self, memory: PeerMemory, placement: Placement, num_experts: int) -> None:
        self.memory, self.num_experts = memory, num_experts
        self._needs_combine = False
        world = memory.num_ranks
        self.chooses = 1 - (1 - 1 / world) ** memory.capacity.top_k < WORTH_CHOOSING
        """Whether rows go only to ranks that hold one of their experts, instead of to all."""
        self._placement, self._copies = _copies_table(placement, num_experts, memory.block.device) if self.chooses else (memory.needs, 0)

    def why_not(self, wire: Wire, hidden: Hidden, sizes: Sequence[int]) -> str | None:
        """Why such a call cannot go this way; None where it can. All ranks say the same."""
        capacity = self.memory.capacity
        if not isinstance(hidden, torch.Tensor) or wire.dtype not in (torch.bfloat16, torch.float16):
            return "hidden is not bfloat16 or float16"
        if wire.hidden != capacity.hidden:
            return f"hidden is {wire.hidden} wide, the buffers {capacity.hidden}"
        if max(sizes) > capacity.tokens:
            return f"{max(sizes)} tokens on a rank exceed the capacity of {capacity.tokens}"
        codes = wire.parts[0].row_bytes
        if capacity.code_bytes is not None and codes > capacity.code_bytes:
            return f"{codes} bytes of codes per row exceed the capacity of {capacity.code_bytes}"
        return None

    def dispatch(self, wire: Wire, tokens: Tokens, sizes: Sequence[int], num_tokens: torch.Tensor | None) -> Tokens:
        reason = self.why_not(wire, tokens.hidden, sizes)
        if reason is None and tokens.topk_ids.shape[1] != self.memory.capacity.top_k:
            reason = f"{tokens.topk_ids.shape[1]} experts per token, the buffers are for {self.memory.capacity.top_k}"
        if reason is not None:
            raise InputError(reason, where="symmetric dispatch", next_step="make ExpertParallel with a larger Capacity, or let transport be 'auto'")
        if self._needs_combine:
            raise InputError("a dispatch before the combine of the last one", where="symmetric dispatch", needed="dispatch and combine in turns")
        self._needs_combine = True
        self.push(wire, tokens, sizes, num_tokens)
        return self.arrived(wire, sum(sizes))

    def push(self, wire: Wire, tokens: Tokens, sizes: Sequence[int], num_tokens: torch.Tensor | None) -> None:
        """Launch the kernel of a dispatch."""
        memory, hidden = self.memory, tokens.hidden
        assert isinstance(hidden, torch.Tensor)
        rows, first_row = sizes[memory.rank], sum(sizes[: memory.rank])
        scale = memory.table if wire.global_scale is None else wire.global_scale
        self._launch(
            push_rows, min(rows, PUSH_PROGRAMS * self._num_sms),
            (
                _words(hidden), scale, scale, tokens.topk_ids.contiguous(), tokens.topk_weights.contiguous(),
                memory.sync if num_tokens is None else num_tokens, self._placement, memory.needs, memory.table, memory.sync,
                first_row, rows, memory.rank, self.num_experts,
            ),
            {
                "FORMAT": _kernel_format(wire), "HIDDEN": wire.hidden, "TOP_K": memory.capacity.top_k, "WORLD": memory.num_ranks,
                "COPIES": self._copies, "COUNTED": num_tokens is not None, "BF16": hidden.dtype == torch.bfloat16, "NATIVE": converts_e4m3(),
            },
            _row_options(wire.hidden),
        )  # fmt: skip

    def arrived(self, wire: Wire, rows: int) -> Tokens:
        """What lies in the buffers."""
        view, top_k = self.memory.view, self.memory.capacity.top_k
        regions = {"bf16": ["codes"], "fp8": ["codes", "row_scales" if wire.scaling == "token" else "block_scales"]}
        names = regions.get(wire.payload, ["codes", "block_scales", "row_scales"])
        parts = [view(name, rows, part.width, part.dtype) for name, part in zip(names, wire.parts, strict=False)]
        return Tokens(wire.decode(parts), view("topk_ids", rows, top_k, torch.int32), view("topk_weights", rows, top_k, torch.float32))

    def partial(self, num_rows: int, hidden: int, dtype: torch.dtype, format: CombineFormat) -> torch.Tensor | None:
        return self.memory.view("partial", num_rows, hidden, dtype) if format == "bf16" and dtype.itemsize == 2 else None

    def combine(self, partial: torch.Tensor, sizes: Sequence[int], format: CombineFormat, out: torch.Tensor) -> None:
        if partial.dtype not in (torch.bfloat16, torch.float16):
            raise InputError("partial sums are not 16-bit floats", where="symmetric combine", given=partial.dtype, needed="bfloat16 or float16")
        self._needs_combine = False
        if format == "fp8":
            self._exchange(partial, sizes, out)
            return
        buffer = self.memory.view("partial", len(partial), partial.shape[1], partial.dtype)
        if partial.data_ptr() != buffer.data_ptr():
            buffer.copy_(partial)
        self._pull(partial, sizes, out)

    def _pull(self, partial: torch.Tensor, sizes: Sequence[int], out: torch.Tensor) -> None:
        """Launch the kernel of a combine; partial sums are in the buffers."""
        memory, hidden = self.memory, partial.shape[1]
        rows, first_row = sizes[memory.rank], sum(sizes[: memory.rank])
        self._launch(
            pull_rows, min(rows * triton.cdiv(hidden, PULL_BLOCK), PULL_PROGRAMS * self._num_sms),
            (out, memory.needs, memory.table, memory.sync, first_row, rows, memory.rank),
            {"HIDDEN": hidden, "WORLD": memory.num_ranks, "SPARSE": self.chooses, "BLOCK": PULL_BLOCK, "BF16": partial.dtype == torch.bfloat16},
            {"num_warps": 4, "enable_fp_fusion": False},  # the same bits as the collectives give
        )  # fmt: skip

    def _exchange(self, partial: torch.Tensor, sizes: Sequence[int], out: torch.Tensor) -> None:
        """Launch the kernel of a combine in e4m3."""
        memory, hidden = self.memory, partial.shape[1]
        rows = max(sizes)
        senders = max(1, min(rows * (memory.num_ranks - 1), SENDERS * self._num_sms))
        adders = max(1, min(rows, ADDERS * self._num_sms))
        self._launch(
            exchange_codes, senders + adders,
            (partial, _words(partial), out, self._placement, memory.needs, memory.table, memory.sync, rows, memory.rank, self.num_experts, senders),
            {
                "HIDDEN": hidden, "TOP_K": memory.capacity.top_k, "WORLD": memory.num_ranks, "COPIES": self._copies,
                "BF16": partial.dtype == torch.bfloat16, "NATIVE": converts_e4m3(),
            },
            _row_options(hidden) | {"maxnreg": 48},
        )  # fmt: skip

    @property
    def _num_sms(self) -> int:
        return 1 if INTERPRETED else Target.of(self.memory.block.device).num_sms

    def _launch(self, kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any], options: dict[str, Any]) -> None:
        with current(self.memory.block.device):
            kernel[(max(1, programs),)](*arguments, **constants, ASM=not INTERPRETED, **({} if INTERPRETED else options))


def _kernel_format(wire: Wire) -> str:
    if wire.payload == "fp4":
        return "nvfp4 by row" if wire.global_scale is None else "nvfp4"
    return "copy" if wire.payload == "bf16" else "fp8" if wire.scaling == "token" else "mxfp8"


def _row_options(hidden: int) -> dict[str, Any]:
    """A program holds a row, two groups of 16 columns per thread, and PUSH_PROGRAMS of them fit; no fusion: the codec rounds every product."""
    return {"num_warps": min(8, max(1, triton.next_power_of_2(hidden // 16) // 32)), "enable_fp_fusion": False, "maxnreg": 64}


def _words(rows: torch.Tensor) -> torch.Tensor:
    """[R, H] 16-bit as int32, 16 bytes at a time."""
    return dense_rows(rows).view(torch.int32)


def _copies_table(placement: Placement, num_experts: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """int32 [E, 1 + copies]: how many copies of each expert there are, and their ranks, in the order in which tokens take turns (`ExpertMap`)."""
    ranks: list[list[int]] = [[] for _ in range(num_experts)]
    for rank, held in enumerate(placement):
        for expert in held:
            ranks[expert].append(rank)
    most = max(map(len, ranks))
    return torch.tensor([[len(holders), *holders, *[0] * (most - len(holders))] for holders in ranks], dtype=torch.int32, device=device), most
