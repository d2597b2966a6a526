"""out[t] = round(sum over slots j = 0 .. k-1, in this order, of weight[t, j] * rows[row of slot (t, j)]); fp32 accumulation.

rows         [T * k, H] bf16 or fp32, or [parts * T * k, H]: the sum of so many, in their order
slots        [T, k]: the row of each slot, -1 where it has none; DIRECT: the expert id of each slot, whose row is at the first slot of the token
             with the same expert, which is where the direct decode kernel puts it
weights      [T, k] fp32, bf16 or fp16
out          [T, H]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc

from halfbyte.kernels.arithmetic import ceil_div, next_power_of_2
from halfbyte.kernels.launch import launch
from halfbyte.kernels.problem import Problem, Support, needs_capability


@triton.jit(do_not_specialize=["expert_offset", "num_experts"])
def _combine(
    rows_ptr, slots_ptr, weights_ptr, out_ptr, expert_offset, num_experts,
    TOP_K: tl.constexpr, HIDDEN: tl.constexpr, PARTS: tl.constexpr, DIRECT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < HIDDEN
    if PDL:
        gdc.gdc_wait()
        gdc.gdc_launch_dependents()
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        if DIRECT:
            expert_id = tl.load(slots_ptr + token * TOP_K + j)
            row = token * TOP_K + j + tl.zeros_like(column)
            for earlier in tl.static_range(j - 1, -1, -1):
                row = tl.where(tl.load(slots_ptr + token * TOP_K + earlier) == expert_id, token * TOP_K + earlier, row)
            local = expert_id.to(tl.int32) - expert_offset + tl.zeros_like(column)
            held = (local >= 0) & (local < num_experts)
        else:
            row = tl.load(slots_ptr + token * TOP_K + j) + tl.zeros_like(column)
            held = row >= 0
        value = tl.zeros((BLOCK,), tl.float32)
        for part in tl.static_range(PARTS):
            part_row = (row + part * tl.num_programs(0) * TOP_K).to(tl.int64)
            value += tl.load(rows_ptr + part_row * HIDDEN + column, mask=inside & held, other=0.0).to(tl.float32)
        weight = tl.load(weights_ptr + token * TOP_K + j).to(tl.float32)
        total += tl.where(held, weight * value, 0.0)
    tl.store(out_ptr + token.to(tl.int64) * HIDDEN + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def block_size(num_tokens: int, hidden: int) -> int:
    """Columns per program, which is all that the compiled kernel knows of the number of tokens."""
    return min(next_power_of_2(hidden), 2048 if num_tokens >= 512 else 512)


def supports(problem: Problem) -> Support:
    return needs_capability(problem.target, 80) or Support.yes("Triton, one launch")


def run(rows: torch.Tensor, row_of_slot: torch.Tensor, topk_weights: torch.Tensor, out: torch.Tensor, *, launch_early: bool = False) -> torch.Tensor:
    """rows [T * k, H], row_of_slot int32 [T * k], topk_weights [T, k] contiguous to out [T, H] contiguous, which is returned."""
    return _launch(rows, row_of_slot, topk_weights, out, 0, 0, is_direct=False, launch_early=launch_early)


def combine_direct(
    rows: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, out: torch.Tensor, expert_offset: int, num_experts: int, *,
    launch_early: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The same of rows [parts * T * k, H] that lie at the first slot of their token with the same expert."""
    return _launch(rows, topk_ids, topk_weights, out, expert_offset, num_experts, is_direct=True, launch_early=launch_early)


def _launch(
    rows: torch.Tensor, slots: torch.Tensor, topk_weights: torch.Tensor, out: torch.Tensor, expert_offset: int, num_experts: int, *,
    is_direct: bool, launch_early: bool,
) -> torch.Tensor:  # fmt: skip
    num_tokens, top_k = topk_weights.shape
    if num_tokens == 0:
        return out
    hidden = out.shape[1]
    block = block_size(num_tokens, hidden)
    launch(
        _combine, (num_tokens, ceil_div(hidden, block), 1),
        (rows, slots, topk_weights, out, expert_offset, num_experts),
        (top_k, hidden, rows.shape[0] // (num_tokens * top_k), is_direct, block, launch_early), num_warps=4, launch_pdl=launch_early,
    )  # fmt: skip
    return out
