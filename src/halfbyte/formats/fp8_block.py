"""fp8-block, the weights of DeepSeek-V3: e4m3 elements, one fp32 scale for each 128 x 128 tile, ragged at the right and bottom edge.

Source: DeepSeek-V3 technical report, 3.3.2; the tensor is named `weight_scale_inv`, though it multiplies.
"""

from __future__ import annotations

import torch

from halfbyte.errors import InputError

TILE = 128


def scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """Tiles that cover a rows x columns weight."""
    return -(-rows // TILE), -(-columns // TILE)


def dequantize(weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """weight[r, c] * scale_inv[r // 128, c // 128], in fp32, then rounded to `dtype`.

    Args:
        weight: float8_e4m3fn [N, K].
        scale_inv: fp32 [ceil(N/128), ceil(K/128)].
        dtype: of the result [N, K].

    Raises:
        InputError: another dtype, or scales that do not cover the weight.

    >>> dequantize(torch.ones(130, 3).to(torch.float8_e4m3fn), torch.tensor([[2.0], [4.0]]))[[127, 128], 0].tolist()
    [2.0, 4.0]
    """
    if weight.dtype != torch.float8_e4m3fn or weight.ndim != 2:
        raise InputError("fp8-block weights are e4m3 matrices", given=f"{weight.dtype} {tuple(weight.shape)}", needed="torch.float8_e4m3fn [N, K]")
    rows, columns = weight.shape
    if tuple(scale_inv.shape) != scale_shape(rows, columns):
        raise InputError(f"scales do not cover a {rows} x {columns} weight", given=tuple(scale_inv.shape), needed=scale_shape(rows, columns))
    out = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    for tile_row, scales in enumerate(scale_inv.float()):  # 128 rows at a time: the fp32 copy stays small
        band = slice(tile_row * TILE, (tile_row + 1) * TILE)
        out[band] = (weight[band].float() * scales.repeat_interleave(TILE)[:columns]).to(dtype)
    return out
