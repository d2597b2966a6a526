"""The canonical arrangement as a layout: `ExpertWeights` as they are, which the portable kernels read."""

from __future__ import annotations

import torch

from halfbyte.experts import ExpertWeights
from halfbyte.weights.checks import ScaleCheck, check_scales, has_unusable_scales


def allocate(w: ExpertWeights, device: torch.device | str) -> ExpertWeights:
    """Return storage for all experts of `w`, uninitialised, on `device` ("meta" too)."""
    return w.with_tensors({name: torch.empty_like(tensor, device=device) for name, tensor in w.tensors.items()})


def pack(w: ExpertWeights, out: ExpertWeights, first: int = 0, scale_check: ScaleCheck | None = None) -> None:
    """Copy the experts of `w` to the experts `first` and following of `out`.

    Raises:
        InputError: a scale is negative or not finite; nothing was written. Not with `scale_check`, which gets the flag that says so.
    """
    check(w, scale_check)
    here, sources = slice(first, first + w.num_experts), w.tensors
    for name, tensor in out.tensors.items():
        (tensor if name.endswith("input_scale") else tensor[here]).copy_(sources[name])


def unpack(experts: ExpertWeights) -> ExpertWeights:
    """The experts themselves."""
    return experts


def check(w: ExpertWeights, scale_check: ScaleCheck | None) -> None:
    """The check of the scales, which `pack` begins with."""
    if scale_check is None:
        check_scales(w)
    else:
        scale_check(has_unusable_scales(w))
