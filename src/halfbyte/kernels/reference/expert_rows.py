"""Both products of the layer in plain torch, expert by expert: the rows that `combine` adds up, fp32 [T * k, H] in the order of a work list.

    x       = q(hidden[token])                                       fp32
    h       = q(round(activation(x @ w13[e]^T + w13_bias[e])))       rounded to the dtype of hidden, then quantised
    row     = h @ w2[e]^T + w2_bias[e]                               fp32

`q` is the round trip through the activation format (`formats.activation_formats`); hidden states that arrive quantised are taken as they are, and h
is then rounded to bf16. Weights are dequantised exactly, in fp32; every product accumulates in fp32. Experts without rows are not touched.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from halfbyte.experts import ExpertWeights
from halfbyte.formats import QuantTensor
from halfbyte.formats.activation_formats import ActivationFormat, round_trip
from halfbyte.kernels.problem import Hidden, Problem, Support, plain_torch
from halfbyte.kernels.reference.activation import activate
from halfbyte.kernels.reference.decoded import matrices
from halfbyte.kernels.work_list import WorkList

capturable = False  # it asks the device for the size of every group
# Dense weights made at a time, in elements: 16 MiB of fp32. Larger blocks gain nothing, smaller ones pay per-call overhead on small experts.
BLOCK_ELEMENTS = 1 << 22


def supports(problem: Problem) -> Support:
    if problem.layout != "canonical":
        return Support.no(f"reads layout 'canonical', the weights are in {problem.layout!r}")
    return plain_torch(problem)


def run(
    hidden: Hidden,
    experts: ExpertWeights,
    work: WorkList,
    *,
    activations: ActivationFormat = "bf16",
    config: None = None,
) -> torch.Tensor:
    """hidden [T, H] to rows fp32 [T * k, H]; those of slots whose expert is not held here are left unset."""
    assert work.row_start is not None
    row_start = work.row_start.tolist()
    scale13, scale2 = largest(experts.w13_input_scale), largest(experts.w2_input_scale)
    arrives_rounded = not isinstance(hidden, torch.Tensor)
    values = hidden if isinstance(hidden, torch.Tensor) else hidden.dequantize(torch.float32)
    rounded = torch.bfloat16 if arrives_rounded else values.dtype
    rows = torch.empty((len(work.token_of_row), experts.hidden), dtype=torch.float32, device=experts.device)
    for block in _blocks(experts, row_start):
        first, last = row_start[block[0]], row_start[block[-1] + 1]
        tokens = values[work.token_of_row[first:last].long()]
        x = tokens if arrives_rounded else round_trip(tokens, activations, scale13)
        gate_up = _grouped_linear(x, experts.w13, experts.w13_bias, block, row_start)
        h = round_trip(activate(gate_up, experts.activation).to(rounded), activations, scale2)
        rows[first:last] = _grouped_linear(h, experts.w2, experts.w2_bias, block, row_start)
    return rows


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
    dense = matrices(weight, block)
    origin = row_start[block[0]]
    groups = []
    for index, expert in enumerate(block):
        group = x[row_start[expert] - origin : row_start[expert + 1] - origin]
        groups.append(group @ dense[index].T if bias is None else torch.addmm(bias[expert].float(), group, dense[index].T))
    return torch.cat(groups)
