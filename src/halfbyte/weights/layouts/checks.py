"""What every layout of FP4 experts asks of its weights before it writes anything."""

from __future__ import annotations

import torch

from halfbyte.checkpoint.experts import ExpertWeights
from halfbyte.errors import InputError
from halfbyte.formats import NVFP4, BlockFormat, QuantTensor


def fp4_matrices(w: ExpertWeights, layout: str) -> tuple[QuantTensor, QuantTensor]:
    """w13 and w2, known to be in FP4 with scales in rows.

    Raises:
        InputError: the weights are dense, or their scales are not in layout "linear".
    """
    if not isinstance(w.w13, QuantTensor) or not isinstance(w.w2, QuantTensor):
        raise InputError(f"layout {layout!r} holds FP4 weights", where="prepare", given="dense experts", needed="NVFP4 or MXFP4 experts")
    for name, matrix in (("w13", w.w13), ("w2", w.w2)):
        if matrix.scale_layout != "linear":
            raise InputError(f"{name} has its block scales in tiles", where="prepare", given=repr(matrix.scale_layout), needed="'linear'")
    return w.w13, w.w2


def largest_valid_scale(format: BlockFormat) -> int:
    """The byte of the largest finite scale; above it lie NaN and, for e4m3, the negative half."""
    return 0x7E if format == NVFP4 else 0xFE


def check_block_scales(w: ExpertWeights) -> None:
    """Raise InputError if a block scale is negative or NaN. Reads every scale once; weights without data ("meta") have nothing to refuse."""
    for name, matrix in (("w13", w.w13), ("w2", w.w2)):
        assert isinstance(matrix, QuantTensor)
        raw, largest = matrix.scales.view(torch.uint8), largest_valid_scale(matrix.format)
        if raw.device.type == "meta" or not raw.numel() or raw.amax() <= largest:
            continue
        raise InputError(
            f"{name} has block scales that are negative or NaN",
            where="prepare",
            given=f"{sum(int((expert > largest).sum()) for expert in raw)} of {raw.numel()}",
            needed="finite scales >= 0",
            next_step="run `halfbyte inspect` on the checkpoint",
        )
