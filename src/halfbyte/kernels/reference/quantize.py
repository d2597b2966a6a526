"""What the quantise kernels compute, in plain torch: the codec, after an activation if there is one, expert by expert if there are some."""

from __future__ import annotations

import itertools

import torch

from halfbyte.experts import Activation
from halfbyte.formats import BlockFormat, QuantTensor
from halfbyte.formats import quantize as codec
from halfbyte.formats.e8m0 import ScaleRule
from halfbyte.formats.scale_layout import ScaleLayout, tile_rows
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


def quantize(
    x: torch.Tensor,
    format: BlockFormat,
    global_scale: torch.Tensor | float | None = None,
    *,
    activation: Activation | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    four_over_six: bool = False,
    scale_rule: ScaleRule = "ceil",
    scale_layout: ScaleLayout = "linear",
) -> QuantTensor:
    """The codec on activation(x), or on the normed x."""
    x = normed(activated(x, activation), norm)
    return codec(x, format, global_scale, four_over_six=four_over_six, scale_rule=scale_rule, scale_layout=scale_layout)


def quantize_experts(
    x: torch.Tensor,
    expert_offsets: torch.Tensor,
    global_scales: torch.Tensor | None,
    format: BlockFormat,
    scale_layout: ScaleLayout,
    codes: torch.Tensor,
    scales: torch.Tensor,
    scale_offsets: torch.Tensor,
    *,
    activation: Activation | None = None,
) -> None:
    """Fill `codes` [M, K/2], `scales` [rows, columns] and `scale_offsets` [E + 1], as `kernels.quantize.quantize_experts` describes them.

    Waits for the device to learn the offsets.
    """
    tile = tile_rows(scale_layout)
    starts = [0]
    bounds = expert_offsets.tolist()
    for expert, (first, end) in enumerate(itertools.pairwise(bounds)):
        scale = None if global_scales is None else global_scales[expert]
        part = quantize(x[first:end], format, scale, activation=activation, scale_layout=scale_layout)
        codes[first:end] = part.codes
        start = first if scale_layout == "linear" else starts[-1]
        scales[start : start + part.scales.shape[0]] = part.scales
        starts.append(starts[-1] + -(-(end - first) // tile) * tile)
    if scale_layout != "linear":
        scale_offsets.copy_(torch.tensor(starts))
