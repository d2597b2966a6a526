"""Which rank holds which experts: a list of expert ids per rank, the same on all ranks. `ExpertMap.placed` makes a rank's map of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch

from halfbyte.arguments import check_integers, check_numbers, check_tensors, check_type
from halfbyte.errors import InputError

Placement = Sequence[Sequence[int]]


def contiguous(num_experts: int, num_ranks: int) -> list[list[int]]:
    """Neighbouring experts together; the first ranks hold one more where the number does not divide.

    >>> contiguous(5, 2)
    [[0, 1, 2], [3, 4]]
    """
    check_integers("contiguous", 1, num_experts=num_experts, num_ranks=num_ranks)
    size, more = divmod(num_experts, num_ranks)
    starts = [rank * size + min(rank, more) for rank in range(num_ranks + 1)]
    return [list(range(first, last)) for first, last in itertools.pairwise(starts)]


def round_robin(num_experts: int, num_ranks: int) -> list[list[int]]:
    """Expert e on rank e % num_ranks.

    >>> round_robin(5, 2)
    [[0, 2, 4], [1, 3]]
    """
    check_integers("round_robin", 1, num_experts=num_experts, num_ranks=num_ranks)
    return [list(range(rank, num_experts, num_ranks)) for rank in range(num_ranks)]


def balanced(counts: Sequence[int] | torch.Tensor, num_ranks: int, num_redundant: int = 0) -> list[list[int]]:
    """Experts by their load, with `num_redundant` copies more than experts: every rank holds equally many, and about the same load.

    The expert with the most tokens per copy gets the next copy. Copies are then placed, the busiest first, on the rank with the least load that has
    room and does not hold that expert yet; tokens take the copies of an expert in turn.

    Args:
        counts: tokens of every expert, measured, as numbers or a tensor [E]; `torch.bincount(ids.flatten())` of all ranks together.

    Raises:
        InputError: copies that do not divide among the ranks, or more copies than every rank holding every expert would need; no counts.

    >>> balanced([90, 10, 10, 10], num_ranks=2, num_redundant=2)
    [[0, 2, 1], [0, 3, 1]]
    """
    where = "balanced"
    if isinstance(counts, torch.Tensor):
        check_tensors(where, counts=counts)
    loads: Any = counts.tolist() if isinstance(counts, torch.Tensor) and not counts.is_meta else counts
    check_type(where, Sequence, counts=loads)
    check_numbers(where, **{f"counts[{expert}]": load for expert, load in enumerate(loads)})
    check_type(where, Integral, num_redundant=num_redundant)
    check_integers(where, 1, num_ranks=num_ranks)
    total = len(loads) + num_redundant
    if total % num_ranks:
        given = f"{len(loads)} experts and {num_redundant} more on {num_ranks} ranks"
        raise InputError("copies do not divide among the ranks", where=where, given=given, needed=f"a multiple of {num_ranks}")
    if num_redundant < 0 or total > len(loads) * num_ranks:
        raise InputError("no use for so many copies", where=where, given=num_redundant, needed=f"0 .. {len(loads) * (num_ranks - 1)}")
    copies = [1] * len(loads)
    for _ in range(num_redundant):
        able = [expert for expert in range(len(loads)) if copies[expert] < num_ranks]
        copies[max(able, key=lambda expert: loads[expert] / copies[expert])] += 1
    load_of_copy = sorted(((loads[e] / copies[e], e) for e in range(len(loads)) for _ in range(copies[e])), key=lambda pair: (-pair[0], pair[1]))
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0.0] * num_ranks
    for tokens, expert in load_of_copy:
        open_ranks = [rank for rank in range(num_ranks) if len(held[rank]) < total // num_ranks]
        others = [rank for rank in open_ranks if expert not in held[rank]]
        rank = min(others or open_ranks, key=lambda r: load[r])
        held[rank].append(expert)
        load[rank] += tokens
    return held
