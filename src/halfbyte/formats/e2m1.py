"""e2m1, the 4-bit element of NVFP4 and MXFP4: sign, 2 exponent bits, 1 mantissa bit; two elements per byte.

Codes 0..7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign, so code 8 is -0. The low nibble of a byte is the even column.
Source: OCP Microscaling Formats v1.0, section 5.3.3; NaN and saturation as NVIDIA's `cuda_fp4.hpp` does them.
"""

from __future__ import annotations

import functools

import torch

from halfbyte.errors import InputError

MAX = 6.0
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def encode(x: torch.Tensor) -> torch.Tensor:
    """Round every element to the nearest e2m1 value, ties to the even code; |x| > 6 saturates; NaN becomes +6 (code 7).

    Args:
        x: floating point, any shape.

    Returns:
        uint8 of the same shape, one code (0..15) per element.

    >>> encode(torch.tensor([0.25, 0.75, 5.0, 7.0, -0.0, float("nan")])).tolist()
    [0, 2, 6, 7, 8, 7]
    """
    x = x.float()
    magnitude = x.abs().clamp_(max=MAX)
    # Spacing of the grid at each magnitude: 0.5 below 2, 1 below 4, else 2. Scaled by it, round() is ties-to-even on the code.
    steps_per_unit = torch.where(magnitude < 2.0, 2.0, torch.where(magnitude < 4.0, 1.0, 0.5))
    first_code = torch.where(magnitude < 2.0, 0.0, torch.where(magnitude < 4.0, 2.0, 4.0))
    code = (magnitude * steps_per_unit).round_().add_(first_code)
    code.nan_to_num_(nan=7.0)
    sign = torch.signbit(x) & ~torch.isnan(x)
    return code.to(torch.uint8).add_(sign, alpha=8)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Return the fp32 value of every code: uint8 (0..15) in, fp32 of the same shape out.

    >>> decode(torch.tensor([1, 7, 15], dtype=torch.uint8)).tolist()
    [0.5, 6.0, -6.0]
    """
    return torch.take(_table(codes.device)[0], codes.long())


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes uint8 [..., K] two per byte into uint8 [..., K/2], even column in the low nibble.

    Raises:
        InputError: K is odd.
    """
    if codes.shape[-1] % 2:
        raise InputError("cannot pack an odd number of 4-bit codes", given=tuple(codes.shape), needed="an even last dimension")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Undo `pack`: uint8 [..., K/2] to codes uint8 [..., K]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def decode_packed(packed: torch.Tensor) -> torch.Tensor:
    """Return the fp32 values [..., K] of packed codes uint8 [..., K/2]; one table look-up per byte."""
    pairs = _table(packed.device)[1].index_select(0, packed.flatten().int())
    return pairs.view(torch.float32).view(*packed.shape[:-1], packed.shape[-1] * 2)


@functools.cache
def _table(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 value of each code [16], and the two values of each byte [256], as one int64 because CPUs gather scalars faster than rows."""
    values = torch.tensor(VALUES, dtype=torch.float32, device=device)
    byte = torch.arange(256, dtype=torch.int64, device=device)
    return values, torch.stack((values[byte & 0xF], values[byte >> 4]), dim=-1).view(torch.int64).squeeze(-1)
