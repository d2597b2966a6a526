"""out[t] = round(sum over slots j = 0 .. k-1, in this order, of weight[t, j] * y[row of slot (t, j)]); fp32 accumulation.

    y            [rows, H] bf16 or fp32, or [parts * rows, H]: the sum of so many, in their order
    weights      [T, k] fp32, bf16 or fp16
    out          [T, H]

The row of a slot is `row_of_slot[t * k + j]` (-1: not held here, contributes nothing), or without that tensor the first slot of token t with the same
expert, which is where the direct decode kernel puts it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc


@triton.jit(do_not_specialize=["expert_offset", "num_experts"])
def _combine(
    y_ptr, row_of_slot_ptr, ids_ptr, weights_ptr, out_ptr, expert_offset, num_experts,
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
            expert_id = tl.load(ids_ptr + token * TOP_K + j)
            row = token * TOP_K + j + tl.zeros_like(column)
            for earlier in tl.static_range(j - 1, -1, -1):
                row = tl.where(tl.load(ids_ptr + token * TOP_K + earlier) == expert_id, token * TOP_K + earlier, row)
            local = expert_id.to(tl.int32) - expert_offset + tl.zeros_like(column)
            held = (local >= 0) & (local < num_experts)
        else:
            row = tl.load(row_of_slot_ptr + token * TOP_K + j) + tl.zeros_like(column)
            held = row >= 0
        value = tl.zeros((BLOCK,), tl.float32)
        for part in tl.static_range(PARTS):
            part_row = (row + part * tl.num_programs(0) * TOP_K).to(tl.int64)
            value += tl.load(y_ptr + part_row * HIDDEN + column, mask=inside & held, other=0.0).to(tl.float32)
        weight = tl.load(weights_ptr + token * TOP_K + j).to(tl.float32)
        total += tl.where(held, weight * value, 0.0)
    tl.store(out_ptr + token.to(tl.int64) * HIDDEN + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def block_size(num_tokens: int, hidden: int) -> int:
    """Columns of a program, which is all that the compiled kernel knows of the number of tokens."""
    return min(triton.next_power_of_2(hidden), 2048 if num_tokens >= 512 else 512)


def combine(
    y: torch.Tensor, row_of_slot: torch.Tensor | None, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, expert_offset: int,
    num_experts: int, *, launch_early: bool = False,
) -> torch.Tensor:  # fmt: skip
    """y [parts * T * k, H], ids and weights [T, k] to out [T, H]."""
    num_tokens, top_k = ids.shape
    hidden = out.shape[1]
    block = block_size(num_tokens, hidden)
    _combine[(num_tokens, triton.cdiv(hidden, block))](
        y, ids if row_of_slot is None else row_of_slot, ids, weights, out, expert_offset, num_experts,
        top_k, hidden, y.shape[0] // ids.numel(), row_of_slot is None, block, launch_early,
        num_warps=4, **({"launch_pdl": True} if launch_early else {}),
    )  # fmt: skip
    return out
