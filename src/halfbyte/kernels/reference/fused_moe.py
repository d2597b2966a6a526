"""The mixture-of-experts layer in plain torch: the definition every kernel is compared with, and the path a CPU runs.

    rows    one for each (token, slot) whose expert is held here, sorted by expert, tokens ascending inside an expert          `sort`
    row     = expert(hidden[token])                                                                                             `expert_rows`
    out[t]  = round(sum over slots j = 0 .. k-1, in this order, of weight[t, j] * row[t, j])                                    `combine`

A token's result depends neither on the other tokens nor, up to fp32 rounding, on where an expert lives: partial sums of several ranks add up.
Gradients reach hidden and weights, not the experts.

Experts that no token chose are not touched, the others are dequantised a block at a time: beside its result a call needs at most

    24 bytes x R x (H + I) + 4 bytes x max(one expert's w13, 2^22 elements) + 64 MiB          R = T * k rows

however many experts there are (held by tests/kernels/reference/test_fused_moe_memory.py), and what `decoded_once` keeps. One token through 4 experts
of H = 256, I = 128 (the demo model) takes 1.1 ms with its routing on two cores of an EPYC 9004 (2026-11).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from halfbyte.experts import ExpertWeights
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.formats.fp8_tensor import Fp8Tensor
from halfbyte.kernels.problem import Hidden
from halfbyte.kernels.reference.combine import weighted_sum
from halfbyte.kernels.reference.expert_rows import capturable, supports
from halfbyte.kernels.reference.expert_rows import run as expert_rows
from halfbyte.kernels.reference.sort import run as sort

__all__ = ["capturable", "run", "supports"]  # what the table reads


def run(
    hidden: Hidden,
    experts: ExpertWeights,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    activations: ActivationFormat = "bf16",
    expert_offset: int = 0,
    out: torch.Tensor | None = None,
    batch_invariant: bool = False,
    config: None = None,
) -> torch.Tensor:
    """hidden [T, H], topk_ids int [T, k], topk_weights float [T, k] to [T, H] of hidden's dtype (bf16 where it is quantised), or out.

    `moe.functional.fused_moe` checks the arguments. torch's products of matrices, and the ends of its vectorised loops, round by the number of rows:
    `batch_invariant` takes each token alone.
    """
    num_tokens = len(topk_ids)
    if batch_invariant and num_tokens > 1:
        dtype = hidden.dtype if isinstance(hidden, torch.Tensor) else torch.bfloat16
        result = torch.empty((num_tokens, experts.hidden), dtype=dtype, device=experts.device) if out is None else out
        for t in range(num_tokens):
            one = slice(t, t + 1)
            run(_rows(hidden, one), experts, topk_ids[one], topk_weights[one], activations=activations, expert_offset=expert_offset, out=result[one])
        return result
    work = sort(topk_ids, expert_offset, experts.num_experts, max_rows=max(1, topk_ids.numel()))
    rows = expert_rows(hidden, experts, work, activations=activations)
    result = weighted_sum(rows, work.row_of_slot, topk_weights)
    return result.to(hidden.dtype if isinstance(hidden, torch.Tensor) else torch.bfloat16) if out is None else out.copy_(result)


def _rows(hidden: Hidden, rows: slice) -> Hidden:
    if isinstance(hidden, torch.Tensor):
        return hidden[rows]
    codes, scales = hidden.codes[rows], hidden.scales[rows]
    if isinstance(hidden, Fp8Tensor):
        return replace(hidden, codes=codes, scales=scales)
    global_scale = hidden.global_scale
    if global_scale is not None and global_scale.ndim:
        global_scale = global_scale.repeat_interleave(hidden.shape[0] // len(global_scale))[rows]
    return replace(hidden, codes=codes, scales=scales, global_scale=global_scale)
