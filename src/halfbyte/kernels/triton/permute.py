"""Rows sorted by expert, and the work list of the grouped GEMMs, without host synchronisation.

    ids            [T * k] int32: expert of each slot; outside expert_offset .. expert_offset + E: not held here
    token_of_row   [T * k] int32: slot // k of the slots sorted by expert, ascending inside an expert (so the result is the same in every run)
    row_of_slot    [T * k] int32: the row of each slot; -1 where the expert is not held here
    items          [max_items, 4] int32: expert, first row, number of rows, 0; `max_rows` rows at most
    num_items      [1] int32

A program counts the experts of one chunk of slots, and the rank of each slot among those of its expert in the chunk. The program that finishes last
(found by a counter that it sets back to zero) adds up over the chunks and lays out the items; a second launch adds base and rank, unless there is
only one chunk. An expert with more than `max_rows` rows is cut into equal items. Large items come first, where `max_rows` leaves a choice of tiles:
what the persistent GEMMs do last is then small.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc

ITEM_ALIGNMENT = 16  # cut experts at multiples of this many rows
MAX_SINGLE_CHUNK = 512  # slots that one program sorts alone
CHUNK = 256
SCAN_ELEMENTS = 8192  # of the table of counts that the last program adds up at a time


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


@triton.jit
def _experts_of(ids_ptr, slot, num_slots, expert_offset, NUM_EXPERTS: tl.constexpr):
    """The local expert of each slot; NUM_EXPERTS where it is not held here or there is no slot."""
    local = tl.load(ids_ptr + slot, mask=slot < num_slots, other=-1).to(tl.int32) - expert_offset
    return tl.where((slot < num_slots) & (local >= 0) & (local < NUM_EXPERTS), local, NUM_EXPERTS)


@triton.jit
def _place_rows(
    slot, expert, rank, base_ptr, start_ptr, token_of_row_ptr, row_of_slot_ptr, num_slots, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr
):
    held = expert < NUM_EXPERTS
    row = rank + tl.load(base_ptr + expert, mask=held, other=0, cache_modifier=".cg")
    row += tl.load(start_ptr + expert, mask=held, other=0, cache_modifier=".cg")
    tl.store(row_of_slot_ptr + slot, tl.where(held, row, -1), mask=slot < num_slots)
    tl.store(token_of_row_ptr + row, slot // TOP_K, mask=held)


@triton.jit
def _lay_out_items(counts, starts, count_ptr, items_ptr, num_items_ptr, BINS: tl.constexpr, MAX_ROWS: tl.constexpr, ALIGNMENT: tl.constexpr):
    experts = tl.arange(0, BINS)
    size, pieces = _item_size(counts, MAX_ROWS, ALIGNMENT)
    if MAX_ROWS > ALIGNMENT:
        # By size, then by expert: an expert's first item comes after those of all experts before it in this order.
        item = tl.zeros((BINS,), tl.int32)
        order = size * BINS - experts
        for first in range(0, BINS, 32):
            others = first + tl.arange(0, 32)
            other_size, other_pieces = _item_size(tl.load(count_ptr + others, cache_modifier=".cg"), MAX_ROWS, ALIGNMENT)
            item += tl.sum(tl.where((other_size * BINS - others)[:, None] > order[None, :], other_pieces[:, None], 0), axis=0)
    else:
        item = tl.cumsum(pieces) - pieces
    tl.store(num_items_ptr, tl.sum(pieces))
    for piece in range(0, tl.max(pieces)):
        entry = items_ptr + (item + piece) * 4
        is_item = piece < pieces
        tl.store(entry, experts, mask=is_item)
        tl.store(entry + 1, starts + piece * size, mask=is_item)
        tl.store(entry + 2, tl.minimum(size, counts - piece * size), mask=is_item)


@triton.jit
def _item_size(counts, MAX_ROWS: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Rows of an expert's items, and how many there are."""
    pieces = (counts + (MAX_ROWS - 1)) // MAX_ROWS
    size = tl.maximum((counts + pieces - 1) // tl.maximum(pieces, 1), 1)  # an empty expert has no piece, and no division by zero
    if MAX_ROWS > ALIGNMENT:
        size = (size + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT
    return size, (counts + size - 1) // size


@triton.jit(do_not_specialize=["num_slots", "num_chunks", "expert_offset"])
def _count(
    ids_ptr, token_of_row_ptr, row_of_slot_ptr, rank_ptr, base_ptr, count_ptr, start_ptr, items_ptr, num_items_ptr, arrivals_ptr, num_slots,
    num_chunks, expert_offset, NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr, TOP_K: tl.constexpr, MAX_ROWS: tl.constexpr, ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr, SCAN_CHUNKS: tl.constexpr, SINGLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    bins = tl.arange(0, BINS)
    if PDL:
        gdc.gdc_wait()
        gdc.gdc_launch_dependents()
    expert = _experts_of(ids_ptr, slot, num_slots, expert_offset, NUM_EXPERTS)
    rank = tl.zeros((CHUNK,), tl.int32)
    for first in range(0, CHUNK, 32):
        other = chunk * CHUNK + first + tl.arange(0, 32)
        other_expert = _experts_of(ids_ptr, other, num_slots, expert_offset, NUM_EXPERTS)
        rank += tl.sum(((other_expert[:, None] == expert[None, :]) & (other[:, None] < slot[None, :])).to(tl.int32), axis=0)  # within a thread
    if not SINGLE:
        tl.store(rank_ptr + slot, rank, mask=slot < num_slots)
    tl.store(base_ptr + chunk * BINS + bins, tl.histogram(expert, BINS, mask=expert < NUM_EXPERTS))
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel")
    if arrived == num_chunks - 1:
        tl.store(arrivals_ptr, 0)
        total = tl.zeros((BINS,), tl.int32)
        for first in range(0, num_chunks, SCAN_CHUNKS):
            row = first + tl.arange(0, SCAN_CHUNKS)
            entry = base_ptr + row[:, None] * BINS + bins[None, :]
            counts = tl.load(entry, mask=(row < num_chunks)[:, None], other=0, cache_modifier=".cg")
            tl.debug_barrier()  # several threads read an entry; none may read it after another has written it
            tl.store(entry, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=(row < num_chunks)[:, None])
            total += tl.sum(counts, axis=0)
        starts = tl.cumsum(total) - total
        tl.store(count_ptr + bins, total)
        tl.store(start_ptr + bins, starts)
        tl.debug_barrier()
        if SINGLE:
            _place_rows(slot, expert, rank, base_ptr, start_ptr, token_of_row_ptr, row_of_slot_ptr, num_slots, NUM_EXPERTS, TOP_K)
        _lay_out_items(total, starts, count_ptr, items_ptr, num_items_ptr, BINS, MAX_ROWS, ALIGNMENT)


@triton.jit(do_not_specialize=["num_slots", "expert_offset"])
def _place(
    ids_ptr, token_of_row_ptr, row_of_slot_ptr, rank_ptr, base_ptr, start_ptr, num_slots, expert_offset,
    NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr, TOP_K: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    if PDL:
        gdc.gdc_wait()
        gdc.gdc_launch_dependents()
    expert = _experts_of(ids_ptr, slot, num_slots, expert_offset, NUM_EXPERTS)
    rank = tl.load(rank_ptr + slot, mask=slot < num_slots, other=0)
    _place_rows(slot, expert, rank, base_ptr + chunk * BINS, start_ptr, token_of_row_ptr, row_of_slot_ptr, num_slots, NUM_EXPERTS, TOP_K)


def permute(ids: torch.Tensor, expert_offset: int, num_experts: int, max_rows: int, arrivals: torch.Tensor, *, launch_early: bool = False) -> Items:
    """Sort the slots of ids [T, k] by expert.

    Args:
        ids: [T, k] int32 or int64, contiguous, T > 0.
        expert_offset, num_experts: the experts held here.
        max_rows: rows an item has at most.
        arrivals: int32 [1] that is zero, and zero again afterwards; one a stream.
        launch_early: programmatic dependent launch (compute capability 9.0).
    """
    num_slots, top_k, device = ids.numel(), ids.shape[1], ids.device
    single = num_slots <= MAX_SINGLE_CHUNK
    chunk = max(64, triton.next_power_of_2(num_slots)) if single else CHUNK
    num_chunks, bins = triton.cdiv(num_slots, chunk), max(32, triton.next_power_of_2(num_experts))
    aligned = -(-num_slots // 4) * 4  # 16 bytes: Triton compiles anew for pointers that are not
    sizes = [aligned, aligned, 0 if single else aligned, num_chunks * bins, bins, bins, 4]
    buffer = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    token_of_row, row_of_slot, rank, base, count, start, num_items = buffer.split(sizes)
    items = torch.empty((max_items(num_slots, num_experts, max_rows), 4), dtype=torch.int32, device=device)
    options: dict[str, Any] = {"num_warps": 8 if chunk > CHUNK else 4, **({"launch_pdl": True} if launch_early else {})}
    _count[(num_chunks,)](
        ids, token_of_row, row_of_slot, rank, base, count, start, items, num_items, arrivals, num_slots, num_chunks, expert_offset,
        num_experts, bins, top_k, max_rows, ITEM_ALIGNMENT, chunk, 1 if single else max(1, SCAN_ELEMENTS // bins), single, launch_early, **options,
    )  # fmt: skip
    if not single:
        _place[(num_chunks,)](
            ids, token_of_row, row_of_slot, rank, base, start, num_slots, expert_offset, num_experts, bins, top_k, chunk, launch_early, **options
        )
    return Items(token_of_row[:num_slots], row_of_slot[:num_slots], items, num_items[:1])


@triton.jit
def _gather(
    x_ptr, scales_ptr, row_of_slot_ptr, out_ptr, out_scales_ptr,
    TOP_K: tl.constexpr, PAIRS: tl.constexpr, PADDED_PAIRS: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    # Slot 16 s + 8 p + 2 t + e of a block of 64 holds column 16 t + 4 s + 2 p + e: pairs (e) stay together.
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = slot // 32 * 32 + 8 * (slot % 4) + 2 * (slot // 8 % 4) + slot // 4 % 2
    if PDL:
        gdc.gdc_wait()
        gdc.gdc_launch_dependents()
    value = tl.load(x_ptr + token.to(tl.int64) * PAIRS + column, mask=column < PAIRS, other=0)
    for j in tl.static_range(TOP_K):
        first_row = tl.load(row_of_slot_ptr + token * TOP_K + j)
        row = first_row.to(tl.int64) + tl.zeros_like(slot)
        tl.store(out_ptr + row * PADDED_PAIRS + slot, value, mask=(slot < PADDED_PAIRS) & (row >= 0))
        if SCALED:
            tl.store(out_scales_ptr + first_row, tl.load(scales_ptr + token), mask=(first_row >= 0) & (tl.program_id(1) == 0))


def gather(
    hidden: torch.Tensor, rows: Items, top_k: int, padded: int, scales: torch.Tensor | None = None, *, launch_early: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """hidden [T, H] (16-bit, contiguous, H even) to [T * k, padded]: columns in the slot order of the Hopper layout, zeros beyond H.

    `scales` fp32 [T], if given, go with their tokens: fp32 [T * k].
    """
    num_tokens = hidden.shape[0]
    out = torch.empty((num_tokens * top_k, padded), dtype=hidden.dtype, device=hidden.device)
    out_scales = None if scales is None else torch.empty(num_tokens * top_k, dtype=torch.float32, device=hidden.device)
    pairs = padded // 2
    block = min(1024, triton.next_power_of_2(pairs))
    _gather[(num_tokens, triton.cdiv(pairs, block))](
        hidden.view(torch.int32), hidden if scales is None else scales, rows.row_of_slot, out.view(torch.int32),
        hidden if out_scales is None else out_scales, top_k, hidden.shape[1] // 2, pairs, scales is not None, block, launch_early,
        num_warps=4, **({"launch_pdl": True} if launch_early else {}),
    )  # fmt: skip
    return out, out_scales
