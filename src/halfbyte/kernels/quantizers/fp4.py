"""Activations to FP4 in one pass: bf16 or fp16 [rows, K] to codes, block scales in the layout that their reader wants, and nothing else written.

    x        [matrices, rows, K] bf16 or fp16, K contiguous
    global   fp32 decode multipliers (NVFP4): one per matrix, or one per group of rows
    codes    uint8 [matrices, rows, K / 2]
    scales   e4m3 or e8m0 bytes, "linear", "128x4" or "8x4"; the padding of the tiles is written as zero

Codes and scales are those of `formats.quantizer`, bit for bit. Target: any CUDA GPU of compute capability 8.0 or newer.
How fast: docs/activations.md.
Compiled for sm_90 by Triton 3.6: 490 instructions for 32 elements of ordinary blocks, 96 registers, no spills (NVFP4, bf16, 128x4).

A thread owns whole blocks (16 columns, 32 for MXFP4), loads them 16 bytes at a time, a step before it needs them, the first of a chunk while the last
one is computed, and needs no other thread: nothing goes through shared memory but "linear" scales. The programs of a matrix, all of them together as
many as the GPU can hold at once, take turns at chunks of its rows (`chunk.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from halfbyte.arguments import dense_rows
from halfbyte.device import Target, current
from halfbyte.experts import Activation
from halfbyte.formats import NVFP4, BlockFormat, QuantTensor
from halfbyte.formats.quantizer import decode_scale_of
from halfbyte.formats.scale_layout import ScaleLayout, padded_shape, tile_rows
from halfbyte.kernels.problem import Problem, Size, Support, takes_16_bits
from halfbyte.kernels.quantizers.blocks import INTERPRETED, converts_e4m3
from halfbyte.kernels.quantizers.chunk import load_rows, quantize_chunk


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
    """factor[row] = 1 / sqrt(mean(x^2) + eps) of contiguous rows, fp32. One program per row."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * width + column, mask=column < width, other=0.0).to(tl.float32)
        total += x * x
    tl.store(factor_ptr + row, 1.0 / tl.sqrt(tl.sum(total) / width + eps))


@dataclass(frozen=True)
class Config:
    """A program takes `rows` rows at a time, `block_rows` at once, of `block_columns` blocks; `rows` divides a tile of the scale layout.
    `max_registers` of a thread; None: as many as it takes."""

    rows: int
    block_rows: int
    block_columns: int
    num_warps: int
    max_registers: int | None = None


def tiles_for(num_rows: int, num_columns: int, block: int, layout: ScaleLayout, num_sms: int, *, plain: bool = True) -> Config:
    """Blocks of a program for `num_rows` rows of `num_columns` blocks of `block` elements: 32 elements per thread, four warps.

    Longer chunks are for many rows, where they save what is done once a chunk. `plain`: nothing is fused in front, whose values would need the
    registers.

    >>> tiles_for(64, 448, 16, "128x4", 132)
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


def supports(problem: Problem) -> Support:
    return takes_16_bits(problem)


def choose_config(problem: Problem, size: Size) -> Config:
    assert problem.format is not None and problem.layout is not None
    num_columns, plain = problem.hidden // problem.format.block, problem.fused is None
    return tiles_for(size.num_tokens, num_columns, problem.format.block, problem.layout, problem.target.num_sms, plain=plain)


def run(
    x: torch.Tensor,
    format: BlockFormat,
    global_scale: torch.Tensor | float | None = None,
    *,
    activation: Activation | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    four_over_six: bool = False,
    scale_rule: str = "ceil",
    scale_layout: ScaleLayout = "linear",
    config: Config | None = None,
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
    if config is None:
        plain = activation is None and norm is None and not four_over_six
        config = tiles_for(matrices * num_rows, num_columns, format.block, scale_layout, Target.of(x.device).num_sms, plain=plain)
    words, row_blocks = words_of(x, format.block)
    arguments = (
        words, *((words, words) if norm is None else (words_of(norm[0][None], format.block)[0], _inverse_rms(x, norm[1]))),
        codes.view(torch.int32), scales, words if decode_scale is None else decode_scale.contiguous(),
        matrices, num_rows, padded[0], row_blocks, num_columns, padded[1], rows_per_global,
    )  # fmt: skip
    constants = constants_of(x, format, scale_rule, scale_layout, config, activation, norm)
    constants |= {"FOUR_OVER_SIX": four_over_six, "GLOBAL_ROWS": rows_per_global != num_rows and format.has_global_scale}
    launch(quantize_kernel, arguments, constants, config, num_columns, triton.cdiv(padded[0], config.rows), x.device, matrices)
    return result


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) of every row: fp32 [rows]."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    factor = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    block = min(4096, triton.next_power_of_2(rows.shape[1]))
    with current(x.device):
        inverse_rms_kernel[(rows.shape[0],)](
            rows, factor, rows.shape[1], eps, block, **({} if INTERPRETED else {"num_warps": 4, "enable_fp_fusion": True})
        )
    return factor


def words_of(x: torch.Tensor, block: int) -> tuple[torch.Tensor, int]:
    """x as int32 words, and the blocks from one row to the next; a copy where rows do not lie evenly, or start off 16 bytes."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1 or rows.stride(0) % block or rows.data_ptr() % 16:
        rows = dense_rows(rows)
    return rows.view(torch.int32), rows.stride(0) // block if rows.shape[0] > 1 else rows.shape[1] // block


def constants_of(
    x: torch.Tensor,
    format: BlockFormat,
    scale_rule: str,
    scale_layout: ScaleLayout,
    config: Config,
    activation: Activation | None,
    norm: object = None,
) -> dict[str, Any]:
    return {
        "NVFP4": format is NVFP4,
        "BF16": x.dtype == torch.bfloat16,
        "RULE": scale_rule,
        "LAYOUT": scale_layout,
        "ROWS": config.rows,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_COLUMNS": config.block_columns,
        "NATIVE": converts_e4m3(),
        "ASM": not INTERPRETED,
        "SOURCE": "swiglu" if activation is not None else "norm" if norm is not None else "x",
        "ALPHA": 1.0 if activation is None else activation.alpha,
        "BETA": 0.0 if activation is None else activation.beta,
        "LIMIT": None if activation is None else activation.limit,
    }


def launch(
    kernel: Any,
    arguments: tuple,
    constants: dict[str, Any],
    config: Config,
    num_columns: int,
    num_chunks: int,
    device: torch.device,
    matrices: int = 1,
    *,
    take_turns: bool = True,
) -> None:
    """Start as many programs as there are chunks in each matrix, or, where programs `take_turns` at them, as the GPU holds at once."""
    # Without fusion: the codec rounds every product.
    options = {} if INTERPRETED else {"num_warps": config.num_warps, "maxnreg": config.max_registers, "enable_fp_fusion": False}
    columns = triton.cdiv(num_columns, config.block_columns)
    with current(device):
        if take_turns:
            most = _programs_per_sm(kernel, arguments, {**constants, **options}) * Target.of(device).num_sms
            num_chunks = min(num_chunks, max(1, most // (columns * matrices)))
        kernel[(matrices * num_chunks, columns)](*arguments, **constants, **options)


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
