"""The MoE layer up to, and without, the weighted sum over a token's experts; and that sum on its own.

A caller that fuses the sum into something of its own (a reduction over ranks, a residual add) takes the rows as they leave the second matrix product.
Contract of FlashInfer's `do_finalize=False`, except that the weights stay as they were given instead of being rounded to bf16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from halfbyte.experts import ExpertWeights
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.kernels.reference.fused_moe import combine, expert_rows, sort_by_expert


class Unfinalized(NamedTuple):
    """`rows` [P, H] of hidden's dtype, sorted by expert, each expert's segment padded with zero rows to a multiple of the tile;
    `weights` [T, k]; `row_of_slot` int32 [T*k], the row of each (token, slot) or -1; `token_of_row` int32 [P], -1 in padding."""

    rows: torch.Tensor
    weights: torch.Tensor
    row_of_slot: torch.Tensor
    token_of_row: torch.Tensor


def unfinalized_moe(
    hidden: torch.Tensor,
    experts: ExpertWeights,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    activations: ActivationFormat = "bf16",
    expert_offset: int = 0,
    tile: int = 1,
) -> Unfinalized:
    """Run each token through its experts and stop before the sum; arguments as `fused_moe`, `tile` rows a tile."""
    permutation = sort_by_expert(ids, expert_offset, experts.num_experts)
    compact = expert_rows(hidden, experts, permutation, ids.shape[1], activations)
    row_start = torch.tensor(permutation.row_start, device=hidden.device)
    counts = row_start.diff()
    padded_counts = -(-counts // tile) * tile
    shift = padded_counts.cumsum(0) - padded_counts - row_start[:-1]
    place = torch.arange(len(compact), device=hidden.device) + shift.repeat_interleave(counts)

    num_rows = int(padded_counts.sum())
    rows = torch.zeros((num_rows, experts.hidden), dtype=hidden.dtype, device=hidden.device)
    rows[place] = compact.to(hidden.dtype)
    row_of_slot = torch.full((ids.numel(),), -1, dtype=torch.int32, device=hidden.device)
    row_of_slot[permutation.slot_of_row] = place.int()
    token_of_row = torch.full((num_rows,), -1, dtype=torch.int32, device=hidden.device)
    token_of_row[place] = (permutation.slot_of_row // ids.shape[1]).int()
    return Unfinalized(rows, weights, row_of_slot, token_of_row)


def finalize(result: Unfinalized) -> torch.Tensor:
    """round(sum over slots of weight * row), in fp32, slots without a row left out: [T, H] of the rows' dtype."""
    return combine(result.rows, result.weights, result.row_of_slot.long()).to(result.rows.dtype)
