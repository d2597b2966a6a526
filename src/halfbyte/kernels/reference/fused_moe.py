"""The mixture-of-experts layer in plain torch: the definition every kernel is compared with, and the path a CPU runs.

    rows    one for each (token, slot) whose expert is held here, sorted by expert, tokens ascending inside an expert
    x       = q(hidden[token])                                       fp32
    h       = q(round(activation(x @ w13[e]^T + w13_bias[e])))       rounded to the dtype of hidden, then quantised
    row     = h @ w2[e]^T + w2_bias[e]                               fp32
    out[t]  = round(sum over slots j = 0 .. k-1, in this order, of weight[t, j] * row[t, j])

`q` is the round trip through the activation format (`formats.activation_formats`). Weights are dequantised exactly, in fp32; every product
accumulates in fp32. A token's result depends neither on the other tokens nor, up to fp32 rounding, on where an expert lives: partial sums of several
ranks add up. Gradients reach hidden and weights, not the experts.

Experts that no token chose are not touched, the others are dequantised a block at a time: beside its result a call needs at most

    24 bytes x R x (H + I) + 4 bytes x max(one expert's w13, 2^22 elements) + 64 MiB          R = T * k rows

however many experts there are (held by tests/kernels/test_fused_moe_memory.py). One token through 4 experts of H = 256, I = 128 (the demo model)
takes 1.1 ms with its routing on two cores of an EPYC 9004 (2026-11).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from halfbyte.experts import ExpertWeights
from halfbyte.formats import QuantTensor
from halfbyte.formats.activation_formats import ActivationFormat, round_trip
from halfbyte.kernels.reference.activation import activate

# Dense weights made at a time, in elements: 16 MiB of fp32. Larger blocks gain nothing, smaller ones pay per-call overhead on small experts.
BLOCK_ELEMENTS = 1 << 22


class Permutation(NamedTuple):
    """Rows sorted by expert.

    `slot_of_row` int64 [R]: index into the flattened ids [T*k]; `row_of_slot` int64 [T*k]: its inverse, -1 where the expert is not held here;
    `row_start`: E+1 ints, expert e owns rows row_start[e] .. row_start[e+1].
    """

    slot_of_row: torch.Tensor
    row_of_slot: torch.Tensor
    row_start: list[int]


def fused_moe(
    hidden: torch.Tensor,
    experts: ExpertWeights,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    activations: ActivationFormat = "bf16",
    expert_offset: int = 0,
    out: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """hidden [T, H], ids int [T, k], weights float [T, k] to [T, H] of hidden's dtype (or out's); `moe.functional.fused_moe` checks the arguments.

    torch's products of matrices, and the ends of its vectorised loops, round by the number of rows: `batch_invariant` takes each token alone.
    """
    if batch_invariant and len(hidden) > 1:
        result = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if out is None else out
        for x, i, w, y in zip(*(tensor.split(1) for tensor in (hidden, ids, weights, result)), strict=True):
            fused_moe(x, experts, i, w, activations=activations, expert_offset=expert_offset, out=y)
        return result
    permutation = sort_by_expert(ids, expert_offset, experts.num_experts)
    rows = expert_rows(hidden, experts, permutation, ids.shape[1], activations)
    result = combine(rows, weights, permutation.row_of_slot)
    return result.to(hidden.dtype) if out is None else out.copy_(result)


def sort_by_expert(ids: torch.Tensor, expert_offset: int, num_experts: int) -> Permutation:
    """Sort the slots of ids [T, k] by expert, stably; ids outside expert_offset .. expert_offset + num_experts have no row."""
    local = ids.flatten().long() - expert_offset
    key = torch.where((local >= 0) & (local < num_experts), local, num_experts)
    slot_of_row = key.argsort(stable=True)
    row_start = [0, *torch.bincount(key, minlength=num_experts + 1)[:num_experts].cumsum(0).tolist()]
    slot_of_row = slot_of_row[: row_start[-1]]
    row_of_slot = torch.full_like(key, -1)
    row_of_slot[slot_of_row] = torch.arange(row_start[-1], device=ids.device)
    return Permutation(slot_of_row, row_of_slot, row_start)


def expert_rows(hidden: torch.Tensor, experts: ExpertWeights, permutation: Permutation, top_k: int, activations: ActivationFormat) -> torch.Tensor:
    """Run each row of `permutation` through its expert: fp32 [R, H]."""
    scale13, scale2 = largest(experts.w13_input_scale), largest(experts.w2_input_scale)
    token_of_row = permutation.slot_of_row // top_k
    rows = torch.empty((len(token_of_row), experts.hidden), dtype=torch.float32, device=hidden.device)
    for block in _blocks(experts, permutation.row_start):
        first, last = permutation.row_start[block[0]], permutation.row_start[block[-1] + 1]
        x = round_trip(hidden[token_of_row[first:last]], activations, scale13)
        gate_up = _grouped_linear(x, experts.w13, experts.w13_bias, block, permutation.row_start)
        h = round_trip(activate(gate_up, experts.activation).to(hidden.dtype), activations, scale2)
        rows[first:last] = _grouped_linear(h, experts.w2, experts.w2_bias, block, permutation.row_start)
    return rows


def combine(rows: torch.Tensor, weights: torch.Tensor, row_of_slot: torch.Tensor) -> torch.Tensor:
    """sum over slots, in order, of weight * row, slots with row -1 left out: rows [R, H], weights [T, k], row_of_slot [T*k] to fp32 [T, H]."""
    row_of_slot = row_of_slot.view(weights.shape)
    total = torch.zeros((len(weights), rows.shape[1]), dtype=torch.float32, device=rows.device)
    if len(rows) == 0:
        return total
    for weight, row in zip(weights.float().split(1, dim=1), row_of_slot.split(1, dim=1), strict=True):
        total += torch.where(row < 0, 0.0, weight * rows[row.clamp(min=0).squeeze(1)])
    return total


def largest(input_scale: torch.Tensor | None) -> torch.Tensor | None:
    """One calibrated scale for the layer: the largest over all experts of all ranks, as engines that quantise before they dispatch need it."""
    return None if input_scale is None else input_scale.max()


def _blocks(experts: ExpertWeights, row_start: list[int]) -> Iterator[list[int]]:
    """The experts that have rows, ascending, as many at a time as BLOCK_ELEMENTS allows (one at least)."""
    touched = [expert for expert in range(experts.num_experts) if row_start[expert] < row_start[expert + 1]]
    size = max(1, BLOCK_ELEMENTS // (experts.w13.shape[1] * experts.w13.shape[2]))
    return (touched[first : first + size] for first in range(0, len(touched), size))


def _grouped_linear(
    x: torch.Tensor, weight: QuantTensor | torch.Tensor, bias: torch.Tensor | None, block: list[int], row_start: list[int]
) -> torch.Tensor:
    """x [rows of the block, K] fp32 times weight[expert]^T plus bias[expert], row group by row group: fp32 [rows of the block, N]."""
    dense = _dense(weight, block)
    origin = row_start[block[0]]
    groups = []
    for index, expert in enumerate(block):
        group = x[row_start[expert] - origin : row_start[expert + 1] - origin]
        groups.append(group @ dense[index].T if bias is None else torch.addmm(bias[expert].float(), group, dense[index].T))
    return torch.cat(groups)


def _dense(weight: QuantTensor | torch.Tensor, block: list[int]) -> torch.Tensor:
    """weight[block] in fp32."""
    index = torch.tensor(block, device=weight.device)
    if not isinstance(weight, QuantTensor):
        return weight[index].float()
    scales = weight.scales.view(torch.uint8)[index]  # as bytes: not every device can index fp8
    global_scale = None if weight.global_scale is None else weight.global_scale[index]
    return replace(weight, codes=weight.codes[index], scales=scales, global_scale=global_scale).dequantize(torch.float32)
