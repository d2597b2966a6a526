"""Grouped GEMM of FP4 activations with FP4 weights on Blackwell's block-scaled tensor cores. Compile-tested only, never run: not in the kernel table.

    out[r] = (x[r] @ w[e]^T) * x_global_scale[r] * w_global_scale[e] + bias[e]          e = expert of row r

    x        codes [R, K/2] uint8, low nibble = even column; scales [R, K/16] e4m3 (NVFP4) or [R, K/32] e8m0 (MXFP4), linear;
             global scale [R] fp32 decode multipliers (NVFP4); rows sorted by expert
    w        codes [E, N, K/2] uint8; scales [E, N, K/16] e4m3 or [E, N, K/32] e8m0, layout "linear"; global scale [E] or [E, G] fp32 (NVFP4)
    row_start  [E+1] int32, ascending; expert e owns rows row_start[e] .. row_start[e+1]; rows from row_start[E] on are left alone
    bias     [E, N] any float, or None
    out      [R, N] fp32, bf16 or fp16

Both operands have the same format. Block scales multiply inside the instruction (tcgen05 kind::mxf4nvf4 for NVFP4, kind::mxf4 for MXFP4), fp32
accumulates, global scales and bias come after the sum. Programs find their expert as in `grouped_gemm_w4a16`.

Target: sm_100. Not measured. BLOCK_M is 128: with 64, Triton decodes to fp16 and uses kind::f16, at a quarter of the rate and without a word.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from halfbyte.device import current
from halfbyte.formats import QuantTensor
from halfbyte.kernels.portable.gemm import find_row_block, row_block_bound

BLOCK_M = 128


class Config(NamedTuple):
    """Tile sizes and launch options."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@triton.jit
def _operand(codes_ptr, scales_ptr, rows, k, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes [rows, BLOCK_K/2] and scales [rows, BLOCK_K/BLOCK] of columns k .. k + BLOCK_K; beyond K both are zero bits: the value is zero."""
    pair = k // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
    group = k // BLOCK + tl.arange(0, BLOCK_K // BLOCK)[None, :]
    codes_ptr += rows[:, None] * (K // 2) + pair
    scales_ptr += rows[:, None] * (K // BLOCK) + group
    if K % BLOCK_K == 0:
        codes, scales = tl.load(codes_ptr), tl.load(scales_ptr)
    else:
        codes, scales = tl.load(codes_ptr, mask=pair < K // 2, other=0), tl.load(scales_ptr, mask=group < K // BLOCK, other=0)
    if BLOCK == 16:
        scales = scales.to(tl.float8e4nv, bitcast=True)
    return codes, scales


@triton.jit
def grouped_gemm_w4a4_kernel(
    x_codes_ptr,
    x_scales_ptr,
    x_global_scale_ptr,
    row_start_ptr,
    codes_ptr,
    scales_ptr,
    global_scale_ptr,
    bias_ptr,
    out_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    SCALE_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0) // N_TILES
    expert, blocks_before = find_row_block(row_start_ptr, block, NUM_EXPERTS, EXPERTS_PADDED, BLOCK_M)
    if expert >= NUM_EXPERTS:
        return
    row = tl.load(row_start_ptr + expert) + (block - blocks_before) * BLOCK_M + tl.arange(0, BLOCK_M)
    mine = row < tl.load(row_start_ptr + expert + 1)
    column = tl.program_id(0) % N_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < N
    x_row = tl.where(mine, row, 0).to(tl.int64)  # beyond the edges: read something valid, store nothing
    weight_row = tl.where(inside, column, 0)
    codes_ptr += expert.to(tl.int64) * N * (K // 2)
    scales_ptr += expert.to(tl.int64) * N * (K // BLOCK)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        x, x_scale = _operand(x_codes_ptr, x_scales_ptr, x_row, k, K, BLOCK, BLOCK_K)
        w, w_scale = _operand(codes_ptr, scales_ptr, weight_row, k, K, BLOCK, BLOCK_K)
        acc = tl.dot_scaled(x, x_scale, "e2m1", tl.trans(w), w_scale, "e2m1", acc)

    if SCALE_GROUPS > 0:
        acc *= tl.load(x_global_scale_ptr + x_row)[:, None]
        acc *= tl.load(global_scale_ptr + expert * SCALE_GROUPS + weight_row // (N // SCALE_GROUPS))[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + expert.to(tl.int64) * N + weight_row).to(tl.float32)[None, :]
    pointers = out_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(pointers, acc.to(out_ptr.dtype.element_ty), mask=mine[:, None] & inside[None, :])


def grouped_gemm_w4a4(
    x: QuantTensor, weight: QuantTensor, row_start: torch.Tensor, out: torch.Tensor, *, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Fill out [R, N] from x [R, K] and weight [E, N, K] as the module says; rows from row_start[E] on keep what they held."""
    num_rows, columns = out.shape
    num_experts = weight.shape[0]
    if num_rows == 0 or num_experts == 0:
        return out
    x, weight = x.with_scale_layout("linear"), weight.with_scale_layout("linear")
    x_scale, scale = x.row_global_scale(), weight.global_scale
    config = choose_config(columns)
    grid = (row_block_bound(num_rows, num_experts, BLOCK_M) * triton.cdiv(columns, config.block_n),)
    with current(out.device):
        grouped_gemm_w4a4_kernel[grid](
            x.codes.contiguous(),
            x.scales.view(torch.uint8).contiguous(),
            None if x_scale is None else x_scale.flatten().expand(num_rows).contiguous(),
            row_start,
            weight.codes.contiguous(),
            weight.scales.view(torch.uint8).contiguous(),
            None if scale is None else scale.contiguous(),
            None if bias is None else bias.contiguous(),
            out,
            N=columns,
            K=x.shape[1],
            NUM_EXPERTS=num_experts,
            EXPERTS_PADDED=triton.next_power_of_2(num_experts),
            SCALE_GROUPS=0 if scale is None else scale.numel() // num_experts,
            BLOCK=weight.format.block,
            BLOCK_M=BLOCK_M,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
            num_stages=config.num_stages,
        )
    return out


def choose_config(columns: int) -> Config:
    """Tiles of 128 x 128 x 256, narrower for few columns. Not tuned: there was no machine.

    >>> choose_config(7168)
    Config(block_n=128, block_k=256, num_warps=8, num_stages=3)
    """
    return Config(128 if columns > 64 else 64, 256, 8, 3)
