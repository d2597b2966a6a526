"""Whole matrices to the Hopper layout and back on a GPU: every byte read once and written once. Byte for byte what `pack_torch` does.
In place: `pack_in_place`.

A program has one row tile and one scale word, which is four tiles: 64 rows x 128 bytes of codes in, four tiles of 2 KiB and one run of scales out.
Rows 16 w + g and 16 w + g + 8 of a tile are a pair, 8 w + g. A lane of 8 bytes of each row has the 16 columns of one thread of the layout, and
becomes two of its four words.

    codes        uint8 [E, N, K/2], read and written 8 bytes at a time
    scales       uint8 [E, N, K/16 or K/32]
    words        int32 [E, N/64, K/64, 512]
    scale_words  int64 [E, N/64, ceil(K/256), 128 or 64]
    row_exponent int8 [E, N], from the largest scale of each row, which the check of the scales has found

Compiled for sm_80 and newer; interpreted on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from halfbyte.device import current
from halfbyte.weights.hopper import rounding_fp8
from halfbyte.weights.hopper.bits import WordsFor
from halfbyte.weights.hopper.fragment_order import column_at
from halfbyte.weights.hopper.layout import RowOrder

TOP_EXPONENT = tl.constexpr(rounding_fp8.TOP_EXPONENT)
SMALLEST_ROW_EXPONENT = tl.constexpr(rounding_fp8.SMALLEST_ROW_EXPONENT)


@triton.jit
def row_of_pair(pair, tile, half: tl.constexpr, intermediate, ORDER: tl.constexpr):
    """The canonical row of a pair's row `half`, and whether there is one. `intermediate`: rows of the matrix, of each half when gate_up."""
    if ORDER == "gate_up":
        column_blocks = (intermediate + 63) // 64  # each has two tiles
        position = 32 * (tile // column_blocks) + pair
        tile = tile % column_blocks
    else:
        position = pair // 8 * 16 + 8 * half + pair % 8
    row = 64 * tile + (position if ORDER == "straight" else column_at(position))
    exists = row < intermediate
    if ORDER == "gate_up":
        row += half * intermediate
    return row, exists


@triton.jit
def encode_nvfp4_scale(m):
    """`bits.encode_nvfp4_scale`, of int32."""
    return tl.minimum(tl.minimum(m + 112, 2 * m + 104), tl.minimum(4 * m + 96, 96 * m))


@triton.jit
def _decode_nvfp4_scale(c):
    return tl.maximum(tl.maximum(c - 112, (c - 104) >> 1), tl.maximum((c - 96) >> 2, (c > 0).to(tl.int32)))


@triton.jit
def _source_of(codes_ptr, scales_ptr, expert, rows, lanes, SCALES: tl.constexpr):
    """The pointers moved to an expert."""
    return codes_ptr + expert.to(tl.int64) * rows * lanes, scales_ptr + expert.to(tl.int64) * rows * (lanes * SCALES // 4)


@triton.jit
def _tiles_of(words_ptr, scale_words_ptr, row_tile, run, runs, column_tiles, SCALES: tl.constexpr):
    """The pointers moved to a row tile, counted through all experts, and to its run of scales."""
    row_tile = row_tile.to(tl.int64)
    return words_ptr + row_tile * column_tiles * 256, scale_words_ptr + (row_tile * runs + run) * (32 * SCALES)


@triton.jit
def _pack(
    codes_ptr, scales_ptr, words_ptr, scale_words_ptr, refused_ptr, rows, intermediate, lanes, column_tiles,
    ORDER: tl.constexpr, NVFP4: tl.constexpr, WORDS_FOR: tl.constexpr,
):  # fmt: skip
    if tl.load(refused_ptr) != 0:
        return
    run, tile, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    SCALES: tl.constexpr = 4 if NVFP4 else 2  # of a row in a tile
    codes_ptr, scales_ptr = _source_of(codes_ptr, scales_ptr, expert, rows, lanes, SCALES)
    row_tile = expert * tl.num_programs(1) + tile
    words_ptr, scale_words_ptr = _tiles_of(words_ptr, scale_words_ptr, row_tile, run, tl.num_programs(0), column_tiles, SCALES)
    first_row, first_exists = row_of_pair(tl.arange(0, 32), tile, 0, intermediate, ORDER)
    second_row, second_exists = row_of_pair(tl.arange(0, 32), tile, 1, intermediate, ORDER)

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
        scale = encode_nvfp4_scale(first_scale.to(tl.int32)) | encode_nvfp4_scale(second_scale.to(tl.int32)) << 8
    else:
        scale = first_scale.to(tl.int32) | second_scale.to(tl.int32) << 8
    scale = tl.reshape(scale.to(tl.int64), (32, 4, SCALES)) << (16 * tl.arange(0, 4))[None, :, None]
    entry = SCALES * tl.arange(0, 32)[:, None] + tl.arange(0, SCALES)[None, :]
    tl.store(scale_words_ptr + entry, tl.sum(scale, axis=1))

    lane3 = lane[:, :, None]
    target = lane3 // 4 * 256 + 8 * tl.arange(0, 32)[:, None, None] + 2 * (lane3 % 4) + tl.arange(0, 2)[None, None, :]
    lanes_of_pair = tl.join(words_of_codes(first, WORDS_FOR), words_of_codes(second, WORDS_FOR))
    tl.store(words_ptr + target, lanes_of_pair, mask=lane3 < 4 * column_tiles)


@triton.jit
def _swap(lanes, distance: tl.constexpr, low: tl.constexpr):
    difference = (lanes >> distance ^ lanes) & tl.cast(low, lanes.dtype)
    return lanes ^ difference ^ difference << distance


@triton.jit
def words_of_codes(codes, WORDS_FOR: tl.constexpr):
    """What `bits.pack_codes` makes of codes, of int64 or int32."""
    n = _swap(codes, 4, 0x00F000F000F000F0)
    if WORDS_FOR == "fp8":
        words = _swap(_swap(_swap(n, 8, 0x00FF000000FF0000), 8, 0x0000880000008800), 4, 0x0080008000800080)
    else:
        n = _swap(n, 8, 0x0000FF000000FF00)
        words = (n << 2 & tl.cast(0x01DC01DC01DC01DC, n.dtype)) | (n << 8 & tl.cast(-0x77FF77FF77FF7800, n.dtype))
        words |= (n >> 8 & tl.cast(0x0001000100010001, n.dtype)) | (n & tl.cast(0x7600760076007600, n.dtype))
        words |= (n << 6 & tl.cast(0x0022000000220000, n.dtype)) | (n >> 26 & tl.cast(0x0000002200000022, n.dtype))
    return words


@triton.jit
def _codes_of_words(words, WORDS_FOR: tl.constexpr):
    if WORDS_FOR == "fp8":
        n = _swap(_swap(_swap(words, 4, 0x0080008000800080), 8, 0x0000880000008800), 8, 0x00FF000000FF0000)
    else:
        n = (words >> 2 & 0x0077007700770077) | (words >> 8 & 0x0088008800880088) | (words << 8 & 0x0100010001000100)
        n |= (words & 0x7600760076007600) | (words >> 6 & 0x0000880000008800) | (words << 26 & -0x77FFFFFF78000000)
        n = _swap(n, 8, 0x0000FF000000FF00)
    return _swap(n, 4, 0x00F000F000F000F0)


@triton.jit
def _unpack(
    words_ptr, scale_words_ptr, codes_ptr, scales_ptr, rows, intermediate, lanes, column_tiles,
    ORDER: tl.constexpr, NVFP4: tl.constexpr, WORDS_FOR: tl.constexpr,
):  # fmt: skip
    run, tile, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    SCALES: tl.constexpr = 4 if NVFP4 else 2
    codes_ptr, scales_ptr = _source_of(codes_ptr, scales_ptr, expert, rows, lanes, SCALES)
    row_tile = expert * tl.num_programs(1) + tile
    words_ptr, scale_words_ptr = _tiles_of(words_ptr, scale_words_ptr, row_tile, run, tl.num_programs(0), column_tiles, SCALES)

    lane = 16 * run + tl.arange(0, 16)[None, :]
    lane3 = lane[:, :, None]
    source = lane3 // 4 * 256 + 8 * tl.arange(0, 32)[:, None, None] + 2 * (lane3 % 4) + tl.arange(0, 2)[None, None, :]
    of_rows = tl.split(_codes_of_words(tl.load(words_ptr + source, mask=lane3 < 4 * column_tiles, other=0), WORDS_FOR))

    column = 4 * SCALES * run + tl.arange(0, 4 * SCALES)[None, :]
    columns = lanes * SCALES // 4
    place = tl.arange(0, 4 * SCALES)[None, :]
    scale_word = tl.load(scale_words_ptr + SCALES * tl.arange(0, 32)[:, None] + place % SCALES)
    scale = (scale_word >> (16 * (place // SCALES))).to(tl.int32)
    for half in tl.static_range(2):
        row, exists = row_of_pair(tl.arange(0, 32), tile, half, intermediate, ORDER)
        tl.store(codes_ptr + row[:, None] * lanes + lane, of_rows[half], mask=exists[:, None] & (lane < lanes))
        raw = scale >> (8 * half) & 0xFF
        if NVFP4:
            raw = _decode_nvfp4_scale(raw)
        tl.store(scales_ptr + row[:, None] * columns + column, raw.to(tl.uint8), mask=exists[:, None] & (column < columns))


@triton.jit
def _row_exponents(largest_ptr, row_exponent_ptr, rows, intermediate, ORDER: tl.constexpr, NVFP4: tl.constexpr):
    """`rounding_fp8.row_exponents` of the 64 rows of a tile."""
    tile, expert = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pair = tl.arange(0, 32)
    row_exponent_ptr += (expert * tl.num_programs(0) + tile) * 64
    for half in tl.static_range(2):
        row, exists = row_of_pair(pair, tile, half, intermediate, ORDER)
        largest = tl.load(largest_ptr + expert * rows + row, mask=exists, other=0).to(tl.int32)
        if NVFP4:
            largest = encode_nvfp4_scale(largest)
        exponent = (largest >> 3) - 20 - TOP_EXPONENT if NVFP4 else largest - 127 - TOP_EXPONENT
        exponent = tl.maximum(exponent, SMALLEST_ROW_EXPONENT).to(tl.int8)
        tl.store(row_exponent_ptr + pair // 8 * 16 + 8 * half + pair % 8, exponent)


@triton.jit
def _largest_of_rows(bytes_ptr, largest_ptr, refused_ptr, rows, columns, limit, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    byte = tl.load(bytes_ptr + expert * rows * columns + row[:, None] * columns + column[None, :], mask=inside, other=0)
    largest = tl.max(byte.to(tl.int32), axis=1)
    tl.store(largest_ptr + expert * rows + row, largest.to(tl.uint8), mask=row < rows)
    tl.store(refused_ptr + tl.zeros_like(row), tl.full((ROWS,), 1, tl.uint8), mask=largest > limit)


def pack_matrix(
    codes: torch.Tensor, scales: torch.Tensor, words: torch.Tensor, scale_words: torch.Tensor, order: RowOrder, words_for: WordsFor,
    refused: torch.Tensor,
) -> None:  # fmt: skip
    """Write the tiles of codes [E, N, K/2] and scales [E, N, K/block] uint8 to `words` and `scale_words`, which share no storage with them.

    All are contiguous, codes 8-byte aligned. `refused`, uint8 []: where it is not 0 nothing is written; scales are neither negative nor NaN else.
    """
    pointers = codes.view(torch.int64), scales, words.view(torch.int64), scale_words, refused
    _launch(_pack, codes, scales, words, scale_words, order, words_for, *pointers)


def write_row_exponents(largest: torch.Tensor, row_exponent: torch.Tensor, order: RowOrder, *, nvfp4: bool) -> None:
    """From the largest scale bytes of rows, uint8 [E, N]; `row_exponent` int8 [E, N padded], its rows in the order of the tiles."""
    num_experts, rows = largest.shape
    with current(largest.device):
        _row_exponents[(row_exponent.shape[1] // 64, num_experts)](
            largest, row_exponent, rows, rows // 2 if order == "gate_up" else rows, order, nvfp4, num_warps=1, enable_fp_fusion=True
        )


def unpack_matrix(
    words: torch.Tensor, scale_words: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, order: RowOrder, words_for: WordsFor
) -> None:
    """The inverse of `pack_matrix`."""
    _launch(_unpack, codes, scales, words, scale_words, order, words_for, words.view(torch.int64), scale_words, codes.view(torch.int64), scales)


def largest_of_rows(raw: torch.Tensor, limit: int, refused: torch.Tensor) -> torch.Tensor:
    """uint8 [E, N]: the largest byte of each row of raw, uint8 [E, N, C] contiguous. Where one is above `limit`, `refused`, uint8 [], becomes 1."""
    num_experts, rows, columns = raw.shape
    largest = torch.empty((num_experts, rows), dtype=torch.uint8, device=raw.device)
    block = triton.next_power_of_2(columns)
    step = max(1, 4096 // block)
    with current(raw.device):
        _largest_of_rows[(triton.cdiv(rows, step), num_experts)](
            raw, largest, refused, rows, columns, limit, step, block, num_warps=4, enable_fp_fusion=True
        )
    return largest


def _launch(
    kernel: triton.JITFunction, codes: torch.Tensor, scales: torch.Tensor, words: torch.Tensor, scale_words: torch.Tensor, order: RowOrder,
    words_for: WordsFor, *pointers: torch.Tensor,
) -> None:  # fmt: skip
    num_experts, rows, half_columns = codes.shape
    grid = (scale_words.shape[2], words.shape[1], num_experts)
    nvfp4 = scales.shape[2] * 8 == half_columns
    with current(words.device):
        kernel[grid](
            *pointers, rows, rows // 2 if order == "gate_up" else rows, half_columns // 8, words.shape[2], order, nvfp4, words_for,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
