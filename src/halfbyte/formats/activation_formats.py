"""Activations in 8 and 4 bits: what a kernel of that kind sees of its input.

| kind | element | scale | who |
|---|---|---|---|
| bf16 | none: the activations' own dtype | | W4A16 |
| fp8 | e4m3 | fp32 one per row (token): amax / 448 | W4A8, on Hopper's fp8 tensor cores |
| mxfp8 | e4m3 | e8m0 one per 32: smallest power of two >= amax / 448 | gpt-oss on Blackwell, W4A8 |
| nvfp4 | e2m1 | e4m3 per 16, and a global scale: the calibrated one, else one per row | W4A4 |

A global scale computed on the fly is one per row, not one per tensor: a token's result then does not depend on the other tokens of the batch, nor on
which rank holds an expert.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from halfbyte.arguments import check_name
from halfbyte.formats import fp8_tensor
from halfbyte.formats.block_format import NVFP4, nvfp4_decode_scale
from halfbyte.formats.quantizer import quantize

ActivationFormat = Literal["bf16", "fp8", "nvfp4", "mxfp8"]
ACTIVATION_FORMATS: tuple[str, ...] = get_args(ActivationFormat)


def check_activations(activations: str, where: str) -> None:
    """Raise InputError unless there is such a format."""
    check_name("activation format", activations, ACTIVATION_FORMATS, where)


def round_trip(x: torch.Tensor, kind: ActivationFormat, input_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Quantise x [..., N, K] to `kind` and back: fp32 of the same shape ("bf16": x itself in fp32).

    `input_scale` is the calibrated fp32 decode multiplier of "nvfp4" (one element); the other kinds have none.
    """
    if kind == "bf16" or x.numel() == 0:
        return x.float()
    if kind != "nvfp4":
        return fp8_tensor.quantize_fp8(x, "token" if kind == "fp8" else "mx").dequantize()
    scale = nvfp4_decode_scale(_row_amax(x)).squeeze(-1) if input_scale is None else input_scale.reshape(())
    return quantize(x, NVFP4, scale).dequantize(torch.float32)


def _row_amax(x: torch.Tensor) -> torch.Tensor:
    return x.float().abs().amax(dim=-1, keepdim=True)
