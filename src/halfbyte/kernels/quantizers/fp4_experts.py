"""Rows sorted by expert to FP4 in one pass, each expert with its own global scale and its own tiles of block scales. `fp4.py` has the rest.

    x          [M, K] bf16 or fp16, K contiguous; rows offsets[e] .. offsets[e + 1] belong to expert e
    global     fp32 decode multipliers (NVFP4), one per expert
    codes      uint8 [M, K / 2]
    scales     e4m3 or e8m0 bytes, "linear", "128x4" or "8x4"; the padding of the tiles is written as zero

The rows of every expert are cut into chunks, so that a chunk belongs to one expert, and what is looked up (expert, first row, global scale) is looked
up once per chunk, a chunk ahead; the last one of an expert also zeroes the rest of its tile of scales. Rows that no expert covers are never touched.
A chunk finds its expert in one of three ways (`Lookup`):

    scan      by comparing with all experts at once, in registers
    search    by bisection in memory, after a one-program kernel that adds the sizes up; for many experts
    row       few rows: chunks are single rows, so a program loads its row at once, while the sizes of the experts are still on their way
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import triton
import triton.language as tl

from halfbyte.device import Target, current
from halfbyte.experts import Activation
from halfbyte.formats import BlockFormat
from halfbyte.formats.scale_layout import ScaleLayout, max_padded_rows, padded_shape, tile_rows
from halfbyte.kernels.quantizers.chunk import load_rows, quantize_chunk
from halfbyte.kernels.quantizers.fp4 import Config, choose_config, constants_of, launch, supports, tiles_for, words_of

__all__ = ["choose_config", "run", "supports"]  # what the table reads

Lookup: TypeAlias = Literal["row", "scan", "search"]

MAX_SCANNED_EXPERTS = 256
# Up to so many rows "row" is taken: of 256 experts it needs 65 to 75 % of the time of "scan" at 64 rows, 70 to 80 % at 512 (H200, 2026-11-30).
MAX_SINGLE_ROWS = 512

_FROM_FIRST_LANE = tl.constexpr("shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;")


@triton.jit
def _uniform(x, ASM: tl.constexpr):
    """x as int32, which all threads have: told so, the compiler keeps it, and what follows from it, in registers that a warp shares. What a loop
    carries it has to be told again: the kernel of experts would not do with its registers else."""
    x = x.to(tl.int32)
    if ASM:
        x = tl.inline_asm_elementwise(_FROM_FIRST_LANE, "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    return x


@triton.jit
def _sizes(offsets_ptr, expert, num_rows, NUM_EXPERTS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Chunks of experts in the high half of an int64, rows in whole tiles in the low one; 0 beyond the last expert."""
    first = tl.load(offsets_ptr + expert, mask=expert < NUM_EXPERTS, other=0)
    end = tl.load(offsets_ptr + expert + 1, mask=expert < NUM_EXPERTS, other=0)
    rows = tl.maximum(tl.minimum(end, num_rows) - tl.maximum(first, 0), 0).to(tl.int64)
    return ((rows + (ROWS - 1)) // ROWS << 32) + (rows + (TILE - 1)) // TILE * TILE


@triton.jit(do_not_specialize=["num_rows"])
def expert_ends_kernel(
    offsets_ptr, ends_ptr, scale_offsets_ptr, num_rows,
    LAYOUT: tl.constexpr, NUM_EXPERTS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ends[e] = `_sizes` of the experts before e, added up; scale_offsets[e] = its rows. One program."""
    total = tl.zeros((), tl.int64)
    tl.store(ends_ptr, total)
    for first in range(0, NUM_EXPERTS, BLOCK):
        expert = first + tl.arange(0, BLOCK)
        ends = total + tl.cumsum(_sizes(offsets_ptr, expert, num_rows, NUM_EXPERTS, ROWS, TILE))
        tl.store(ends_ptr + 1 + expert, ends, mask=expert < NUM_EXPERTS)
        if LAYOUT != "linear":
            _store_scale_offsets(scale_offsets_ptr, expert, ends, NUM_EXPERTS)
        total = tl.max(ends)


@triton.jit
def _store_scale_offsets(scale_offsets_ptr, expert, ends, NUM_EXPERTS: tl.constexpr):
    """scale_offsets[0] = 0 and, for each expert, where the scales of the next one start: the low half of its `ends`."""
    tl.store(scale_offsets_ptr, 0)
    tl.store(scale_offsets_ptr + 1 + expert, ends.to(tl.int32), mask=expert < NUM_EXPERTS)


@triton.jit
def _sum_and_last(count, chunks, rows, other_count, other_chunks, other_rows):
    return count + other_count, tl.maximum(chunks, other_chunks), tl.maximum(rows, other_rows)


@triton.jit
def _chunk_of_expert(
    chunk, ends, offsets_ptr, ends_ptr, num_rows,
    LAYOUT: tl.constexpr, TILE: tl.constexpr, NUM_EXPERTS: tl.constexpr, SCAN: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Of a chunk, int32: its expert, its first row in x and in the scales, its rows, and those with the padding of its tile."""
    if SCAN:
        is_before = (ends >> 32) <= chunk
        before = tl.where(is_before, ends, 0)
        expert, chunks_before, rows_before = tl.reduce((is_before.to(tl.int32), (before >> 32).to(tl.int32), before.to(tl.int32)), 0, _sum_and_last)
    else:  # bisect: the number of experts that end at or before this chunk
        expert = 0
        end = NUM_EXPERTS
        for _ in range(STEPS):
            middle = (expert + end) // 2
            is_before = (middle < NUM_EXPERTS) & ((tl.load(ends_ptr + 1 + tl.minimum(middle, NUM_EXPERTS - 1)) >> 32) <= chunk)
            expert = tl.where(is_before, middle + 1, expert)
            end = tl.where(is_before, end, middle)
        before = tl.load(ends_ptr + expert)
        chunks_before, rows_before = before >> 32, before
    expert = _uniform(expert, ASM)
    first = _uniform(tl.maximum(tl.load(offsets_ptr + expert), 0), ASM)
    count = _uniform(tl.minimum(tl.load(offsets_ptr + expert + 1), num_rows) - first, ASM)
    row = (chunk - _uniform(chunks_before, ASM)) * ROWS
    written = tl.where(row + ROWS < count, ROWS, (count + (TILE - 1)) // TILE * TILE - row)
    scale_row = first + row if LAYOUT == "linear" else _uniform(rows_before, ASM) + row
    return expert, first + row, scale_row, tl.minimum(count - row, ROWS), written


@triton.jit(do_not_specialize=["num_rows"])
def quantize_experts_kernel(
    x_ptr, codes_ptr, scales_ptr, global_ptr, offsets_ptr, ends_ptr, scale_offsets_ptr, num_rows, row_blocks, num_columns, scale_columns,
    NVFP4: tl.constexpr, BF16: tl.constexpr, RULE: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr, NUM_EXPERTS: tl.constexpr,
    SCAN: tl.constexpr, EXPERTS_PADDED: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr,
    SOURCE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    if SCAN:
        experts = tl.arange(0, EXPERTS_PADDED)
        ends = tl.cumsum(_sizes(offsets_ptr, experts, num_rows, NUM_EXPERTS, ROWS, TILE))
        total = tl.max(ends)
        if LAYOUT != "linear":  # noqa: SIM102 - decided when compiling
            if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
                _store_scale_offsets(scale_offsets_ptr, experts, ends, NUM_EXPERTS)
    else:
        ends = 0
        total = tl.load(ends_ptr + NUM_EXPERTS)
    num_chunks = (total >> 32).to(tl.int32)
    first_column = tl.program_id(1) * BLOCK_COLUMNS
    if tl.program_id(0) >= num_chunks:
        return
    expert, x_row, scale_row, present, written = _chunk_of_expert(
        tl.program_id(0), ends, offsets_ptr, ends_ptr, num_rows, LAYOUT, TILE, NUM_EXPERTS, SCAN, STEPS, ROWS, ASM
    )
    words = load_rows(x_ptr, x_row.to(tl.int64), present, first_column, row_blocks, num_columns, NVFP4, BLOCK_ROWS, BLOCK_COLUMNS, SOURCE)
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        following = chunk + tl.num_programs(0)
        next_expert, next_x_row, next_scale_row, next_present, next_written = _chunk_of_expert(
            tl.minimum(following, num_chunks - 1), ends, offsets_ptr, ends_ptr, num_rows, LAYOUT, TILE, NUM_EXPERTS, SCAN, STEPS, ROWS, ASM
        )
        next_present = tl.where(following < num_chunks, next_present, 0)
        words = quantize_chunk(
            words, x_ptr, x_ptr, x_ptr, codes_ptr, scales_ptr, global_ptr + _uniform(expert, ASM),
            _uniform(x_row, ASM).to(tl.int64), _uniform(scale_row, ASM).to(tl.int64), _uniform(present, ASM), _uniform(written, ASM),
            _uniform(next_x_row, ASM).to(tl.int64), _uniform(next_present, ASM), first_column, row_blocks, num_columns, scale_columns, 1,
            NVFP4, BF16, RULE, False, LAYOUT, False, BLOCK_ROWS, BLOCK_COLUMNS, NATIVE, ASM,
            SOURCE, ALPHA, BETA, LIMIT,
        )  # fmt: skip
        expert, x_row, scale_row, present, written = next_expert, next_x_row, next_scale_row, next_present, next_written


@triton.jit(do_not_specialize=["num_rows"])
def quantize_single_rows_kernel(
    x_ptr, codes_ptr, scales_ptr, global_ptr, offsets_ptr, scale_offsets_ptr, num_rows, row_blocks, num_columns, scale_columns,
    NVFP4: tl.constexpr, BF16: tl.constexpr, RULE: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr, NUM_EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr,
    SOURCE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """A program for each row, and one more for `scale_offsets`."""
    row = tl.program_id(0)
    first_column = tl.program_id(1) * BLOCK_COLUMNS
    experts = tl.arange(0, EXPERTS_PADDED)
    words = load_rows(x_ptr, row.to(tl.int64), num_rows - row, first_column, row_blocks, num_columns, NVFP4, BLOCK_ROWS, BLOCK_COLUMNS, SOURCE)
    scale_rows = _sizes(offsets_ptr, experts, num_rows, NUM_EXPERTS, ROWS, TILE).to(tl.int32)  # the low half
    ends = tl.load(offsets_ptr + 1 + experts, mask=experts < NUM_EXPERTS, other=2147483647)
    if row == num_rows:
        if LAYOUT != "linear" and tl.program_id(1) == 0:
            _store_scale_offsets(scale_offsets_ptr, experts, tl.cumsum(scale_rows), NUM_EXPERTS)
    else:
        is_before = ends <= row
        expert = tl.sum(is_before.to(tl.int32))
        first = tl.maximum(tl.load(offsets_ptr + expert), 0)
        if (expert < NUM_EXPERTS) & (first <= row):
            count = tl.minimum(tl.load(offsets_ptr + expert + 1), num_rows) - first
            written = tl.where(row + 1 < first + count, 1, (count + (TILE - 1)) // TILE * TILE - (row - first))
            scale_row = row if LAYOUT == "linear" else tl.sum(tl.where(is_before, scale_rows, 0)) + row - first
            quantize_chunk(
                words, x_ptr, x_ptr, x_ptr, codes_ptr, scales_ptr, global_ptr + expert, row.to(tl.int64), scale_row.to(tl.int64), 1, written,
                row.to(tl.int64), 0, first_column, row_blocks, num_columns, scale_columns, 1,
                NVFP4, BF16, RULE, False, LAYOUT, False, BLOCK_ROWS, BLOCK_COLUMNS, NATIVE, ASM,
                SOURCE, ALPHA, BETA, LIMIT,
            )  # fmt: skip


def run(
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
    lookup: Lookup | None = None,
    config: Config | None = None,
) -> None:
    """Quantise rows sorted by expert into `codes`, `scales` and `scale_offsets`, which `kernels.quantize` allocates and describes.

    `lookup` chooses how a chunk finds its expert, "row" and "scan" of at most as many experts as threads can hold; by default, by the numbers of
    rows and experts.
    """
    num_rows = x.shape[0]
    num_experts, num_columns = expert_offsets.numel() - 1, codes.shape[1] * 2 // format.block
    if lookup is None:
        lookup = "search" if num_experts > MAX_SCANNED_EXPERTS else "row" if num_rows <= MAX_SINGLE_ROWS else "scan"
    if config is None:
        config = tiles_for(num_rows, num_columns, format.block, scale_layout, Target.of(x.device).num_sms, plain=activation is None)
        if lookup == "row":
            config = single_row(config, num_columns)
    tile = config.rows if scale_layout == "linear" else tile_rows(scale_layout)
    words, row_blocks = words_of(x, format.block)
    scales_in = words if global_scales is None else global_scales
    sizes = (num_rows, row_blocks, num_columns, padded_shape(scale_layout, 0, num_columns)[1])
    constants = constants_of(x, format, "ceil", scale_layout, config, activation) | {"TILE": tile, "NUM_EXPERTS": num_experts}
    if lookup != "search":
        constants["EXPERTS_PADDED"] = triton.next_power_of_2(num_experts)
    outputs = codes.view(torch.int32), scales.view(torch.uint8)
    if lookup == "row":
        arguments = (words, *outputs, scales_in, expert_offsets, scale_offsets, *sizes)
        launch(quantize_single_rows_kernel, arguments, constants, config, num_columns, num_rows + 1, x.device, take_turns=False)
        return
    scan = lookup == "scan"
    ends = expert_offsets if scan else torch.empty(num_experts + 1, dtype=torch.int64, device=x.device)
    if not scan:
        block = min(1024, triton.next_power_of_2(num_experts))
        with current(x.device):
            expert_ends_kernel[(1,)](
                expert_offsets, ends, scale_offsets, num_rows, scale_layout, num_experts, config.rows, tile, block,
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    constants |= {"SCAN": scan, "STEPS": 0 if scan else num_experts.bit_length()}
    constants.setdefault("EXPERTS_PADDED", 1)
    most_chunks = max_padded_rows(num_rows, num_experts, config.rows) // config.rows
    launch(
        quantize_experts_kernel, (words, *outputs, scales_in, expert_offsets, ends, scale_offsets, *sizes), constants, config, num_columns,
        most_chunks, x.device,
    )  # fmt: skip


def single_row(config: Config, num_columns: int) -> Config:
    """Chunks of one row with one block per thread, because what follows the look-up, zeroing the rest of a tile of scales, is for many threads."""
    block_columns = min(64, max(32, triton.next_power_of_2(num_columns)))
    return Config(1, 1, block_columns, block_columns // 32, config.max_registers)
