"""Activations to e4m3 in plain torch: the codec itself."""

from __future__ import annotations

import torch

from halfbyte.formats.fp8_tensor import Fp8Scaling, Fp8Tensor, quantize_fp8
from halfbyte.formats.scale_layout import ScaleLayout
from halfbyte.kernels.reference.quantize import supports

__all__ = ["run", "supports"]  # what the table reads


def run(x: torch.Tensor, scaling: Fp8Scaling = "token", *, scale_layout: ScaleLayout = "linear") -> Fp8Tensor:
    return quantize_fp8(x, scaling, scale_layout=scale_layout)
