"""Activations to e4m3 in one pass: one scale per token, a block of 128, or a block of 32 (MXFP8). Bit for bit `formats.fp8_tensor.quantize_fp8`.

    x        [rows, K] bf16 or fp16, K contiguous
    codes    e4m3 [rows, K]
    scales   fp32 [rows, 1] or [rows, K / 128]; e8m0 bytes [rows, K / 32] "linear", "128x4" or "8x4", padding zero

A program holds whole rows for "token", else a tile of blocks.
Target: any CUDA GPU of compute capability 8.0 or newer. Not measured yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from halfbyte.device import current
from halfbyte.formats.fp8_tensor import BLOCKS, Fp8Scaling, Fp8Tensor, quantize_fp8
from halfbyte.formats.scale_layout import ScaleLayout, padded_shape
from halfbyte.gluon_compat import fix_cache_keys
from halfbyte.kernels.problem import Problem, Support, takes_16_bits
from halfbyte.kernels.quantizers.blocks import INTERPRETED, converts_e4m3, e4m3_of, quotient, range_factor, reciprocal

_SMALLEST_NORMAL = tl.constexpr(2.0**-126)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def e4m3_bytes(x, NATIVE: tl.constexpr):
    """e4m3 of any fp32, saturating; every NaN is the positive one."""
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    magnitude = tl.where(x != x, 0.0, tl.minimum(tl.abs(x), 448.0))
    byte, _ = e4m3_of(magnitude, False)
    return tl.where(x != x, 0x7F, byte | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def fp32_scale(amax):
    """amax / 448, at least the smallest normal number."""
    scale = tl.div_rn(amax, 448.0)
    scale = tl.where(scale < _SMALLEST_NORMAL, _SMALLEST_NORMAL, scale)
    return tl.where(scale != scale, float("nan"), scale)  # one NaN for all devices


@triton.jit
def prepare_division(scale, ASM: tl.constexpr):
    """What `divide` has to know of a scale that `fp32_scale` made."""
    factor = range_factor(scale)
    divisor = scale * factor
    inverse = reciprocal(tl.where(divisor == _INFINITY, 1.0, divisor), ASM)
    if ASM:  # an infinite divisor, times the zero that its reciprocal is, would make NaN of every quotient
        inverse = tl.where(divisor == _INFINITY, 0.0, inverse)
        divisor = tl.where(divisor == _INFINITY, 1.0, divisor)
    return factor, divisor, inverse


@triton.jit
def divide(x, factor, divisor, inverse, ASM: tl.constexpr):
    """x / scale correctly rounded, by Markstein's division and with the sign of x, which that takes from a negative zero. An infinite scale makes
    zeros, and NaN of infinities."""
    q = quotient(x * factor, divisor, inverse, ASM)
    return ((q.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | (x.to(tl.int32, bitcast=True) & -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def mx_scale(amax):
    """The e8m0 byte (int32) of blocks whose maximum has the fp32 bits `amax` (of a 16-bit float, not NaN), and 2^-(byte - 127) as fp32."""
    byte = tl.maximum(((amax + 0x1FFFFF) >> 23) - 8, 0)  # amax / 448: 448 is 1.75 * 2^8
    byte = tl.where(amax == 0x7F800000, 254, byte)
    return byte, tl.where(byte == 254, 0x400000, (254 - byte) << 23).to(tl.float32, bitcast=True)


@triton.jit
def quantize_fp8_kernel(
    x_ptr, codes_ptr, scales_ptr, num_rows, row_stride, width, scale_rows, scale_columns,
    MX: tl.constexpr, BLOCK: tl.constexpr, LAYOUT: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = TILE_COLUMNS // BLOCK
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)[None, :]
    mask = (row < num_rows) & (column < width)
    x = tl.load(x_ptr + row * row_stride + column, mask=mask, other=0.0)
    if x_ptr.dtype.element_ty == tl.bfloat16:  # by hand: the interpreter's conversion spoils subnormals
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    x = tl.reshape(x.to(tl.float32), (TILE_ROWS, GROUPS, BLOCK))
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # in the order of the magnitudes, NaN above infinity
    if MX:
        amax = tl.max(tl.where(bits > 0x7F800000, 0, bits), axis=2)
        byte, factor = mx_scale(amax)
        q = x * factor[:, :, None]
        scale = byte.to(tl.uint8)
    else:
        scale = fp32_scale(tl.max(bits, axis=2).to(tl.float32, bitcast=True))
        factor, divisor, inverse = prepare_division(scale, ASM)
        q = divide(
            x, factor[:, :, None], tl.broadcast_to(divisor[:, :, None], x.shape), tl.broadcast_to(inverse[:, :, None], x.shape), ASM,
        )  # fmt: skip
    codes = tl.reshape(e4m3_bytes(q, NATIVE), (TILE_ROWS, TILE_COLUMNS))
    tl.store(codes_ptr + row * width + column, codes, mask=mask)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :]
    offset = row * scale_columns + group
    if LAYOUT == "128x4":
        offset = (row // 128 * (scale_columns // 4) + group // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4
    elif LAYOUT == "8x4":
        offset = (row // 8 * (scale_columns // 4) + group // 4) * 32 + row % 8 * 4 + group % 4
    tl.store(scales_ptr + offset, scale, mask=(row < scale_rows) & (group < scale_columns))


fix_cache_keys(*globals().values())


def supports(problem: Problem) -> Support:
    return takes_16_bits(problem)


def run(x: torch.Tensor, scaling: Fp8Scaling = "token", *, scale_layout: ScaleLayout = "linear") -> Fp8Tensor:
    """As `formats.fp8_tensor.quantize_fp8`, of bf16 and fp16."""
    if x.numel() == 0:
        return quantize_fp8(x, scaling, scale_layout=scale_layout)
    *batch, num_rows, width = x.shape
    groups = width // BLOCKS[scaling] if scaling in BLOCKS else 1
    padded = padded_shape(scale_layout, num_rows, groups)
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((*batch, *padded), dtype=torch.uint8 if scaling == "mx" else torch.float32, device=x.device)
    result = Fp8Tensor(codes, scales, scaling, scale_layout)
    columns = triton.next_power_of_2(width)  # at least 128 of blocks, so that four scales of "mx", which layouts pad to, are written together
    tile_columns = max(32, columns) if scaling == "token" else min(1024, max(128, columns))
    tile_rows = max(1, 2048 // tile_columns)
    num_warps = min(16, max(4, tile_columns // 512))  # 16 elements per thread, up to 8192 columns
    options = {} if INTERPRETED else {"num_warps": num_warps, "enable_fp_fusion": False}
    matrices = x.reshape(-1, num_rows, width)
    for matrix, matrix_codes, matrix_scales in zip(matrices, codes.view(-1, num_rows, width), scales.view(-1, *padded), strict=True):
        rows = matrix if matrix.stride(1) == 1 else matrix.contiguous()
        with current(x.device):
            quantize_fp8_kernel[(triton.cdiv(padded[0], tile_rows), triton.cdiv(width, tile_columns))](
                rows, matrix_codes.view(torch.uint8), matrix_scales, num_rows, rows.stride(0), width, *padded,
                scaling == "mx", BLOCKS.get(scaling, tile_columns), scale_layout, tile_rows, tile_columns,
                converts_e4m3(), not INTERPRETED, **options,
            )  # fmt: skip
    return result
