"""The symmetric-memory kernels: several processes in Triton's interpreter over shared files, and compiled without a GPU.

On GPUs see test_on_one_gpu.py and test_on_gpus.py.

Whatever goes over peers' memory must be, bit for bit, what the collectives bring.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from compile_only import compile_for
from helpers import assert_equal_bits
from interpreted import not_interpreted
from ranks import run_ranks

import halfbyte as hb
from halfbyte.distributed.collectives import add_in_order
from halfbyte.distributed.peer_memory import Capacity, PeerMemory, why_not
from halfbyte.distributed.placement import balanced, round_robin
from halfbyte.distributed.transport import CollectiveTransport, Tokens, add_codes_in_order
from halfbyte.distributed.wire import Wire
from halfbyte.errors import InputError
from halfbyte.moe.parallel import ExpertParallel

EXPERTS, HIDDEN, TOP_K, TOKENS = 6, 96, 3, 5


def shared_memory(folder: str, rank: int, world: int, capacity: Capacity) -> PeerMemory:
    """Blocks in files that every process maps, each at addresses of its own."""
    size = capacity.offsets(world)["end"]
    own = Path(folder) / f"block{rank}"
    own.write_bytes(bytes(size))
    dist.barrier()
    blocks = [torch.from_file(f"{folder}/block{other}", shared=True, size=size, dtype=torch.uint8) for other in range(world)]
    return PeerMemory(blocks[rank], [block.data_ptr() for block in blocks], rank, capacity, blocks)


def make_tokens(rows: int, rank: int, step: int, dtype: torch.dtype = torch.bfloat16) -> Tokens:
    random = torch.Generator().manual_seed(1000 * step + rank)
    hidden = torch.randn(rows, HIDDEN, generator=random) * torch.logspace(-3, 3, max(rows, 1))[:rows].unsqueeze(1)
    ids = torch.rand(rows, EXPERTS, generator=random).argsort(dim=1)[:, :TOP_K].int() - (torch.rand(rows, 1, generator=random) < 0.2).int()
    return Tokens(hidden.to(dtype), ids, torch.rand(rows, TOP_K, generator=random))


def same_rows(got: Tokens, wanted: Tokens, rows: torch.Tensor) -> None:
    """Equal ids and weights, and equal bits of the hidden states of `rows`."""
    assert_equal_bits(got.topk_ids, wanted.topk_ids)
    assert_equal_bits(got.topk_weights, wanted.topk_weights)
    assert type(got.hidden) is type(wanted.hidden)
    if isinstance(got.hidden, torch.Tensor):
        assert_equal_bits(got.hidden[rows], wanted.hidden[rows])
        return
    assert_equal_bits(got.hidden.codes.view(torch.uint8)[rows], wanted.hidden.codes.view(torch.uint8)[rows])
    assert_equal_bits(got.hidden.scales.view(torch.uint8)[rows], wanted.hidden.scales.view(torch.uint8)[rows])
    scale = getattr(wanted.hidden, "global_scale", None)
    if scale is not None and scale.ndim:
        assert_equal_bits(got.hidden.global_scale[rows], scale[rows])


def wires(dtype: torch.dtype) -> list[Wire]:
    scale = torch.tensor(0.003)
    fp8 = [Wire("fp8", HIDDEN, dtype), Wire("fp8", HIDDEN, dtype, scaling="mx")]
    return [Wire("bf16", HIDDEN, dtype), *fp8, Wire("fp4", HIDDEN, dtype), Wire("fp4", HIDDEN, dtype, global_scale=scale)]


def check_sums() -> None:
    """The kernel that adds up what NCCL brings against its definition; fp32 results, since the interpreter cuts off instead of rounding."""
    from halfbyte.distributed.sums import add_rows

    random = torch.Generator().manual_seed(0)
    for world, rows, width in ((2, 3, 96), (3, 1, 1040), (4, 2, 33)):
        parts = torch.randn(world, rows, width, generator=random).bfloat16()
        parts[:, 0, 0] = -0.0
        got, wanted = (torch.full((rows, width), torch.nan) for _ in range(2))
        add_rows(parts, got)
        add_in_order(parts, wanted)
        assert_equal_bits(got, wanted)
        if width % 16 == 0:
            coded = hb.quantize_fp8(torch.randn(world, rows, width, generator=random))
            received = torch.cat(
                (coded.scales.view(world, rows, 1).expand(-1, -1, 4).contiguous().view(torch.uint8), coded.codes.view(torch.uint8)), 2
            )
            for rank in range(world):
                add_rows(received, got, parts[0], rank)
                add_codes_in_order(received, parts[0], rank, wanted)
                assert_equal_bits(got, wanted)
    add_rows(parts[:, :0], got[:0])
    add_rows(parts[..., :0], got[:, :0])


def check_transport(rank: int, world: int, folder: str, chooses: bool) -> None:
    from halfbyte.distributed import symmetric

    if rank == 0 and world == 2:
        check_sums()
    symmetric.WORTH_CHOOSING = 2.0 if chooses else 0.0
    placement = balanced([9, 1, 1, 1, 1, 1], world, 2) if chooses else round_robin(EXPERTS, world)
    memory = shared_memory(folder, rank, world, Capacity(TOKENS, HIDDEN, TOP_K))
    over_peers, over_gloo = symmetric.SymmetricTransport(memory, placement, EXPERTS), CollectiveTransport(None, torch.device("cpu"))
    assert over_peers.chooses == chooses
    expert_map = hb.ExpertMap.placed(placement, rank, EXPERTS)
    step = 0
    for dtype in (torch.bfloat16, torch.float16) if world == 2 else (torch.bfloat16,):
        for number, wire in enumerate(wires(dtype)[:: 1 if world == 2 and dtype == torch.bfloat16 else 4]):
            for sizes in ([3, 0, 5, 1][:world], [TOKENS] * world, [0] * world)[: 1 if number else 3]:
                step += 1
                count = torch.tensor([max(sizes[rank] - 1, 0)], dtype=torch.int32) if step % 2 else None
                tokens = make_tokens(sizes[rank], rank, step, dtype)
                memory.block[memory.offsets["codes"] : memory.offsets["partial"]] = 0xFF  # what is not written is seen
                dist.barrier()
                wanted = over_gloo.dispatch(wire, tokens, sizes, count)
                got = over_peers.dispatch(wire, tokens, sizes, count)
                held = (expert_map.local(got.topk_ids) >= 0).any(dim=1)
                same_rows(got, wanted, held if chooses else torch.ones_like(held))
                for format in ("bf16", "fp8"):
                    partial = torch.randn(sum(sizes), HIDDEN, generator=torch.Generator().manual_seed(step * world + rank)).to(dtype)
                    partial[~held] = 0.0  # as `fused_moe` leaves them
                    buffer = over_peers.partial(sum(sizes), HIDDEN, dtype, format)
                    if buffer is not None and step % 3:
                        partial = buffer.copy_(partial)
                    # The interpreter cuts fp32 off to bf16 instead of rounding.
                    result = torch.float32 if step % 2 or dtype == torch.bfloat16 else dtype
                    out, expected = (torch.full((sizes[rank], HIDDEN), torch.nan, dtype=result) for _ in range(2))
                    over_gloo.combine(partial, sizes, format, expected)
                    over_peers.combine(partial, sizes, format, out)
                    assert not expected.isnan().any()
                    assert_equal_bits(out, expected)
                    dist.barrier()  # two combines in a row are not what the protocol is for


def check_layer(rank: int, world: int, folder: str) -> None:
    from halfbyte.distributed.symmetric import SymmetricTransport

    random = torch.Generator().manual_seed(0)
    w13, w2 = torch.randn(EXPERTS, 64, HIDDEN, generator=random), torch.randn(EXPERTS, HIDDEN, 32, generator=random)
    w = hb.ExpertWeights(hb.quantize(w13, hb.NVFP4), hb.quantize(w2, hb.NVFP4))
    for transport in ("symmetric", "auto"):
        ep, plain = ExpertParallel(None, EXPERTS, payload="fp4"), ExpertParallel(None, EXPERTS, payload="fp4")
        memory = shared_memory(folder, rank, world, Capacity(TOKENS, HIDDEN, TOP_K, code_bytes=HIDDEN // 2))
        ep.transports["symmetric"], ep.transport = SymmetricTransport(memory, ep.placement, EXPERTS), transport
        first, held = ep.local_experts[0], len(ep.local_experts)
        experts = hb.prepare(w[first : first + held])
        for step, sizes in enumerate(([TOKENS] * world, [1, 4, 0][:world])):
            tokens = make_tokens(sizes[rank], rank, step)
            results = [torch.full((sizes[rank], HIDDEN), torch.nan) for _ in range(2)]
            for way, out in zip((ep, plain), results, strict=True):
                way.forward(tokens.hidden, experts, *tokens[1:], out=out)
            assert_equal_bits(*results)
        tokens = make_tokens(2, rank, 9)
        sent = ep.dispatch(*tokens)
        assert sent.transport == "symmetric"
        with pytest.raises(InputError, match="before the combine of the last one"):
            ep.dispatch(*tokens)
        ep.combine(torch.zeros(2 * world, HIDDEN, dtype=torch.bfloat16), sent)
        for given, reason in (
            (make_tokens(TOKENS + 1, rank, 8), "6 tokens on a rank exceed the capacity of 5"),
            (make_tokens(2, rank, 7, torch.float32), "not bfloat16"),
        ):
            if transport == "symmetric":
                with pytest.raises(InputError, match=reason):
                    ep.dispatch(*given)
            else:
                assert ep.dispatch(*given).transport == "gloo"
    assert why_not(None, torch.device("cpu")) is not None
    with pytest.raises(InputError, match="needed capacity="):
        ExpertParallel(None, EXPERTS, transport="symmetric")


@not_interpreted
@pytest.mark.parametrize(("world", "chooses"), [(2, False), (4, True)])
def test_peers_bring_what_the_collectives_bring(world: int, chooses: bool, tmp_path: Path) -> None:
    run_ranks(check_transport, world, str(tmp_path), chooses, interpreted=True)


@not_interpreted
def test_the_layer_over_peers_is_the_layer_over_the_collectives(tmp_path: Path) -> None:
    run_ranks(check_layer, 3, str(tmp_path), interpreted=True)


@not_interpreted
@pytest.mark.parametrize(
    ("format", "world", "copies"),  # what a row becomes and where it goes are two parts of the kernel
    [("copy", 8, 2), ("nvfp4", 2, 0), ("nvfp4 by row", 8, 2), ("nvfp4 by row", 2, 0), ("fp8", 8, 2), ("mxfp8", 2, 0)],
)
def test_push_compiles(format: str, world: int, copies: int) -> None:
    """Rows leave in accesses as wide as a thread has bytes, and addresses are 64 bits wide."""
    from halfbyte.distributed.kernels import push_rows

    i32, i64, f32 = torch.int32, torch.int64, torch.float32
    compiled = compile_for(
        push_rows, i32, f32, f32, i32, f32, i32, i32, i32, i64, i32, 128, 128, 1, 256,
        FORMAT=format, HIDDEN=7168, TOP_K=8, WORLD=world, COPIES=copies, COUNTED=True, BF16=True, NATIVE=True, ASM=True,
        num_warps=8, enable_fp_fusion=False, maxnreg=64,
    )  # fmt: skip
    assert compiled.spill_bytes <= (16 if format == "nvfp4 by row" else 0)
    assert ("st.global.v2.b32" if "nvfp4" in format else "st.global.v4.b32") in compiled.ptx
    assert compiled.ptx.count("release.add") == world and "acq_rel.add" in compiled.ptx and "acquire" in compiled.ptx
    assert "multimem" not in compiled.ptx and "trap" in compiled.ptx


@not_interpreted
@pytest.mark.parametrize("coded", [False, True])
def test_sums_compile(coded: bool) -> None:
    from halfbyte.distributed.sums import _add_rows

    received = torch.uint8 if coded else torch.bfloat16
    compiled = compile_for(
        _add_rows, received, torch.bfloat16, torch.bfloat16, 128, 1, WIDTH=7168, WORLD=2, CODED=coded, BLOCK=1024, num_warps=4, enable_fp_fusion=False
    )
    assert compiled.spill_bytes == 0
    assert "ld.global.v2.b32" in compiled.ptx if coded else "ld.global.v4.b32" in compiled.ptx


@pytest.mark.slow
@not_interpreted
@pytest.mark.parametrize(("world", "copies"), [(2, 0), (8, 2)])
def test_combines_compile(world: int, copies: int) -> None:
    from halfbyte.distributed.exchange import exchange_codes
    from halfbyte.distributed.kernels import pull_rows

    bf16, i32, i64 = torch.bfloat16, torch.int32, torch.int64
    pull = compile_for(
        pull_rows, bf16, i32, i64, i32, 128, 128, 1,
        HIDDEN=7168, WORLD=world, SPARSE=world > 2, BLOCK=1024, BF16=True, ASM=True, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    assert pull.spill_bytes == 0 and pull.registers <= 96
    assert pull.ptx.count("ld.global.v4.b32") >= world and "multimem" not in pull.ptx
    exchange = compile_for(
        exchange_codes, bf16, i32, bf16, i32, i32, i64, i32, 128, 1, 256, 264,
        HIDDEN=7168, TOP_K=8, WORLD=world, COPIES=copies, BF16=True, NATIVE=True, ASM=True,
        num_warps=8, enable_fp_fusion=False, maxnreg=48,
    )  # fmt: skip
    assert exchange.spill_bytes <= (16 if world == 2 else 24)  # addresses of every rank's rows
    assert "st.global.v4.b32" in exchange.ptx and "fence.acq_rel.sys" in exchange.ptx and "ld.global.sys.acquire.b64" in exchange.ptx
    assert "multimem" not in exchange.ptx and "trap" in exchange.ptx
