"""`WorkList`: the slots of a call sorted by expert, which the stages hand on."""

from __future__ import annotations

from typing import NamedTuple

import torch


class WorkList(NamedTuple):
    """What `sort` finds out about expert ids [T, k]. Row r of the sorted order is one slot, that is one (token, j); rows of an expert ascend by slot.

    Attributes:
        token_of_row: int32 [T * k]; only the rows of experts held here are written.
        row_of_slot: int32 [T * k]; -1 where the expert is not held here.
        entries: int32 [max_entries, 4], items of work: expert, first row, number of rows, 0.
        num_entries: int32 [1]: how many of them there are.
        row_start: int32 [E + 1], expert e has rows row_start[e] .. row_start[e + 1]; None where nobody asked.
    """

    token_of_row: torch.Tensor
    row_of_slot: torch.Tensor
    entries: torch.Tensor
    num_entries: torch.Tensor
    row_start: torch.Tensor | None = None


def max_entries(num_slots: int, num_experts: int, max_rows: int) -> int:
    """How many items there can be: one short item per expert, and full ones.

    >>> max_entries(128, 256, 8), max_entries(4096, 8, 64)
    (128, 72)
    """
    return min(num_slots, num_experts + num_slots // max_rows)
