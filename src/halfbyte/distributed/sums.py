"""`add_rows`: what all ranks have sent of a row, added up in fp32 in the order of ranks and rounded once, in one pass over memory (Triton, GPUs).

Its definition in plain torch is in `collectives.add_in_order` and `transport.add_codes_in_order`, which CPUs use.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from halfbyte.device import current
from halfbyte.distributed.wire import SUM_HEADER

_HEADER = tl.constexpr(SUM_HEADER)
_BLOCK = 1024


@triton.jit(do_not_specialize=["num_rows", "rank"])
def _add_rows(
    received_ptr, own_ptr, out_ptr, num_rows, rank, WIDTH: tl.constexpr, WORLD: tl.constexpr, CODED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[row] = round(sum over ranks, in their order, of received[rank, row]).

    received    [WORLD, num_rows, WIDTH] floats, or (CODED) uint8 [WORLD, num_rows, SUM_HEADER + WIDTH]: a scale, then e4m3
    own         [num_rows, WIDTH], CODED: what `rank`, this one, adds itself, which was not rounded
    """
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    for peer in tl.static_range(WORLD):
        at = tl.cast(peer, tl.int64) * num_rows + row
        if CODED:
            received = received_ptr + at * (_HEADER + WIDTH)
            is_own = rank + tl.zeros_like(column) == peer
            scale = tl.load(received.to(tl.pointer_type(tl.float32)))
            codes = tl.load((received + _HEADER).to(tl.pointer_type(tl.float8e4nv)) + column, mask=inside & (is_own == 0), other=0.0)
            own = tl.load(own_ptr + tl.cast(row, tl.int64) * WIDTH + column, mask=inside & is_own, other=0.0).to(tl.float32)
            total += tl.where(is_own, own, codes.to(tl.float32) * scale)
        else:
            total += tl.load(received_ptr + at * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.cast(row, tl.int64) * WIDTH + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def add_rows(received: torch.Tensor, out: torch.Tensor, own: torch.Tensor | None = None, rank: int = 0) -> None:
    """Launch it: received [world, rows, width] into out [rows, width]; with `own` they are coded, and width is a multiple of 4.

    All are contiguous, on one GPU.
    """
    if out.numel() == 0:
        return
    rows, width = out.shape
    with current(out.device):
        _add_rows[(rows, triton.cdiv(width, _BLOCK))](
            received, out if own is None else own, out, rows, rank, WIDTH=width, WORLD=len(received), CODED=own is not None, BLOCK=_BLOCK,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
