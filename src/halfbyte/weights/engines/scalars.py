"""The numbers from which the scalars of Blackwell engines are made: what their accumulators are multiplied by, and constants of the activation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.experts import Activation, ExpertWeights
from halfbyte.formats import QuantTensor


@dataclass(frozen=True)
class Multipliers:
    """What the numbers of the canonical experts are multiplied by, fp32 and decoding; 1 where there is none.

    Attributes:
        w13_input, w2_input: [], the largest input scale of the whole layer: the same on every rank.
        gate, up, w2: [E], global scales of the weights (gate and up are the same tensor without a gate).
    """

    w13_input: torch.Tensor
    w2_input: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    w2: torch.Tensor


def multipliers_of(w: ExpertWeights) -> Multipliers:
    """Those of canonical FP4 experts, on their device."""
    ones = torch.ones(w.num_experts, dtype=torch.float32, device=w.device)

    def input_scale(scale: torch.Tensor | None) -> torch.Tensor:
        return ones.new_ones(()) if scale is None or not scale.numel() else scale.float().amax()

    def global_scale(w: QuantTensor | torch.Tensor) -> torch.Tensor:
        assert isinstance(w, QuantTensor)
        return ones.unsqueeze(1) if w.global_scale is None else w.global_scale.view(len(ones), -1 if len(ones) else 1)

    w13 = global_scale(w.w13)
    return Multipliers(input_scale(w.w13_input_scale), input_scale(w.w2_input_scale), w13[:, 0], w13[:, -1], global_scale(w.w2)[:, 0])


def activation_scalars(activation: Activation, limit_divisor: torch.Tensor, beta_divisor: torch.Tensor) -> dict[str, torch.Tensor]:
    """gemm1_alpha, gemm1_beta and gemm1_clamp_limit fp32 [E] of a swiglu that has them."""
    values: dict[str, torch.Tensor] = {}
    if activation.alpha != 1:
        values["gemm1_alpha"] = torch.full_like(beta_divisor, activation.alpha)
    if activation.beta != 0:
        values["gemm1_beta"] = activation.beta / beta_divisor
    if activation.limit is not None:
        values["gemm1_clamp_limit"] = activation.limit / limit_divisor
    return values
