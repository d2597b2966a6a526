"""The mixture-of-experts layer on Hopper: FP4 weights, activations in any format. Equation and semantics: `kernels.reference.fused_moe`.

    up to 8 tokens    GEMM1, GEMM2 (both direct), combine
    more              sort, both products (`expert_rows`), combine

Nothing synchronises with the host, and launch shapes depend on the number of tokens alone, so a captured CUDA graph serves any routing. Every sum has
a fixed order: equal inputs give equal bits. Consecutive kernels overlap by programmatic dependent launch, except around prefill GEMMs.

Workspace of a call: that of `expert_rows`, and of the sort 8 R bytes and its list; R = T * k.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from halfbyte.arguments import dense_rows
from halfbyte.errors import UnsupportedError
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.kernels.problem import Hidden, Problem, Size
from halfbyte.kernels.shared.combine import block_size, combine_direct
from halfbyte.kernels.shared.combine import run as combine
from halfbyte.kernels.shared.sort import run as sort
from halfbyte.kernels.shared.sort import variant
from halfbyte.kernels.shared.sort import workspace_nbytes as sort_nbytes
from halfbyte.kernels.sm90.configs import DIRECT, Config, choose_config, configs, rivals, rounds_weights, sources, takes
from halfbyte.kernels.sm90.expert_rows import direct_shapes, layout, problem_of, supports
from halfbyte.kernels.sm90.expert_rows import run as expert_rows
from halfbyte.kernels.sm90.expert_rows import workspace_nbytes as expert_rows_nbytes
from halfbyte.weights.hopper.layout import HopperExperts

__all__ = [  # what the table reads
    "choose_config", "configs", "layout", "rivals", "rounds_weights", "run", "sources", "supports", "takes", "variants", "workspace_nbytes",
]  # fmt: skip


def variants(problem: Problem, size: Size, config: Config) -> frozenset[Hashable]:
    """What kernels are compiled for beside the configuration, where that depends on the number of tokens."""
    combined = (config == DIRECT, block_size(size.num_tokens, problem.hidden))
    if config == DIRECT:
        return frozenset((combined, direct_shapes(problem, size)))
    return frozenset((combined, (config.max_rows, *variant(size.num_rows, problem.num_experts, config.max_rows))))


def workspace_nbytes(problem: Problem, size: Size, config: Config) -> int:
    """What `run` takes of a workspace."""
    nbytes = expert_rows_nbytes(problem, size, config)
    return nbytes if config == DIRECT else nbytes + sort_nbytes(size.num_rows, problem.num_experts, config.max_rows)


def run(
    hidden: Hidden,
    experts: HopperExperts,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    activations: ActivationFormat = "bf16",
    expert_offset: int = 0,
    out: torch.Tensor | None = None,
    batch_invariant: bool = False,
    config: Config | None = None,
) -> torch.Tensor:
    """hidden [T, H] bf16 or quantised, topk_ids int [T, k], topk_weights float [T, k] to [T, H]; `moe.functional.fused_moe` checks the arguments.

    Raises:
        UnsupportedError: a gradient is asked for.
    """
    if torch.is_grad_enabled() and (topk_weights.requires_grad or (isinstance(hidden, torch.Tensor) and hidden.requires_grad)):
        raise UnsupportedError(
            "the Hopper kernels have no backward pass", where="fused_moe", next_step="run under torch.no_grad(), or prepare(w, 'canonical')"
        )
    num_tokens, num_experts = topk_ids.shape[0], experts.num_experts
    if out is None:
        out = torch.empty((num_tokens, experts.hidden), dtype=torch.bfloat16, device=experts.device)
    if num_tokens == 0:
        return out
    if config is None:
        config = choose_config(problem_of("fused_moe", hidden, experts, activations, batch_invariant), Size(*topk_ids.shape))
    topk_ids, topk_weights = topk_ids.contiguous(), topk_weights.contiguous()
    hidden = dense_rows(hidden) if isinstance(hidden, torch.Tensor) else hidden
    result = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    work = topk_ids if config == DIRECT else sort(topk_ids, expert_offset, num_experts, config.max_rows, launch_early=True)
    rows = expert_rows(hidden, experts, work, activations=activations, expert_offset=expert_offset, config=config)
    if isinstance(work, torch.Tensor):
        combine_direct(rows, topk_ids, topk_weights, result, expert_offset, num_experts, launch_early=True)
    else:
        combine(rows, work.row_of_slot, topk_weights, result, launch_early=True)
    return out if result is out else out.copy_(result)
