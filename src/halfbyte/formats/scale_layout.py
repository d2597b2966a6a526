"""Where block scales lie in memory: `linear` (row-major), `128x4` (the tiles FP4 tensor cores load) and `8x4` (few rows).

    128x4  flat(r, c) = (r//128)*(Cp//4)*512 + (c//4)*512 + (r%32)*16 + ((r%128)//32)*4 + c%4     rows padded to 128, columns to 4
    8x4    flat(r, c) = (r//8)*(Cp//4)*32 + (c//4)*32 + (r%8)*4 + c%4                             rows padded to 8, columns to 4

Padding is zero. The layout cannot be read off a tensor (with full tiles all three have one shape), so it always travels as a tag.
Source: cuBLAS "1D block scaling factors layout"; FlashInfer and TensorRT-LLM for 8x4.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from halfbyte.arguments import check_integers, check_name, check_tensors
from halfbyte.errors import InputError

ScaleLayout = Literal["linear", "128x4", "8x4"]
LAYOUTS: tuple[str, ...] = get_args(ScaleLayout)
_TILE_ROWS = {"linear": 1, "128x4": 128, "8x4": 8}
_TILE_COLUMNS = 4


def padded_shape(layout: ScaleLayout, rows: int, cols: int) -> tuple[int, int]:
    """Rows and columns a `layout` buffer holds for `rows` x `cols` scales."""
    tile = tile_rows(layout)
    return (rows, cols) if layout == "linear" else (-(-rows // tile) * tile, -(-cols // _TILE_COLUMNS) * _TILE_COLUMNS)


def check_scale_layout(layout: str, where: str = "") -> None:
    """Raise InputError for an unknown layout."""
    check_name("scale layout", layout, LAYOUTS, where)


def tile_rows(layout: ScaleLayout) -> int:
    """Rows are padded to a multiple of this; InputError for an unknown layout."""
    check_scale_layout(layout)
    return _TILE_ROWS[layout]


def max_padded_rows(num_rows: int, num_experts: int, tile: int) -> int:
    """The most rows that `num_rows` rows of `num_experts` experts fill, each expert starting a tile, whoever has how many of them.

    >>> max_padded_rows(3, 256, 128), max_padded_rows(300, 2, 128)
    (384, 512)
    """
    return (num_rows + (tile - 1) * min(num_experts, num_rows)) // tile * tile


def swizzle_scales(scales: torch.Tensor, layout: ScaleLayout) -> torch.Tensor:
    """Rearrange row-major scales [..., R, C] into `layout`; each leading index is padded on its own.

    Args:
        scales: any 1-byte dtype, [..., R, C].
        layout: "128x4" or "8x4" ("linear" returns a contiguous copy or the tensor itself).

    Returns:
        Contiguous tensor of the same dtype, [..., Rp, Cp], bytes in the order of the module's formulas, padding zero.

    Raises:
        InputError: unknown layout, no rows and columns, or a dtype wider than a byte.

    >>> swizzle_scales(torch.ones(3, 5, dtype=torch.uint8), "128x4").shape
    torch.Size([128, 8])
    """
    _check_bytes(scales, "swizzle_scales")
    check_scale_layout(layout, "swizzle_scales")
    if layout == "linear":
        return scales.contiguous()
    *batch, rows, cols = scales.shape
    padded_rows, padded_cols = padded_shape(layout, rows, cols)
    padded = scales.new_zeros((*batch, padded_rows, padded_cols), dtype=torch.uint8)
    padded[..., :rows, :cols] = scales.view(torch.uint8)
    tiles = padded.reshape(*batch, padded_rows // tile_rows(layout), *_row_split(layout), padded_cols // 4, 4)
    swizzled = _move_tiles(tiles, layout, len(batch)).contiguous()
    return swizzled.view(scales.dtype).reshape(*batch, padded_rows, padded_cols)


def unswizzle_scales(scales: torch.Tensor, layout: ScaleLayout, rows: int, cols: int) -> torch.Tensor:
    """Undo `swizzle_scales`: [..., Rp, Cp] in `layout` to row-major [..., rows, cols].

    Raises:
        InputError: the buffer is not the padded size of `rows` x `cols`.

    >>> s = torch.arange(24, dtype=torch.uint8).view(3, 8)
    >>> torch.equal(unswizzle_scales(swizzle_scales(s, "8x4"), "8x4", 3, 8), s)
    True
    """
    _check_bytes(scales, "unswizzle_scales")
    check_scale_layout(layout, "unswizzle_scales")
    check_integers("unswizzle_scales", 0, rows=rows, cols=cols)
    padded_rows, padded_cols = padded_shape(layout, rows, cols)
    if scales.shape[-2:] != (padded_rows, padded_cols):
        raise InputError(
            f"scale buffer does not hold {rows} x {cols} scales in layout {layout}",
            where="unswizzle_scales",
            given=tuple(scales.shape),
            needed=f"[..., {padded_rows}, {padded_cols}]",
        )
    if layout == "linear":
        return scales
    batch = scales.shape[:-2]
    tile_grid = (padded_rows // tile_rows(layout), padded_cols // 4)
    tiles = scales.view(torch.uint8).reshape(*batch, *tile_grid, *reversed(_row_split(layout)), 4)
    linear = _move_tiles(tiles, layout, len(batch)).reshape(*batch, padded_rows, padded_cols)
    return linear[..., :rows, :cols].contiguous().view(scales.dtype)


def words_128x4(scales: torch.Tensor) -> torch.Tensor:
    """View a buffer [n, Rp, Cp] in layout "128x4" as words of four scales in row-major order, int32 [n, Rp/128, 4, 32, Cp/4]: nothing is copied.

    >>> s = torch.arange(1024).to(torch.uint8).view(1, 128, 8)
    >>> words = words_128x4(swizzle_scales(s, "128x4"))
    >>> torch.equal(words.reshape(1, 128, 2), s.view(torch.int32))
    True
    """
    n, rows, cols = scales.shape
    return scales.view(torch.int32).view(n, rows // 128, cols // 4, 32, 4).permute(0, 1, 4, 3, 2)


def _row_split(layout: ScaleLayout) -> tuple[int, ...]:
    """How a tile's rows split: 128 = 4 groups of 32, whose order is exchanged; 8 stays whole."""
    return (4, 32) if layout == "128x4" else (8,)


def _move_tiles(tiles: torch.Tensor, layout: ScaleLayout, batch: int) -> torch.Tensor:
    # 128x4: rows/128, 4, 32, cols/4, 4 <-> rows/128, cols/4, 32, 4, 4. 8x4: rows/8, 8, cols/4, 4 <-> rows/8, cols/4, 8, 4. Each its own inverse.
    order: tuple[int, ...] = (0, 3, 2, 1, 4) if layout == "128x4" else (0, 2, 1, 3)
    return tiles.permute(*range(batch), *(batch + axis for axis in order))


def _check_bytes(scales: torch.Tensor, where: str) -> None:
    check_tensors(where, scales=scales)
    if scales.element_size() != 1 or scales.ndim < 2:
        given = f"{scales.dtype} {tuple(scales.shape)}"
        raise InputError("block scales are rows of bytes", where=where, given=given, needed="uint8, float8_e4m3fn or float8_e8m0fnu [..., R, C]")
