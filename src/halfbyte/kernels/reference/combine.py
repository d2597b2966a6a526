"""out[t] = round(sum over slots j = 0 .. k-1, in this order, of weight[t, j] * rows[row of slot (t, j)]), in fp32, slots without a row left out."""

from __future__ import annotations

import torch

from halfbyte.kernels.problem import Problem, Support, plain_torch


def supports(problem: Problem) -> Support:
    return plain_torch(problem)


def run(rows: torch.Tensor, row_of_slot: torch.Tensor, topk_weights: torch.Tensor, out: torch.Tensor, *, launch_early: bool = False) -> torch.Tensor:
    """rows [R, H], row_of_slot [T * k] (-1: none), topk_weights [T, k] to out [T, H], which is returned."""
    return out.copy_(weighted_sum(rows, row_of_slot, topk_weights))


def weighted_sum(rows: torch.Tensor, row_of_slot: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """The sum, not rounded: fp32 [T, H]. Gradients reach rows and weights."""
    row_of_slot = row_of_slot.long().view(topk_weights.shape)
    total = torch.zeros((len(topk_weights), rows.shape[1]), dtype=torch.float32, device=rows.device)
    if len(rows) == 0:
        return total
    for weight, row in zip(topk_weights.float().split(1, dim=1), row_of_slot.split(1, dim=1), strict=True):
        total += torch.where(row < 0, 0.0, weight * rows[row.clamp(min=0).squeeze(1)])
    return total
