"""e8m0, the block scale of MXFP4 and MXFP8: a biased power of two. Byte b is 2^(b-127); 255 is NaN; no zero, no sign.

Source: OCP Microscaling Formats v1.0, section 5.4.1. Held as uint8, because torch.float8_e8m0fnu supports few operations.

Systems disagree on how a block maximum becomes a byte, so the rule is always named:

| rule | byte of the block scale | who |
|---|---|---|
| ceil | smallest power of two >= amax / element maximum; never clips | FlashInfer, TensorRT-LLM, ModelOpt |
| floor | floor(log2 amax) - exponent of the element maximum; values up to 8/6 of the range saturate | OCP v1.0 |
| even | amax rounded half up at the bit below the element's mantissa, then as floor | compressed-tensors |
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from halfbyte.arguments import check_name
from halfbyte.errors import InputError
from halfbyte.formats.ieee import divide

ScaleRule = Literal["ceil", "floor", "even"]
RULES: tuple[str, ...] = get_args(ScaleRule)
NAN = 255
_F32_MANTISSA_BITS = 23


def decode(scales: torch.Tensor) -> torch.Tensor:
    """Return 2^(b-127) in fp32 for every byte b (uint8 or float8_e8m0fnu); 255 gives NaN, 0 the subnormal 2^-127.

    >>> decode(torch.tensor([127, 130], dtype=torch.uint8)).tolist()
    [1.0, 8.0]
    """
    exponent = as_bytes(scales).to(torch.int32)
    bits = exponent << _F32_MANTISSA_BITS
    bits = torch.where(exponent == 0, 1 << (_F32_MANTISSA_BITS - 1), bits)
    return torch.where(exponent == NAN, 0x7FC00000, bits).to(torch.int32).view(torch.float32)


def encode(amax: torch.Tensor, element_max: float, rule: ScaleRule = "ceil") -> torch.Tensor:
    """Choose the scale byte of blocks with maximum magnitude `amax` (fp32, >= 0) by the named rule.

    `element_max` is the largest element value (6 for e2m1, 448 for e4m3). amax 0 gives byte 0; inf gives 254; NaN gives 255.

    Raises:
        InputError: the rule has no such name.
    """
    check_rule(rule, "e8m0.encode")
    amax = amax.float()
    element_exponent = int(torch.tensor(element_max, dtype=torch.float32).log2().floor())
    if rule == "ceil":
        byte = _ceil_exponent(divide(amax, element_max))
    elif rule == "floor":
        byte = _biased_exponent(amax) - element_exponent
    else:
        if element_max != 6.0:
            raise InputError('the "even" scale rule is defined for e2m1 elements only', given=f"element maximum {element_max}", needed=6.0)
        half_ulp = 1 << (_F32_MANTISSA_BITS - 2)  # e2m1 keeps one mantissa bit: add half of the bit below it
        byte = _biased_exponent((amax.view(torch.int32) + half_ulp).view(torch.float32)) - element_exponent
    byte = byte.clamp(0, 254)
    byte = torch.where(amax == 0, 0, byte)
    byte = torch.where(torch.isinf(amax), 254, byte)
    return torch.where(torch.isnan(amax), NAN, byte).to(torch.uint8)


def of_powers_of_two(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of fp32 scales, uint8, and which of them are no power of two from 2^-126 to 2^127, whose bytes mean nothing: bool.

    >>> [part.tolist() for part in of_powers_of_two(torch.tensor([2.0, 3.0]))]
    [[128, 128], [False, True]]
    """
    bits = scales.view(torch.int32)
    byte = bits >> _F32_MANTISSA_BITS
    return byte.to(torch.uint8), ((bits & ((1 << _F32_MANTISSA_BITS) - 1)) != 0) | (byte < 1) | (byte >= NAN)


def check_rule(rule: str, where: str) -> None:
    """Raise InputError unless there is such a rule."""
    check_name("e8m0 scale rule", rule, RULES, where)


def as_bytes(scales: torch.Tensor) -> torch.Tensor:
    """View e8m0 scales as uint8, whatever 1-byte dtype they came in."""
    return scales if scales.dtype == torch.uint8 else scales.view(torch.uint8)


def _biased_exponent(x: torch.Tensor) -> torch.Tensor:
    """floor(log2 x) + 127 as int32 from the fp32 bits; subnormals give 0 or less only through the caller's clamp."""
    return (x.view(torch.int32) >> _F32_MANTISSA_BITS) & 0xFF


def _ceil_exponent(x: torch.Tensor) -> torch.Tensor:
    """Byte of the smallest power of two >= x; subnormal fp32 up to 2^-127 gives 0."""
    bits = x.view(torch.int32)
    exponent = (bits >> _F32_MANTISSA_BITS) & 0xFF
    mantissa = bits & ((1 << _F32_MANTISSA_BITS) - 1)
    normal = exponent + (mantissa != 0)
    subnormal = (mantissa > (1 << (_F32_MANTISSA_BITS - 1))).to(torch.int32)
    return torch.where(exponent == 0, subnormal, normal)
