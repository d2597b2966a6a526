"""Grouped GEMM on canonical FP4 weights, every GPU from sm_80 on: the portable kernel, correct first.

    plain       out[r] = x[source(r)] @ w[e]^T * x_scale[source(r)] + bias[e]                 e = expert of row r
    activation  out[r] = activation(x[source(r)] @ w[e]^T * x_scale[source(r)] + bias[e])     gate rows of w, then up rows

    x             [S, K] bf16, fp16 or fp32; source(r) = token_of_row[r], or r without it
    x_scale       [S] fp32, or None for 1
    row_start     [E+1] int32, ascending; expert e owns rows row_start[e] .. row_start[e+1]; rows from row_start[E] on are left alone
    token_of_row  [R] int32, or None
    codes         [E, W, K/2] uint8, low nibble = even column; W = N, or 2N with a gate
    scales        [E, W, K/16] e4m3 (NVFP4), [E, W, K/32] e8m0 (MXFP4), layout "linear"
    global scale  [E] or [E, G] fp32 (NVFP4), row group g of a matrix has scale g
    bias          [E, W] any float, or None
    out           [R, N] fp32, bf16 or fp16

A program computes one tile of one expert's rows, with a gate a gate tile and the up tile that belongs to it. It finds its expert in row_start: the
grid covers the most row blocks that R rows can make and the programs left over return at once, so nothing is read back to the host.

Weights are dequantised in registers, exactly: e2m1 x e4m3 has six significant bits, which bf16 and fp16 hold (carried as value * 2^-8 or 2^-7, so
that an element is its four bits shifted into place), and e2m1 x e8m0 is exact in bf16. fp16 activations meet MXFP4 weights, whose range exceeds that
of fp16, in tf32, exactly as well. fp32 activations take three tf32 products. Everything accumulates in fp32.

Target: any GPU of compute capability 8.0 or newer, and TRITON_INTERPRET=1 on a CPU. Not measured. The weights pass through shared memory as operand
B on purpose: as the register operand of a Hopper wgmma, Triton 3.6 overwrites them while a product still reads them. Here each product is waited for
(tested).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from halfbyte.device import current
from halfbyte.experts import Activation
from halfbyte.formats import NVFP4, BlockFormat, QuantTensor
from halfbyte.kernels.problem import Problem, Size

TWO_POW_126 = tl.constexpr(2.0**126)
SQRT_HALF = tl.constexpr(0.7071067811865476)
TWICE_SQRT_TWO_OVER_PI = tl.constexpr(1.5957691216057308)
INVARIANT_ROWS = 64  # rows per expert whose tile serves any number of rows: half as fast as the best at either end, by arithmetic
TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class Config(NamedTuple):
    """Tile sizes and launch options; the columns of a gated w13 come in tiles of `gated_block_n`."""

    block_m: int
    block_n: int
    gated_block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def max_rows(self) -> int:
        """Of an item of the work list."""
        return self.block_m


# Each fits the 99 KiB of shared memory of sm_86 and sm_89, and none spills on sm_80, sm_90 and sm_100.
_TILES = (Config(16, 64, 64, 64, 4, 4), Config(64, 64, 64, 64, 4, 3), Config(128, 128, 64, 64, 8, 3))
_TILES_FP32 = (Config(16, 64, 64, 32, 4, 2), Config(32, 64, 64, 32, 4, 2))


@triton.jit
def find_row_block(row_start_ptr, block, NUM_EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of row block `block` (NUM_EXPERTS or more: past the last block) and how many row blocks the experts before it have."""
    index = tl.arange(0, EXPERTS_PADDED)
    first = tl.load(row_start_ptr + index, mask=index < NUM_EXPERTS, other=0)
    last = tl.load(row_start_ptr + index + 1, mask=index < NUM_EXPERTS, other=0)
    blocks = (last - first + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum((tl.cumsum(blocks, 0) <= block).to(tl.int32), 0)
    return expert, tl.sum(tl.where(index < expert, blocks, 0), 0)


@triton.jit
def _load(pointers, inside, MASKED: tl.constexpr):
    return tl.load(pointers, mask=inside, other=0) if MASKED else tl.load(pointers)


@triton.jit
def _element(code, COMPUTE: tl.constexpr):
    """The e2m1 value of a 4-bit code (int32), times 2^-14 in fp16, times 2^-126 in bf16 and fp32: its bits moved, subnormals included."""
    if COMPUTE.is_fp32():
        value = (((code & 8) << 28) | ((code & 7) << 22)).to(tl.float32, bitcast=True)
    elif COMPUTE.is_bf16():
        value = (((code & 8) << 12) | ((code & 7) << 6)).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        value = (((code & 8) << 12) | ((code & 7) << 9)).to(tl.int16).to(tl.float16, bitcast=True)
    return value


@triton.jit
def _e4m3_scale(byte, COMPUTE: tl.constexpr):
    """e4m3 by integer operations (sm_80 has no fp8), times 2^7 in fp16, times 2^118 in bf16 and fp32; sign kept, NaN read as 480."""
    scale = (((byte & 0x80) << 8) | ((byte & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)  # times 2^-8
    scale *= 32768.0 if COMPUTE.is_fp16() else TWO_POW_126
    return scale.to(COMPUTE)


@triton.jit
def _e8m0_scale(byte, COMPUTE: tl.constexpr):
    """2^(byte - 127): 0 is subnormal, 255 is NaN."""
    bits = tl.where(byte == 0, 0x00400000, byte << 23)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True).to(COMPUTE)


@triton.jit
def _weight_tile(
    codes_ptr,
    scales_ptr,
    rows,
    k,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows `rows` and columns k .. k + BLOCK_K of one expert's matrix, [BLOCK_N, BLOCK_K] in COMPUTE; NVFP4 lacks 2^7 or 2^8."""
    MASKED: tl.constexpr = K % BLOCK_K != 0
    GROUPS: tl.constexpr = BLOCK_K // BLOCK
    pair = k // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
    group = k // BLOCK + tl.arange(0, GROUPS)[None, :]
    packed = _load(codes_ptr + rows[:, None] * (K // 2) + pair, pair < K // 2, MASKED).to(tl.int32)
    byte = _load(scales_ptr + rows[:, None] * (K // BLOCK) + group, group < K // BLOCK, MASKED).to(tl.int32)
    value = tl.reshape(tl.join(_element(packed, COMPUTE), _element(packed >> 4, COMPUTE)), (BLOCK_N, BLOCK_K))
    if BLOCK == 16:
        scale = _e4m3_scale(byte, COMPUTE)
    else:
        scale = _e8m0_scale(byte, COMPUTE)
        value = value * TWO_POW_126
    return value * tl.reshape(tl.broadcast_to(scale[:, :, None], (BLOCK_N, GROUPS, BLOCK)), (BLOCK_N, BLOCK_K))


@triton.jit
def _finish(acc, rows, expert, global_scale_ptr, bias_ptr, W: tl.constexpr, SCALE_GROUPS: tl.constexpr, FACTOR: tl.constexpr):
    """Apply what all columns k share: global scale, the power of two left out of the weights, bias. `rows` of the matrix are columns of acc."""
    if SCALE_GROUPS > 0:
        scale = tl.load(global_scale_ptr + expert * SCALE_GROUPS + rows // (W // SCALE_GROUPS))
        acc *= (scale * FACTOR)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + expert.to(tl.int64) * W + rows).to(tl.float32)[None, :]
    return acc


@triton.jit
def _gated(gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr):
    """`kernels.reference.activation` of a gate tile and an up tile, fp32. NaN passes through, as in torch."""
    if ACTIVATION == "swiglu":
        if LIMIT is not None:
            gate = tl.where(gate > LIMIT, LIMIT, gate)
            up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        up += BETA
        gate *= tl.sigmoid(gate * ALPHA)
    elif ACTIVATION == "geglu":
        gate *= 0.5 + 0.5 * tl.erf(gate * SQRT_HALF)
    else:
        tl.static_assert(ACTIVATION == "geglu_tanh")
        gate *= tl.sigmoid((gate + 0.044715 * gate * gate * gate) * TWICE_SQRT_TWO_OVER_PI)  # (1 + tanh z) / 2 = sigmoid(2 z)
    return gate * up


@triton.jit
def grouped_gemm_w4a16_kernel(
    x_ptr,
    token_of_row_ptr,
    row_start_ptr,
    codes_ptr,
    scales_ptr,
    global_scale_ptr,
    bias_ptr,
    x_scale_ptr,
    out_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    SCALE_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    LIMIT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    GATED: tl.constexpr = ACTIVATION is not None and ACTIVATION != "relu2"
    W: tl.constexpr = 2 * N if GATED else N
    FACTOR: tl.constexpr = 128.0 if COMPUTE.is_fp16() else 256.0
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0) // N_TILES
    expert, blocks_before = find_row_block(row_start_ptr, block, NUM_EXPERTS, EXPERTS_PADDED, BLOCK_M)
    if expert >= NUM_EXPERTS:
        return
    row = tl.load(row_start_ptr + expert) + (block - blocks_before) * BLOCK_M + tl.arange(0, BLOCK_M)
    mine = row < tl.load(row_start_ptr + expert + 1)
    column = tl.program_id(0) % N_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < N
    weight_row = tl.where(inside, column, 0)  # beyond the edge: read something valid, store nothing

    source = tl.where(mine, row, 0)
    if token_of_row_ptr is not None:
        source = tl.load(token_of_row_ptr + source)
    x_ptr += source.to(tl.int64)[:, None] * K
    codes_ptr += expert.to(tl.int64) * W * (K // 2)
    scales_ptr += expert.to(tl.int64) * W * (K // BLOCK)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        index = k + tl.arange(0, BLOCK_K)[None, :]
        x = _load(x_ptr + index, index < K, K % BLOCK_K != 0).to(COMPUTE)
        w = _weight_tile(codes_ptr, scales_ptr, weight_row, k, K, BLOCK, COMPUTE, BLOCK_N, BLOCK_K)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        if GATED:
            w = _weight_tile(codes_ptr, scales_ptr, weight_row + N, k, K, BLOCK, COMPUTE, BLOCK_N, BLOCK_K)
            up = tl.dot(x, tl.trans(w), up, input_precision=PRECISION)

    if x_scale_ptr is not None:
        x_scale = tl.load(x_scale_ptr + source)[:, None]
        acc *= x_scale
        up *= x_scale
    value = _finish(acc, weight_row, expert, global_scale_ptr, bias_ptr, W, SCALE_GROUPS, FACTOR)
    if GATED:
        value = _gated(
            value, _finish(up, weight_row + N, expert, global_scale_ptr, bias_ptr, W, SCALE_GROUPS, FACTOR), ACTIVATION, ALPHA, BETA, LIMIT
        )
    elif ACTIVATION == "relu2":
        value = tl.where(value < 0, 0.0, value)
        value *= value
    pointers = out_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(pointers, value.to(out_ptr.dtype.element_ty), mask=mine[:, None] & inside[None, :])


def grouped_gemm_w4a16(
    x: torch.Tensor,
    weight: QuantTensor,
    row_start: torch.Tensor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    activation: Activation | None = None,
    token_of_row: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """Fill out [R, N] from x [S, K] and weight [E, W, K] as the module says; rows from row_start[E] on keep what they held.

    `config`: by default that for so many rows.

    Launches one kernel, allocates nothing when x and the weights are contiguous, and never waits for the device.
    """
    num_rows, columns = out.shape
    num_experts = weight.shape[0]
    if num_rows == 0 or num_experts == 0:
        return out
    weight = weight.with_scale_layout("linear")
    scale = weight.global_scale
    compute = compute_dtype(x.dtype, weight.format, interpreted=triton.knobs.runtime.interpret)
    config = tiles(num_rows, num_experts, compute) if config is None else config
    block_n = config.gated_block_n if activation is not None and activation.gated else config.block_n
    grid = (row_block_bound(num_rows, num_experts, config.block_m) * triton.cdiv(columns, block_n),)
    with current(out.device):
        grouped_gemm_w4a16_kernel[grid](
            x.contiguous(),
            token_of_row,
            row_start,
            weight.codes.contiguous(),
            weight.scales.view(torch.uint8).contiguous(),
            None if scale is None else scale.contiguous(),
            None if bias is None else bias.contiguous(),
            x_scale,
            out,
            N=columns,
            K=x.shape[1],
            NUM_EXPERTS=num_experts,
            EXPERTS_PADDED=triton.next_power_of_2(num_experts),
            SCALE_GROUPS=0 if scale is None else scale.numel() // num_experts,
            BLOCK=weight.format.block,
            ACTIVATION=activation.kind if activation else None,
            ALPHA=activation.alpha if activation else None,
            BETA=activation.beta if activation else None,
            LIMIT=activation.limit if activation else None,
            COMPUTE=TRITON_DTYPES[compute],
            PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",
            BLOCK_M=config.block_m,
            BLOCK_N=block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
            num_stages=config.num_stages,
        )
    return out


def row_block_bound(num_rows: int, num_experts: int, block_m: int) -> int:
    """The most row blocks that num_rows rows, spread over num_experts experts in any way, can make.

    >>> row_block_bound(8, 256, 16), row_block_bound(1024, 4, 128)
    (8, 12)
    """
    return min(num_rows, num_rows // block_m + num_experts)


def compute_dtype(dtype: torch.dtype, format: BlockFormat, *, interpreted: bool = False) -> torch.dtype:
    """The dtype in which activations of `dtype` meet the weights, both exact in it (fp32: as tf32 products).

    Triton's interpreter has no bf16 arithmetic and takes fp32.

    >>> compute_dtype(torch.float16, halfbyte.MXFP4)
    torch.float32
    """
    if dtype == torch.float16:
        return torch.float16 if format is NVFP4 else torch.float32
    return torch.float32 if interpreted else dtype


def configs(problem: Problem) -> tuple[Config, ...]:
    return _TILES_FP32 if _compute_of(problem) == torch.float32 else _TILES


def choose_config(problem: Problem, size: Size) -> Config:
    """The tiles for so many rows per expert on average; one for any number of rows where the problem is batch invariant."""
    num_rows = INVARIANT_ROWS * problem.num_experts if problem.batch_invariant else size.num_rows
    return tiles(num_rows, problem.num_experts, _compute_of(problem))


def tiles(num_rows: int, num_experts: int, compute: torch.dtype) -> Config:
    """Row blocks about as high as an expert has rows on average: three kernels at most, whatever the number of tokens.

    >>> tiles(8, 256, torch.bfloat16)
    Config(block_m=16, block_n=64, gated_block_n=64, block_k=64, num_warps=4, num_stages=4)
    """
    few, *others = _TILES_FP32 if compute == torch.float32 else _TILES
    if num_rows <= 16 * num_experts:
        return few
    return others[0] if num_rows <= 128 * num_experts else others[-1]


def _compute_of(problem: Problem) -> torch.dtype:
    is_encoded = problem.activations != "bf16" or problem.quantized is not None
    dtype = torch.bfloat16 if is_encoded or problem.dtype is None else problem.dtype
    assert problem.format is not None
    return compute_dtype(dtype, problem.format, interpreted=triton.knobs.runtime.interpret)
