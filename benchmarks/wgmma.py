"""How long wgmma takes on an sm_90 GPU, by tokens (N), type and place of A, alone and beside integer work: what the lab notes reason with.

python benchmarks/wgmma.py        # a table of ns for the products of all warpgroups; zeros, so the power limit plays no part
"""

from __future__ import annotations

import statistics

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

CHAIN = gl.constexpr(
    "{ .reg .b32 t; mov.b32 t, $1; " + "mad.lo.u32 t, t, $1, 12345; xor.b32 t, t, $1; " * 32 + "mov.b32 $0, t; }",
)
ITERATIONS = 1000


@gluon.jit
def multiply(
    out_ptr, iterations, N: gl.constexpr, WARPGROUPS: gl.constexpr, FP8: gl.constexpr, IN_REGISTERS: gl.constexpr, PRODUCTS: gl.constexpr,
    COMPUTE: gl.constexpr,
):  # fmt: skip
    """Each warpgroup, `iterations` times: PRODUCTS of [64, 64] and [64, N], a chain of 64 dependent integer instructions, a wait for the products."""
    DTYPE: gl.constexpr = gl.float8e4nv if FP8 else gl.bfloat16
    ELEMENTS: gl.constexpr = 4 if FP8 else 2
    ROWS: gl.constexpr = 64 * WARPGROUPS
    ACCUMULATOR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * WARPGROUPS, 1], [16, N, 8 * ELEMENTS])
    BLOCKED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4 * WARPGROUPS, 1], [1, 0])
    x = gl.allocate_shared_memory(DTYPE, [N, 64], gl.NVMMASharedLayout.get_default_for([N, 64], DTYPE))
    x.store(gl.zeros([N, 64], gl.float32, layout=BLOCKED).to(DTYPE))
    if IN_REGISTERS:
        w = gl.zeros([ROWS, 64], gl.float32, layout=gl.DotOperandLayout(0, ACCUMULATOR, ELEMENTS)).to(DTYPE)
    else:
        w = gl.allocate_shared_memory(DTYPE, [ROWS, 64], gl.NVMMASharedLayout.get_default_for([ROWS, 64], DTYPE))
        w.store(gl.zeros([ROWS, 64], gl.float32, layout=BLOCKED).to(DTYPE))
    fence_async_shared()
    sums = gl.zeros([ROWS, N], gl.float32, layout=ACCUMULATOR)
    value = gl.arange(0, 128 * WARPGROUPS, layout=gl.BlockedLayout([1], [32], [4 * WARPGROUPS], [0]))
    for _ in range(iterations):
        for _ in gl.static_range(PRODUCTS):
            sums = warpgroup_mma(w, x.permute((1, 0)), sums, is_async=True)
        if COMPUTE:
            value = gl.inline_asm_elementwise(CHAIN, "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1)
        if PRODUCTS > 0:
            sums = warpgroup_mma_wait(0, deps=(sums,))
    gl.store(out_ptr + gl.program_id(0), gl.sum(gl.sum(sums, 1), 0) + gl.sum(value, 0).to(gl.float32))


def time_ns(n: int, warpgroups: int, *, fp8: bool, in_registers: bool, products: int, computes: bool = False) -> float:
    """An iteration, with a program on every multiprocessor."""
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.empty(programs, device="cuda")
    times = triton.testing.do_bench(
        lambda: multiply[(programs,)](
            out, ITERATIONS, n, warpgroups, fp8, in_registers, products, computes, num_warps=4 * warpgroups, enable_fp_fusion=True
        ),
        return_mode="all",
    )
    return statistics.median(times) * 1e6 / ITERATIONS


def main() -> None:
    print("| type | tokens | warpgroups | of four, A in registers | of four, A in shared memory | one | integer chain | one and the chain |")
    print("|---|---|---|---|---|---|---|---|")
    for fp8 in (False, True):
        for n, warpgroups in ((8, 4), (16, 4), (32, 1), (32, 4), (64, 1), (64, 4), (256, 1), (256, 2)):
            registers, shared = (time_ns(n, warpgroups, fp8=fp8, in_registers=place, products=4) / 4 for place in (True, False))
            one, chain, both = (
                time_ns(n, warpgroups, fp8=fp8, in_registers=True, products=products, computes=computes)
                for products, computes in ((1, False), (0, True), (1, True))
            )
            print(
                f"| {'fp8' if fp8 else 'bf16'} | {n} | {warpgroups} | {registers:.0f} | {shared:.0f} | {one:.0f} | {chain:.0f} | {both:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
