"""Scales that cannot be used, found as the tensors of the files come in, and named.

A matrix of zeros is zero whatever its scales, as those of pruned experts are; there, scales of zero stand for what was stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from halfbyte.errors import CheckpointError
from halfbyte.formats import BlockFormat, e8m0

# Reads the codes that belong to the scales; needed only where some scale cannot be used.
ReadCodes = Callable[[], torch.Tensor]
_AGAIN = "quantise the model again, or download the file again"
_MAGNITUDES = 0x77  # of the two codes in a byte: all bits but the signs


def powers_of_two(scales: torch.Tensor, name: str) -> torch.Tensor:
    """fp32 block scales as e8m0 bytes.

    Raises:
        CheckpointError: one is no power of two that e8m0 has.
    """
    stored, bad = e8m0.of_powers_of_two(scales)
    if bad.any():
        raise CheckpointError("a block scale is no power of two", where=name, given=scales[bad][0].item(), needed="2^-126 .. 2^127", next_step=_AGAIN)
    return stored


def usable_block_scales(scales: torch.Tensor, codes: ReadCodes, format: BlockFormat, name: str) -> torch.Tensor:
    """Block scales [..., N, K/block] as bytes or floats of one byte; those of blocks of zeros are made usable.

    Raises:
        CheckpointError: one is NaN or negative.
    """
    stored = scales.view(torch.uint8)
    if int(stored.max()) <= format.largest_scale_byte:
        return scales
    bad = stored > format.largest_scale_byte
    nonzero = (codes().view(torch.uint8).to(stored.device) & _MAGNITUDES) != 0
    blocks = nonzero.flatten(scales.ndim - 1).unflatten(-1, (scales.shape[-1], -1)).any(-1)
    refused = bad & blocks
    if refused.any():
        raise CheckpointError(
            "a block scale is NaN or negative",
            where=name,
            given=f"{int(refused.sum())} of {refused.numel()}, the first at {refused.nonzero()[0].tolist()}",
            next_step=_AGAIN,
        )
    return stored.masked_fill(bad, 0x00 if format.has_global_scale else 0x7F).view(scales.dtype)


def usable_scalars(scalars: torch.Tensor, codes: ReadCodes | None, name: str) -> torch.Tensor:
    """fp32 decode multipliers [] or [E] of matrices whose codes are [N, K/2] or [E, N, K/2]; those of zero matrices are made 1.

    Raises:
        CheckpointError: one is not a positive finite number.
    """
    bad = ~_positive(scalars)
    if codes is not None and bad.any():
        nonzero = (codes().view(torch.uint8).to(scalars.device) & _MAGNITUDES) != 0
        is_zero = ~(nonzero.flatten(1).any(-1) if scalars.numel() == len(nonzero) and scalars.ndim else nonzero.any())
        scalars = scalars.masked_fill(bad & is_zero, 1.0)
    return _all_positive(scalars, name)


def usable_input_multiplier(scales: torch.Tensor, name: str) -> torch.Tensor:
    """A pre_quant_scale [K].

    Raises:
        CheckpointError: an element is not finite.
    """
    if not bool(scales.isfinite().all()):
        raise CheckpointError("a pre_quant_scale is not finite", where=name, next_step=_AGAIN)
    return scales


def usable_fp8_weight(weight: torch.Tensor, name: str) -> torch.Tensor:
    """An e4m3 weight.

    Raises:
        CheckpointError: an element is NaN.
    """
    if bool(((weight.view(torch.uint8) & 0x7F) == 0x7F).any()):
        raise CheckpointError("an e4m3 element is NaN", where=name, next_step=_AGAIN)
    return weight


def usable_fp8_scales(scales: torch.Tensor, ndim: int, name: str) -> torch.Tensor:
    """The scales of an e4m3 weight of `ndim` dimensions, in fp32: [] for one, otherwise of as many dimensions.

    Raises:
        CheckpointError: one is not a positive finite number.
    """
    scales = scales.reshape(()) if scales.numel() == 1 else scales.reshape(*scales.shape, *[1] * (ndim - scales.ndim))
    return _all_positive(scales.float(), name)


def _positive(scales: torch.Tensor) -> torch.Tensor:
    return scales.isfinite() & (scales > 0)


def _all_positive(scales: torch.Tensor, name: str) -> torch.Tensor:
    bad = scales[~_positive(scales)]
    if bad.numel():
        raise CheckpointError("a scale is not a positive finite number", where=name, given=bad.flatten()[0].item(), next_step=_AGAIN)
    return scales
