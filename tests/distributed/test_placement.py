"""Placements: every expert somewhere, ranks of one size, and the loads as even as claimed."""

from __future__ import annotations

import pytest
import torch

from halfbyte.distributed.placement import balanced, contiguous, round_robin
from halfbyte.errors import InputError
from halfbyte.experts import ExpertMap


@pytest.mark.parametrize("num_experts", [4, 7, 256])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("place", [contiguous, round_robin])
def test_every_expert_is_on_one_rank_and_ranks_differ_by_one_at_most(place, num_experts: int, num_ranks: int) -> None:
    held = place(num_experts, num_ranks)
    assert sorted(expert for rank in held for expert in rank) == list(range(num_experts))
    assert max(map(len, held)) - min(map(len, held)) <= 1


def loads(counts: list[int], held: list[list[int]]) -> list[float]:
    copies = [sum(rank.count(expert) for rank in held) for expert in range(len(counts))]
    return [sum(counts[expert] / copies[expert] for expert in rank) for rank in held]


@pytest.mark.parametrize(("num_ranks", "num_redundant"), [(2, 0), (4, 0), (4, 8), (8, 16)])
def test_balanced_spreads_the_load(num_ranks: int, num_redundant: int) -> None:
    counts = (10000 / torch.arange(1, 65)).int().tolist()  # Zipf
    held = balanced(counts, num_ranks, num_redundant)
    assert {len(rank) for rank in held} == {(64 + num_redundant) // num_ranks} and {e for rank in held for e in rank} == set(range(64))
    assert all(len(set(rank)) == len(rank) for rank in held)  # a second copy on one rank would be of no use
    plain = loads(counts, contiguous(64, num_ranks))
    assert max(loads(counts, held)) < 0.8 * max(plain)
    if num_redundant:
        assert max(loads(counts, held)) < 1.05 * sum(counts) / num_ranks
    for rank in range(num_ranks):
        assert int((ExpertMap.placed(held, rank, 64).local(torch.arange(64).unsqueeze(0)) >= 0).sum()) > 0


def test_what_does_not_divide_is_refused() -> None:
    for arguments, message in (((([1] * 7), 2, 0), "multiple of 2"), (([1] * 4, 2, 6), r"needed 0 \.\. 4"), (([1] * 4, 2, -2), r"needed 0 \.\. 4")):
        with pytest.raises(InputError, match=message):
            balanced(*arguments)
