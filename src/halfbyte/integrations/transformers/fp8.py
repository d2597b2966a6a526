"""FP8 matrices outside the experts: x W^T with W e4m3 [N, K] and its fp32 scales: one, one per row, or one for 128 x 128 elements.

| device | scales | what happens |
|---|---|---|
| GPU of compute capability 9.0 or newer, bf16 x, N and K multiples of 16 | one, one per row | torch._scaled_mm, x in e4m3 with a scale per token |
| GPU of compute capability 9.0, bf16 x, N a multiple of 128 and K of 512 | blocks | the same, with a scale per token and 128 columns |
| any other, and blocks under torch.compile | all | W is dequantised to the dtype of x at each call |

Checkpoints with such layers were made for e4m3 inputs. Scales of their own lose less than the one of a calibration, which is therefore not used.
One token on an H200 (2026-11-30, torch 2.11, W [7168, 2048]): 14 us, dequantised 119.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from halfbyte.device import Target
from halfbyte.formats import fp8_tensor
from halfbyte.formats.fp8_block import TILE
from halfbyte.kernels.problem import needs_capability
from halfbyte.kernels.quantize import quantize_fp8


def linear(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] times the transpose of e4m3 `weight` [N, K] times its scales, to [..., N] in the dtype of x."""
    can = _capability_of(x.device.type, x.device.index)
    if torch.compiler.is_compiling():
        can = can.removesuffix(" and blocks")  # Inductor of torch 2.11 refuses their scales
    if x.dtype == torch.bfloat16 and multiplies_fp8(can, weight.shape, scales.shape):
        return scaled_product(x, weight, scales, bias)
    return F.linear(x, dequantize(weight, scales, x.dtype), bias)


@torch.compiler.assume_constant_result
def _capability_of(device: str, index: int | None) -> str:
    return capability(Target.of(device if index is None else f"{device}:{index}"))


def capability(target: Target) -> str:
    """Which scales torch._scaled_mm takes on this device: "rows" (of matrices, too), "rows and blocks", or "none"."""
    if target.is_cpu or needs_capability(target, 90):
        return "none"
    return "rows and blocks" if target.arch == "sm_90" else "rows"


def multiplies_fp8(capability: str, shape: torch.Size, scales: torch.Size) -> bool:
    """Whether `scaled_product` takes a weight and scales of these shapes.

    >>> multiplies_fp8("rows", torch.Size((64, 64)), torch.Size(())), multiplies_fp8("rows", torch.Size((256, 512)), torch.Size((2, 4)))
    (True, False)
    """
    if _in_blocks(shape, scales):  # scales of 16 whole bytes per row
        return capability == "rows and blocks" and shape[0] % TILE == 0 and shape[1] % (4 * TILE) == 0
    return capability != "none" and shape[0] % 16 == 0 and shape[1] % 16 == 0


def scaled_product(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`linear` on fp8 tensor cores: x bf16 [..., K] in e4m3, by token for `scales` [] and [N, 1], else by token and 128 columns."""
    rows = x.reshape(-1, x.shape[-1])
    if _in_blocks(weight.shape, scales.shape):
        blocks = quantize_fp8(F.pad(rows, (0, 0, 0, -len(rows) % 16)), "block")  # of fewer tokens the strides of scales are ambiguous
        column_major = blocks.scales.t().contiguous().t()
        y = torch._scaled_mm(blocks.codes, weight.t(), scale_a=column_major, scale_b=scales.t(), out_dtype=x.dtype)[: len(rows)]
        y = y if bias is None else y + bias
    else:
        quantize = fp8_tensor.quantize_fp8 if torch.compiler.is_compiling() else quantize_fp8  # the compiler fuses the definition itself
        tokens, of_columns = quantize(rows), scales.reshape(1, -1).expand(1, len(weight)).contiguous()
        y = torch._scaled_mm(tokens.codes, weight.t(), scale_a=tokens.scales, scale_b=of_columns, bias=bias, out_dtype=x.dtype)
    return y.view(*x.shape[:-1], len(weight))


def _in_blocks(shape: torch.Size, scales: torch.Size) -> bool:
    return math.prod(scales) != 1 and tuple(scales) != (shape[0], 1)


def dequantize(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """e4m3 [..., N, K] times fp32 scales, rounded to `dtype`: one; [..., N, 1]; [E, 1, 1]; or [..., N/128, K/128], rounded up.

    >>> dequantize(torch.ones(2, 3).to(torch.float8_e4m3fn), torch.tensor([[2.0], [4.0]]), torch.float32)[:, 0].tolist()
    [2.0, 4.0]
    """
    rows, columns = weight.shape[-2:]
    if math.prod(scales.shape) == 1:
        scales = scales.reshape(())
    elif scales.shape[-2:] not in ((rows, 1), (1, 1)):
        scales = scales.repeat_interleave(TILE, -2)[..., :rows, :].repeat_interleave(TILE, -1)[..., :columns]
    return (weight.float() * scales).to(dtype)
