"""Hidden states that arrive in 8 or 4 bits to bf16, which holds them exactly but for one scale per row: what W4A16 kernels multiply.

    codes    e4m3 [rows, K], or two e2m1 per byte [rows, K/2]
    scales   e4m3 [rows, K/16] (NVFP4) or e8m0 [rows, K/32] (MXFP4, MXFP8), layout "linear"
    out      [rows, K] bf16; out[r] * row_scale[r] is the value
    row_scale    [rows] fp32: the global scale of the row (NVFP4), or its scale (fp8)

| hidden | out | row_scale |
|---|---|---|
| NVFP4 | e2m1 code * e4m3 block scale | the global scale |
| MXFP4 | e2m1 code * 2^(byte - 127) | none |
| fp8, one scale per token | e4m3 code | the scale |
| MXFP8 | e4m3 code * 2^(byte - 127) | none |

`decode_rows` does it in a launch of its own; `decode_pairs` in another kernel (`sm90.gather`), which writes the rows where they are multiplied.

Target: any GPU of compute capability 8.0 or newer. Not measured yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from halfbyte.arguments import dense_rows
from halfbyte.formats import QuantTensor
from halfbyte.formats.fp8_tensor import Fp8Tensor
from halfbyte.kernels.arithmetic import next_power_of_2
from halfbyte.kernels.launch import launch
from halfbyte.kernels.quantizers.blocks import INTERPRETED, e2m1_value, pack
from halfbyte.kernels.workspace import scratch


@triton.jit
def _e4m3_value(byte):
    """e4m3 (int32) to fp32: its bits moved, subnormals included."""
    value = ((byte & 0x7F) << 20).to(tl.float32, bitcast=True) * 2.0**120
    value = tl.where((byte & 0x7F) == 0x7F, float("nan"), value)
    return (value.to(tl.int32, bitcast=True) | ((byte & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def _block_scale(scales_ptr, index, mask, E8M0: tl.constexpr):
    byte = tl.load(scales_ptr + index, mask=mask, other=0).to(tl.int32)
    if E8M0:
        scale = tl.where(byte == 0, 0x400000, byte << 23).to(tl.float32, bitcast=True)
        scale = tl.where(byte == 255, float("nan"), scale)
    else:
        scale = _e4m3_value(byte)
    return scale


@triton.jit
def decode_pairs(codes_ptr, scales_ptr, row, pair, mask, PAIRS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, E8M0: tl.constexpr):
    """Both columns of pairs of a row (int64) of codes, times their block scales, in fp32. BLOCK: columns per scale, 0 where there are none."""
    if BITS == 4:
        byte = tl.load(codes_ptr + row * PAIRS + pair, mask=mask, other=0).to(tl.int32)
        low, high = e2m1_value(byte), e2m1_value(byte >> 4)
    else:
        both = tl.load(codes_ptr + row * PAIRS + pair, mask=mask, other=0).to(tl.int32)
        low, high = _e4m3_value(both & 0xFF), _e4m3_value(both >> 8 & 0xFF)
    if BLOCK > 0:
        scale = _block_scale(scales_ptr + row * (2 * PAIRS // BLOCK), 2 * pair // BLOCK, mask, E8M0)
        low, high = low * scale, high * scale
    return low, high


@triton.jit(do_not_specialize=["rows_per_scale"])
def _decode(
    codes_ptr, scales_ptr, given_scale_ptr, out_ptr, row_scale_ptr, rows_per_scale,
    PAIRS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, E8M0: tl.constexpr, SCALED: tl.constexpr, PADDED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Program r decodes row r, in pairs of columns. SCALED: there is a scale per row."""
    row = tl.program_id(0)
    pair = tl.arange(0, PADDED)
    mask = pair < PAIRS
    low, high = decode_pairs(codes_ptr, scales_ptr, row.to(tl.int64), pair, mask, PAIRS, BITS, BLOCK, E8M0)
    tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + row.to(tl.int64) * PAIRS + pair, pack(low, high, True, ASM), mask=mask)
    if SCALED:
        tl.store(row_scale_ptr + row, tl.load(given_scale_ptr + row // rows_per_scale))


class CodedRows(NamedTuple):
    """What `decode_pairs` is given of quantised rows.

    Attributes:
        codes: uint8 [rows, K/2] or int16 [rows, K/2], one element per pair; scales: uint8 per block, or what is never read.
        row_scale: fp32, one for all rows or one per row; None where there is none.
        rows_per_scale: rows that share an element of it.
        pairs, bits, block, e8m0: constants of the kernel.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    row_scale: torch.Tensor | None
    rows_per_scale: int
    pairs: int
    bits: int
    block: int
    e8m0: bool

    @staticmethod
    def of(hidden: QuantTensor | Fp8Tensor) -> CodedRows:
        """Those of hidden [rows, K] in scale layout "linear"."""
        codes, scales, num_rows = dense_rows(hidden.codes), hidden.scales.contiguous(), hidden.codes.shape[0]
        if isinstance(hidden, QuantTensor):
            given = hidden.global_scale
            rows_per_scale = 1 if given is None else num_rows // max(1, given.numel())
            return CodedRows(
                codes, scales.view(torch.uint8), given, rows_per_scale, codes.shape[1], 4, hidden.format.block, not hidden.format.has_global_scale
            )
        if hidden.scaling == "token":
            return CodedRows(codes.view(torch.int16), scales, scales, 1, codes.shape[1] // 2, 8, 0, True)
        return CodedRows(codes.view(torch.int16), scales.view(torch.uint8), None, 1, codes.shape[1] // 2, 8, 32, True)


def decode_rows(hidden: QuantTensor | Fp8Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """hidden [rows, K] in scale layout "linear" to `out` bf16 [rows, K] and `row_scale` fp32 [rows] or None, as the module says."""
    given, num_rows = CodedRows.of(hidden), hidden.codes.shape[0]
    out = scratch((num_rows, 2 * given.pairs), torch.bfloat16, given.codes.device)
    row_scale = None if given.row_scale is None else scratch((num_rows,), torch.float32, given.codes.device)
    if num_rows == 0:
        return out, row_scale
    padded = next_power_of_2(given.pairs)
    launch(
        _decode, (num_rows, 1, 1),
        (given.codes, given.scales, given.scales if given.row_scale is None else given.row_scale, out,
         out if row_scale is None else row_scale, given.rows_per_scale),
        (given.pairs, given.bits, given.block, given.e8m0, row_scale is not None, padded, not INTERPRETED), num_warps=min(8, max(1, padded // 256)),
    )  # fmt: skip
    return out, row_scale
