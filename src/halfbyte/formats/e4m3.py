"""e4m3 (fn), the block scale of NVFP4 and the element of FP8: 4 exponent bits, 3 mantissa bits, no infinity, NaN at 0x7f and 0xff.

Largest value 448, smallest subnormal 2^-9. Source: OCP FP8 v1.0; saturation as `__NV_SATFINITE`.
"""

from __future__ import annotations

import torch

MAX = 448.0


def encode(x: torch.Tensor) -> torch.Tensor:
    """Round to nearest even and saturate at +-448 (infinities too); NaN stays NaN, without its sign, which
    differs between devices. Returns float8_e4m3fn of the same shape.

    >>> encode(torch.tensor([1000.0, 2.0**-10, -float("inf")])).float().tolist()
    [448.0, 0.0, -448.0]
    """
    x = x.float().clamp(-MAX, MAX)
    return torch.where(x.isnan(), torch.nan, x).to(torch.float8_e4m3fn)


def as_e4m3(scales: torch.Tensor) -> torch.Tensor:
    """View raw scale bytes (uint8) as float8_e4m3fn; float8_e4m3fn passes through."""
    return scales if scales.dtype == torch.float8_e4m3fn else scales.view(torch.float8_e4m3fn)


def has_nan(x: torch.Tensor) -> bool:
    """Whether an element of e4m3 x is NaN. 0x7F is the largest signed byte and 0xFF the largest unsigned one: nothing is made beside x.

    >>> has_nan(torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)), has_nan(torch.tensor([448.0]).to(torch.float8_e4m3fn))
    (True, False)
    """
    return x.numel() > 0 and (int(x.view(torch.int8).amax()) == 0x7F or int(x.view(torch.uint8).amax()) == 0xFF)
