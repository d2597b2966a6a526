"""`hopper.pack` and `hopper.unpack` of whole matrices on a GPU: every byte read once and written once. Byte for byte what the torch code does.

A program has one row tile and one scale word, which is four tiles: 64 rows x 128 bytes of codes in, four tiles of 2 KiB and one run of scales out.
Rows 16 w + g and 16 w + g + 8 of a tile are a pair, 8 w + g. A lane of 8 bytes of both rows has the 16 columns of one thread of the layout, and
becomes its four words.

    codes        uint8 [E, N, K/2], read and written 8 bytes at a time
    scales       uint8 [E, N, K/16 or K/32]
    words        int32 [E, N/64, K/64, 512]
    scale_words  int64 [E, N/64, ceil(K/256), 128 or 64]
    row_exponent int8 [E, N], from the scale words that were just written

Compiled for sm_80 and newer; interpreted on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from halfbyte.weights.layouts import hopper_fp8
from halfbyte.weights.layouts.hopper import RowOrder

TOP_EXPONENT = tl.constexpr(hopper_fp8.TOP_EXPONENT)
SMALLEST_ROW_EXPONENT = tl.constexpr(hopper_fp8.SMALLEST_ROW_EXPONENT)
LOW_NIBBLES = tl.constexpr(0x0F0F0F0F0F0F0F0F)


@triton.jit
def _rows_of_pairs(tile, half: tl.constexpr, intermediate, ORDER: tl.constexpr):
    """[32] canonical row of each pair's row `half`, and whether there is one. `intermediate`: rows of the matrix, of each half when gate_up."""
    pair = tl.arange(0, 32)
    if ORDER == "gate_up":
        slot = 32 * (tile % 2) + pair
        tile = tile // 2
    else:
        slot = pair // 8 * 16 + 8 * half + pair % 8
    if ORDER != "straight":
        slot = 16 * (slot // 2 % 4) + 4 * (slot // 16) + 2 * (slot // 8 % 2) + slot % 2
    row = 64 * tile + slot
    exists = row < intermediate
    if ORDER == "gate_up":
        row += half * intermediate
    return row, exists


@triton.jit
def _encode_nvfp4_scale(m):
    """`hopper_bits.encode_nvfp4_scale` in int32."""
    return tl.minimum(tl.minimum(m + 112, 2 * m + 104), tl.minimum(4 * m + 96, 96 * m))


@triton.jit
def _decode_nvfp4_scale(c):
    return tl.maximum(tl.maximum(c - 112, (c - 104) >> 1), tl.maximum((c - 96) >> 2, (c > 0).to(tl.int32)))


@triton.jit
def _of_this_program(codes_ptr, scales_ptr, words_ptr, scale_words_ptr, rows, lanes, column_tiles, SCALES: tl.constexpr):
    """The pointers moved to the expert of this program, and to its row tile and run of scales."""
    expert = tl.program_id(2).to(tl.int64)
    row_tile = expert * tl.num_programs(1) + tl.program_id(1)
    return (
        codes_ptr + expert * rows * lanes,
        scales_ptr + expert * rows * (lanes * SCALES // 4),
        words_ptr + row_tile * column_tiles * 512,
        scale_words_ptr + (row_tile * tl.num_programs(0) + tl.program_id(0)) * (32 * SCALES),
    )


@triton.jit
def _pack(
    codes_ptr, scales_ptr, words_ptr, scale_words_ptr, rows, intermediate, lanes, column_tiles,
    ORDER: tl.constexpr, NVFP4: tl.constexpr,
):  # fmt: skip
    run, tile = tl.program_id(0), tl.program_id(1)
    SCALES: tl.constexpr = 4 if NVFP4 else 2  # of a row in a tile
    codes_ptr, scales_ptr, words_ptr, scale_words_ptr = _of_this_program(
        codes_ptr, scales_ptr, words_ptr, scale_words_ptr, rows, lanes, column_tiles, SCALES
    )  # fmt: skip
    first_row, first_exists = _rows_of_pairs(tile, 0, intermediate, ORDER)
    second_row, second_exists = _rows_of_pairs(tile, 1, intermediate, ORDER)

    lane = 16 * run + tl.arange(0, 16)[None, :]
    inside = lane < lanes
    first = tl.load(codes_ptr + first_row[:, None] * lanes + lane, mask=first_exists[:, None] & inside, other=0)
    second = tl.load(codes_ptr + second_row[:, None] * lanes + lane, mask=second_exists[:, None] & inside, other=0)

    column = 4 * SCALES * run + tl.arange(0, 4 * SCALES)[None, :]
    columns = lanes * SCALES // 4
    inside = column < columns
    first_scale = tl.load(scales_ptr + first_row[:, None] * columns + column, mask=first_exists[:, None] & inside, other=0)
    second_scale = tl.load(scales_ptr + second_row[:, None] * columns + column, mask=second_exists[:, None] & inside, other=0)
    if NVFP4:
        first = tl.where(first_scale == 0, 0, first)
        second = tl.where(second_scale == 0, 0, second)
        scale = _encode_nvfp4_scale(first_scale.to(tl.int32)) | _encode_nvfp4_scale(second_scale.to(tl.int32)) << 8
    else:
        scale = first_scale.to(tl.int32) | second_scale.to(tl.int32) << 8
    scale = tl.reshape(scale.to(tl.int64), (32, 4, SCALES)) << (16 * tl.arange(0, 4))[None, :, None]
    entry = SCALES * tl.arange(0, 32)[:, None] + tl.arange(0, SCALES)[None, :]
    tl.store(scale_words_ptr + entry, tl.sum(scale, axis=1))

    # Bytes with the codes of even columns, and of odd ones: the second row's in the low nibble, the first row's in the high one.
    even = (second & LOW_NIBBLES) | (first & LOW_NIBBLES) << 4
    odd = (second >> 4 & LOW_NIBBLES) | (first >> 4 & LOW_NIBBLES) << 4
    shift = (16 * tl.arange(0, 4))[None, None, :]
    even16 = (even[:, :, None] >> shift).to(tl.uint32) & 0xFFFF
    word = _word_of_nibbles(even16 | (odd[:, :, None] >> shift).to(tl.uint32) << 16)
    lane3 = lane[:, :, None]
    target = lane3 // 4 * 512 + 16 * tl.arange(0, 32)[:, None, None] + 4 * (lane3 % 4) + tl.arange(0, 4)[None, None, :]
    tl.store(words_ptr + target, word.to(tl.int32, bitcast=True), mask=lane3 < 4 * column_tiles)


@triton.jit
def _word_of_nibbles(nibbles):
    """uint32 with even columns in the low half and odd ones in the high half, as `hopper_bits._half_words_of_nibbles` has them, to a word."""
    word = (nibbles << 8 & 0x88008800) | (nibbles << 2 & 0x01DC01DC) | (nibbles >> 10 & 0x00200020)
    word |= (nibbles & 0x06000600) | (nibbles >> 8 & 0x00010001)
    return word | ((nibbles << 16 | nibbles >> 16) & 0x70007000) | ((nibbles << 6 | nibbles >> 26) & 0x00020002)


@triton.jit
def _nibbles_of_word(word):
    nibbles = (word >> 8 & 0x00880088) | (word >> 2 & 0x00770077) | (word << 10 & 0x80008000)
    nibbles |= (word & 0x06000600) | (word << 8 & 0x01000100)
    return nibbles | ((word << 16 | word >> 16) & 0x70007000) | ((word << 26 | word >> 6) & 0x08000800)


@triton.jit
def _unpack(
    words_ptr, scale_words_ptr, codes_ptr, scales_ptr, rows, intermediate, lanes, column_tiles,
    ORDER: tl.constexpr, NVFP4: tl.constexpr,
):  # fmt: skip
    run, tile = tl.program_id(0), tl.program_id(1)
    SCALES: tl.constexpr = 4 if NVFP4 else 2
    codes_ptr, scales_ptr, words_ptr, scale_words_ptr = _of_this_program(
        codes_ptr, scales_ptr, words_ptr, scale_words_ptr, rows, lanes, column_tiles, SCALES
    )  # fmt: skip

    lane = 16 * run + tl.arange(0, 16)[None, :]
    lane3 = lane[:, :, None]
    source = lane3 // 4 * 512 + 16 * tl.arange(0, 32)[:, None, None] + 4 * (lane3 % 4) + tl.arange(0, 4)[None, None, :]
    word = tl.load(words_ptr + source, mask=lane3 < 4 * column_tiles, other=0)
    nibbles = _nibbles_of_word(word.to(tl.uint32, bitcast=True)).to(tl.int64)
    shift = (16 * tl.arange(0, 4))[None, None, :]
    even = tl.sum((nibbles & 0xFFFF) << shift, axis=2)
    odd = tl.sum((nibbles >> 16) << shift, axis=2)

    column = 4 * SCALES * run + tl.arange(0, 4 * SCALES)[None, :]
    columns = lanes * SCALES // 4
    place = tl.arange(0, 4 * SCALES)[None, :]
    scale_word = tl.load(scale_words_ptr + SCALES * tl.arange(0, 32)[:, None] + place % SCALES)
    scale = (scale_word >> (16 * (place // SCALES))).to(tl.int32)
    for half in tl.static_range(2):
        row, exists = _rows_of_pairs(tile, half, intermediate, ORDER)
        code = (even >> (4 - 4 * half) & LOW_NIBBLES) | (odd >> (4 - 4 * half) & LOW_NIBBLES) << 4
        tl.store(codes_ptr + row[:, None] * lanes + lane, code, mask=exists[:, None] & (lane < lanes))
        raw = scale >> (8 * half) & 0xFF
        if NVFP4:
            raw = _decode_nvfp4_scale(raw)
        tl.store(scales_ptr + row[:, None] * columns + column, raw.to(tl.uint8), mask=exists[:, None] & (column < columns))


@triton.jit
def _row_exponents(scale_words_ptr, row_exponent_ptr, scale_words, NVFP4: tl.constexpr):
    """`hopper_fp8.row_exponents` of the 64 rows of a tile."""
    tile, expert = tl.program_id(0), tl.program_id(1).to(tl.int64)
    SCALES: tl.constexpr = 4 if NVFP4 else 2
    tile += expert * tl.num_programs(0)
    scale_words_ptr += tile * scale_words * (32 * SCALES)
    entry = SCALES * tl.arange(0, 32)[:, None] + tl.arange(0, SCALES)[None, :]
    first = tl.zeros((32, SCALES), tl.int32)
    second = tl.zeros((32, SCALES), tl.int32)
    for run in range(0, scale_words):
        word = tl.load(scale_words_ptr + run * (32 * SCALES) + entry)
        for c in tl.static_range(4):
            pair = (word >> (16 * c)).to(tl.int32)
            first, second = tl.maximum(first, pair & 0xFF), tl.maximum(second, pair >> 8 & 0xFF)
    row = 64 * tile + tl.arange(0, 32) // 8 * 16 + tl.arange(0, 32) % 8
    _store_exponents(row_exponent_ptr + row, tl.max(first, axis=1), NVFP4)
    _store_exponents(row_exponent_ptr + row + 8, tl.max(second, axis=1), NVFP4)


@triton.jit
def _store_exponents(pointers, largest, NVFP4: tl.constexpr):
    exponent = (largest >> 3) - 20 - TOP_EXPONENT if NVFP4 else largest - 127 - TOP_EXPONENT
    tl.store(pointers, tl.maximum(exponent, SMALLEST_ROW_EXPONENT).to(tl.int8))


@triton.jit
def _largest_byte(bytes_ptr, largest_ptr, count, BLOCK: tl.constexpr):
    expert = tl.program_id(1).to(tl.int64)
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.load(bytes_ptr + expert * count + offset, mask=offset < count, other=0)
    tl.atomic_max(largest_ptr + expert, tl.max(byte.to(tl.int32)))


def pack_matrix(
    codes: torch.Tensor, scales: torch.Tensor, words: torch.Tensor, scale_words: torch.Tensor, row_exponent: torch.Tensor, order: RowOrder
) -> None:
    """Write the tiles of codes [E, N, K/2] and scales [E, N, K/block] uint8 to `words`, `scale_words` and `row_exponent`, which share no storage
    with them.

    All are contiguous, codes 8-byte aligned; scales are neither negative nor NaN.
    """
    _launch(_pack, codes, scales, words, scale_words, order, codes.view(torch.int64), scales, words, scale_words)
    num_experts, row_tiles, runs, entries = scale_words.shape
    with torch.cuda.device_of(words):
        _row_exponents[(row_tiles, num_experts)](scale_words, row_exponent, runs, entries == 128, num_warps=1)


def unpack_matrix(words: torch.Tensor, scale_words: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, order: RowOrder) -> None:
    """The inverse of `pack_matrix`."""
    _launch(_unpack, codes, scales, words, scale_words, order, words, scale_words, codes.view(torch.int64), scales)


def largest_bytes(raw: torch.Tensor) -> torch.Tensor:
    """int32 [E]: the largest byte of each raw[e], uint8 [E, ...] contiguous."""
    largest = torch.zeros(len(raw), dtype=torch.int32, device=raw.device)
    count, block = raw[0].numel(), 16384
    with torch.cuda.device_of(raw):
        _largest_byte[(triton.cdiv(count, block), len(raw))](raw, largest, count, block, num_warps=8)
    return largest


def _launch(
    kernel: triton.JITFunction, codes: torch.Tensor, scales: torch.Tensor, words: torch.Tensor, scale_words: torch.Tensor, order: RowOrder,
    *pointers: torch.Tensor,
) -> None:  # fmt: skip
    num_experts, rows, half_columns = codes.shape
    grid = (scale_words.shape[2], words.shape[1], num_experts)
    nvfp4 = scales.shape[2] * 8 == half_columns
    with torch.cuda.device_of(words):
        kernel[grid](*pointers, rows, rows // 2 if order == "gate_up" else rows, half_columns // 8, words.shape[2], order, nvfp4, num_warps=4)
