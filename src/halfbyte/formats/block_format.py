"""The two FP4 block formats, every number of each in one place.

| | element | block | block scale | second scale |
|---|---|---|---|---|
| NVFP4 | e2m1 | 16 | e4m3 | fp32, one per matrix (or per row group) |
| MXFP4 | e2m1 | 32 | e8m0 | none |

value = element * block scale * global scale. Sources: NVIDIA "Introducing NVFP4" (2025), OCP Microscaling Formats v1.0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.arguments import check_name
from halfbyte.errors import InputError
from halfbyte.formats import e2m1, e4m3, e8m0
from halfbyte.formats.ieee import divide


@dataclass(frozen=True)
class BlockFormat:
    """A 4-bit block format: `name`, `block` elements share one scale of `scale_dtype`, and perhaps one fp32 global scale."""

    name: str
    block: int
    scale_dtype: torch.dtype
    has_global_scale: bool

    def __repr__(self) -> str:
        return self.name.upper()

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return as_format, (self.name, "pickle")  # there is one object of each format

    def decode_scales(self, scales: torch.Tensor) -> torch.Tensor:
        """Return block scales as fp32 of the same shape."""
        return e4m3.as_e4m3(scales).float() if self.has_global_scale else e8m0.decode(scales)

    @property
    def largest_scale_byte(self) -> int:
        """The byte of the largest scale. Above it lie NaN and, for e4m3, the negative half.

        >>> halfbyte.NVFP4.decode_scales(torch.tensor(halfbyte.NVFP4.largest_scale_byte, dtype=torch.uint8)).item()
        448.0
        """
        return 0x7E if self.has_global_scale else 0xFE

    @property
    def bits_per_weight(self) -> float:
        """Storage bits per element, block scales included, global scale not."""
        return 4 + 8 / self.block


NVFP4 = BlockFormat("nvfp4", block=16, scale_dtype=torch.float8_e4m3fn, has_global_scale=True)
MXFP4 = BlockFormat("mxfp4", block=32, scale_dtype=torch.uint8, has_global_scale=False)
FORMATS = {format.name: format for format in (NVFP4, MXFP4)}


def as_format(format: BlockFormat | str, where: str) -> BlockFormat:
    """The format itself, or the one that is called so.

    Raises:
        InputError: there is no such format.

    >>> as_format("NVFP4", "here")
    NVFP4
    """
    if isinstance(format, BlockFormat):
        return format
    name = format.lower() if isinstance(format, str) else format
    check_name("format", name, FORMATS, where)
    return FORMATS[name]


# The largest block scale of plain NVFP4 and of four-over-six, whose amax/4 candidate needs head room: 1.5 * 256 = 384 <= 448.
NVFP4_MAX_SCALE = e4m3.MAX
FOUR_OVER_SIX_MAX_SCALE = 256.0
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def nvfp4_decode_scale(amax: torch.Tensor, *, four_over_six: bool = False) -> torch.Tensor:
    """amax / (6 * 448), the fp32 multiplier that *decodes* (ModelOpt `weight_scale_2`, `input_scale`); 256 for 448 with four-over-six.

    Zero amax gives 1.0; a result under the smallest normal fp32 is raised to it, so the scale never is 0, subnormal or infinite.
    """
    max_scale = FOUR_OVER_SIX_MAX_SCALE if four_over_six else NVFP4_MAX_SCALE
    scale = divide(amax.float(), e2m1.MAX * max_scale).clamp(min=_SMALLEST_NORMAL)
    return torch.where(amax == 0, 1.0, scale)


def encode_scale_from_decode(decode_scale: torch.Tensor) -> torch.Tensor:
    """1 / decode scale: the *encode* multiplier (compressed-tensors `weight_global_scale`, FlashInfer `global_scale`)."""
    return 1.0 / decode_scale.float()


def decode_scale_from_encode(encode_scale: torch.Tensor) -> torch.Tensor:
    """1 / encode multiplier: the *decode* multiplier that halfbyte holds everywhere."""
    return 1.0 / encode_scale.float()


def check_blocks(columns: int, format: BlockFormat, where: str) -> None:
    """Raise InputError unless `columns` is a positive multiple of the block (0 is allowed)."""
    if columns % format.block:
        raise InputError(
            f"the last dimension does not divide into {format!r} blocks",
            where=where,
            given=columns,
            needed=f"a multiple of {format.block}",
            next_step="pad the tensor, or leave this layer unquantised",
        )
