"""Activations to e4m3 with one scale a row, fused with the moves around it: scale = amax(row) / 448, code = e4m3(x / scale), bit for bit as
`formats.activation_formats.quantize_fp8` defines them.

    quantize_tokens    hidden [T, H] bf16          to x [R, H padded] e4m3: the row of every slot of a token, which is read once
    gather_codes       hidden [T, H] e4m3          the same of hidden states that arrive in e4m3 with one scale per token
    quantize_rows      h [R, I padded] bf16        to x [R, I padded] e4m3

e4m3 codes are in fp8 fragment order (`weights.hopper.layout`), h comes in the bf16 fragment order in which the first GEMM
writes it. What W4A16 kernels multiply when activations are "fp8" comes from `encode_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc

from halfbyte.arguments import dense_rows
from halfbyte.formats.fp8_tensor import Fp8Tensor
from halfbyte.kernels.arithmetic import ceil_div, next_power_of_2
from halfbyte.kernels.launch import launch
from halfbyte.kernels.quantizers.fp8 import divide, e4m3_bytes, fp32_scale, prepare_division
from halfbyte.kernels.work_list import WorkList
from halfbyte.kernels.workspace import scratch
from halfbyte.weights.hopper.fragment_order import pair_of_fp8_word

INTERPRETED = triton.knobs.runtime.interpret
EIGHTS_OF_PROGRAM = 256  # of pairs, that `quantize_rows` takes at once, two a thread: short rows alone would leave it waiting for memory
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
def _amax(first, second):
    """The largest magnitude of the four elements of two pairs."""
    x00, x01 = _halves(first)
    x10, x11 = _halves(second)
    return tl.maximum(tl.maximum(tl.abs(x00), tl.abs(x01)), tl.maximum(tl.abs(x10), tl.abs(x11)))


@triton.jit
def _codes(first, second, scale, s, ASM: tl.constexpr):
    """Word 4 s + t of the codes, from the pairs (s, t, p = 0) and (s, t, 1): the bytes (p 0, e 0), (1, 0), (0, 1), (1, 1), for odd s with the halves
    exchanged."""
    x00, x01 = _halves(first)
    x10, x11 = _halves(second)
    factor, divisor, inverse = prepare_division(scale, ASM)
    q00, q10 = divide(x00, factor, divisor, inverse, ASM), divide(x10, factor, divisor, inverse, ASM)
    q01, q11 = divide(x01, factor, divisor, inverse, ASM), divide(x11, factor, divisor, inverse, ASM)
    codes = _e4m3_word(q00, q10, q01, q11, ASM)
    return tl.where(s % 2 == 1, codes << 16 | (codes >> 16 & 0xFFFF), codes)


@triton.jit
def _quantize_tokens(
    x_ptr, row_of_slot_ptr, codes_ptr, scales_ptr,
    PAIRS: tl.constexpr, PADDED_WORDS: tl.constexpr, TOP_K: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Program t writes the rows of token t."""
    token = tl.program_id(0)
    if PDL:
        gdc.gdc_wait()
        gdc.gdc_launch_dependents()
    word = tl.arange(0, WORDS)  # 4 s + t of a block of 16
    pair = pair_of_fp8_word(word)
    x_row = x_ptr.to(tl.pointer_type(tl.int32)) + token.to(tl.int64) * PAIRS
    first = tl.load(x_row + pair, mask=(pair < PAIRS) & (word < PADDED_WORDS), other=0)
    second = tl.load(x_row + pair + 1, mask=(pair + 1 < PAIRS) & (word < PADDED_WORDS), other=0)
    scale = fp32_scale(tl.max(_amax(first, second), 0))
    codes = _codes(first, second, scale, word // 4, ASM)
    codes_ptr = codes_ptr.to(tl.pointer_type(tl.int32))
    for j in tl.static_range(TOP_K):
        row = tl.load(row_of_slot_ptr + token * TOP_K + j)
        if row >= 0:
            tl.store(codes_ptr + row.to(tl.int64) * PADDED_WORDS + word, codes, mask=word < PADDED_WORDS)
            tl.store(scales_ptr + row, scale)


@triton.jit
def _gather_codes(
    x_ptr, x_scale_ptr, row_of_slot_ptr, codes_ptr, scales_ptr,
    WORDS_OF_X: tl.constexpr, PADDED_WORDS: tl.constexpr, TOP_K: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Program t writes the rows of token t. Word 4 s + t of a block has four neighbouring columns, which are one word of x."""
    token = tl.program_id(0)
    word = tl.arange(0, WORDS)
    source = pair_of_fp8_word(word) // 2
    x = tl.load(
        x_ptr.to(tl.pointer_type(tl.int32)) + token.to(tl.int64) * WORDS_OF_X + source, mask=(source < WORDS_OF_X) & (word < PADDED_WORDS), other=0
    )
    codes = (x & -16776961) | (x >> 8 & 0xFF00) | (x << 8 & 0xFF0000)  # bytes 0, 2, 1, 3; -16776961 is 0xFF0000FF
    codes = tl.where(word // 4 % 2 == 1, codes << 16 | (codes >> 16 & 0xFFFF), codes)
    scale = tl.load(x_scale_ptr + token)
    codes_ptr = codes_ptr.to(tl.pointer_type(tl.int32))
    for j in tl.static_range(TOP_K):
        row = tl.load(row_of_slot_ptr + token * TOP_K + j)
        if row >= 0:
            tl.store(codes_ptr + row.to(tl.int64) * PADDED_WORDS + word, codes, mask=word < PADDED_WORDS)
            tl.store(scales_ptr + row, scale)


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_rows(h_ptr, codes_ptr, scales_ptr, num_rows, EIGHTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ASM: tl.constexpr):
    """Each program ROWS rows of EIGHTS times eight pairs, in bf16 fragment order: of an s, first those with p = 0."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    s = tl.arange(0, BLOCK)[None, :, None]
    t = tl.arange(0, 4)[None, None, :]
    mask = (row < num_rows) & (s < EIGHTS)
    eight = row.to(tl.int64) * EIGHTS + s
    h = h_ptr.to(tl.pointer_type(tl.int32)) + eight * 8 + t
    first = tl.load(h, mask=mask, other=0)
    second = tl.load(h + 4, mask=mask, other=0)
    scale = fp32_scale(tl.max(tl.max(_amax(first, second), 2), 1))
    tl.store(codes_ptr.to(tl.pointer_type(tl.int32)) + eight * 4 + t, _codes(first, second, scale[:, None, None], s, ASM), mask=mask)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(scales_ptr + rows, scale, mask=rows < num_rows)


def quantize_tokens(
    hidden: torch.Tensor, work: WorkList, padded: int, *, out: torch.Tensor | None = None, launch_early: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [T, H] bf16 (contiguous, H even) to codes e4m3 [T * k, padded] and scales fp32 [T * k], in the rows of `work`; zeros beyond H.

    `out`: where the codes go.
    """
    codes, scales = _allocate(work.row_of_slot.shape[0], padded, hidden.device, out)
    words = padded // 4
    launch(
        _quantize_tokens, (hidden.shape[0], 1, 1),
        (hidden, work.row_of_slot, codes, scales),
        (hidden.shape[1] // 2, words, work.row_of_slot.shape[0] // hidden.shape[0], next_power_of_2(words), launch_early, not INTERPRETED),
        num_warps=4 if words <= 1024 else 8, launch_pdl=launch_early,
    )  # fmt: skip
    return codes, scales


def gather_codes(hidden: Fp8Tensor, work: WorkList, padded: int, *, out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of hidden states [T, H] that are e4m3 with one scale per token already (H a multiple of 4): their bits, moved."""
    codes, scales = _allocate(work.row_of_slot.shape[0], padded, hidden.codes.device, out)
    num_tokens, width = hidden.codes.shape
    words = padded // 4
    launch(
        _gather_codes, (num_tokens, 1, 1),
        (dense_rows(hidden.codes), hidden.scales.contiguous(), work.row_of_slot, codes, scales),
        (width // 4, words, work.row_of_slot.shape[0] // num_tokens, next_power_of_2(words)), num_warps=4 if words <= 1024 else 8,
    )  # fmt: skip
    return codes, scales


def quantize_rows(h: torch.Tensor, *, out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """h [R, I] bf16 (contiguous, I a multiple of 64) in bf16 fragment order to codes e4m3 [R, I] and scales fp32 [R]."""
    num_rows, width = h.shape
    codes, scales = _allocate(num_rows, width, h.device, out)
    block = next_power_of_2(width // 16)
    rows = max(1, EIGHTS_OF_PROGRAM // block)
    launch(
        _quantize_rows, (ceil_div(num_rows, rows), 1, 1),
        (h, codes, scales, num_rows), (width // 16, rows, block, not INTERPRETED),
        num_warps=4 if block <= 256 else 8,
    )  # fmt: skip
    return codes, scales


def _allocate(num_rows: int, padded: int, device: torch.device, codes: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    codes = scratch((num_rows, padded), torch.float8_e4m3fn, device) if codes is None else codes
    return codes, scratch((num_rows,), torch.float32, device)
