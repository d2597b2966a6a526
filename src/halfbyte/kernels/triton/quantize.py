"""Activations to FP4 in one pass: bf16 or fp16 [rows, K] to codes, block scales in the layout that their reader wants, and nothing else written.

    x        [matrices, rows, K] bf16 or fp16, K contiguous
    global   fp32 decode multipliers (NVFP4): one a matrix, one a group of rows, or one an expert
    codes    uint8 [matrices, rows, K / 2]
    scales   e4m3 or e8m0 bytes, "linear", "128x4" or "8x4"; the padding of the tiles is written as zero

Codes and scales are those of `formats.quantizer`, bit for bit. Target: any CUDA GPU of compute capability 8.0 or newer. Not measured yet.
Compiled for sm_90 by Triton 3.6: 752 instructions for 32 elements a thread, 56 registers, no spills (NVFP4, bf16, 128x4).

A thread owns whole blocks (16 columns, 32 for MXFP4), loads them 16 bytes at a time and needs no other thread. A program walks over chunks of rows
with the stride of the grid, which has as many programs as the GPU can hold at once.

**Experts.** Rows are sorted by expert. Chunks are cut from the *padded* rows of the scale buffer, where every expert starts a tile: a chunk belongs
to one expert, and what is looked up (expert, first row, global scale) is looked up once a chunk. By comparing with all experts at once, in
registers (SCAN), or by bisection in memory, after a one-program kernel that adds the sizes up. Rows that no expert covers are never touched.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from halfbyte.checkpoint.experts import Activation
from halfbyte.device import Target
from halfbyte.formats import NVFP4, BlockFormat, QuantTensor
from halfbyte.formats.quantizer import decode_scale_of
from halfbyte.formats.scale_layout import ScaleLayout, max_padded_rows, padded_shape, tile_rows
from halfbyte.kernels.triton.blocks import amax8, codes4, e2m1_value, e4m3_of, e8m0_of, half, normed, quotient, range_factor, reciprocal, swiglu

INTERPRETED = triton.knobs.runtime.interpret
MAX_SCANNED_EXPERTS = 256


@triton.jit
def _split4(quad):
    """The four words that a thread holds along the last dimension."""
    even, odd = tl.split(tl.reshape(quad, (quad.shape[0], quad.shape[1], 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def load_words(pointers, mask, STEP: tl.constexpr = 1):
    """Eight words, STEP apart, at pointers [rows, columns]: sixteen elements a thread, in two loads of 16 bytes where STEP is 1."""
    quads = pointers[:, :, None] + STEP * tl.arange(0, 4)[None, None, :]
    w0, w1, w2, w3 = _split4(tl.load(quads, mask=mask[:, :, None], other=0))
    w4, w5, w6, w7 = _split4(tl.load(quads + 4 * STEP, mask=mask[:, :, None], other=0))
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def _load_block(
    pointers, mask, up_words, weights, weight_mask, factor,
    SOURCE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Eight words of x ("x"), of the activation of x and what lies `up_words` words behind it ("swiglu"), or of x * factor * weights ("norm")."""
    w = load_words(pointers, mask)
    if SOURCE == "swiglu":
        u = load_words(pointers + up_words, mask)
        w = (
            swiglu(w[0], u[0], ALPHA, BETA, LIMIT, BF16, ASM),
            swiglu(w[1], u[1], ALPHA, BETA, LIMIT, BF16, ASM),
            swiglu(w[2], u[2], ALPHA, BETA, LIMIT, BF16, ASM),
            swiglu(w[3], u[3], ALPHA, BETA, LIMIT, BF16, ASM),
            swiglu(w[4], u[4], ALPHA, BETA, LIMIT, BF16, ASM),
            swiglu(w[5], u[5], ALPHA, BETA, LIMIT, BF16, ASM),
            swiglu(w[6], u[6], ALPHA, BETA, LIMIT, BF16, ASM),
            swiglu(w[7], u[7], ALPHA, BETA, LIMIT, BF16, ASM),
        )
    if SOURCE == "norm":
        v = load_words(weights, weight_mask)
        w = (
            normed(w[0], v[0], factor, BF16, ASM),
            normed(w[1], v[1], factor, BF16, ASM),
            normed(w[2], v[2], factor, BF16, ASM),
            normed(w[3], v[3], factor, BF16, ASM),
            normed(w[4], v[4], factor, BF16, ASM),
            normed(w[5], v[5], factor, BF16, ASM),
            normed(w[6], v[6], factor, BF16, ASM),
            normed(w[7], v[7], factor, BF16, ASM),
        )
    return w


@triton.jit
def _nvfp4_scale(amax, largest: tl.constexpr, global_scale, NATIVE: tl.constexpr, ASM: tl.constexpr):
    """e4m3(amax / (largest * global)): byte and value."""
    divisor = largest * global_scale
    factor = range_factor(divisor)
    inverse = reciprocal(divisor * factor, ASM)
    return e4m3_of(tl.minimum(quotient(amax * factor, divisor * factor, inverse, ASM), 448.0), NATIVE)  # min takes the number beside a NaN


@triton.jit
def _nvfp4_codes(w, scale, global_scale, BF16: tl.constexpr, ASM: tl.constexpr):
    """Codes of eight words, two words of them; 0 where scale * global is 0, and where it overflows all but NaN and infinity give 0."""
    divisor = scale * global_scale
    factor = tl.where(divisor == float("inf"), 0.0, range_factor(global_scale))
    divisor = tl.where(factor == 0.0, 1.0, divisor * factor)
    inverse = reciprocal(divisor, ASM)
    low = codes4(w[0], w[1], w[2], w[3], factor, divisor, inverse, BF16, True, ASM)
    high = codes4(w[4], w[5], w[6], w[7], factor, divisor, inverse, BF16, True, ASM)
    return tl.where(divisor == 0.0, 0, low), tl.where(divisor == 0.0, 0, high)


@triton.jit
def _squared(word, HALF: tl.constexpr, code, scale, global_scale, BF16: tl.constexpr):
    difference = e2m1_value(code) * scale * global_scale - half(word, HALF, BF16)
    return difference * difference


@triton.jit
def _pair_error(word, codes, scale, global_scale, BF16: tl.constexpr):
    return _squared(word, 0, codes, scale, global_scale, BF16) + _squared(word, 1, codes >> 4, scale, global_scale, BF16)


@triton.jit
def _error4(w0, w1, w2, w3, codes, scale, global_scale, BF16: tl.constexpr):
    first = _pair_error(w0, codes, scale, global_scale, BF16) + _pair_error(w1, codes >> 8, scale, global_scale, BF16)
    return first + (_pair_error(w2, codes >> 16, scale, global_scale, BF16) + _pair_error(w3, codes >> 24, scale, global_scale, BF16))


@triton.jit
def _error(w, low, high, scale, global_scale, BF16: tl.constexpr):
    """The squared error of a block, added up in the codec's order."""
    first = _error4(w[0], w[1], w[2], w[3], low, scale, global_scale, BF16)
    return first + _error4(w[4], w[5], w[6], w[7], high, scale, global_scale, BF16)


@triton.jit
def nvfp4_block(w, global_scale, BF16: tl.constexpr, FOUR_OVER_SIX: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr):
    """Scale byte and two words of codes of the block in eight words."""
    amax = amax8(w, BF16, ASM)
    byte, scale = _nvfp4_scale(amax, 6.0, global_scale, NATIVE, ASM)
    low, high = _nvfp4_codes(w, scale, global_scale, BF16, ASM)
    if FOUR_OVER_SIX:
        byte4, scale4 = _nvfp4_scale(amax, 4.0, global_scale, NATIVE, ASM)
        low4, high4 = _nvfp4_codes(w, scale4, global_scale, BF16, ASM)
        keep4 = _error(w, low4, high4, scale4, global_scale, BF16) < _error(w, low, high, scale, global_scale, BF16)
        byte, low, high = tl.where(keep4, byte4, byte), tl.where(keep4, low4, low), tl.where(keep4, high4, high)
    return byte, low, high


@triton.jit
def _scale_offset(row, column, scale_columns, LAYOUT: tl.constexpr):
    """Bytes from the start of its tile row to the scale of (row, column); `scale_columns` is padded to 4 except for "linear", a tile of one row."""
    if LAYOUT == "linear":
        return row * scale_columns + column
    if LAYOUT == "8x4":
        return row * 4 + column // 4 * 32 + column % 4
    return row % 32 * 16 + row // 32 * 4 + column // 4 * 512 + column % 4


@triton.jit
def _quantize_rows(
    x_ptr, weight_ptr, factor_ptr, codes_ptr, scales_ptr, global_ptr, x_row, scale_row, present, first_column, global_index,
    row_blocks, num_columns, scale_columns, rows_per_global,
    NVFP4: tl.constexpr, BF16: tl.constexpr, RULE: tl.constexpr, FOUR_OVER_SIX: tl.constexpr, LAYOUT: tl.constexpr, GLOBAL_ROWS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr,
    SOURCE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Quantise `present` rows from `x_row` on, and write zero scales for those up to ROWS. Columns are blocks; int64 `x_row` and `scale_row`.

    What depends on the chunk is in 64-bit base pointers; offsets inside it are 32-bit.
    """
    GROUPS: tl.constexpr = 1 if NVFP4 else 2  # of sixteen elements in a block
    TILE: tl.constexpr = 1 if LAYOUT == "linear" else (8 if LAYOUT == "8x4" else 128)
    x_base = x_ptr + x_row * row_blocks * (8 * GROUPS)
    codes_base = codes_ptr + x_row * num_columns * (2 * GROUPS)
    scales_base = scales_ptr + scale_row // TILE * TILE * scale_columns
    tile_row = (scale_row % TILE).to(tl.int32)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)[None, :]
    for start in range(0, present, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (row < present) & (column < num_columns)
        words = x_base + (row * row_blocks + column) * (8 * GROUPS)
        codes = codes_base + ((row * num_columns + column) * (2 * GROUPS))[:, :, None]
        up_words = num_columns * (8 * GROUPS)
        weights = weight_ptr + column * (8 * GROUPS)
        factor_of_row = 1.0
        if SOURCE == "norm":
            factor_of_row = tl.load(factor_ptr + x_row + row, mask=row < present, other=0.0)
        w = _load_block(words, mask, up_words, weights, column < num_columns, factor_of_row, SOURCE, ALPHA, BETA, LIMIT, BF16, ASM)
        if NVFP4:
            if GLOBAL_ROWS:
                global_scale = tl.load(global_ptr + (x_row + row) // rows_per_global, mask=row < present, other=1.0)
            else:
                global_scale = tl.load(global_ptr + global_index)
            byte, low, high = nvfp4_block(w, global_scale, BF16, FOUR_OVER_SIX, NATIVE, ASM)
            tl.store(codes + tl.arange(0, 2)[None, None, :], tl.join(low, high), mask=mask[:, :, None])
        else:
            v = _load_block(words + 8, mask, up_words, weights + 8, column < num_columns, factor_of_row, SOURCE, ALPHA, BETA, LIMIT, BF16, ASM)
            byte, factor = e8m0_of(tl.maximum(amax8(w, BF16, ASM), amax8(v, BF16, ASM)), RULE)
            c0 = codes4(w[0], w[1], w[2], w[3], factor, factor, factor, BF16, False, ASM)
            c1 = codes4(w[4], w[5], w[6], w[7], factor, factor, factor, BF16, False, ASM)
            c2 = codes4(v[0], v[1], v[2], v[3], factor, factor, factor, BF16, False, ASM)
            c3 = codes4(v[4], v[5], v[6], v[7], factor, factor, factor, BF16, False, ASM)
            quad = tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (BLOCK_ROWS, BLOCK_COLUMNS, 4))
            tl.store(codes + tl.arange(0, 4)[None, None, :], quad, mask=mask[:, :, None])
        scales = scales_base + tl.max_contiguous(_scale_offset(tile_row + row, column, scale_columns, LAYOUT), (1, 1))
        tl.store(scales, byte.to(tl.uint8), mask=(row < present) & (column < scale_columns))
    if LAYOUT != "linear":  # noqa: SIM102 - decided when compiling
        if present < ROWS:
            _zero_scales(scales_base, tile_row, present, first_column, scale_columns, LAYOUT, ROWS, BLOCK_COLUMNS)


@triton.jit
def _zero_scales(scales_base, tile_row, present, first_column, scale_columns, LAYOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Zero the scales of rows `present` to ROWS, four columns at a time."""
    row = tl.arange(0, ROWS)[:, None]
    column = first_column + 4 * tl.arange(0, BLOCK_COLUMNS // 4)[None, :]
    words = scales_base.to(tl.pointer_type(tl.int32)) + _scale_offset(tile_row + row, column, scale_columns, LAYOUT) // 4
    zero = tl.zeros((ROWS, BLOCK_COLUMNS // 4), tl.int32)
    tl.store(words, zero, mask=(row >= present) & (column < scale_columns))


@triton.jit(do_not_specialize=["num_rows", "padded_rows", "chunks_of_matrix", "num_chunks"])
def quantize_kernel(
    x_ptr, weight_ptr, factor_ptr, codes_ptr, scales_ptr, global_ptr, num_rows, padded_rows, chunks_of_matrix, num_chunks,
    row_blocks, num_columns, scale_columns, rows_per_global,
    NVFP4: tl.constexpr, BF16: tl.constexpr, RULE: tl.constexpr, FOUR_OVER_SIX: tl.constexpr, LAYOUT: tl.constexpr, GLOBAL_ROWS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr,
    SOURCE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        matrix = (chunk // chunks_of_matrix).to(tl.int64)
        row = chunk % chunks_of_matrix * ROWS
        present = tl.maximum(tl.minimum(num_rows - row, ROWS), 0)
        _quantize_rows(
            x_ptr, weight_ptr, factor_ptr, codes_ptr, scales_ptr, global_ptr, matrix * num_rows + row, matrix * padded_rows + row, present,
            tl.program_id(1) * BLOCK_COLUMNS, matrix, row_blocks, num_columns, scale_columns, rows_per_global,
            NVFP4, BF16, RULE, FOUR_OVER_SIX, LAYOUT, GLOBAL_ROWS, ROWS, BLOCK_ROWS, BLOCK_COLUMNS, NATIVE, ASM,
            SOURCE, ALPHA, BETA, LIMIT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["eps"])
def inverse_rms_kernel(x_ptr, factor_ptr, width, eps, BLOCK: tl.constexpr):
    """factor[row] = 1 / sqrt(mean(x^2) + eps) of contiguous rows, fp32. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * width + column, mask=column < width, other=0.0).to(tl.float32)
        total += x * x
    tl.store(factor_ptr + row, 1.0 / tl.sqrt(tl.sum(total) / width + eps))


@triton.jit
def _padded_sizes(offsets_ptr, expert, num_rows, NUM_EXPERTS: tl.constexpr, TILE: tl.constexpr):
    """Rows of experts in whole tiles; 0 beyond the last expert."""
    first = tl.load(offsets_ptr + expert, mask=expert < NUM_EXPERTS, other=0)
    end = tl.load(offsets_ptr + expert + 1, mask=expert < NUM_EXPERTS, other=0)
    return (tl.maximum(tl.minimum(end, num_rows) - tl.maximum(first, 0), 0) + (TILE - 1)) // TILE * TILE


@triton.jit(do_not_specialize=["num_rows"])
def scale_offsets_kernel(offsets_ptr, scale_offsets_ptr, num_rows, NUM_EXPERTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """scale_offsets[e] = rows of the experts before e in whole tiles. One program."""
    lane = tl.arange(0, BLOCK)
    total = 0
    tl.store(scale_offsets_ptr, 0)
    for first in range(0, NUM_EXPERTS, BLOCK):
        ends = total + tl.cumsum(_padded_sizes(offsets_ptr, first + lane, num_rows, NUM_EXPERTS, TILE))
        tl.store(scale_offsets_ptr + 1 + first + lane, ends, mask=first + lane < NUM_EXPERTS)
        total = tl.max(ends)


@triton.jit(do_not_specialize=["num_rows"])
def quantize_experts_kernel(
    x_ptr, codes_ptr, scales_ptr, global_ptr, offsets_ptr, scale_offsets_ptr, num_rows, row_blocks, num_columns, scale_columns,
    NVFP4: tl.constexpr, BF16: tl.constexpr, RULE: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr, NUM_EXPERTS: tl.constexpr,
    SCAN: tl.constexpr, EXPERTS_PADDED: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr,
    SOURCE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    if SCAN:
        experts = tl.arange(0, EXPERTS_PADDED)
        ends = tl.cumsum(_padded_sizes(offsets_ptr, experts, num_rows, NUM_EXPERTS, TILE))
        total = tl.max(ends)
        if LAYOUT != "linear":  # noqa: SIM102 - decided when compiling
            if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
                tl.store(scale_offsets_ptr, 0)
                tl.store(scale_offsets_ptr + 1 + experts, ends, mask=experts < NUM_EXPERTS)
    else:
        total = tl.load(scale_offsets_ptr + NUM_EXPERTS)
    for chunk in range(tl.program_id(0), total // ROWS, tl.num_programs(0)):
        padded_row = chunk * ROWS
        if SCAN:
            is_before = ends <= padded_row
            expert = tl.sum(is_before.to(tl.int32))
            start = tl.max(tl.where(is_before, ends, 0))
        else:  # bisect: the number of experts that end at or before this row
            expert = 0
            end = NUM_EXPERTS
            for _ in range(STEPS):
                middle = (expert + end) // 2
                is_before = (middle < NUM_EXPERTS) & (tl.load(scale_offsets_ptr + 1 + tl.minimum(middle, NUM_EXPERTS - 1)) <= padded_row)
                expert = tl.where(is_before, middle + 1, expert)
                end = tl.where(is_before, end, middle)
            start = tl.load(scale_offsets_ptr + expert)
        first = tl.maximum(tl.load(offsets_ptr + expert), 0)
        count = tl.minimum(tl.load(offsets_ptr + expert + 1), num_rows) - first
        x_row = (first + padded_row - start).to(tl.int64)
        present = tl.maximum(tl.minimum(count - (padded_row - start), ROWS), 0)
        scale_row = x_row if LAYOUT == "linear" else tl.cast(padded_row, tl.int64)
        _quantize_rows(
            x_ptr, x_ptr, x_ptr, codes_ptr, scales_ptr, global_ptr, x_row, scale_row, present,
            tl.program_id(1) * BLOCK_COLUMNS, expert, row_blocks, num_columns, scale_columns, 1,
            NVFP4, BF16, RULE, False, LAYOUT, False, ROWS, BLOCK_ROWS, BLOCK_COLUMNS, NATIVE, ASM,
            SOURCE, ALPHA, BETA, LIMIT,
        )  # fmt: skip


@dataclass(frozen=True)
class Config:
    """A program takes `rows` rows at a time, `block_rows` at once, of `block_columns` blocks; `rows` divides a tile of the scale layout."""

    rows: int
    block_rows: int
    block_columns: int
    num_warps: int


def choose_config(num_rows: int, num_columns: int, block: int, layout: ScaleLayout, num_sms: int, num_experts: int = 0) -> Config:
    """Blocks of a program for `num_rows` rows of `num_columns` blocks of `block` elements: two (NVFP4) or one (MXFP4) a thread, four warps.

    Longer chunks are for many rows, where they save looking up, and for few rows an expert, where most of a tile is padding.

    >>> choose_config(64, 448, 16, "128x4", 132), choose_config(8192, 448, 16, "8x4", 132)
    (Config(rows=4, block_rows=4, block_columns=64, num_warps=4), Config(rows=8, block_rows=4, block_columns=64, num_warps=4))
    """
    blocks, blocks_of_thread = (256, 2) if block == 16 else (128, 1)
    block_columns = min(64, max(4, triton.next_power_of_2(num_columns)))
    tile = 128 if layout == "linear" else tile_rows(layout)
    rows = block_rows = min(blocks // block_columns, tile)
    if num_experts and num_rows < 32 * num_experts:
        rows = tile
    while rows < min(tile, 4 * block_rows) and num_rows * triton.cdiv(num_columns, block_columns) > 16 * num_sms * rows:
        rows *= 2
    return Config(rows, block_rows, block_columns, max(1, block_rows * block_columns // blocks_of_thread // 32))


def quantize(
    x: torch.Tensor,
    format: BlockFormat,
    global_scale: torch.Tensor | float | None = None,
    *,
    activation: Activation | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    four_over_six: bool = False,
    scale_rule: str = "ceil",
    scale_layout: ScaleLayout = "linear",
) -> QuantTensor:
    """As `kernels.reference.quantize`, of bf16 and fp16. A global scale that is not given costs passes over x of its own."""
    *batch, num_rows, width = x.shape
    width = width if activation is None else width // 2
    num_columns = width // format.block
    padded = padded_shape(scale_layout, num_rows, num_columns)
    decode_scale = decode_scale_of(x, global_scale, four_over_six) if format.has_global_scale else None
    codes = torch.empty((*batch, num_rows, width // 2), dtype=torch.uint8, device=x.device)
    scales = torch.empty((*batch, *padded), dtype=torch.uint8, device=x.device)
    result = QuantTensor(codes, scales, decode_scale, format, scale_layout)
    if x.numel() == 0:
        return result
    matrices = math.prod(batch)
    rows_per_global = 1 if decode_scale is None else matrices * num_rows // decode_scale.numel()
    config = choose_config(matrices * num_rows, num_columns, format.block, scale_layout, Target.of(x.device).num_sms)
    chunks_of_matrix = triton.cdiv(padded[0], config.rows)
    words, row_blocks = _words(x, format.block)
    arguments = (
        words, *((words, words) if norm is None else (_words(norm[0][None], format.block)[0], _inverse_rms(x, norm[1]))),
        codes.view(torch.int32), scales, words if decode_scale is None else decode_scale.contiguous(),
        num_rows, padded[0], chunks_of_matrix, matrices * chunks_of_matrix, row_blocks, num_columns, padded[1], rows_per_global,
    )  # fmt: skip
    constants = _constants(x, format, scale_rule, scale_layout, config, activation, norm)
    constants |= {"FOUR_OVER_SIX": four_over_six, "GLOBAL_ROWS": rows_per_global != num_rows and format.has_global_scale}
    _launch(quantize_kernel, arguments, constants, config, matrices * chunks_of_matrix, x.device)
    return result


def quantize_experts(
    x: torch.Tensor,
    expert_offsets: torch.Tensor,
    global_scales: torch.Tensor | None,
    format: BlockFormat,
    scale_layout: ScaleLayout,
    codes: torch.Tensor,
    scales: torch.Tensor,
    scale_offsets: torch.Tensor,
    *,
    activation: Activation | None = None,
    scan: bool | None = None,
) -> None:
    """Quantise rows sorted by expert into `codes`, `scales` and `scale_offsets`, which `kernels.quantize` allocates and describes.

    `scan` chooses how a chunk finds its expert; by default, by the number of experts.
    """
    num_rows = x.shape[0]
    num_experts, num_columns = expert_offsets.numel() - 1, codes.shape[1] * 2 // format.block
    scan = num_experts <= MAX_SCANNED_EXPERTS if scan is None else scan
    config = choose_config(num_rows, num_columns, format.block, scale_layout, Target.of(x.device).num_sms, num_experts)
    tile = config.rows if scale_layout == "linear" else tile_rows(scale_layout)
    words, row_blocks = _words(x, format.block)
    if scale_layout == "linear":  # chunks still need a start for every expert; it is nobody else's business
        scale_offsets = torch.empty(0 if scan else num_experts + 1, dtype=torch.int32, device=x.device)
    if not scan:
        block = min(1024, triton.next_power_of_2(num_experts))
        with torch.cuda.device_of(x):
            scale_offsets_kernel[(1,)](expert_offsets, scale_offsets, num_rows, num_experts, tile, block, num_warps=4)
    arguments = (
        words, codes.view(torch.int32), scales.view(torch.uint8), words if global_scales is None else global_scales, expert_offsets, scale_offsets,
        num_rows, row_blocks, num_columns, padded_shape(scale_layout, 0, num_columns)[1],
    )  # fmt: skip
    constants = _constants(x, format, "ceil", scale_layout, config, activation)
    constants |= {"TILE": tile, "NUM_EXPERTS": num_experts, "SCAN": scan, "STEPS": 0 if scan else num_experts.bit_length()}
    constants |= {"EXPERTS_PADDED": triton.next_power_of_2(num_experts) if scan else 1}
    most_chunks = max_padded_rows(num_rows, num_experts, tile) // config.rows
    _launch(quantize_experts_kernel, arguments, constants, config, most_chunks, x.device)


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) of every row: fp32 [rows]."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    factor = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    block = min(4096, triton.next_power_of_2(rows.shape[1]))
    with torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext():
        inverse_rms_kernel[(rows.shape[0],)](rows, factor, rows.shape[1], eps, block, **({} if INTERPRETED else {"num_warps": 4}))
    return factor


def _words(x: torch.Tensor, block: int) -> tuple[torch.Tensor, int]:
    """x as int32 words, and the blocks from one row to the next; a copy where rows do not lie evenly, or start off 16 bytes."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1 or rows.stride(0) % block or rows.data_ptr() % 16:
        rows = rows.contiguous()
    return rows.view(torch.int32), rows.stride(0) // block if rows.shape[0] > 1 else rows.shape[1] // block


def _constants(
    x: torch.Tensor,
    format: BlockFormat,
    scale_rule: str,
    scale_layout: ScaleLayout,
    config: Config,
    activation: Activation | None,
    norm: object = None,
) -> dict[str, Any]:
    capability = 0 if INTERPRETED else triton.runtime.driver.active.get_current_target().arch
    return {
        "NVFP4": format is NVFP4,
        "BF16": x.dtype == torch.bfloat16,
        "RULE": scale_rule,
        "LAYOUT": scale_layout,
        "ROWS": config.rows,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_COLUMNS": config.block_columns,
        "NATIVE": capability >= 89,
        "ASM": not INTERPRETED,
        "SOURCE": "swiglu" if activation is not None else "norm" if norm is not None else "x",
        "ALPHA": 1.0 if activation is None else activation.alpha,
        "BETA": 0.0 if activation is None else activation.beta,
        "LIMIT": None if activation is None else activation.limit,
    }


def _launch(kernel: Any, arguments: tuple, constants: dict[str, Any], config: Config, num_chunks: int, device: torch.device) -> None:
    """Start as many programs as there are chunks, or as the GPU holds at once."""
    options = {} if INTERPRETED else {"num_warps": config.num_warps, "enable_fp_fusion": False}  # the codec rounds every product
    columns = triton.cdiv(arguments[-2 if kernel is quantize_experts_kernel else -3], config.block_columns)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        most = _programs_per_sm(kernel, arguments, {**constants, **options}) * Target.of(device).num_sms
        kernel[(min(num_chunks, triton.cdiv(most, columns)), columns)](*arguments, **constants, **options)


_MEASURED: dict[tuple, int] = {}


def _programs_per_sm(kernel: Any, arguments: tuple, constants: dict[str, Any]) -> int:
    """How many programs of this kernel a multiprocessor holds, by the registers and the shared memory that it was compiled to."""
    if INTERPRETED:
        return 1
    key = (kernel.fn.__name__, triton.runtime.driver.active.get_current_device(), *constants.values())
    if key not in _MEASURED:
        compiled = kernel.warmup(*arguments, grid=(1,), **constants)
        compiled._init_handles()
        _MEASURED[key] = programs_per_sm(compiled.n_regs, compiled.metadata.shared, constants["num_warps"])
    return _MEASURED[key]


def programs_per_sm(registers: int, shared_bytes: int, num_warps: int) -> int:
    """Programs of `num_warps` warps of 32 threads of `registers` registers that fit: 65,536 registers, 48 warps, 96 KiB on the smallest GPU.

    >>> programs_per_sm(64, 0, 4), programs_per_sm(40, 40000, 4)
    (8, 2)
    """
    registers_of_warp = triton.cdiv(max(registers, 1) * 32, 256) * 256
    return max(1, min(65536 // registers_of_warp // num_warps, 48 // num_warps, 98304 // (shared_bytes + 1024)))
