"""What the quantiser kernels compute, in plain torch: the codec, after an activation or a norm if there is one."""

from __future__ import annotations

import torch

from halfbyte.experts import Activation
from halfbyte.formats import BlockFormat, QuantTensor
from halfbyte.formats import quantize as codec
from halfbyte.formats.e8m0 import ScaleRule
from halfbyte.formats.scale_layout import ScaleLayout
from halfbyte.kernels.problem import Problem, Support, plain_torch
from halfbyte.kernels.reference.activation import activate


def activated(x: torch.Tensor, activation: Activation | None) -> torch.Tensor:
    """activation(x) [..., K] of x [..., 2K], computed in fp32 and rounded to the dtype of x; x itself without one."""
    return x if activation is None else activate(x.float(), activation).to(x.dtype)


def normed(x: torch.Tensor, norm: tuple[torch.Tensor, float] | None) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight with norm = (weight, eps), computed in fp32 and rounded to the dtype of x; x itself without one."""
    if norm is None:
        return x
    weight, eps = norm
    factor = 1.0 / torch.sqrt(x.float().square().mean(dim=-1, keepdim=True) + eps)
    return (x.float() * factor * weight.float()).to(x.dtype)


def supports(problem: Problem) -> Support:
    return plain_torch(problem)


def run(
    x: torch.Tensor,
    format: BlockFormat,
    global_scale: torch.Tensor | float | None = None,
    *,
    activation: Activation | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    four_over_six: bool = False,
    scale_rule: ScaleRule = "ceil",
    scale_layout: ScaleLayout = "linear",
    config: None = None,
) -> QuantTensor:
    """The codec on activation(x), or on the normed x."""
    x = normed(activated(x, activation), norm)
    return codec(x, format, global_scale, four_over_six=four_over_six, scale_rule=scale_rule, scale_layout=scale_layout)
