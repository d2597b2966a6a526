"""Activations to FP4 in one pass: bf16 or fp16 [rows, K] to codes, block scales in the layout that their reader wants, and nothing else written.

    x        [matrices, rows, K] bf16 or fp16, K contiguous
    global   fp32 decode multipliers (NVFP4): one a matrix, one a group of rows, or one an expert
    codes    uint8 [matrices, rows, K / 2]
    scales   e4m3 or e8m0 bytes, "linear", "128x4" or "8x4"; the padding of the tiles is written as zero

Codes and scales are those of `formats.quantizer`, bit for bit. Target: any CUDA GPU of compute capability 8.0 or newer.
How fast: docs/activations.md.
Compiled for sm_90 by Triton 3.6: 490 instructions for 32 elements of ordinary blocks, 96 registers, no spills (NVFP4, bf16, 128x4).

A thread owns whole blocks (16 columns, 32 for MXFP4), loads them 16 bytes at a time, a step before it needs them, the first of a chunk while the last
one is computed, and needs no other thread: nothing goes through shared memory but "linear" scales. The programs of a matrix, all of them together as
many as the GPU can hold at once, take turns at chunks of its rows (`quantize_chunk.py`).

**Experts.** Rows are sorted by expert. The rows of every expert are cut into chunks, so that a chunk belongs to one expert, and what is looked up
(expert, first row, global scale) is looked up once a chunk, a chunk ahead; the last one of an expert also zeroes the rest of its tile of scales. By
comparing with all experts at once, in registers (SCAN), or by bisection in memory, after a one-program kernel that adds the sizes up. Rows that no
expert covers are never touched.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from halfbyte.device import Target
from halfbyte.experts import Activation
from halfbyte.formats import NVFP4, BlockFormat, QuantTensor
from halfbyte.formats.quantizer import decode_scale_of
from halfbyte.formats.scale_layout import ScaleLayout, max_padded_rows, padded_shape, tile_rows
from halfbyte.kernels.quantizers.chunk import load_rows, quantize_chunk

INTERPRETED = triton.knobs.runtime.interpret
MAX_SCANNED_EXPERTS = 256

_FROM_FIRST_LANE = tl.constexpr("shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;")


@triton.jit
def _uniform(x, ASM: tl.constexpr):
    """x as int32, which all threads have: told so, the compiler keeps it, and what follows from it, in registers that a warp shares. What a loop
    carries it has to be told again: the kernel of experts would not do with its registers else."""
    x = x.to(tl.int32)
    if ASM:
        x = tl.inline_asm_elementwise(_FROM_FIRST_LANE, "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    return x


@triton.jit(do_not_specialize=["matrices", "num_rows", "padded_rows"])
def quantize_kernel(
    x_ptr, weight_ptr, factor_ptr, codes_ptr, scales_ptr, global_ptr, matrices, num_rows, padded_rows,
    row_blocks, num_columns, scale_columns, rows_per_global,
    NVFP4: tl.constexpr, BF16: tl.constexpr, RULE: tl.constexpr, FOUR_OVER_SIX: tl.constexpr, LAYOUT: tl.constexpr, GLOBAL_ROWS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr,
    SOURCE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    programs = tl.num_programs(0) // matrices
    matrix = tl.program_id(0) // programs
    first_row = (tl.program_id(0) - matrix * programs) * ROWS
    x_start, scale_start = matrix.to(tl.int64) * num_rows, matrix.to(tl.int64) * padded_rows
    if not GLOBAL_ROWS:
        global_ptr += matrix
    first_column = tl.program_id(1) * BLOCK_COLUMNS
    words = load_rows(
        x_ptr, x_start + first_row, num_rows - first_row, first_column, row_blocks, num_columns, NVFP4, BLOCK_ROWS, BLOCK_COLUMNS, SOURCE
    )
    for row in range(first_row, padded_rows, programs * ROWS):
        next_row = row + programs * ROWS
        words = quantize_chunk(
            words, x_ptr, weight_ptr, factor_ptr, codes_ptr, scales_ptr, global_ptr, x_start + row, scale_start + row,
            tl.maximum(tl.minimum(num_rows - row, ROWS), 0), ROWS, x_start + next_row, num_rows - next_row, first_column,
            row_blocks, num_columns, scale_columns, rows_per_global,
            NVFP4, BF16, RULE, FOUR_OVER_SIX, LAYOUT, GLOBAL_ROWS, BLOCK_ROWS, BLOCK_COLUMNS, NATIVE, ASM,
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


@dataclass(frozen=True)
class Config:
    """A program takes `rows` rows at a time, `block_rows` at once, of `block_columns` blocks; `rows` divides a tile of the scale layout.
    `max_registers` of a thread; None: as many as it takes."""

    rows: int
    block_rows: int
    block_columns: int
    num_warps: int
    max_registers: int | None = None


def choose_config(num_rows: int, num_columns: int, block: int, layout: ScaleLayout, num_sms: int, *, plain: bool = True) -> Config:
    """Blocks of a program for `num_rows` rows of `num_columns` blocks of `block` elements: 32 elements a thread, four warps.

    Longer chunks are for many rows, where they save what is done once a chunk. `plain`: nothing is fused in front, whose values would need the
    registers.

    >>> choose_config(64, 448, 16, "128x4", 132)
    Config(rows=4, block_rows=4, block_columns=64, num_warps=4, max_registers=96)
    """
    blocks_of_thread = 2 if block == 16 and plain else 1
    blocks = 128 * blocks_of_thread
    block_columns = min(64, max(4, triton.next_power_of_2(num_columns)))
    tile = 128 if layout == "linear" else tile_rows(layout)
    rows = block_rows = min(blocks // block_columns, tile)
    while rows < min(tile, 4 * blocks_of_thread * block_rows) and num_rows * triton.cdiv(num_columns, block_columns) > 16 * num_sms * rows:
        rows *= 2
    num_warps = max(1, block_rows * block_columns // blocks_of_thread // 32)
    return Config(rows, block_rows, block_columns, num_warps, 96 if blocks_of_thread == 2 else 64 if plain else None)


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
    plain = activation is None and norm is None and not four_over_six
    config = choose_config(matrices * num_rows, num_columns, format.block, scale_layout, Target.of(x.device).num_sms, plain=plain)
    words, row_blocks = _words(x, format.block)
    arguments = (
        words, *((words, words) if norm is None else (_words(norm[0][None], format.block)[0], _inverse_rms(x, norm[1]))),
        codes.view(torch.int32), scales, words if decode_scale is None else decode_scale.contiguous(),
        matrices, num_rows, padded[0], row_blocks, num_columns, padded[1], rows_per_global,
    )  # fmt: skip
    constants = _constants(x, format, scale_rule, scale_layout, config, activation, norm)
    constants |= {"FOUR_OVER_SIX": four_over_six, "GLOBAL_ROWS": rows_per_global != num_rows and format.has_global_scale}
    _launch(quantize_kernel, arguments, constants, config, triton.cdiv(padded[0], config.rows), x.device, matrices)
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
    config = choose_config(num_rows, num_columns, format.block, scale_layout, Target.of(x.device).num_sms, plain=activation is None)
    tile = config.rows if scale_layout == "linear" else tile_rows(scale_layout)
    words, row_blocks = _words(x, format.block)
    ends = expert_offsets if scan else torch.empty(num_experts + 1, dtype=torch.int64, device=x.device)
    if not scan:
        block = min(1024, triton.next_power_of_2(num_experts))
        with torch.cuda.device_of(x):
            expert_ends_kernel[(1,)](expert_offsets, ends, scale_offsets, num_rows, scale_layout, num_experts, config.rows, tile, block, num_warps=4)
    arguments = (
        words, codes.view(torch.int32), scales.view(torch.uint8), words if global_scales is None else global_scales, expert_offsets, ends,
        scale_offsets, num_rows, row_blocks, num_columns, padded_shape(scale_layout, 0, num_columns)[1],
    )  # fmt: skip
    constants = _constants(x, format, "ceil", scale_layout, config, activation)
    constants |= {"TILE": tile, "NUM_EXPERTS": num_experts, "SCAN": scan, "STEPS": 0 if scan else num_experts.bit_length()}
    constants |= {"EXPERTS_PADDED": triton.next_power_of_2(num_experts) if scan else 1}
    most_chunks = max_padded_rows(num_rows, num_experts, config.rows) // config.rows
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


def _launch(
    kernel: Any, arguments: tuple, constants: dict[str, Any], config: Config, num_chunks: int, device: torch.device, matrices: int = 1
) -> None:
    """Start as many programs as there are chunks in each matrix, or as the GPU holds at once."""
    # Without fusion: the codec rounds every product.
    options = {} if INTERPRETED else {"num_warps": config.num_warps, "maxnreg": config.max_registers, "enable_fp_fusion": False}
    columns = triton.cdiv(arguments[-2 if kernel is quantize_experts_kernel else -3], config.block_columns)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        most = _programs_per_sm(kernel, arguments, {**constants, **options}) * Target.of(device).num_sms
        kernel[(matrices * min(num_chunks, max(1, most // (columns * matrices))), columns)](*arguments, **constants, **options)


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
