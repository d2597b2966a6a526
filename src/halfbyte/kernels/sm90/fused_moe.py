"""The mixture-of-experts layer on Hopper: FP4 weights, activations in any format. Equation and semantics: `kernels.reference.fused_moe`.

    up to 8 tokens    GEMM1, GEMM2 (both direct), combine
    more              sort, both products (`expert_rows`), combine

Nothing synchronises with the host, and launch shapes depend on the number of tokens alone, so a captured CUDA graph serves any routing. Every sum has
a fixed order: equal inputs give equal bits. Consecutive kernels overlap by programmatic dependent launch, except around prefill GEMMs.

Workspace of a call, from torch's allocator: that of `expert_rows`; direct, with R = T * k rows, 2 R I and 4 R H bytes.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from halfbyte.errors import UnsupportedError
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.kernels.problem import Hidden, Problem, Size
from halfbyte.kernels.shared.combine import block_size, combine_direct
from halfbyte.kernels.shared.combine import run as combine
from halfbyte.kernels.shared.sort import run as sort
from halfbyte.kernels.shared.sort import variant
from halfbyte.kernels.sm90.configs import DIRECT, Config, choose_config, configs, rounds_weights
from halfbyte.kernels.sm90.expert_rows import decode, layout, problem_of, supports
from halfbyte.kernels.sm90.expert_rows import run as expert_rows
from halfbyte.weights.hopper.layout import HopperExperts, padded_size

__all__ = ["choose_config", "configs", "layout", "rounds_weights", "run", "supports", "variants"]  # what the table reads

# The direct kernel divides the columns of w2 among this many programs where there are that many columns. One token takes 22 to 27 % less with
# Mixtral's 14,336 and 10 % less with gpt-oss' 2,880, but 6 % more with DeepSeek-R1's 2,048 (H100 and H200, 2026-11-26).
W2_PARTS = 4
MIN_COLUMNS_OF_PARTS = 2816


def variants(problem: Problem, size: Size, config: Config) -> frozenset[Hashable]:
    """What the kernels around the GEMMs are compiled for, where that depends on the number of tokens."""
    combined = (config == DIRECT, block_size(size.num_tokens, problem.hidden))
    if config == DIRECT:
        return frozenset((combined,))
    return frozenset((combined, (config.max_rows, *variant(size.num_rows, problem.num_experts, config.max_rows))))


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
    hidden = hidden.contiguous() if isinstance(hidden, torch.Tensor) else hidden
    result = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    if config == DIRECT:
        rows = _direct_rows(hidden, experts, topk_ids, activations, expert_offset)
        combine_direct(rows, topk_ids, topk_weights, result, expert_offset, num_experts, launch_early=True)
    else:
        work = sort(topk_ids, expert_offset, num_experts, config.max_rows, launch_early=True)
        rows = expert_rows(hidden, experts, work, activations=activations, config=config)
        combine(rows, work.row_of_slot, topk_weights, result, launch_early=True)
    return out if result is out else out.copy_(result)


def _direct_rows(hidden: Hidden, experts: HopperExperts, topk_ids: torch.Tensor, activations: ActivationFormat, expert_offset: int) -> torch.Tensor:
    """fp32 [parts * T * k, H]: row of slot s at s, the first slot of a token that names the expert; the parts are to be added up."""
    num_rows, device = topk_ids.numel(), experts.device
    h = torch.empty((num_rows, padded_size(experts.intermediate)), dtype=torch.bfloat16, device=device)
    parts = W2_PARTS if experts.intermediate >= MIN_COLUMNS_OF_PARTS else 1
    rows = torch.empty((parts * num_rows, experts.hidden), dtype=torch.float32, device=device)
    decode(hidden, experts, topk_ids, h, rows, activations, expert_offset)
    return rows
