"""x[row of slot (t, j)] = hidden[t] for every slot of a token, columns brought into bf16 fragment order: a token is read once and written k times.

    hidden         [T, H] 16-bit, contiguous, H even
    scales         [T] fp32, or None: go with their tokens, to [T * k]
    row_of_slot    [T * k] int32, -1 where the expert is not held here
    x              [T * k, H padded to 64]

Padding is written as zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc

from halfbyte.kernels.arithmetic import ceil_div, next_power_of_2
from halfbyte.kernels.launch import launch
from halfbyte.kernels.work_list import WorkList
from halfbyte.kernels.workspace import scratch
from halfbyte.weights.hopper.fragment_order import pair_at


@triton.jit
def _gather(
    x_ptr, scales_ptr, row_of_slot_ptr, out_ptr, out_scales_ptr,
    TOP_K: tl.constexpr, PAIRS: tl.constexpr, PADDED_PAIRS: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pair = pair_at(position)
    if PDL:
        gdc.gdc_wait()
        gdc.gdc_launch_dependents()
    value = tl.load(x_ptr + token.to(tl.int64) * PAIRS + pair, mask=pair < PAIRS, other=0)
    for j in tl.static_range(TOP_K):
        first_row = tl.load(row_of_slot_ptr + token * TOP_K + j)
        row = first_row.to(tl.int64) + tl.zeros_like(position)
        tl.store(out_ptr + row * PADDED_PAIRS + position, value, mask=(position < PADDED_PAIRS) & (row >= 0))
        if SCALED:
            tl.store(out_scales_ptr + first_row, tl.load(scales_ptr + token), mask=(first_row >= 0) & (tl.program_id(1) == 0))


def gather(
    hidden: torch.Tensor,
    work: WorkList,
    padded: int,
    scales: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    launch_early: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """hidden [T, H] (16-bit, contiguous, H even) to [T * k, padded]: columns in bf16 fragment order (`weights.hopper.layout`), zeros beyond H.

    `scales` fp32 [T], if given, go with their tokens: fp32 [T * k]. `out`: where the rows go.
    """
    num_tokens = hidden.shape[0]
    top_k = work.row_of_slot.shape[0] // num_tokens
    out = scratch((num_tokens * top_k, padded), hidden.dtype, hidden.device) if out is None else out
    out_scales = None if scales is None else scratch((num_tokens * top_k,), torch.float32, hidden.device)
    pairs = padded // 2
    block = min(1024, next_power_of_2(pairs))
    launch(
        _gather, (num_tokens, ceil_div(pairs, block)),
        hidden.view(torch.int32), hidden if scales is None else scales, work.row_of_slot, out.view(torch.int32),
        hidden if out_scales is None else out_scales, top_k, hidden.shape[1] // 2, pairs, scales is not None, block, launch_early,
        num_warps=4, **({"launch_pdl": True} if launch_early else {}),
    )  # fmt: skip
    return out, out_scales
