"""FP8 matrices outside the experts: x W^T with W e4m3 [N, K] and its fp32 scales: one, one a row, or one for 128 x 128 elements.

| device | scales | what happens |
|---|---|---|
| GPU of compute capability 9.0 or newer, bf16 inputs, N and K multiples of 16 | one, one a row | torch._scaled_mm, inputs rounded to e4m3 by token |
| any other | all | W is dequantised to the dtype of x at each call |

Checkpoints with such layers were made for e4m3 inputs. One scale per token loses less than the one of a calibration, which is therefore not used.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from halfbyte.device import Target
from halfbyte.formats import fp8_tensor
from halfbyte.kernels.problem import needs_capability
from halfbyte.kernels.quantize import quantize_fp8


def linear(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] times the transpose of e4m3 `weight` [N, K] times its scales, to [..., N] in the dtype of x."""
    if multiplies_fp8(Target.of(x.device), x.dtype, weight.shape, scales.shape):
        return scaled_product(x, weight, scales, bias)
    return F.linear(x, dequantize(weight, scales, x.dtype), bias)


def multiplies_fp8(target: Target, dtype: torch.dtype, shape: torch.Size, scales: torch.Size) -> bool:
    """Whether `scaled_product` runs on this device, for inputs of this dtype and a weight and scales of these shapes.

    >>> multiplies_fp8(Target.of("cpu"), torch.bfloat16, torch.Size((64, 64)), torch.Size(()))
    False
    """
    if target.is_cpu or dtype != torch.bfloat16 or needs_capability(target, 90):
        return False
    return (math.prod(scales) == 1 or tuple(scales) == (shape[0], 1)) and shape[0] % 16 == 0 and shape[1] % 16 == 0


def scaled_product(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`linear` on fp8 tensor cores: x bf16 [..., K] in e4m3 with one scale per token; `scales` [] or [N, 1]."""
    quantize = fp8_tensor.quantize_fp8 if torch.compiler.is_compiling() else quantize_fp8  # the compiler fuses the definition itself
    rows = quantize(x.reshape(-1, x.shape[-1]))
    of_columns = scales.reshape(1, -1).expand(1, len(weight)).contiguous()
    y = torch._scaled_mm(rows.codes, weight.t(), scale_a=rows.scales, scale_b=of_columns, bias=bias, out_dtype=x.dtype)
    return y.view(*x.shape[:-1], len(weight))


def dequantize(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """e4m3 [..., N, K] times fp32 scales, rounded to `dtype`: one; [..., N, 1]; [E, 1, 1]; or [..., N/128, K/128], rounded up.

    >>> dequantize(torch.ones(2, 3).to(torch.float8_e4m3fn), torch.tensor([[2.0], [4.0]]), torch.float32)[:, 0].tolist()
    [2.0, 4.0]
    """
    rows, columns = weight.shape[-2:]
    if math.prod(scales.shape) == 1:
        scales = scales.reshape(())
    elif scales.shape[-2:] not in ((rows, 1), (1, 1)):
        scales = scales.repeat_interleave(128, -2)[..., :rows, :].repeat_interleave(128, -1)[..., :columns]
    return (weight.float() * scales).to(dtype)
