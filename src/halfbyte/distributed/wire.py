"""`Wire`: what a token's hidden state looks like between ranks.

| payload | parts of a row | bytes, H = 7168 |
|---|---|---|
| bf16 | the floats as they are | 14,336 |
| fp8, "token" | e4m3 [H], fp32 [1] | 7,172 |
| fp8, "mx" | e4m3 [H], e8m0 [H/32] | 7,392 |
| fp4, one global scale | e2m1 [H/2], e4m3 [H/16] | 4,032 |
| fp4, one scale per row | the same, fp32 | 4,036 |

Every part is made of its own row alone, so it is the same bytes whether rows are encoded before they travel or after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch

from halfbyte.errors import InputError
from halfbyte.formats import NVFP4, Fp8Tensor, QuantTensor
from halfbyte.formats.block_format import nvfp4_decode_scale
from halfbyte.kernels.problem import Hidden, quantized_format
from halfbyte.kernels.quantize import quantize, quantize_fp8

Payload = Literal["bf16", "fp8", "fp4"]
PAYLOADS: tuple[str, ...] = get_args(Payload)
SUM_HEADER = 16  # bytes in front of a partial sum in e4m3: its scale, fp32, four times, so that rows of whole 16 bytes stay aligned


class Part(NamedTuple):
    """One tensor [rows, width] of those that travel together."""

    dtype: torch.dtype
    width: int

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize


@dataclass(frozen=True)
class Wire:
    """How rows of `hidden` floats travel.

    Attributes:
        payload: "bf16" (floats as they are), "fp8" or "fp4" (NVFP4).
        hidden: H.
        dtype: of floats that travel as they are.
        scaling: of "fp8": "token" or "mx".
        global_scale: of "fp4": the fp32 decode multiplier [] that all ranks use; None for one per row, which travels with it.
    """

    payload: Payload
    hidden: int
    dtype: torch.dtype = torch.bfloat16
    scaling: Literal["token", "mx"] = "token"
    global_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        block = 16 if self.payload == "fp4" else 32 if self.payload == "fp8" and self.scaling == "mx" else 1
        if self.hidden % block:
            raise InputError(
                f"rows do not divide into {self.payload} blocks", where="ExpertParallel", given=self.hidden, needed=f"multiple of {block}"
            )

    @staticmethod
    def of(hidden: Hidden) -> Wire:
        """The wire of rows that are floats, or quantised already.

        Raises:
            InputError: scales in tiles or per block of 128; MXFP4.
        """
        if isinstance(hidden, torch.Tensor):
            return Wire("bf16", hidden.shape[1], hidden.dtype)
        quantized_format(hidden, "ExpertParallel")
        if isinstance(hidden, Fp8Tensor):
            return Wire("fp8", hidden.codes.shape[1], scaling="mx" if hidden.scaling == "mx" else "token")
        if hidden.format != NVFP4:
            raise InputError(
                "hidden does not travel in this format", where="ExpertParallel", given=repr(hidden.format), needed="floats, NVFP4 or fp8"
            )
        return Wire("fp4", hidden.shape[1])  # ranks may have quantised by different global scales: each row brings its own

    @property
    def parts(self) -> list[Part]:
        if self.payload == "bf16":
            return [Part(self.dtype, self.hidden)]
        if self.payload == "fp8":
            scales = Part(torch.float32, 1) if self.scaling == "token" else Part(torch.uint8, self.hidden // 32)
            return [Part(torch.float8_e4m3fn, self.hidden), scales]
        own_scale = [Part(torch.float32, 1)] if self.global_scale is None else []
        return [Part(torch.uint8, self.hidden // 2), Part(torch.float8_e4m3fn, self.hidden // 16), *own_scale]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, ids and weights not counted.

        >>> Wire("fp4", 7168).row_bytes, Wire("bf16", 7168).row_bytes
        (4036, 14336)
        """
        return sum(part.row_bytes for part in self.parts)

    def encode(self, hidden: Hidden) -> list[torch.Tensor]:
        """The parts of rows [T, H], floats or quantised as the wire says."""
        if isinstance(hidden, torch.Tensor):
            if self.payload == "bf16":
                return [hidden]
            if len(hidden) == 0:
                return [torch.empty((0, width), dtype=dtype, device=hidden.device) for dtype, width in self.parts]
            if self.payload == "fp8":
                hidden = quantize_fp8(hidden, self.scaling)
            else:
                scale = self.global_scale
                hidden = quantize(hidden, NVFP4, nvfp4_decode_scale(hidden.float().abs().amax(dim=1)) if scale is None else scale)
        parts = [hidden.codes, hidden.scales]
        if isinstance(hidden, QuantTensor) and self.global_scale is None:
            scale = hidden.row_global_scale()
            assert scale is not None
            parts.append(scale.expand(len(hidden.codes), 1))
        return parts

    def decode(self, parts: Sequence[torch.Tensor]) -> Hidden:
        """Rows that have arrived, as `fused_moe` takes them; nothing is widened."""
        rows = parts[0].shape[0]
        if self.payload == "bf16":
            return parts[0]
        if rows == 0:
            return parts[0].new_empty((0, self.hidden), dtype=torch.bfloat16)
        if self.payload == "fp8":
            return Fp8Tensor(parts[0], parts[1], self.scaling)
        return QuantTensor(parts[0], parts[1], parts[2].view(-1) if self.global_scale is None else self.global_scale, NVFP4)
