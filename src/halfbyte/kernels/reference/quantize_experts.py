"""Rows sorted by expert to FP4 in plain torch, expert by expert."""

from __future__ import annotations

import itertools

import torch

from halfbyte.experts import Activation
from halfbyte.formats import BlockFormat
from halfbyte.formats.scale_layout import ScaleLayout, tile_rows
from halfbyte.kernels.reference.quantize import run as quantize
from halfbyte.kernels.reference.quantize import supports

__all__ = ["capturable", "run", "supports"]  # what the table reads

capturable = False  # it asks the device for the offsets


def run(
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
    config: None = None,
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
        scale_offsets.copy_(torch.tensor(starts, dtype=torch.int64))
