"""The slots of expert ids [T, k] sorted by expert, stably, and cut into items of work; `WorkList` says what comes out."""

from __future__ import annotations

import torch

from halfbyte.kernels.problem import Problem, Support, plain_torch
from halfbyte.kernels.work_list import WorkList, max_entries

ITEM_ALIGNMENT = 16  # items of more rows than this are cut at multiples of it


def supports(problem: Problem) -> Support:
    return plain_torch(problem)


def run(
    topk_ids: torch.Tensor, expert_offset: int, num_experts: int, max_rows: int, *, row_start: bool = True, launch_early: bool = False
) -> WorkList:
    """Sort the slots of topk_ids [T, k]; ids outside expert_offset .. expert_offset + num_experts have no row.

    Args:
        max_rows: rows an item has at most: an expert with more is cut into equal items. With more than 16 rows to choose from, experts with larger
            items come first, in quarters of max_rows.
        row_start: here always made; launch_early: of no use here.
    """
    num_slots, device = topk_ids.numel(), topk_ids.device
    local = topk_ids.flatten().long() - expert_offset
    key = torch.where((local >= 0) & (local < num_experts), local, num_experts)
    slot_of_row = key.argsort(stable=True)
    counts = torch.bincount(key, minlength=num_experts + 1)[:num_experts]
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()
    num_rows = int(starts[-1])
    row_of_slot = torch.full((num_slots,), -1, dtype=torch.int32, device=device)
    row_of_slot[slot_of_row[:num_rows]] = torch.arange(num_rows, dtype=torch.int32, device=device)
    entries = torch.zeros((max_entries(num_slots, num_experts, max_rows), 4), dtype=torch.int32, device=device)
    items = _items(counts.tolist(), starts.tolist(), max_rows)
    if items:
        entries[: len(items), :3] = torch.tensor(items, dtype=torch.int32)
    num_entries = torch.tensor([len(items)], dtype=torch.int32, device=device)
    return WorkList((slot_of_row // topk_ids.shape[1]).int(), row_of_slot, entries, num_entries, starts)


def _items(counts: list[int], starts: list[int], max_rows: int) -> list[tuple[int, int, int]]:
    """(expert, first row, rows) of every item."""
    sized = []
    for expert, count in enumerate(counts):
        if not count:
            continue
        size = -(-count // -(-count // max_rows))
        if max_rows > ITEM_ALIGNMENT:
            size = -(-size // ITEM_ALIGNMENT) * ITEM_ALIGNMENT
        quarter = min(-(-4 * size // max_rows), 4) if max_rows > ITEM_ALIGNMENT else 0
        sized.append((-quarter, expert, size))
    return [
        (expert, starts[expert] + first, min(size, counts[expert] - first))
        for _, expert, size in sorted(sized)
        for first in range(0, counts[expert], size)
    ]
