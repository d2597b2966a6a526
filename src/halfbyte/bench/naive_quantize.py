"""What one writes first: NVFP4 with a program per row, a division per element, and comparisons for rounding. The measure of the real quantiser."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from halfbyte.formats import NVFP4, QuantTensor
from halfbyte.formats.scale_layout import ScaleLayout, padded_shape

_BLOCK = 1024


@triton.jit
def _code(x):  # type: ignore[no-untyped-def]
    a = tl.abs(x)
    low = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32) + (a >= 1.75).to(tl.int32)
    high = (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32) + (a > 5.0).to(tl.int32)
    return low + high + tl.where(x.to(tl.int32, bitcast=True) < 0, 8, 0)


@triton.jit
def _quantize_row(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, scales_ptr, global_ptr, num_rows, width, scale_columns, tiled: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    global_scale = tl.load(global_ptr)
    for first in range(0, scale_columns * 16, block):
        column = first + tl.arange(0, block)
        x = tl.load(x_ptr + row * width + column, mask=(column < width) & (row < num_rows), other=0.0).to(tl.float32)
        x = tl.reshape(x, (block // 16, 16))
        scale = tl.minimum(tl.div_rn(tl.max(tl.abs(x), axis=1), 6.0 * global_scale), 448.0).to(tl.float8e4nv)
        step = scale.to(tl.float32) * global_scale
        codes = tl.where((step == 0.0)[:, None], 0, _code(tl.div_rn(x, tl.where(step == 0.0, 1.0, step)[:, None])))
        low, high = tl.split(tl.reshape(codes, (block // 2, 2)))
        byte = first // 2 + tl.arange(0, block // 2)
        tl.store(codes_ptr + row * (width // 2) + byte, (low | (high << 4)).to(tl.uint8), mask=(byte < width // 2) & (row < num_rows))
        column = first // 16 + tl.arange(0, block // 16)
        offset = row * scale_columns + column
        if tiled:
            offset = (row // 128 * (scale_columns // 4) + column // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
        tl.store(scales_ptr + offset, scale.to(tl.uint8, bitcast=True), mask=column < scale_columns)


def naive_quantize(x: torch.Tensor, global_scale: torch.Tensor, layout: ScaleLayout) -> QuantTensor:
    """NVFP4 of finite x [rows, K] bf16 on a GPU of compute capability 8.9 or newer, layout "linear" or "128x4"."""
    num_rows, width = x.shape
    scale_rows, scale_columns = padded_shape(layout, num_rows, width // NVFP4.block)
    codes = torch.empty((num_rows, width // 2), dtype=torch.uint8, device=x.device)
    scales = torch.empty((scale_rows, scale_columns), dtype=torch.uint8, device=x.device)
    _quantize_row[(scale_rows,)](
        x, codes, scales, global_scale, num_rows, width, scale_columns, layout == "128x4", _BLOCK, num_warps=4, enable_fp_fusion=True
    )
    return QuantTensor(codes, scales, global_scale, NVFP4, layout)
