"""The symmetric-memory kernels with two, four and eight ranks that share one GPU: a block of memory and a stream each.

What the ranks of several GPUs would do, without NVLink. The programs of all ranks must be on the GPU together, with room for the experts' kernels
beside them, so each rank gets few.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers import assert_equal_bits
from ranks import run_ranks

import halfbyte as hb
from halfbyte.distributed.peer_memory import Capacity, PeerMemory
from halfbyte.distributed.placement import Placement, balanced, contiguous
from halfbyte.distributed.transport import Tokens
from halfbyte.distributed.wire import Wire

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, TOKENS = 16, 1024, 256, 4, 48

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


class SharedGpu:
    """Transports of so many ranks over blocks of one GPU's memory."""

    def __init__(self, placement: Placement, hidden: int = HIDDEN, chooses: bool = False, programs: int = 1) -> None:
        from halfbyte.distributed import symmetric

        class FewPrograms(symmetric.SymmetricTransport):
            _num_sms = programs

        world, capacity = len(placement), Capacity(TOKENS, hidden, TOP_K)
        blocks = [torch.zeros(capacity.offsets(world)["end"], dtype=torch.uint8, device="cuda") for _ in range(world)]
        addresses = [block.data_ptr() for block in blocks]
        memories = [PeerMemory(block, addresses, rank, capacity) for rank, block in enumerate(blocks)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(symmetric, "WORTH_CHOOSING", 2.0 if chooses else 0.0)
            self.ranks = [FewPrograms(memory, placement, EXPERTS) for memory in memories]
        self.maps = [hb.ExpertMap.placed(placement, rank, EXPERTS, "cuda") for rank in range(world)]
        self.streams = [torch.cuda.Stream() for _ in range(world)]

    @contextmanager
    def together(self) -> Iterator[Callable[[int], torch.cuda.StreamContext]]:
        """Streams that begin after what has been launched and are waited for at the end."""
        current = torch.cuda.current_stream()
        for stream in self.streams:
            stream.wait_stream(current)
        yield lambda rank: torch.cuda.stream(self.streams[rank])
        for stream in self.streams:
            current.wait_stream(stream)


def make_tokens(rows: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tokens:
    random = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(rows, HIDDEN, generator=random, device="cuda") * torch.rand(rows, 1, generator=random, device="cuda") * 10
    ids = torch.rand(rows, EXPERTS, generator=random, device="cuda").argsort(dim=1)[:, :TOP_K].int()
    return Tokens(hidden.to(dtype), ids, torch.rand(rows, TOP_K, generator=random, device="cuda"))


def added_up(partial: list[torch.Tensor], rank: int, rows: slice, format: str) -> torch.Tensor:
    """What `Transport.combine` defines."""
    total = torch.zeros(partial[rank][rows].shape, dtype=torch.float32, device="cuda")
    for other, sums in enumerate(partial):
        total += sums[rows].float() if other == rank or format == "bf16" else hb.quantize_fp8(sums[rows]).dequantize(torch.float32)
    return total.to(partial[rank].dtype)


def slices(sizes: list[int]) -> list[slice]:
    return [slice(sum(sizes[:rank]), sum(sizes[: rank + 1])) for rank in range(len(sizes))]


def bits_of(hidden: object) -> list[torch.Tensor]:
    parts = [hidden] if isinstance(hidden, torch.Tensor) else [hidden.codes, hidden.scales]
    return [part.view(torch.uint8) for part in parts]


def check_rows_and_sums(_: int, __: int, world: int, chooses: bool) -> None:
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"  # before CUDA begins: a queue for each stream
    placement = balanced([9, *[1] * (EXPERTS - 1)], world, num_redundant=world)
    gpu = SharedGpu(placement, chooses=chooses)
    scale = torch.tensor(0.004, device="cuda")
    wires = [
        Wire("bf16", HIDDEN),
        Wire("fp8", HIDDEN),
        Wire("fp8", HIDDEN, scaling="mx"),
        Wire("fp4", HIDDEN),
        Wire("fp4", HIDDEN, global_scale=scale),
    ]
    skewed, empty = [max(1, TOKENS >> rank) for rank in range(world)], [TOKENS if rank % 2 else 0 for rank in range(world)]
    all_sizes = ([TOKENS] * world, skewed, empty, [1] * world, [0] * world)
    for step, (wire, sizes, format) in enumerate(itertools.product(wires, all_sizes, ("bf16", "fp8"))):
        tokens = [make_tokens(rows, 100 * step + rank) for rank, rows in enumerate(sizes)]
        arrived = list(tokens)
        torch.cuda.synchronize()
        with gpu.together() as on:
            for rank, peer in enumerate(gpu.ranks):
                with on(rank):
                    arrived[rank] = peer.dispatch(wire, tokens[rank], sizes, None)
        ids, weights = torch.cat([t.topk_ids for t in tokens]), torch.cat([t.topk_weights for t in tokens])
        hidden = wire.decode(wire.encode(torch.cat([t.hidden for t in tokens])))
        partial = []
        for rank, got in enumerate(arrived):
            assert_equal_bits(got.topk_ids, ids)
            assert_equal_bits(got.topk_weights, weights)
            held = (gpu.maps[rank].local(ids) >= 0).any(dim=1)
            rows = held if chooses else torch.ones_like(held)
            for ours, theirs in zip(bits_of(got.hidden), bits_of(hidden), strict=True):
                assert_equal_bits(ours[rows], theirs[rows])
            sums = torch.randn(sum(sizes), HIDDEN, device="cuda", generator=torch.Generator("cuda").manual_seed(world * step + rank)).bfloat16()
            partial.append(torch.where(held.unsqueeze(1), sums, 0.0))
        outs = [torch.full((rows, HIDDEN), torch.nan, device="cuda", dtype=torch.bfloat16) for rows in sizes]
        torch.cuda.synchronize()
        with gpu.together() as on:
            for rank, peer in enumerate(gpu.ranks):
                with on(rank):
                    peer.combine(partial[rank], sizes, format, outs[rank])
        for rank, own in enumerate(slices(sizes)):
            assert_equal_bits(outs[rank], added_up(partial, rank, own, format))


def check_replays(_: int, __: int, payload: str, format: str, activations: str) -> None:
    """Dispatch, experts and combine of two ranks as one graph; each time other tokens, and other numbers of them, sometimes none on a rank."""
    world = 2  # nobody promises that branches of a graph run together: two do
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
    random = torch.Generator().manual_seed(0)
    w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=random) / 32
    w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=random) / 16
    w = hb.ExpertWeights(hb.quantize(w13, hb.NVFP4), hb.quantize(w2, hb.NVFP4)).to("cuda")
    size, wire, sizes = EXPERTS // world, Wire(payload, HIDDEN), [TOKENS] * world
    experts = [hb.prepare(w[rank * size : rank * size + size], activations=activations) for rank in range(world)]
    gpu = SharedGpu(contiguous(EXPERTS, world))
    static = [make_tokens(TOKENS, rank) for rank in range(world)]
    arrived = list(static)
    counts = [torch.zeros(1, dtype=torch.int32, device="cuda") for _ in range(world)]

    def partial_of(rank: int, tokens: Tokens) -> torch.Tensor:
        return hb.fused_moe(tokens.hidden, experts[rank], tokens.topk_ids, tokens.topk_weights, expert_map=gpu.maps[rank])

    def layer() -> list[torch.Tensor]:
        """Step by step: before the graph is recorded nothing may be compiled or loaded while a rank waits for another."""
        outs = [torch.empty_like(tokens.hidden) for tokens in static]
        partial: list[torch.Tensor] = []
        with gpu.together() as on:
            for rank, peer in enumerate(gpu.ranks):
                with on(rank):
                    arrived[rank] = peer.dispatch(wire, static[rank], sizes, counts[rank])
            for rank in range(world):
                with on(rank):
                    partial.append(partial_of(rank, arrived[rank]))
            for rank, peer in enumerate(gpu.ranks):
                with on(rank):
                    peer.combine(partial[rank], sizes, format, outs[rank])
        return outs

    def expected() -> list[torch.Tensor]:
        ids = [torch.where(torch.arange(TOKENS, device="cuda").unsqueeze(1) < count, t.topk_ids, -1) for t, count in zip(static, counts, strict=True)]
        hidden = wire.decode(wire.encode(torch.cat([t.hidden for t in static])))
        everything = Tokens(hidden, torch.cat(ids), torch.cat([t.topk_weights for t in static]))
        partial = [partial_of(rank, everything) for rank in range(world)]
        return [added_up(partial, rank, own, format) for rank, own in enumerate(slices(sizes))]

    expected()  # compiles
    layer()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        outs = layer()
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    pool = [[make_tokens(TOKENS, 1000 * rank + seed) for seed in range(8)] for rank in range(world)]
    for replay in range(1000):
        for rank in range(world):
            counts[rank].fill_((replay * (2 * rank + 1) * 7) % (TOKENS + 1) if replay % 5 else 0 if rank % 2 else TOKENS)
            for target, source in zip(static[rank], pool[rank][replay % 8], strict=True):
                target.copy_(source)
            static[rank].hidden.mul_(1 + replay % 3)
        graph.replay()
        for out, wanted in zip(outs, expected(), strict=True):
            different += (out.view(torch.int16) != wanted.view(torch.int16)).sum()
    assert different.item() == 0


@pytest.mark.parametrize(("world", "chooses"), [(2, False), (4, False), (4, True), (8, True)])
def test_rows_and_sums_are_those_of_the_definition(world: int, chooses: bool) -> None:
    run_ranks(check_rows_and_sums, 1, world, chooses)


def test_replays_of_a_layer() -> None:
    run_ranks(check_replays, 1, "fp4", "fp8", "bf16")
