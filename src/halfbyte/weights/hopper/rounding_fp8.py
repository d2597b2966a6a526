"""What the fp8 tensor cores make of the Hopper layout: the same words and scales as W4A16, decoded to e4m3 (`dequant_fp8.py`).

    weight = e4m3(e2m1 * scale * 2^-j) * 2^j        rounded to nearest, ties away from zero; j is one integer per row: `row_exponents`

j brings the largest scale of a row to 64 or just below, so that 6 times it is within e4m3's 448; a scale that this makes smaller than 2^-5 counts as
2^-5, so that no value is subnormal. What that costs:

    MXFP4   nothing where the scales of a row span at most 11 octaves: e4m3 has normal values from 0.5 * 2^-5 to 6 * 2^6. Beyond that, the values of
            blocks 2^12 times smaller than the largest, or more, grow to at most 2^-11 of the row's largest: an error of a row of K weights of at most
            sqrt(K) * 2^-11 of its norm where the largest block reaches 6 (4 % for K = 7168, if all other blocks are that small)
    NVFP4   1.5 times an e4m3 scale has up to 6 significant bits, e4m3 has 4: magnitudes 1.5, 3 and 6 are rounded, the others are exact. About 2 %
            of the weights' norm, beside the 9.6 % that NVFP4 itself lost; rows whose scales span more, as with MXFP4
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch

from halfbyte.experts import ExpertWeights
from halfbyte.formats import NVFP4, BlockFormat, QuantTensor, e2m1, e4m3

TOP_EXPONENT = 6  # of a row's largest power-of-two scale after the shift; other scales stay below 2^6
SMALLEST_ROW_EXPONENT = -126  # keeps 2^j a normal fp32
SMALLEST_SCALE_EXPONENT = -5  # after the shift: half of it is the smallest normal number of e4m3


@dataclass(frozen=True)
class WeightError:
    """What rounding weights to e4m3 changes: `rows` that differ from their FP4 values, of `total_rows`; sums over all weights. Errors add up."""

    rows: int = 0
    total_rows: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0

    @property
    def relative(self) -> float:
        """The L2 norm of the error over that of the weights."""
        return (self.squared_error / self.squared_norm) ** 0.5 if self.squared_norm else 0.0

    def __add__(self, other: WeightError) -> WeightError:
        return WeightError(*(ours + theirs for ours, theirs in zip(astuple(self), astuple(other), strict=True)))


def row_exponents(largest: torch.Tensor, format: BlockFormat) -> torch.Tensor:
    """j of rows from their largest scale bytes, coded as `pack` stores them (uint8): int8 of the same shape.

    >>> row_exponents(torch.tensor([127], dtype=torch.uint8), halfbyte.MXFP4).tolist()
    [-6]
    """
    byte = largest.int()
    exponent = (byte >> 3) - 21 + 1 - TOP_EXPONENT if format == NVFP4 else byte - 127 - TOP_EXPONENT
    return exponent.clamp(min=SMALLEST_ROW_EXPONENT).to(torch.int8)


def round_to_fp8(w: QuantTensor) -> torch.Tensor:
    """The values of `w` [..., N, K] that the fp8 kernels multiply by, in fp32.

    >>> q = halfbyte.quantize(torch.randn(8, 64), halfbyte.MXFP4)
    >>> torch.equal(round_to_fp8(q), q.dequantize())
    True
    """
    linear = w.with_scale_layout("linear")
    scales = w.format.decode_scales(linear.scales)
    _, exponent = torch.frexp(scales.amax(dim=-1, keepdim=True))  # the largest scale is in [2^(exponent - 1), 2^exponent)
    j = (exponent - (TOP_EXPONENT if w.format == NVFP4 else TOP_EXPONENT + 1)).clamp(min=SMALLEST_ROW_EXPONENT)
    elements = e2m1.decode_packed(linear.codes).unflatten(-1, (-1, w.format.block))
    kept = torch.where(scales > 0, torch.ldexp(scales, -j).clamp(min=2.0**SMALLEST_SCALE_EXPONENT), 0.0)
    ties_away = (elements * kept.unsqueeze(-1)).flatten(-2) * (1 + 2.0**-12)  # no other value comes near a tie
    rounded = torch.ldexp(e4m3.encode(ties_away).float(), j)
    row_scale = w.row_global_scale()
    return rounded if row_scale is None else rounded * row_scale


def weight_error(w: ExpertWeights) -> dict[str, WeightError]:
    """Measure, for "w13" and "w2", how far e4m3 is from the FP4 weights; one expert at a time.

    >>> q = halfbyte.quantize(torch.randn(2, 64, 64), halfbyte.MXFP4)
    >>> weight_error(halfbyte.ExpertWeights(q, halfbyte.quantize(torch.randn(2, 64, 32), halfbyte.MXFP4)))["w13"].rows
    0
    """
    return {name: _error_of(matrix) for name, matrix in (("w13", w.w13), ("w2", w.w2)) if isinstance(matrix, QuantTensor)}


def _error_of(w: QuantTensor) -> WeightError:
    total = WeightError()
    for expert in range(w.shape[0]):
        exact = w[expert].dequantize()
        difference = round_to_fp8(w[expert]) - exact
        rows = int((difference != 0).any(dim=-1).sum())
        total += WeightError(rows, w.shape[1], float(difference.double().square().sum()), float(exact.double().square().sum()))
    return total
