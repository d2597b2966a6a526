"""Rows sorted by expert, and the work list of the grouped GEMMs, without host synchronisation.

    topk_ids       [T * k] int32: expert of each slot; outside expert_offset .. expert_offset + E: not held here
    `WorkList`     what comes out, equal to that of `kernels.reference.sort` and so the same in every run

Few slots take one launch, in which every program reads all of them: one for each expert, and one that lays out the items. Many take three: `_count`
finds the rank of every slot among those of its expert in a chunk of slots, `_sum_before` adds up the chunks, and `_place` adds the two. No atomics,
no program waits for another. An expert with more than `max_rows` rows is cut into equal items. Where there is a choice of tiles, larger items come
first: what the persistent GEMMs do last is then small.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc

from halfbyte.kernels.arithmetic import ceil_div, next_power_of_2
from halfbyte.kernels.launch import launch
from halfbyte.kernels.problem import Problem, Support, needs_capability
from halfbyte.kernels.work_list import WorkList, max_entries
from halfbyte.kernels.workspace import aligned, kept_in_workspace, scratch

ITEM_ALIGNMENT = 16  # cut experts at multiples of this many rows
MAX_SINGLE_SLOTS = 8192
MAX_REGISTERS = 128  # per thread of `_sort`: two programs per multiprocessor, so that 256 experts need not take turns
CHUNK = 256  # slots that are ranked among one another
EXPERTS_SUMMED, CHUNKS_SUMMED = 16, 128  # by a program of `_sum_before` at a time
MAX_ORDERED_ITEMS = 65535  # of each of the four sizes that items are ordered by: their counts share a word of 64 bits


def variant(num_slots: int, num_experts: int, max_rows: int) -> tuple[bool, bool, int]:
    """Which of the compiled kernels sort these slots: ordered items or not, in a single launch or three, and the slots of a program.

    >>> variant(8, 256, 8), variant(65536, 256, 192)
    ((False, True, 256), (True, False, 256))
    """
    ordered = max_rows > ITEM_ALIGNMENT and max_entries(num_slots, num_experts, max_rows) <= MAX_ORDERED_ITEMS
    single = num_slots <= MAX_SINGLE_SLOTS
    return ordered, single, max(256, next_power_of_2(num_slots)) if single else CHUNK


@triton.jit
def _local_experts(ids_ptr, slot, num_slots, expert_offset):
    """Expert of each slot, counted from the first held here; -2^31 where there is no slot."""
    local = tl.load(ids_ptr + slot, mask=slot < num_slots, other=0).to(tl.int32) - expert_offset
    return tl.where(slot < num_slots, local, -2147483648)


@triton.jit
def _items_of(counts, MAX_ROWS: tl.constexpr, ALIGNMENT: tl.constexpr, ORDERED: tl.constexpr):
    """Of every expert: how many items, of how many rows, and the place of the first: experts in order, or first those with larger items (ORDERED, in
    quarters of MAX_ROWS)."""
    pieces = (counts + (MAX_ROWS - 1)) // MAX_ROWS
    size = tl.maximum((counts + pieces - 1) // tl.maximum(pieces, 1), 1)  # an empty expert has no piece, and no division by zero
    if MAX_ROWS > ALIGNMENT:
        size = (size + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT
    pieces = (counts + size - 1) // size
    if ORDERED:
        shift = (4 - tl.minimum((size * 4 + (MAX_ROWS - 1)) // MAX_ROWS, 4)).to(tl.int64) * 16
        packed = pieces.to(tl.int64) << shift
        before = ((tl.cumsum(packed) - packed) >> shift) & 0xFFFF
        larger = tl.sum(packed) & ((1 << shift) - 1)
        item = (before + (larger & 0xFFFF) + (larger >> 16 & 0xFFFF) + (larger >> 32 & 0xFFFF)).to(tl.int32)
    else:
        item = tl.cumsum(pieces) - pieces
    return pieces, size, item


@triton.jit
def _store_items(
    items_ptr, num_items_ptr, experts, counts, start, MAX_ROWS: tl.constexpr, ALIGNMENT: tl.constexpr, ORDERED: tl.constexpr
):  # fmt: skip
    """The work list of experts with `counts` rows from row `start` on."""
    pieces, size, item = _items_of(counts, MAX_ROWS, ALIGNMENT, ORDERED)
    tl.store(num_items_ptr, tl.sum(pieces))
    for piece in range(0, tl.max(pieces)):
        entry = items_ptr + (item + piece) * 4
        is_item = piece < pieces
        tl.store(entry, experts, mask=is_item)
        tl.store(entry + 1, start + piece * size, mask=is_item)
        tl.store(entry + 2, tl.minimum(size, counts - piece * size), mask=is_item)


@triton.jit
def _store_row_start(row_start_ptr, experts, ends, NUM_EXPERTS: tl.constexpr):
    tl.store(row_start_ptr, 0)
    tl.store(row_start_ptr + 1 + experts, ends, mask=experts < NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_slots", "expert_offset"])
def _sort(
    ids_ptr, token_of_row_ptr, row_of_slot_ptr, items_ptr, num_items_ptr, row_start_ptr, num_slots, expert_offset,
    NUM_EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, TOP_K: tl.constexpr, MAX_ROWS: tl.constexpr, ALIGNMENT: tl.constexpr,
    ORDERED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """At most BLOCK slots. The first program lays out the items, each of the others finds the rows of an expert."""
    expert = tl.program_id(0) - 1
    slot = tl.arange(0, BLOCK)
    if PDL:
        gdc.gdc_wait()
        gdc.gdc_launch_dependents()
    local = _local_experts(ids_ptr, slot, num_slots, expert_offset)
    if expert < 0:
        held = (local >= 0) & (local < NUM_EXPERTS)
        counts = tl.histogram(local, EXPERTS_PADDED, mask=held)
        start = tl.cumsum(counts) - counts
        _store_items(items_ptr, num_items_ptr, tl.arange(0, EXPERTS_PADDED), counts, start, MAX_ROWS, ALIGNMENT, ORDERED)
        if row_start_ptr is not None:
            _store_row_start(row_start_ptr, tl.arange(0, EXPERTS_PADDED), start + counts, NUM_EXPERTS)
        tl.store(row_of_slot_ptr + slot, tl.full((BLOCK,), -1, tl.int32), mask=(slot < num_slots) & ~held)
    else:
        first_row = tl.sum(((local >= 0) & (local < expert)).to(tl.int32))
        mine = local == expert
        row = first_row + tl.cumsum(mine.to(tl.int32)) - 1
        tl.store(token_of_row_ptr + row, slot // TOP_K, mask=mine)
        tl.store(row_of_slot_ptr + slot, row, mask=mine)


@triton.jit(do_not_specialize=["num_slots", "expert_offset"])
def _count(
    ids_ptr, rank_ptr, counts_ptr, num_slots, expert_offset,
    NUM_EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of every slot of a chunk: how many before it in the chunk have its expert. Of every expert: how many slots of the chunk."""
    begin = tl.program_id(0) * CHUNK
    lane = tl.arange(0, CHUNK)
    if PDL:
        gdc.gdc_wait()
        gdc.gdc_launch_dependents()
    local = _local_experts(ids_ptr, begin + lane, num_slots, expert_offset)
    rank = tl.zeros((CHUNK,), tl.int32)
    for first in tl.static_range(0, CHUNK, 64):
        other = first + tl.arange(0, 64)
        other_local = _local_experts(ids_ptr, begin + other, num_slots, expert_offset)
        rank += tl.sum(((local[:, None] == other_local[None, :]) & (other[None, :] < lane[:, None])).to(tl.int32), 1)
    tl.store(rank_ptr + begin + lane, rank, mask=begin + lane < num_slots)
    counts = tl.histogram(local, EXPERTS_PADDED, mask=(local >= 0) & (local < NUM_EXPERTS))
    tl.store(counts_ptr + tl.program_id(0) * EXPERTS_PADDED + tl.arange(0, EXPERTS_PADDED), counts)


@triton.jit(do_not_specialize=["num_chunks"])
def _sum_before(counts_ptr, totals_ptr, num_chunks, EXPERTS_PADDED: tl.constexpr, EXPERTS: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr):
    """The counts of a chunk become those of all chunks before it."""
    experts = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    if PDL:
        gdc.gdc_wait()
        gdc.gdc_launch_dependents()
    before = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, num_chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)[:, None]
        entry = counts_ptr + chunk * EXPERTS_PADDED + experts[None, :]
        counts = tl.load(entry, mask=chunk < num_chunks, other=0)
        tl.store(entry, before[None, :] + tl.cumsum(counts, 0) - counts, mask=chunk < num_chunks)
        before += tl.sum(counts, 0)
    tl.store(totals_ptr + experts, before)


@triton.jit(do_not_specialize=["num_slots", "expert_offset"])
def _place(
    ids_ptr, counts_before_ptr, totals_ptr, token_of_row_ptr, row_of_slot_ptr, items_ptr, num_items_ptr, row_start_ptr, num_slots, expert_offset,
    NUM_EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, TOP_K: tl.constexpr, MAX_ROWS: tl.constexpr, ALIGNMENT: tl.constexpr,
    ORDERED: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Ranks, in row_of_slot, to rows: a program a chunk. The first one lays out the items."""
    chunk = tl.program_id(0)
    experts = tl.arange(0, EXPERTS_PADDED)
    if PDL:
        gdc.gdc_wait()
        gdc.gdc_launch_dependents()
    counts = tl.load(totals_ptr + experts)
    counts_before = tl.load(counts_before_ptr + chunk * EXPERTS_PADDED + experts)
    start = tl.cumsum(counts) - counts
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    local = _local_experts(ids_ptr, slot, num_slots, expert_offset)
    held = (local >= 0) & (local < NUM_EXPERTS)
    rank = tl.load(row_of_slot_ptr + slot, mask=slot < num_slots, other=0)
    row = rank + tl.gather(start + counts_before, tl.where(held, local, 0), 0)
    tl.store(row_of_slot_ptr + slot, tl.where(held, row, -1), mask=slot < num_slots)
    tl.store(token_of_row_ptr + row, slot // TOP_K, mask=held)
    if chunk == 0:
        _store_items(items_ptr, num_items_ptr, experts, counts, start, MAX_ROWS, ALIGNMENT, ORDERED)
        if row_start_ptr is not None:
            _store_row_start(row_start_ptr, experts, start + counts, NUM_EXPERTS)


def workspace_nbytes(num_slots: int, num_experts: int, max_rows: int) -> int:
    """What `run` takes of a workspace."""
    _, single, block = variant(num_slots, num_experts, max_rows)
    sizes = [4 * num_slots, 4 * num_slots, 4, 16 * max_entries(num_slots, num_experts, max_rows)]
    if not single:
        padded = max(32, next_power_of_2(num_experts))
        sizes += [4 * ceil_div(num_slots, block) * padded, 4 * padded]
    return sum(map(aligned, sizes))


def supports(problem: Problem) -> Support:
    return needs_capability(problem.target, 80) or Support.yes("Triton, one launch or three")


def run(
    topk_ids: torch.Tensor, expert_offset: int, num_experts: int, max_rows: int, *, row_start: bool = False, launch_early: bool = False
) -> WorkList:
    """Sort the slots of topk_ids [T, k] by expert.

    Args:
        topk_ids: [T, k] int32 or int64, contiguous, T > 0.
        expert_offset, num_experts: the experts held here.
        max_rows: rows an item has at most.
        row_start: whether the work list gets one.
        launch_early: programmatic dependent launch (compute capability 9.0).
    """
    num_slots, device = topk_ids.numel(), topk_ids.device
    ordered, single, block = variant(num_slots, num_experts, max_rows)
    padded, chunks = max(32, next_power_of_2(num_experts)), 0 if single else ceil_div(num_slots, block)
    work, counts, totals = _memory(num_slots, max_entries(num_slots, num_experts, max_rows), chunks, padded, device)
    starts = torch.empty(num_experts + 1, dtype=torch.int32, device=device) if row_start else None
    outputs = (work.token_of_row, work.row_of_slot, work.entries, work.num_entries, starts)
    layout = (num_experts, padded, topk_ids.shape[1], max_rows, ITEM_ALIGNMENT, ordered, block, launch_early)
    if single:
        launch(
            _sort, (1 + num_experts, 1, 1),
            (topk_ids, *outputs, num_slots, expert_offset), layout,
            num_warps=4 if block <= 2048 else 8, maxnreg=MAX_REGISTERS, launch_pdl=launch_early,
        )  # fmt: skip
    else:
        launch(
            _count, (chunks, 1, 1), (topk_ids, work.row_of_slot, counts, num_slots, expert_offset), (num_experts, padded, block, launch_early),
            num_warps=8, launch_pdl=launch_early,
        )  # fmt: skip
        launch(
            _sum_before, (padded // EXPERTS_SUMMED, 1, 1), (counts, totals, chunks), (padded, EXPERTS_SUMMED, CHUNKS_SUMMED, launch_early),
            num_warps=4, launch_pdl=launch_early,
        )  # fmt: skip
        launch(
            _place, (chunks, 1, 1),
            (topk_ids, counts, totals, *outputs, num_slots, expert_offset), layout,
            num_warps=4, launch_pdl=launch_early,
        )  # fmt: skip
    return work._replace(row_start=starts) if row_start else work


@kept_in_workspace
def _memory(
    num_slots: int, num_entries: int, chunks: int, padded: int, device: torch.device
) -> tuple[WorkList, torch.Tensor | None, torch.Tensor | None]:
    """The work list, and what three launches need beside it."""
    sizes: tuple[tuple[int, ...], ...] = ((num_slots,), (num_slots,), (num_entries, 4), (1,))
    work = WorkList(*(scratch(size, torch.int32, device) for size in sizes))
    if chunks == 0:
        return work, None, None
    return work, scratch((chunks, padded), torch.int32, device), scratch((padded,), torch.int32, device)
