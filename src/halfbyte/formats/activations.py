"""Activations in 8 and 4 bits: what a kernel of that kind sees of its input.

| kind | element | scale | who |
|---|---|---|---|
| bf16 | none: the activations' own dtype | | W4A16 |
| fp8 | e4m3 | fp32 one a row (token): amax / 448 | W4A8, on Hopper's fp8 tensor cores |
| mxfp8 | e4m3 | e8m0 one per 32: smallest power of two >= amax / 448 | gpt-oss on Blackwell, W4A8 |
| nvfp4 | e2m1 | e4m3 per 16, and a global scale: the calibrated one, else one a row | W4A4 |

A global scale computed on the fly is one a row, not one a tensor: a token's result then does not depend on the other tokens of the batch, nor on
which rank holds an expert.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from halfbyte.errors import InputError
from halfbyte.formats import e4m3, e8m0
from halfbyte.formats.block_format import NVFP4, nvfp4_decode_scale
from halfbyte.formats.ieee import divide
from halfbyte.formats.quantizer import block_amax, quantize

ActivationFormat = Literal["bf16", "fp8", "nvfp4", "mxfp8"]
ACTIVATION_FORMATS: tuple[str, ...] = get_args(ActivationFormat)
MXFP8_BLOCK = 32
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def quantize_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3(x / scale) with scale = amax(row) / 448: x [..., K] to codes e4m3 [..., K] and scales fp32 [..., 1].

    A row of zeros has the smallest normal scale; a row with NaN or infinity becomes NaN.

    >>> codes, scales = quantize_fp8(torch.tensor([[1.0, -448.0]]))
    >>> codes.float().tolist(), scales.tolist()
    ([[1.0, -448.0]], [[1.0]])
    """
    x = x.float()
    scales = divide(_row_amax(x), e4m3.MAX).clamp(min=_SMALLEST_NORMAL)
    return e4m3.encode(x / scales), scales


def quantize_mxfp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3(x / 2^(scale - 127)) per block of 32: x [..., K] to codes e4m3 [..., K] and scales uint8 e8m0 [..., K/32].

    Raises:
        InputError: K is not a multiple of 32.

    >>> codes, scales = quantize_mxfp8(torch.full((1, 32), 449.0))
    >>> codes.float()[0, 0].item(), scales.tolist()
    (224.0, [[128]])
    """
    if x.shape[-1] % MXFP8_BLOCK:
        raise InputError("the last dimension does not divide into mxfp8 blocks", given=x.shape[-1], needed=f"a multiple of {MXFP8_BLOCK}")
    blocks = x.float().unflatten(-1, (-1, MXFP8_BLOCK))
    scales = e8m0.encode(block_amax(blocks), e4m3.MAX)
    return e4m3.encode(blocks / e8m0.decode(scales).unsqueeze(-1)).flatten(-2), scales


def round_trip(x: torch.Tensor, kind: ActivationFormat, input_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Quantise x [..., N, K] to `kind` and back: fp32 of the same shape ("bf16": x itself in fp32).

    `input_scale` is the calibrated fp32 decode multiplier of "nvfp4" (one element); the other kinds have none.
    """
    if kind == "bf16" or x.numel() == 0:
        return x.float()
    if kind == "fp8":
        codes, scales = quantize_fp8(x)
        return codes.float() * scales
    if kind == "mxfp8":
        codes, scales = quantize_mxfp8(x)
        return (codes.float().unflatten(-1, (-1, MXFP8_BLOCK)) * e8m0.decode(scales).unsqueeze(-1)).flatten(-2)
    scale = nvfp4_decode_scale(_row_amax(x)).squeeze(-1) if input_scale is None else input_scale.reshape(())
    return quantize(x, NVFP4, scale).dequantize(torch.float32)


def _row_amax(x: torch.Tensor) -> torch.Tensor:
    return x.float().abs().amax(dim=-1, keepdim=True)
