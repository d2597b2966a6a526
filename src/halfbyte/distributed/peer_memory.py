"""`PeerMemory`: one block of memory per rank that the GPUs of all ranks address directly, and its named regions.

It is torch's symmetric memory (backend "CUDA": peer access over NVLink; no NVSHMEM and no multicast), made once, outside the forward path. What
kernels get is a table of addresses (`kernels`).
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist

from halfbyte.arguments import check_integers
from halfbyte.errors import InputError

REGIONS = ("flags", "sizes", "codes", "block_scales", "row_scales", "topk_ids", "topk_weights", "partial", "stamps")
PHASES = 2  # dispatch and combine: each has a flag per rank
SYNC_WORDS = 2 * PHASES  # of a rank alone, int32: programs done and epoch of each phase
_ALIGNMENT = 256


@dataclass(frozen=True)
class Capacity:
    """What a block has room for; the same on all ranks.

    Attributes:
        tokens: rows of one rank in one call.
        hidden: H, a multiple of 16.
        top_k: experts per token.
        code_bytes: of a hidden state on its way, scales not counted: H / 2 is enough for FP4, H for fp8. By default 2 H: floats as they are.
    """

    tokens: int
    hidden: int
    top_k: int
    code_bytes: int | None = None

    def __post_init__(self) -> None:
        """Raises InputError for what is no size."""
        check_integers("Capacity", 1, tokens=self.tokens, hidden=self.hidden, top_k=self.top_k)
        if self.code_bytes is not None:
            check_integers("Capacity", 1, code_bytes=self.code_bytes)
        if self.hidden % 16:
            raise InputError("hidden does not fit", where="Capacity", given=self.hidden, needed="a multiple of 16")

    def offsets(self, num_ranks: int) -> dict[str, int]:
        """Where each region begins in a block; "end": the bytes of a block.

        >>> round(Capacity(4096, 7168, 8).offsets(2)["end"] / 2**20)
        228
        """
        rows, codes = num_ranks * self.tokens, 2 * self.hidden if self.code_bytes is None else self.code_bytes
        sizes = {
            "flags": PHASES * num_ranks * 4,
            "sizes": 2 * num_ranks * 4,  # of the last two dispatches: a rank may begin one before another has left the combine before it
            "codes": rows * codes,
            "block_scales": rows * (self.hidden // 16),
            "row_scales": rows * 4,
            "topk_ids": rows * self.top_k * 4,
            "topk_weights": rows * self.top_k * 4,
            "partial": rows * self.hidden * 2,
            "stamps": rows * 8,
        }
        offsets, end = {}, 0
        for region in REGIONS:
            offsets[region] = end
            end += -(-sizes[region] // _ALIGNMENT) * _ALIGNMENT
        return offsets | {"end": end}


class PeerMemory:
    """This rank's block, the addresses of all blocks, and what the kernels keep for themselves."""

    def __init__(self, block: torch.Tensor, addresses: list[int], rank: int, capacity: Capacity, keep_alive: object = None) -> None:
        """Over a block uint8 [offsets["end"]] of zeros; `addresses` of the blocks of all ranks as this one sees them, which `keep_alive` keeps."""
        self.keep_alive = keep_alive
        self.block, self.rank, self.num_ranks, self.capacity = block, rank, len(addresses), capacity
        self.offsets = capacity.offsets(self.num_ranks)
        self.table = torch.tensor([*addresses, *(self.offsets[region] for region in REGIONS)], dtype=torch.int64, device=block.device)
        self.sync = torch.zeros(SYNC_WORDS, dtype=torch.int32, device=block.device)
        self.needs = torch.full((capacity.tokens,), -1, dtype=torch.int32, device=block.device)

    @staticmethod
    def allocate(group: dist.ProcessGroup | None, device: torch.device, capacity: Capacity) -> PeerMemory:
        """A collective: all ranks of the group call it, with the same capacity."""
        import torch.distributed._symmetric_memory as symmetric_memory  # alpha in torch 2.11 to 2.15, and not in every build

        group = dist.group.WORLD if group is None else group
        assert group is not None
        with torch.cuda.device(device):
            block = symmetric_memory.empty(capacity.offsets(group.size())["end"], dtype=torch.uint8, device=device)
            handle = symmetric_memory.rendezvous(block, group)
            block.zero_()
            torch.cuda.synchronize(device)
            dist.barrier(group)
        shift = block.data_ptr() - handle.buffer_ptrs[handle.rank]  # the block may lie inside an allocation, everywhere at the same place
        return PeerMemory(block, [address + shift for address in handle.buffer_ptrs], handle.rank, capacity, handle)

    def view(self, region: str, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """[rows, width] at the beginning of a region of this rank's block."""
        first = self.offsets[region]
        return self.block[first : first + rows * width * dtype.itemsize].view(dtype).view(rows, width)


def why_not(group: dist.ProcessGroup | None, device: torch.device) -> str | None:
    """Why the ranks cannot reach each other's memory, the same answer on all of them; None where they can. A collective."""
    mine = (socket.gethostname(), None if device.type != "cuda" else str(torch.cuda.get_device_properties(device).uuid), _unreachable(device))
    everyone: list[tuple[str, str | None, str | None]] = [mine] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    if len(everyone) == 1:
        return "one rank has nobody to reach"
    hosts = {host for host, _, _ in everyone}
    if len(hosts) > 1:
        return f"the ranks are on {len(hosts)} hosts"
    if len({gpu for _, gpu, _ in everyone}) < len(everyone):
        return "not every rank has a GPU of its own"
    reasons = [f"rank {rank}: {reason}" for rank, (_, _, reason) in enumerate(everyone) if reason]
    return "; ".join(reasons) or None


def _unreachable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"its device is {device.type}"
    try:
        import torch.distributed._symmetric_memory
    except ImportError as error:
        return f"this torch has no symmetric memory ({error})"
    own = torch.cuda.current_device() if device.index is None else device.index
    missing = [other for other in range(torch.cuda.device_count()) if other != own and not torch.cuda.can_device_access_peer(own, other)]
    return f"GPU {own} has no peer access to {missing}" if missing else None
