"""The layer in stages: `sort` the slots by expert, run them through their experts (`expert_rows`), and `combine` a token's rows.

`fused_moe` is the three in one call, and faster for a few tokens, which it does not sort. The stages are for who does something of their own between
them, such as a sum over ranks instead of `combine`. They are plain calls, not traced by torch.compile.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from halfbyte.arguments import check_type, dense_rows
from halfbyte.device import Target, current
from halfbyte.experts import ExpertMap
from halfbyte.formats.activation_formats import ActivationFormat, check_activations
from halfbyte.kernels.problem import Hidden, Problem, Size, layer_problem
from halfbyte.kernels.table import choose
from halfbyte.kernels.work_list import WorkList
from halfbyte.moe.checks import FLOATS, IDS, check_hidden, check_prepared, check_sums, check_tensor, config_of_sorted, resolve_config, resolve_map
from halfbyte.weights import PreparedExperts


@dataclass(frozen=True)
class SortedSlots:
    """The slots of a call sorted by expert, in items that suit the kernel which will run them.

    Attributes:
        work: the rows and items (`kernels.work_list.WorkList`).
        num_tokens, top_k: of the ids.
        activations, config: what `expert_rows` will be asked for, and the configuration whose tiles the items are cut for.
    """

    work: WorkList
    num_tokens: int
    top_k: int
    activations: ActivationFormat
    config: Hashable | None


def sort(
    topk_ids: torch.Tensor,
    experts: PreparedExperts,
    *,
    activations: ActivationFormat | None = None,
    expert_map: ExpertMap | None = None,
    expert_offset: int | None = None,
    config: Hashable | None = None,
) -> SortedSlots:
    """Sort the slots of topk_ids int [T, k] by expert; all arguments as in `fused_moe`.

    Raises:
        InputError, UnsupportedError: as `fused_moe`.

    >>> w = halfbyte.ExpertWeights(torch.randn(4, 64, 32), torch.randn(4, 32, 32))
    >>> sort(torch.tensor([[2, 0], [1, 2]]), halfbyte.prepare(w)).work.row_of_slot.tolist()
    [2, 0, 1, 3]
    """
    check_prepared(experts, "sort")
    activations = experts.activations if activations is None else activations
    check_tensor("topk_ids", topk_ids, IDS, None, None, experts.device, "sort")
    check_activations(activations, "sort")
    expert_map = resolve_map(experts.storage, expert_map, expert_offset, "sort")
    size = Size(*topk_ids.shape)
    problem = layer_problem("expert_rows", experts.storage, experts.target, experts.layout, activations)
    kernel = choose(problem)
    config = resolve_config(config, kernel, problem, size, "sort")
    max_rows = max(1, topk_ids.numel()) if config is None else config.max_rows  # type: ignore[attr-defined]  # every configuration of a layer has it
    if not expert_map.is_slice:
        topk_ids = expert_map.local(topk_ids)
    run = choose(Problem("sort", experts.target)).run
    with current(experts.device):
        work = run(topk_ids.contiguous(), expert_map.first, experts.num_experts, max_rows, row_start=True)
    return SortedSlots(work, *size, activations, config)


def expert_rows(hidden: Hidden, slots: SortedSlots, experts: PreparedExperts) -> torch.Tensor:
    """Run every sorted slot through its expert, w13, activation and w2: rows [T * k, H] bf16 or fp32, not weighted and not summed.

    Row `work.row_of_slot[t * k + j]` is that of slot j of token t; rows of slots whose expert is not held here (-1) are left unset.

    Raises:
        InputError, UnsupportedError: as `fused_moe`.

    >>> w = halfbyte.ExpertWeights(torch.randn(4, 64, 32), torch.randn(4, 32, 32))
    >>> p, ids = halfbyte.prepare(w), torch.tensor([[2, 0], [1, 2]])
    >>> expert_rows(torch.randn(2, 32), sort(ids, p), p).shape
    torch.Size([4, 32])
    """
    check_prepared(experts, "expert_rows")
    check_type("expert_rows", SortedSlots, slots=slots)
    check_hidden(hidden, experts.storage, "expert_rows", slots.num_tokens)
    if slots.num_tokens == 0:
        return torch.empty((0, experts.hidden), dtype=torch.bfloat16, device=experts.device)
    if isinstance(hidden, torch.Tensor):
        hidden = dense_rows(hidden)
    problem = layer_problem("expert_rows", experts.storage, experts.target, experts.layout, slots.activations, hidden)
    kernel = choose(problem)
    config = config_of_sorted(slots.config, kernel, problem, Size(slots.num_tokens, slots.top_k))
    with current(experts.device):
        return kernel.run(hidden, experts.storage, slots.work, activations=slots.activations, config=config)


def combine(rows: torch.Tensor, slots: SortedSlots, topk_weights: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """sum over j of topk_weights[t, j] * row of slot (t, j), in fp32 and in this order: [T, H], by default bf16.

    Args:
        rows: from `expert_rows`.
        topk_weights: [T, k] fp32, bf16 or fp16.
        out: [T, H] contiguous, of any float dtype.

    Raises:
        InputError: a shape, dtype or device does not fit.

    >>> w = halfbyte.ExpertWeights(torch.randn(4, 64, 32), torch.randn(4, 32, 32))
    >>> p, ids = halfbyte.prepare(w), torch.tensor([[2, 0], [1, 2]])
    >>> slots = sort(ids, p)
    >>> combine(expert_rows(torch.randn(2, 32), slots, p), slots, torch.ones(2, 2)).dtype
    torch.bfloat16
    """
    check_type("combine", SortedSlots, slots=slots)
    check_tensor("rows", rows, FLOATS, slots.num_tokens * slots.top_k, None, slots.work.row_of_slot.device, "combine")
    check_tensor("topk_weights", topk_weights, FLOATS, slots.num_tokens, slots.top_k, rows.device, "combine")
    if out is None:
        out = torch.empty((slots.num_tokens, rows.shape[1]), dtype=torch.bfloat16, device=rows.device)
    check_sums(out, slots.num_tokens, rows.shape[1], rows.device, "combine")
    with current(rows.device):
        return choose(Problem("combine", Target.of(rows.device))).run(rows.contiguous(), slots.work.row_of_slot, topk_weights.contiguous(), out)
