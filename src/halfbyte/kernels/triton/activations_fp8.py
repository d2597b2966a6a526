"""Activations to e4m3 with one scale a row, fused with the moves around it: scale = amax(row) / 448, code = e4m3(x / scale), bit for bit as
`formats.activations.quantize_fp8` defines them.

    quantize_tokens    hidden [T, H] bf16          to x [R, H padded] e4m3: the row of every slot of a token, which is read once
    quantize_rows      h [R, I padded] bf16        to x [R, I padded] e4m3

e4m3 codes are in fp8 slot order (`weights.layouts.hopper_fp8`), h comes in the bf16 slot order in which the first GEMM writes it. What W4A16 kernels
multiply when activations are "fp8" comes from `encode_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc

from halfbyte.kernels.triton.permute import Items
from halfbyte.kernels.triton.quantize_fp8 import divide, e4m3_bytes, fp32_scale, prepare_division

INTERPRETED = triton.knobs.runtime.interpret
_FOUR_CODES = tl.constexpr("{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; mov.b32 $0, {a, b}; }")


@triton.jit
def _halves(pair):
    """int32, two bf16, to two fp32."""
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3_word(q0, q1, q2, q3, ASM: tl.constexpr):
    """Four e4m3 codes in an int32, the first one lowest."""
    if ASM:
        return tl.inline_asm_elementwise(_FOUR_CODES, "=r,f,f,f,f", [q0, q1, q2, q3], dtype=tl.int32, is_pure=True, pack=1)
    low = e4m3_bytes(q0, True).to(tl.int32) | (e4m3_bytes(q1, True).to(tl.int32) << 8)
    return low | (e4m3_bytes(q2, True).to(tl.int32) << 16) | (e4m3_bytes(q3, True).to(tl.int32) << 24)


@triton.jit
def _quantize(
    x_ptr, row_of_slot_ptr, codes_ptr, scales_ptr,
    PAIRS: tl.constexpr, PADDED_WORDS: tl.constexpr, TOP_K: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Program t writes the rows of token t (TOP_K > 0), or program r row r, whose columns are in bf16 slot order (TOP_K 0)."""
    source = tl.program_id(0)
    if PDL:
        gdc.gdc_wait()
        gdc.gdc_launch_dependents()
    # Word 4 s + t of a block of 64 slots has the bytes (p 0, e 0), (1, 0), (0, 1), (1, 1), for odd s with the halves exchanged; a pair of the source
    # is one (s, t, p).
    word = tl.arange(0, WORDS)
    if TOP_K > 0:
        pair = word // 16 * 32 + word % 4 * 8 + word // 4 % 4 * 2
        next_pair = pair + 1
    else:
        pair = word // 4 * 8 + word % 4
        next_pair = pair + 4
    x_row = x_ptr + source.to(tl.int64) * PAIRS
    first = tl.load(x_row + pair, mask=(pair < PAIRS) & (word < PADDED_WORDS), other=0)
    second = tl.load(x_row + next_pair, mask=(next_pair < PAIRS) & (word < PADDED_WORDS), other=0)
    x00, x01 = _halves(first)
    x10, x11 = _halves(second)
    amax = tl.maximum(tl.maximum(tl.abs(x00), tl.abs(x01)), tl.maximum(tl.abs(x10), tl.abs(x11)))
    scale = fp32_scale(tl.max(amax, 0))
    factor, divisor, inverse = prepare_division(scale, ASM)
    q00, q10 = divide(x00, factor, divisor, inverse, ASM), divide(x10, factor, divisor, inverse, ASM)
    q01, q11 = divide(x01, factor, divisor, inverse, ASM), divide(x11, factor, divisor, inverse, ASM)
    codes = _e4m3_word(q00, q10, q01, q11, ASM)
    codes = tl.where(word // 4 % 2 == 1, codes << 16 | (codes >> 16 & 0xFFFF), codes)
    if TOP_K > 0:
        for j in tl.static_range(TOP_K):
            row = tl.load(row_of_slot_ptr + source * TOP_K + j)
            if row >= 0:
                tl.store(codes_ptr + row.to(tl.int64) * PADDED_WORDS + word, codes, mask=word < PADDED_WORDS)
                tl.store(scales_ptr + row, scale)
    else:
        tl.store(codes_ptr + source.to(tl.int64) * PADDED_WORDS + word, codes, mask=word < PADDED_WORDS)
        tl.store(scales_ptr + source, scale)


def quantize_tokens(hidden: torch.Tensor, rows: Items, top_k: int, padded: int, *, launch_early: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [T, H] bf16 (contiguous, H even) to codes e4m3 [T * k, padded] and scales fp32 [T * k], by the rows of `permute`; zeros beyond H."""
    return _launch(hidden, rows.row_of_slot, hidden.shape[0] * top_k, top_k, padded, launch_early)


def quantize_rows(h: torch.Tensor, *, launch_early: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """h [R, I] bf16 (contiguous, I a multiple of 64) in bf16 slot order to codes e4m3 [R, I] and scales fp32 [R]."""
    return _launch(h, None, h.shape[0], 0, h.shape[1], launch_early)


def _launch(
    x: torch.Tensor, row_of_slot: torch.Tensor | None, num_rows: int, top_k: int, padded: int, launch_early: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty((num_rows, padded), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    words = padded // 4
    _quantize[(x.shape[0],)](
        x.view(torch.int32), scales if row_of_slot is None else row_of_slot, codes.view(torch.int32), scales,
        x.shape[1] // 2, words, top_k, triton.next_power_of_2(words), launch_early, not INTERPRETED,
        num_warps=4 if words <= 1024 else 8, **({"launch_pdl": True} if launch_early else {}),
    )  # fmt: skip
    return codes, scales
