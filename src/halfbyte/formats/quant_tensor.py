"""`QuantTensor`: FP4 codes and their scales, with format and scale layout as tags on the object."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from halfbyte.arguments import as_device, check_floats, check_tensors, check_type, same_bits
from halfbyte.errors import InputError
from halfbyte.formats import e2m1
from halfbyte.formats.block_format import BlockFormat, as_format, check_blocks
from halfbyte.formats.scale_layout import ScaleLayout, check_scale_layout, padded_shape, swizzle_scales, unswizzle_scales

# Elements processed at a time: the working set of quantise and dequantise stays under about 40 bytes each, 160 MiB, whatever the tensor.
CHUNK_ELEMENTS = 1 << 22
_WHERE = "QuantTensor"


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A tensor [..., N, K] held in FP4.

    Attributes:
        codes: uint8 [..., N, K/2]; two e2m1 codes per byte, low nibble = even column.
        scales: block scales, float8_e4m3fn (NVFP4) or uint8 e8m0 (MXFP4); [..., N, K/block] in layout "linear",
            padded to [..., Np, Cp] in "128x4" and "8x4".
        global_scale: None (MXFP4), or fp32 *decode* multiplier: shape [...] (one per matrix) or [..., G] where row group g
            covers rows `g * N/G` to `(g + 1) * N/G` (gate and up of a fused w13: G = 2; one per row: G = N).
        format: NVFP4 or MXFP4.
        scale_layout: "linear", "128x4" or "8x4".
    """

    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor | None
    format: BlockFormat
    scale_layout: ScaleLayout = "linear"

    def __post_init__(self) -> None:
        """Raises InputError for codes and scales that do not belong together."""
        check_tensors(_WHERE, codes=self.codes, scales=self.scales)
        object.__setattr__(self, "format", as_format(self.format, _WHERE))
        check_scale_layout(self.scale_layout, _WHERE)
        if self.codes.element_size() != 1 or self.codes.ndim < 2:
            given = f"{self.codes.dtype} {tuple(self.codes.shape)}"
            raise InputError("codes are rows of bytes", where=_WHERE, given=given, needed="uint8 [..., N, K/2]")
        if self.codes.dtype != torch.uint8:
            object.__setattr__(self, "codes", self.codes.view(torch.uint8))  # float4_e2m1fn_x2, int8
        if self.scales.dtype != self.format.scale_dtype:
            if self.scales.element_size() != 1 or self.scales.ndim < 2:
                given = f"{self.scales.dtype} {tuple(self.scales.shape)}"
                raise InputError(f"{self.format!r} block scales are rows of bytes", where=_WHERE, given=given, needed=self.format.scale_dtype)
            object.__setattr__(self, "scales", self.scales.view(self.format.scale_dtype))
        *batch, rows, columns = self.shape
        check_blocks(columns, self.format, _WHERE)
        scale_shape = (*batch, *padded_shape(self.scale_layout, rows, columns // self.format.block))
        if self.scales.shape != scale_shape:
            raise InputError(
                f"block scales do not fit codes of {tuple(self.codes.shape)}",
                where=_WHERE,
                given=tuple(self.scales.shape),
                needed=f"{scale_shape} ({self.format!r}, layout {self.scale_layout})",
            )
        self._check_global_scale(tuple(batch), rows)

    def _check_global_scale(self, batch: tuple[int, ...], rows: int) -> None:
        scale = self.global_scale
        if not self.format.has_global_scale:
            if scale is not None:
                raise InputError(f"{self.format!r} has no global scale", where=_WHERE, given=type(scale).__name__, needed="global_scale=None")
            return
        if not isinstance(scale, torch.Tensor) or scale.dtype != torch.float32:
            given = scale.dtype if isinstance(scale, torch.Tensor) else type(scale).__name__
            raise InputError(f"{self.format!r} needs a global scale", where=_WHERE, given=given, needed="fp32 decode multipliers")
        per_matrix = scale.shape == batch
        per_group = scale.ndim == len(batch) + 1 and scale.shape[:-1] == batch and rows == scale.shape[-1] * (rows // max(1, scale.shape[-1]))
        if not (per_matrix or per_group):
            raise InputError(
                "global scale does not fit", where=_WHERE, given=tuple(scale.shape), needed=f"{batch} or {(*batch, 'G')} with G dividing {rows} rows"
            )

    def __repr__(self) -> str:
        return f"QuantTensor({self.format!r} {list(self.shape)}, scales {self.scale_layout}, {self.device})"

    def __eq__(self, other: object) -> bool:
        """Whether format, layout and every bit are the same."""
        if not isinstance(other, QuantTensor):
            return NotImplemented
        tags = (self.format, self.scale_layout) == (other.format, other.scale_layout)
        return tags and same_bits(self.tensors, other.tensors)

    __hash__ = None  # type: ignore[assignment]  # tensors can change

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        # Bytes: torch does not pickle tensors of 8-bit floats.
        return QuantTensor, (self.codes, self.scales.view(torch.uint8), self.global_scale, self.format, self.scale_layout)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Codes, scales and global scale by name, as far as there are some."""
        tensors = {"codes": self.codes, "scales": self.scales, "global_scale": self.global_scale}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @property
    def shape(self) -> torch.Size:
        """Logical shape [..., N, K]."""
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 2))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and global scale together."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def __getitem__(self, index: int | slice) -> QuantTensor:
        """Select along the first leading (expert) dimension; shares storage.

        Raises:
            InputError: the tensor has no leading dimension; no index.
        """
        check_type(_WHERE, (int, slice), index=index)
        if self.codes.ndim < 3:
            raise InputError("cannot index a single matrix", where=_WHERE, given=tuple(self.shape), needed="[E, ..., N, K]")
        scale = self.global_scale
        return replace(self, codes=self.codes[index], scales=self.scales[index], global_scale=None if scale is None else scale[index])

    def to(self, device: torch.device | str) -> QuantTensor:
        """Copy every tensor to `device`.

        Raises:
            UnsupportedError: there is no such device.
        """
        place = as_device(device, "QuantTensor.to")
        moved: dict[str, Any] = {name: tensor.to(place) for name, tensor in self.tensors.items()}
        return replace(self, **moved)

    def with_scale_layout(self, layout: ScaleLayout) -> QuantTensor:
        """Return the same values with scales rearranged into `layout` (itself when it already is)."""
        check_scale_layout(layout, "QuantTensor.with_scale_layout")
        if layout == self.scale_layout:
            return self
        linear = self._linear_scales()
        return replace(self, scales=swizzle_scales(linear, layout), scale_layout=layout)

    def codes_float4(self) -> torch.Tensor:
        """View the codes as torch.float4_e2m1fn_x2 [..., N, K/2] (same bytes)."""
        return self.codes.view(torch.float4_e2m1fn_x2)

    def scales_float8(self) -> torch.Tensor:
        """View the scales as float8_e4m3fn (NVFP4) or float8_e8m0fnu (MXFP4) (same bytes)."""
        return self.scales if self.format.has_global_scale else self.scales.view(torch.float8_e8m0fnu)

    def row_global_scale(self) -> torch.Tensor | None:
        """The fp32 decode multiplier of every row, broadcastable to [..., N, 1]; None for MXFP4."""
        scale = self.global_scale
        if scale is None:
            return None
        if scale.ndim == self.codes.ndim - 2:
            return scale[..., None, None]
        return scale.repeat_interleave(self.shape[-2] // max(1, scale.shape[-1]), dim=-1)[..., None]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(element * block scale) * global scale, each product rounded once in fp32, then cast: [..., N, K] of `dtype`.

        Peak memory: the result plus at most 160 MiB (the work is done in chunks of rows).

        >>> q = halfbyte.quantize(torch.eye(32), halfbyte.NVFP4)
        >>> torch.equal(q.dequantize(), torch.eye(32))
        True
        """
        check_floats("QuantTensor.dequantize", dtype=dtype)
        *batch, rows, columns = self.shape
        if self.codes.numel() == 0:
            return torch.empty(self.shape, dtype=dtype, device=self.device)
        blocks = columns // self.format.block
        codes = self.codes.reshape(-1, columns // 2)
        scales = self._linear_scales().reshape(-1, blocks)
        row_scale = self.row_global_scale()
        if row_scale is not None:
            row_scale = row_scale.expand(*batch, rows, 1).reshape(-1, 1, 1)

        def decode(chunk: slice) -> torch.Tensor:
            value = e2m1.decode_packed(codes[chunk]).unflatten(-1, (blocks, self.format.block))
            value *= self.format.decode_scales(scales[chunk]).unsqueeze(-1)
            if row_scale is not None:
                value *= row_scale[chunk]
            return value.flatten(-2).to(dtype)

        step = max(1, CHUNK_ELEMENTS // columns)
        if len(codes) <= step:
            return decode(slice(None)).view(self.shape)
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        flat = out.view(-1, columns)
        for first in range(0, len(codes), step):
            flat[first : first + step] = decode(slice(first, first + step))
        return out

    def _linear_scales(self) -> torch.Tensor:
        rows, columns = self.shape[-2:]
        return unswizzle_scales(self.scales, self.scale_layout, rows, columns // self.format.block)
