"""x[row of slot (t, j)] = hidden[t] for every slot of a token, columns brought into bf16 fragment order: a token is read once and written k times.

    hidden         [T, H] 16-bit, contiguous, H even; or quantised, and then decoded on the way (`shared.decode_rows`): no wide copy of it is made
    scales         [T] fp32, or None: go with their tokens, to [T * k]; of quantised hidden states, what `decode_rows` calls row_scale
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
from halfbyte.kernels.problem import Hidden
from halfbyte.kernels.quantizers.blocks import pack
from halfbyte.kernels.shared.decode_rows import CodedRows, decode_pairs
from halfbyte.kernels.work_list import WorkList
from halfbyte.kernels.workspace import scratch
from halfbyte.weights.hopper.fragment_order import pair_at

INTERPRETED = triton.knobs.runtime.interpret


@triton.jit(do_not_specialize=["tokens_per_scale"])
def _gather(
    x_ptr, block_scales_ptr, scales_ptr, row_of_slot_ptr, out_ptr, out_scales_ptr, tokens_per_scale,
    TOP_K: tl.constexpr, PAIRS: tl.constexpr, PADDED_PAIRS: tl.constexpr, BITS: tl.constexpr, SCALE_BLOCK: tl.constexpr, E8M0: tl.constexpr,
    SCALED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """BITS 16: pairs of x are moved as they are. 8 and 4: what `decode_pairs` is given."""
    token = tl.program_id(0)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pair = pair_at(position)
    if PDL:
        gdc.gdc_wait()
        gdc.gdc_launch_dependents()
    if BITS == 16:
        value = tl.load(x_ptr.to(tl.pointer_type(tl.int32)) + token.to(tl.int64) * PAIRS + pair, mask=pair < PAIRS, other=0)
    else:
        low, high = decode_pairs(x_ptr, block_scales_ptr, token.to(tl.int64), pair, pair < PAIRS, PAIRS, BITS, SCALE_BLOCK, E8M0)
        value = tl.where(pair < PAIRS, pack(low, high, True, ASM), 0)
    for j in tl.static_range(TOP_K):
        first_row = tl.load(row_of_slot_ptr + token * TOP_K + j)
        row = first_row.to(tl.int64) + tl.zeros_like(position)
        tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + row * PADDED_PAIRS + position, value, mask=(position < PADDED_PAIRS) & (row >= 0))
        if SCALED:
            scale = tl.load(scales_ptr + token // tokens_per_scale)
            tl.store(out_scales_ptr + first_row, scale, mask=(first_row >= 0) & (tl.program_id(1) == 0))


def gather(
    hidden: Hidden,
    work: WorkList,
    padded: int,
    scales: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    launch_early: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """hidden [T, H] (16-bit, contiguous, H even; or quantised) to [T * k, padded]: columns in bf16 fragment order (`weights.hopper.layout`), zeros
    beyond H.

    `scales` fp32 [T], if given, go with their tokens: fp32 [T * k]; quantised hidden states have their own. `out`: where the rows go.
    """
    if isinstance(hidden, torch.Tensor):
        dtype, given = hidden.dtype, CodedRows(hidden, hidden, scales, 1, hidden.shape[1] // 2, 16, 0, True)
    else:
        dtype, given = torch.bfloat16, CodedRows.of(hidden)
    num_tokens, num_rows = given.codes.shape[0], work.row_of_slot.shape[0]
    out = scratch((num_rows, padded), dtype, given.codes.device) if out is None else out
    out_scales = None if given.row_scale is None else scratch((num_rows,), torch.float32, given.codes.device)
    pairs = padded // 2
    block = min(1024, next_power_of_2(pairs))
    launch(
        _gather, (num_tokens, ceil_div(pairs, block), 1),
        (given.codes, given.scales, given.scales if given.row_scale is None else given.row_scale, work.row_of_slot, out,
         out if out_scales is None else out_scales, given.rows_per_scale),
        (num_rows // num_tokens, given.pairs, pairs, given.bits, given.block, given.e8m0, out_scales is not None, block, launch_early,
         not INTERPRETED),
        num_warps=4, launch_pdl=launch_early,
    )  # fmt: skip
    return out, out_scales
