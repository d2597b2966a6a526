"""NCCL and symmetric memory on two GPUs and more: the same bits as the collectives, in CUDA graphs too, whatever the numbers of tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close_rel, assert_equal_bits
from ranks import run_ranks

import halfbyte as hb
from halfbyte.distributed import all_gatherv, reduce_scatterv
from halfbyte.distributed.peer_memory import Capacity, PeerMemory
from halfbyte.distributed.placement import balanced
from halfbyte.distributed.transport import CollectiveTransport, Tokens
from halfbyte.distributed.wire import Wire
from halfbyte.errors import InputError
from halfbyte.moe.parallel import ExpertParallel

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, TOKENS = 16, 1024, 256, 4, 96
WORLD = min(torch.cuda.device_count(), 8) if torch.cuda.is_available() else 0
REPLAYS = 1000


def on_several_gpus(test: Callable) -> Callable:
    return pytest.mark.gpu(pytest.mark.skipif(WORLD < 2, reason="fewer than two CUDA GPUs")(test))


def sizes_of(world: int) -> list[list[int]]:
    """Even, skewed, partly and wholly empty."""
    return [
        [TOKENS] * world,
        [TOKENS - 7 * rank for rank in range(world)],
        [TOKENS if rank % 2 else 0 for rank in range(world)],
        [1] * world,
        [0] * world,
    ]


def make_tokens(rows: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tokens:
    random = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(rows, HIDDEN, generator=random, device="cuda") * torch.rand(rows, 1, generator=random, device="cuda") * 10
    ids = torch.rand(rows, EXPERTS, generator=random, device="cuda").argsort(dim=1)[:, :TOP_K].int()
    return Tokens(hidden.to(dtype), ids, torch.rand(rows, TOP_K, generator=random, device="cuda"))


def check_nccl(rank: int, world: int) -> None:
    for sizes in sizes_of(world):
        given = [
            torch.randint(0, 255, (rows, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(other)) for other, rows in enumerate(sizes)
        ]
        floats = [torch.randn(sum(sizes), 64, generator=torch.Generator().manual_seed(other)).bfloat16() for other in range(world)]
        first = sum(sizes[:rank])
        mine = slice(first, first + sizes[rank])
        in_order = torch.zeros(sum(sizes), 64)
        for other in floats:
            in_order += other.float()
        tensors = [given[rank].cuda(), given[rank].cuda()[:, :12].contiguous().view(torch.float32)]
        gathered, added = [], []

        def call() -> None:
            gathered[:] = all_gatherv(tensors, sizes, check=False)  # noqa: B023
            summed = floats_here  # noqa: B023
            added[:] = [reduce_scatterv(summed, sizes), reduce_scatterv(summed, sizes, deterministic=True)]  # noqa: B023

        floats_here = floats[rank].cuda()
        call()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            call()
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        assert_equal_bits(gathered[0].cpu(), torch.cat(given))
        assert_equal_bits(gathered[1].cpu(), torch.cat([g[:, :12].contiguous().view(torch.float32) for g in given]))
        assert_equal_bits(added[1].cpu(), in_order[mine].bfloat16())
        assert_close_rel(added[0].float().cpu(), in_order[mine], token=2e-2, overall=1e-2)
    with pytest.raises(InputError, match="disagree about the sizes"):
        all_gatherv(torch.ones(1, 2, device="cuda"), [1] * (world - 1) + [1 + rank], check=True)


def wires(dtype: torch.dtype) -> list[Wire]:
    fp8 = [Wire("fp8", HIDDEN, dtype), Wire("fp8", HIDDEN, dtype, scaling="mx")]
    return [
        Wire("bf16", HIDDEN, dtype),
        *fp8,
        Wire("fp4", HIDDEN, dtype),
        Wire("fp4", HIDDEN, dtype, global_scale=torch.tensor(0.004, device="cuda")),
    ]


def bits_of(hidden: object) -> list[torch.Tensor]:
    if isinstance(hidden, torch.Tensor):
        return [hidden.view(torch.uint8)]
    parts = [
        hidden.codes,
        hidden.scales,
        *([hidden.global_scale.view(-1, 1)] if getattr(hidden, "global_scale", None) is not None and hidden.global_scale.ndim else []),
    ]
    return [part.view(torch.uint8) for part in parts]


def check_peers(rank: int, world: int, chooses: bool) -> None:
    from halfbyte.distributed import symmetric

    symmetric.WORTH_CHOOSING = 2.0 if chooses else 0.0
    placement = balanced([9, *[1] * (EXPERTS - 1)], world, num_redundant=world)
    expert_map = hb.ExpertMap.placed(placement, rank, EXPERTS, "cuda")
    memory = PeerMemory.allocate(None, torch.device("cuda", rank), Capacity(TOKENS, HIDDEN, TOP_K))
    peers, nccl = symmetric.SymmetricTransport(memory, placement, EXPERTS), CollectiveTransport(None, torch.device("cuda"))
    step = 0
    for dtype in (torch.bfloat16, torch.float16):
        for wire in wires(dtype)[:: 1 if dtype == torch.bfloat16 else 4]:
            for sizes in sizes_of(world):
                for format in ("bf16", "fp8"):
                    step += 1
                    count = torch.tensor([max(0, sizes[rank] - step % 3)], dtype=torch.int32, device="cuda") if step % 2 else None
                    tokens = make_tokens(sizes[rank], 100 * step + rank, dtype)
                    wanted, got = (way.dispatch(wire, tokens, sizes, count) for way in (nccl, peers))
                    assert_equal_bits(got.topk_ids, wanted.topk_ids)
                    assert_equal_bits(got.topk_weights, wanted.topk_weights)
                    held = (expert_map.local(got.topk_ids) >= 0).any(dim=1)
                    rows = held if chooses else torch.ones_like(held)
                    for ours, theirs in zip(bits_of(got.hidden), bits_of(wanted.hidden), strict=True):
                        assert_equal_bits(ours[rows], theirs[rows])
                    partial = torch.randn(sum(sizes), HIDDEN, device="cuda", generator=torch.Generator("cuda").manual_seed(world * step + rank)).to(
                        dtype
                    )
                    partial[~held] = 0.0
                    out, expected = (torch.full((sizes[rank], HIDDEN), torch.nan, device="cuda", dtype=dtype) for _ in range(2))
                    nccl.combine(partial, sizes, format, expected)
                    peers.combine(partial, sizes, format, out)
                    assert_equal_bits(out, expected)
                    assert not out.isnan().any()


def make_layer(rank: int, world: int, layout: str) -> tuple[hb.PreparedExperts, hb.PreparedExperts]:
    random = torch.Generator().manual_seed(0)
    w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=random) / 32
    w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=random) / 16
    w = hb.ExpertWeights(hb.quantize(w13, hb.NVFP4), hb.quantize(w2, hb.NVFP4)).to("cuda")
    size = EXPERTS // world
    return tuple(hb.prepare(part, layout) for part in (w, w[rank * size : rank * size + size]))


def check_layer(rank: int, world: int, layout: str = "auto") -> None:
    whole, experts = make_layer(rank, world, layout)
    capacity = Capacity(TOKENS, HIDDEN, TOP_K)
    for payload, activations, combine in (("bf16", "bf16", "bf16"), ("fp4", "bf16", "fp8")):
        options = {"payload": payload, "combine_dtype": combine}
        peers, nccl = (ExpertParallel(None, EXPERTS, transport=name, capacity=capacity, **options) for name in ("symmetric", "nccl"))
        for sizes in (sizes_of(world)[0], sizes_of(world)[2], sizes_of(world)[4]):
            tokens = make_tokens(sizes[rank], rank)
            results = [ep.forward(tokens.hidden, experts, *tokens[1:], activations=activations, sizes=sizes) for ep in (peers, nccl)]
            assert_equal_bits(*results)
            if payload == "bf16":
                assert_close_rel(results[0].float(), hb.fused_moe(tokens.hidden, whole, *tokens[1:]).float())
        check_graph(rank, world, peers, nccl, experts, activations)
    with pytest.raises(InputError, match="97 tokens on a rank exceed the capacity of 96"):
        peers.dispatch(*make_tokens(TOKENS + 1, 0), sizes=[TOKENS + 1] * world)


def check_graph(rank: int, world: int, peers: ExpertParallel, nccl: ExpertParallel, experts: hb.PreparedExperts, activations: str) -> None:
    """A graph of two layers, replayed with other tokens and other numbers of them each time, against one over the collectives."""
    sizes = [TOKENS] * world
    static, count = make_tokens(TOKENS, 0), torch.zeros(1, dtype=torch.int32, device="cuda")
    options = {"sizes": sizes, "num_tokens": count, "activations": activations}

    def layers(ep: ExpertParallel) -> torch.Tensor:
        first = ep.forward(static.hidden, experts, *static[1:], **options)
        return ep.forward(first, experts, *static[1:], **options)

    graphs, outs = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for ep, graph in zip((peers, nccl), graphs, strict=True):
        layers(ep)
        torch.cuda.synchronize()
        dist.barrier()
        with torch.cuda.graph(graph):
            outs.append(layers(ep))
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    pool = [make_tokens(TOKENS, 1000 * rank + seed) for seed in range(8)]
    for replay in range(REPLAYS):
        count.fill_((replay * (2 * rank + 1) * 7) % (TOKENS + 1) if replay % 5 else 0 if rank % 2 else TOKENS)
        for target, source in zip(static, pool[replay % 8], strict=True):
            target.copy_(source)
        static.hidden.mul_(1 + replay % 3)
        for graph in graphs:
            graph.replay()
        different += (outs[0].view(torch.int16) != outs[1].view(torch.int16)).sum()
    assert different.item() == 0 and not outs[0].isnan().any()


@on_several_gpus
def test_nccl() -> None:
    run_ranks(check_nccl, WORLD, backend="nccl")


@on_several_gpus
@pytest.mark.parametrize("chooses", [False, True])
def test_peers_bring_what_nccl_brings(chooses: bool) -> None:
    run_ranks(check_peers, WORLD, chooses, backend="nccl")


@on_several_gpus
def test_layers_and_a_thousand_replays() -> None:
    run_ranks(check_layer, WORLD, backend="nccl")
