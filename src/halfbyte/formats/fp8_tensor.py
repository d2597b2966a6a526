"""`Fp8Tensor`: activations in e4m3, with one scale per token, a block of 128, or a block of 32 (MXFP8). `quantize_fp8` defines them.

| scaling | block | scale | chosen as |
|---|---|---|---|
| token | the row | fp32 | amax / 448 |
| block | 128 | fp32 | amax / 448 |
| mx | 32 | e8m0 | smallest power of two >= amax / 448 |

A block of zeros has the smallest normal scale ("mx": byte 0). NaN: "token" and "block" make their whole block NaN, and infinity makes itself NaN and
the rest of its block 0; "mx" ignores NaN when it chooses a scale, so that only the element itself is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from halfbyte.arguments import check_floats, check_name, check_tensors, same_bits
from halfbyte.errors import InputError
from halfbyte.formats import e4m3, e8m0
from halfbyte.formats.ieee import divide
from halfbyte.formats.quantizer import block_amax
from halfbyte.formats.scale_layout import ScaleLayout, check_scale_layout, padded_shape, swizzle_scales, unswizzle_scales

Fp8Scaling = Literal["token", "block", "mx"]
SCALINGS: tuple[str, ...] = get_args(Fp8Scaling)
BLOCKS = {"block": 128, "mx": 32}
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class Fp8Tensor:
    """A tensor [..., N, K] held in e4m3.

    Attributes:
        codes: float8_e4m3fn [..., N, K].
        scales: fp32 [..., N, 1] ("token") or [..., N, K/128] ("block"), or uint8 e8m0 [..., N, K/32] ("mx"), the last in `scale_layout`.
        scaling: "token", "block" or "mx".
        scale_layout: "linear"; for "mx" also "128x4" and "8x4".
    """

    codes: torch.Tensor
    scales: torch.Tensor
    scaling: Fp8Scaling
    scale_layout: ScaleLayout = "linear"

    def __post_init__(self) -> None:
        """Raises InputError for codes and scales that do not belong together."""
        where = "Fp8Tensor"
        check_tensors(where, codes=self.codes, scales=self.scales)
        _check_scaling(self.scaling, self.scale_layout, where)
        if self.codes.dtype == torch.uint8:
            object.__setattr__(self, "codes", self.codes.view(torch.float8_e4m3fn))
        if self.codes.dtype != torch.float8_e4m3fn or self.codes.ndim < 2:
            given = f"{self.codes.dtype} {tuple(self.codes.shape)}"
            raise InputError("codes do not fit", where=where, given=given, needed="float8_e4m3fn or uint8 [..., N, K]")
        *batch, rows, columns = self.codes.shape
        _check_blocks(columns, self.scaling, where)
        groups = columns // BLOCKS[self.scaling] if self.scaling in BLOCKS else 1
        shape, dtype = (*batch, *padded_shape(self.scale_layout, rows, groups)), torch.uint8 if self.scaling == "mx" else torch.float32
        if self.scales.shape != shape or self.scales.dtype != dtype:
            given = f"{self.scales.dtype} {tuple(self.scales.shape)}"
            needed = f"{dtype} {shape} (scaling {self.scaling!r}, layout {self.scale_layout!r})"
            raise InputError(f"scales do not fit codes of {tuple(self.codes.shape)}", where=where, given=given, needed=needed)

    def __repr__(self) -> str:
        return f"Fp8Tensor({list(self.codes.shape)}, scales per {self.scaling}, {self.scale_layout}, {self.codes.device})"

    def __eq__(self, other: object) -> bool:
        """Whether scaling, layout and every bit are the same."""
        if not isinstance(other, Fp8Tensor):
            return NotImplemented
        tags = (self.scaling, self.scale_layout) == (other.scaling, other.scale_layout)
        return tags and same_bits({"codes": self.codes, "scales": self.scales}, {"codes": other.codes, "scales": other.scales})

    __hash__ = None  # type: ignore[assignment]  # tensors can change

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Fp8Tensor, (self.codes.view(torch.uint8), self.scales, self.scaling, self.scale_layout)  # bytes: torch does not pickle 8-bit floats

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """code * scale, rounded to `dtype`: [..., N, K].

        >>> q = halfbyte.quantize_fp8(torch.tensor([[1.0, -448.0]]))
        >>> q.dequantize().tolist(), q.scales.tolist()
        ([[1.0, -448.0]], [[1.0]])
        """
        check_floats("Fp8Tensor.dequantize", dtype=dtype)
        scales = self.scales
        if self.scaling == "mx":
            rows, width = self.codes.shape[-2:]
            scales = e8m0.decode(unswizzle_scales(scales, self.scale_layout, rows, width // BLOCKS["mx"]))
        groups = scales.shape[-1]
        return (self.codes.float().unflatten(-1, (groups, -1)) * scales.unsqueeze(-1)).flatten(-2).to(dtype)


def check_fp8(x: torch.Tensor, scaling: str, scale_layout: ScaleLayout) -> None:
    """Raise InputError for what `quantize_fp8` cannot do."""
    where = "quantize_fp8"
    check_tensors(where, x=x)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.ndim < 2:
        raise InputError("cannot quantise this", where=where, given=f"{x.dtype} {tuple(x.shape)}", needed="float32, bfloat16 or float16 [..., N, K]")
    _check_scaling(scaling, scale_layout, where)
    _check_blocks(x.shape[-1], scaling, where)


def _check_scaling(scaling: str, scale_layout: ScaleLayout, where: str) -> None:
    check_name("scaling", scaling, SCALINGS, where)
    check_scale_layout(scale_layout, where)
    if scaling != "mx" and scale_layout != "linear":
        raise InputError("only mx scales have layouts", where=where, given=repr(scale_layout), needed="'linear'")


def _check_blocks(columns: int, scaling: str, where: str) -> None:
    multiple = BLOCKS.get(scaling, 1)
    if columns % multiple:
        raise InputError("the last dimension does not divide into blocks", where=where, given=columns, needed=f"a multiple of {multiple}")


def quantize_fp8(x: torch.Tensor, scaling: Fp8Scaling = "token", *, scale_layout: ScaleLayout = "linear") -> Fp8Tensor:
    """The definition: x [..., N, K] to e4m3, in plain torch."""
    check_fp8(x, scaling, scale_layout)
    groups = x.float().unflatten(-1, (-1, BLOCKS[scaling])) if scaling in BLOCKS else x.float().unsqueeze(-2)
    if scaling == "mx":
        scales = e8m0.encode(block_amax(groups), e4m3.MAX)
        codes = e4m3.encode(groups / e8m0.decode(scales).unsqueeze(-1)).flatten(-2)
        return Fp8Tensor(codes, swizzle_scales(scales, scale_layout), scaling, scale_layout)
    amax = groups.abs().amax(dim=-1) if x.shape[-1] else groups.new_zeros(groups.shape[:-1])
    scales = divide(amax, e4m3.MAX).clamp(min=_SMALLEST_NORMAL)
    scales = torch.where(scales.isnan(), torch.nan, scales)  # one NaN for all devices
    return Fp8Tensor(e4m3.encode(groups / scales.unsqueeze(-1)).flatten(-2), scales, scaling)
