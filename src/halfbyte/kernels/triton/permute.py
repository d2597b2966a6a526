"""Rows sorted by expert, and the work list of the grouped GEMMs, in one launch without host synchronisation.

    ids            [T * k] int32: expert of each slot; outside expert_offset .. expert_offset + E: not held here
    slot_of_row    [T * k] int32: slots sorted by expert, ascending inside an expert (so the result is the same in every run)
    token_of_row   [T * k] int32: slot // k
    row_of_slot    [T * k] int32: the inverse; -1 where the expert is not held here
    items          [max_items, 4] int32: expert, first row, number of rows, 0; `max_rows` rows at most
    num_items      [1] int32

Program e counts the slots of expert e and of those before it, then writes the rows of its own: every program reads all ids (L2 serves them), none
waits for another. The program that finishes last lays out the items; it is found by a counter that it sets back to zero. An expert with more than
`max_rows` rows is cut into equal items.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc

ITEM_ALIGNMENT = 16  # cut experts at multiples of this many rows


class Items(NamedTuple):
    """The outputs of `permute`; see the module's docstring."""

    token_of_row: torch.Tensor
    row_of_slot: torch.Tensor
    items: torch.Tensor
    num_items: torch.Tensor


def max_items(num_slots: int, num_experts: int, max_rows: int) -> int:
    """How long the work list can become: one short item an expert, and full ones.

    >>> max_items(128, 256, 8), max_items(4096, 8, 64)
    (128, 72)
    """
    return min(num_slots, num_experts + num_slots // max_rows)


@triton.jit(do_not_specialize=["num_slots", "expert_offset"])
def _permute(
    ids_ptr, token_of_row_ptr, row_of_slot_ptr, count_ptr, start_ptr, items_ptr, num_items_ptr, arrivals_ptr, num_slots, expert_offset,
    NUM_EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, TOP_K: tl.constexpr, MAX_ROWS: tl.constexpr, ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if PDL:
        gdc.gdc_wait()
        gdc.gdc_launch_dependents()
    start = 0
    count = 0
    for first in range(0, num_slots, BLOCK):
        local = tl.load(ids_ptr + first + lane, mask=first + lane < num_slots, other=-1).to(tl.int32) - expert_offset
        held = (local >= 0) & (local < NUM_EXPERTS) & (first + lane < num_slots)
        start += tl.sum((held & (local < expert)).to(tl.int32))
        count += tl.sum((held & (local == expert)).to(tl.int32))
    row = start
    for first in range(0, num_slots, BLOCK):
        slot = first + lane
        local = tl.load(ids_ptr + slot, mask=slot < num_slots, other=-1).to(tl.int32) - expert_offset
        mine = (local == expert) & (slot < num_slots)
        rank = tl.cumsum(mine.to(tl.int32)) - 1
        tl.store(token_of_row_ptr + row + rank, slot // TOP_K, mask=mine)
        tl.store(row_of_slot_ptr + slot, row + rank, mask=mine)
        if expert == 0:
            tl.store(row_of_slot_ptr + slot, tl.full((BLOCK,), -1, tl.int32), mask=((local < 0) | (local >= NUM_EXPERTS)) & (slot < num_slots))
        row += tl.sum(mine.to(tl.int32))
    tl.store(count_ptr + expert, count)
    tl.store(start_ptr + expert, start)
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel")
    if arrived == NUM_EXPERTS - 1:
        tl.store(arrivals_ptr, 0)
        experts = tl.arange(0, EXPERTS_PADDED)
        counts = tl.load(count_ptr + experts, mask=experts < NUM_EXPERTS, other=0, volatile=True)
        starts = tl.load(start_ptr + experts, mask=experts < NUM_EXPERTS, other=0, volatile=True)
        pieces = (counts + (MAX_ROWS - 1)) // MAX_ROWS
        size = tl.maximum((counts + pieces - 1) // tl.maximum(pieces, 1), 1)  # an empty expert has no piece, and no division by zero
        if MAX_ROWS > ALIGNMENT:
            size = (size + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT
        pieces = (counts + size - 1) // size
        item = tl.cumsum(pieces) - pieces
        tl.store(num_items_ptr, tl.sum(pieces))
        for piece in range(0, tl.max(pieces)):
            entry = items_ptr + (item + piece) * 4
            is_item = piece < pieces
            tl.store(entry, experts, mask=is_item)
            tl.store(entry + 1, starts + piece * size, mask=is_item)
            tl.store(entry + 2, tl.minimum(size, counts - piece * size), mask=is_item)


def permute(ids: torch.Tensor, expert_offset: int, num_experts: int, max_rows: int, arrivals: torch.Tensor, *, launch_early: bool = False) -> Items:
    """Sort the slots of ids [T, k] by expert.

    Args:
        ids: [T, k] int32 or int64, contiguous, T > 0.
        expert_offset, num_experts: the experts held here.
        max_rows: rows an item has at most.
        arrivals: int32 [1] that is zero, and zero again afterwards; one a stream.
        launch_early: programmatic dependent launch (compute capability 9.0).
    """
    num_slots, device = ids.numel(), ids.device
    buffer = torch.empty(2 * num_slots + 2 * num_experts + 1, dtype=torch.int32, device=device)
    token_of_row, row_of_slot, count, start, num_items = buffer.split([num_slots, num_slots, num_experts, num_experts, 1])
    items = torch.empty((max_items(num_slots, num_experts, max_rows), 4), dtype=torch.int32, device=device)
    block = min(4096, max(256, triton.next_power_of_2(num_slots)))
    _permute[(num_experts,)](
        ids, token_of_row, row_of_slot, count, start, items, num_items, arrivals, num_slots, expert_offset,
        num_experts, triton.next_power_of_2(num_experts), ids.shape[1], max_rows, ITEM_ALIGNMENT, block, launch_early,
        num_warps=4 if block <= 1024 else 8, **({"launch_pdl": True} if launch_early else {}),
    )  # fmt: skip
    return Items(token_of_row, row_of_slot, items, num_items)


@triton.jit
def _gather(
    x_ptr, scales_ptr, token_of_row_ptr, num_items_ptr, items_ptr, out_ptr, out_scales_ptr,
    PAIRS: tl.constexpr, PADDED_PAIRS: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if PDL:
        gdc.gdc_wait()
        gdc.gdc_launch_dependents()
    last = tl.load(num_items_ptr) - 1
    num_rows = 0
    if last >= 0:
        num_rows = tl.load(items_ptr + last * 4 + 1) + tl.load(items_ptr + last * 4 + 2)
    if row < num_rows:
        token = tl.load(token_of_row_ptr + row).to(tl.int64)
        for first in tl.static_range(0, PADDED_PAIRS, BLOCK):
            # Slot 16 s + 8 p + 2 t + e of a block of 64 holds column 16 t + 4 s + 2 p + e: pairs (e) stay together.
            slot = first + tl.arange(0, BLOCK)
            column = slot // 32 * 32 + 8 * (slot % 4) + 2 * (slot // 8 % 4) + slot // 4 % 2
            value = tl.load(x_ptr + token * PAIRS + column, mask=column < PAIRS, other=0)
            tl.store(out_ptr + row.to(tl.int64) * PADDED_PAIRS + slot, value, mask=slot < PADDED_PAIRS)
        if SCALED:
            tl.store(out_scales_ptr + row, tl.load(scales_ptr + token))


def gather(
    hidden: torch.Tensor, rows: Items, num_rows: int, padded: int, scales: torch.Tensor | None = None, *, launch_early: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """hidden [T, H] (16-bit, contiguous, H even) to [num_rows, padded]: columns in the slot order of the Hopper layout, zeros beyond H.

    `scales` fp32 [T], if given, go with their tokens: fp32 [num_rows].
    """
    out = torch.empty((num_rows, padded), dtype=hidden.dtype, device=hidden.device)
    out_scales = None if scales is None else torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    pairs = padded // 2
    block = min(1024, triton.next_power_of_2(pairs))
    _gather[(num_rows,)](
        hidden.view(torch.int32), hidden if scales is None else scales, rows.token_of_row, rows.num_items, rows.items, out.view(torch.int32),
        hidden if out_scales is None else out_scales, hidden.shape[1] // 2, pairs, scales is not None, block, launch_early,
        num_warps=4, **({"launch_pdl": True} if launch_early else {}),
    )  # fmt: skip
    return out, out_scales
