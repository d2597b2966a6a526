"""Experts of random bits, with biases, for tests of layouts."""

from __future__ import annotations

import torch

import halfbyte as hb
from halfbyte.experts import SWIGLU, Activation, ExpertWeights


def make_experts(num_experts: int, hidden: int, intermediate: int, format: hb.BlockFormat, activation: Activation = SWIGLU) -> ExpertWeights:
    random = torch.Generator().manual_seed(0)
    halves = activation.halves

    def matrix(rows: int, columns: int, groups: int) -> hb.QuantTensor:
        codes = torch.randint(0, 256, (num_experts, rows, columns // 2), dtype=torch.uint8, generator=random)
        low, high = (1, 0x7F) if format is hb.NVFP4 else (90, 130)
        scales = torch.randint(low, high, (num_experts, rows, columns // format.block), dtype=torch.uint8, generator=random)
        shape = (num_experts, groups) if groups > 1 else (num_experts,)
        scale = torch.rand(shape, generator=random, dtype=torch.float32) + 0.5 if format is hb.NVFP4 else None
        return hb.QuantTensor(codes, scales, scale, format)

    bias13, bias2 = (torch.randn(num_experts, rows, generator=random, dtype=torch.float32) for rows in (halves * intermediate, hidden))
    return ExpertWeights(matrix(halves * intermediate, hidden, halves), matrix(hidden, intermediate, 1), activation, bias13, bias2)
