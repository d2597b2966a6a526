"""The mixture-of-experts layer on canonical FP4 weights, every GPU from sm_80 on: sort, both products (`expert_rows`), combine.

Where a gradient of the routing weights is asked for, the sum is torch's. Nothing is compiled for a number of tokens but the sort and the sum, which
are small. Memory beside the result: that of `expert_rows`, R rows of H in fp32 and the result in fp32; R = T * k.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from halfbyte.device import Target
from halfbyte.experts import ExpertWeights
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.kernels.portable.expert_rows import run as expert_rows
from halfbyte.kernels.portable.expert_rows import supports
from halfbyte.kernels.portable.gemm import Config, choose_config, configs
from halfbyte.kernels.problem import Hidden, Problem, Size, layer_problem
from halfbyte.kernels.reference.combine import weighted_sum
from halfbyte.kernels.shared.combine import block_size
from halfbyte.kernels.shared.combine import run as combine
from halfbyte.kernels.shared.sort import run as sort
from halfbyte.kernels.shared.sort import variant

__all__ = ["choose_config", "configs", "run", "supports", "variants"]  # what the table reads


def variants(problem: Problem, size: Size, config: Config) -> frozenset[Hashable]:
    """What the sort and the sum are compiled for, where that depends on the number of tokens."""
    return frozenset((variant(size.num_rows, problem.num_experts, config.max_rows), block_size(size.num_tokens, problem.hidden)))


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
    config: Config | None = None,
) -> torch.Tensor:
    """hidden [T, H], topk_ids int [T, k], topk_weights float [T, k] to [T, H] of hidden's dtype (bf16 where it is quantised), or out.

    `moe.functional.fused_moe` checks the arguments. A row of a tile never mixes with another, so that with one `config` for any number of tokens,
    which is what `choose_config` picks for `batch_invariant`, a token's bits depend on nothing else.
    """
    dtype = hidden.dtype if isinstance(hidden, torch.Tensor) else torch.bfloat16
    if len(topk_ids) == 0:
        return torch.empty((0, experts.hidden), dtype=dtype, device=experts.device) if out is None else out
    if config is None:
        problem = layer_problem("fused_moe", experts, Target.of(experts.device), "canonical", activations, hidden, batch_invariant=batch_invariant)
        config = choose_config(problem, Size(*topk_ids.shape))
    work = sort(topk_ids.contiguous(), expert_offset, experts.num_experts, config.max_rows, row_start=True)
    rows = expert_rows(hidden, experts, work, activations=activations, config=config)
    if torch.is_grad_enabled() and (rows.requires_grad or topk_weights.requires_grad):
        result = weighted_sum(rows, work.row_of_slot, topk_weights)
    else:
        result = torch.empty((len(topk_ids), experts.hidden), dtype=torch.float32, device=experts.device)
        combine(rows, work.row_of_slot, topk_weights.contiguous(), result)
    return result.to(dtype) if out is None else out.copy_(result)
