"""`hopper.pack` and `hopper.unpack` of whole matrices on a GPU: every byte read once and written once. Byte for byte what the torch code does.

A program has one row tile and one scale word, which is four tiles: 64 rows x 128 bytes of codes in, four tiles of 2 KiB and one run of scales out.
Rows 16 w + g and 16 w + g + 8 of a tile are a pair, 8 w + g. A lane of 8 bytes of each row has the 16 columns of one thread of the layout, and
becomes two of its four words.

    codes        uint8 [E, N, K/2], read and written 8 bytes at a time
    scales       uint8 [E, N, K/16 or K/32]
    words        int32 [E, N/64, K/64, 512]
    scale_words  int64 [E, N/64, ceil(K/256), 128 or 64]
    row_exponent int8 [E, N], from the scale words that were just written

In place, where the tiles of an expert lie in the memory of its codes, one launch packs all experts of a matrix. A program keeps the tiles that it
packs in memory of its own until all programs have read their part of the expert, then moves them to where they belong and goes on to the next.
What is kept, one expert or a few small ones, is used again and again, and should stay in the L2, so that global memory still sees every byte read
once and written once. Measured: 38 % of the copy bandwidth, so it does not quite (H200, 2026-11-26, docs/weights.md).

Compiled for sm_80 and newer; interpreted on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from halfbyte.weights.layouts import hopper_fp8
from halfbyte.weights.layouts.hopper import RowOrder

INTERPRETED = triton.knobs.runtime.interpret
# In place. 8 warps of 64 registers a thread: four programs have all registers of a multiprocessor, and half of its threads or more.
PROGRAMS_OF_A_MULTIPROCESSOR = 4
MAX_REGISTERS = 64
KEPT_BYTES = 20 << 20  # tiles that stay in the L2 of an sm_90 GPU (50 MiB in two halves), whose other traffic passes through with "evict_first"

TOP_EXPONENT = tl.constexpr(hopper_fp8.TOP_EXPONENT)
SMALLEST_ROW_EXPONENT = tl.constexpr(hopper_fp8.SMALLEST_ROW_EXPONENT)


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
    codes_ptr, scales_ptr, words_ptr, scale_words_ptr, rows, intermediate, lanes, column_tiles,
    ORDER: tl.constexpr, NVFP4: tl.constexpr,
):  # fmt: skip
    run, tile, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    SCALES: tl.constexpr = 4 if NVFP4 else 2  # of a row in a tile
    codes_ptr, scales_ptr = _source_of(codes_ptr, scales_ptr, expert, rows, lanes, SCALES)
    row_tile = expert * tl.num_programs(1) + tile
    words_ptr, scale_words_ptr = _tiles_of(words_ptr, scale_words_ptr, row_tile, run, tl.num_programs(0), column_tiles, SCALES)
    _pack_tiles(codes_ptr, scales_ptr, words_ptr, scale_words_ptr, tile, run, intermediate, lanes, column_tiles, ORDER, NVFP4, "")


@triton.jit
def _pack_tiles(
    codes_ptr, scales_ptr, words_ptr, scale_words_ptr, tile, run, intermediate, lanes, column_tiles,
    ORDER: tl.constexpr, NVFP4: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Four tiles and their scales, from the matrix of an expert to its row tile `tile`. KEEP: eviction policy of what is written."""
    SCALES: tl.constexpr = 4 if NVFP4 else 2
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
    tl.store(scale_words_ptr + entry, tl.sum(scale, axis=1), eviction_policy=KEEP)

    lane3 = lane[:, :, None]
    target = lane3 // 4 * 256 + 8 * tl.arange(0, 32)[:, None, None] + 2 * (lane3 % 4) + tl.arange(0, 2)[None, None, :]
    lanes_of_pair = tl.join(_words_of_codes(first), _words_of_codes(second))
    tl.store(words_ptr + target, lanes_of_pair, mask=lane3 < 4 * column_tiles, eviction_policy=KEEP)


@triton.jit
def _meet(arrivals_ptr):
    """Wait until every program is here. They must all run at the same time."""
    tl.debug_barrier()
    tl.atomic_add(arrivals_ptr, 1, sem="release")
    while tl.atomic_add(arrivals_ptr, 0, sem="acquire") < tl.num_programs(0):  # one thread asks: many would keep the last programs from arriving
        pass
    tl.debug_barrier()


@triton.jit
def _pack_in_place(
    codes_ptr, scales_ptr, words_ptr, scale_words_ptr, kept_words_ptr, kept_scale_words_ptr, arrivals_ptr,
    num_experts, num_kept, rows, intermediate, lanes, row_tiles, column_tiles, runs,
    ORDER: tl.constexpr, NVFP4: tl.constexpr,
):  # fmt: skip
    """`num_kept` experts at a time; a program has the same tiles of all of them."""
    SCALES: tl.constexpr = 4 if NVFP4 else 2
    num_steps = tl.cdiv(num_experts, num_kept)
    offset = tl.arange(0, 1024)
    for step in range(0, num_steps + 1):
        if step > 0:
            _meet(arrivals_ptr + step - 1)
            first = (step - 1) * num_kept
            for index in range(tl.program_id(0), tl.minimum(num_kept, num_experts - first) * row_tiles * runs, tl.num_programs(0)):
                kept_tile, run = index // runs, index % runs
                kept, kept_scales = _tiles_of(kept_words_ptr, kept_scale_words_ptr, kept_tile, run, runs, column_tiles, SCALES)
                words, scale_words = _tiles_of(words_ptr, scale_words_ptr, first * row_tiles + kept_tile, run, runs, column_tiles, SCALES)
                inside = 1024 * run + offset < 256 * column_tiles
                word = tl.load(kept + 1024 * run + offset, mask=inside, eviction_policy="evict_last")
                scale = tl.load(kept_scales + tl.arange(0, 32 * SCALES), eviction_policy="evict_last")
                tl.store(words + 1024 * run + offset, word, mask=inside, eviction_policy="evict_first")
                tl.store(scale_words + tl.arange(0, 32 * SCALES), scale, eviction_policy="evict_first")
            tl.debug_barrier()  # before other threads write to what is kept
        if step < num_steps:
            first = step * num_kept
            for index in range(tl.program_id(0), tl.minimum(num_kept, num_experts - first) * row_tiles * runs, tl.num_programs(0)):
                kept_tile, run = index // runs, index % runs
                codes, scales = _source_of(codes_ptr, scales_ptr, first + kept_tile // row_tiles, rows, lanes, SCALES)
                kept, kept_scales = _tiles_of(kept_words_ptr, kept_scale_words_ptr, kept_tile, run, runs, column_tiles, SCALES)
                _pack_tiles(
                    codes, scales, kept, kept_scales, kept_tile % row_tiles, run, intermediate, lanes, column_tiles, ORDER, NVFP4, "evict_last"
                )  # fmt: skip


@triton.jit
def _swap(lanes, distance: tl.constexpr, low: tl.constexpr):
    difference = (lanes >> distance ^ lanes) & low
    return lanes ^ difference ^ difference << distance


@triton.jit
def _words_of_codes(codes):
    """`hopper_bits._words_of_codes`, of int64."""
    n = _swap(_swap(codes, 4, 0x00F000F000F000F0), 8, 0x0000FF000000FF00)
    words = (n << 2 & 0x01DC01DC01DC01DC) | (n << 8 & -0x77FF77FF77FF7800) | (n >> 8 & 0x0001000100010001)
    return words | (n & 0x7600760076007600) | (n << 6 & 0x0022000000220000) | (n >> 26 & 0x0000002200000022)


@triton.jit
def _codes_of_words(words):
    n = (words >> 2 & 0x0077007700770077) | (words >> 8 & 0x0088008800880088) | (words << 8 & 0x0100010001000100)
    n |= (words & 0x7600760076007600) | (words >> 6 & 0x0000880000008800) | (words << 26 & -0x77FFFFFF78000000)
    return _swap(_swap(n, 8, 0x0000FF000000FF00), 4, 0x00F000F000F000F0)


@triton.jit
def _unpack(
    words_ptr, scale_words_ptr, codes_ptr, scales_ptr, rows, intermediate, lanes, column_tiles,
    ORDER: tl.constexpr, NVFP4: tl.constexpr,
):  # fmt: skip
    run, tile, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    SCALES: tl.constexpr = 4 if NVFP4 else 2
    codes_ptr, scales_ptr = _source_of(codes_ptr, scales_ptr, expert, rows, lanes, SCALES)
    row_tile = expert * tl.num_programs(1) + tile
    words_ptr, scale_words_ptr = _tiles_of(words_ptr, scale_words_ptr, row_tile, run, tl.num_programs(0), column_tiles, SCALES)

    lane = 16 * run + tl.arange(0, 16)[None, :]
    lane3 = lane[:, :, None]
    source = lane3 // 4 * 256 + 8 * tl.arange(0, 32)[:, None, None] + 2 * (lane3 % 4) + tl.arange(0, 2)[None, None, :]
    of_rows = tl.split(_codes_of_words(tl.load(words_ptr + source, mask=lane3 < 4 * column_tiles, other=0)))

    column = 4 * SCALES * run + tl.arange(0, 4 * SCALES)[None, :]
    columns = lanes * SCALES // 4
    place = tl.arange(0, 4 * SCALES)[None, :]
    scale_word = tl.load(scale_words_ptr + SCALES * tl.arange(0, 32)[:, None] + place % SCALES)
    scale = (scale_word >> (16 * (place // SCALES))).to(tl.int32)
    for half in tl.static_range(2):
        row, exists = _rows_of_pairs(tile, half, intermediate, ORDER)
        tl.store(codes_ptr + row[:, None] * lanes + lane, of_rows[half], mask=exists[:, None] & (lane < lanes))
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
    _launch(_pack, codes, scales, words, scale_words, order, codes.view(torch.int64), scales, words.view(torch.int64), scale_words)
    _write_row_exponents(scale_words, row_exponent)


def pack_matrix_in_place(
    codes: torch.Tensor, scales: torch.Tensor, words: torch.Tensor, scale_words: torch.Tensor, row_exponent: torch.Tensor, order: RowOrder,
    num_programs: int,
) -> None:  # fmt: skip
    """`pack_matrix` where `words`, `scale_words` or both lie in the storage of codes and scales, expert upon expert.

    `num_programs`: at most what the device runs at the same time, `PROGRAMS_OF_A_MULTIPROCESSOR` on each of its multiprocessors. Memory: tiles of
    `KEPT_BYTES`, or of one expert where that has more.
    """
    num_experts, rows, half_columns = codes.shape
    _, row_tiles, runs, entries = scale_words.shape
    num_kept = min(num_experts, max(1, KEPT_BYTES // (words[0].nbytes + scale_words[0].nbytes)))
    kept = [torch.empty((num_kept, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device) for tensor in (words, scale_words)]
    arrivals = torch.zeros(triton.cdiv(num_experts, num_kept), dtype=torch.int32, device=words.device)
    pieces = num_kept * row_tiles * runs
    num_programs = triton.cdiv(pieces, triton.cdiv(pieces, num_programs))  # all with the same number of pieces
    options = {} if INTERPRETED else {"launch_cooperative_grid": True, "maxnreg": MAX_REGISTERS}
    with torch.cuda.device_of(words):
        _pack_in_place[(num_programs,)](
            codes.view(torch.int64), scales, words.view(torch.int64), scale_words, *(tensor.view(torch.int64) for tensor in kept), arrivals,
            num_experts, num_kept, rows, rows // 2 if order == "gate_up" else rows, half_columns // 8, row_tiles, words.shape[2], runs,
            order, entries == 128, num_warps=8, **options,
        )  # fmt: skip
    _write_row_exponents(scale_words, row_exponent)


def _write_row_exponents(scale_words: torch.Tensor, row_exponent: torch.Tensor) -> None:
    num_experts, row_tiles, runs, entries = scale_words.shape
    with torch.cuda.device_of(scale_words):
        _row_exponents[(row_tiles, num_experts)](scale_words, row_exponent, runs, entries == 128, num_warps=1)


def unpack_matrix(words: torch.Tensor, scale_words: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, order: RowOrder) -> None:
    """The inverse of `pack_matrix`."""
    _launch(_unpack, codes, scales, words, scale_words, order, words.view(torch.int64), scale_words, codes.view(torch.int64), scales)


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
