"""`Activation`: its kinds. `ExpertMap`: slices, placements and copies, and that every slot is somebody's exactly once."""

from __future__ import annotations

import random

import pytest
import torch

from halfbyte.errors import InputError
from halfbyte.experts import Activation, ExpertMap


@pytest.mark.parametrize("kind", ["silu", "tanh", "gelu", "SwiGLU", "", None])
def test_an_activation_of_a_kind_that_there_is(kind: str) -> None:
    with pytest.raises(InputError, match=r"unknown activation .*needed swiglu, geglu, geglu_tanh, relu2"):
        Activation(kind)
    assert [Activation(known).gated for known in ("swiglu", "geglu", "geglu_tanh", "relu2")] == [True, True, True, False]


def test_a_slice_counts_from_its_first_expert() -> None:
    assert ExpertMap(4).is_slice and ExpertMap(4).local(torch.tensor([[3, 4, 6, -1]])).tolist() == [[-1, 0, 2, -5]]


@pytest.mark.parametrize("seed", range(20))
def test_every_slot_is_run_by_exactly_one_copy_in_turn(seed: int) -> None:
    rng = random.Random(seed)
    num_global, num_ranks = rng.randrange(1, 40), rng.randrange(1, 6)
    held = [[rank for rank in range(num_ranks) if rng.random() < 0.4] or [rng.randrange(num_ranks)] for _ in range(num_global)]
    ranks = [[expert for expert in range(num_global) for other in held[expert] if other == rank] for rank in range(num_ranks)]
    for experts in ranks:
        rng.shuffle(experts)
    num_tokens = rng.randrange(0, 50)
    ids = torch.tensor([[rng.randrange(-1, num_global + 1) for _ in range(3)] for _ in range(num_tokens)], dtype=torch.int32).view(-1, 3)
    served: dict[tuple[int, int], list[int]] = {}
    for rank in range(num_ranks):
        local = ExpertMap.placed(ranks, rank, num_global).local(ids)
        assert local.shape == ids.shape
        for t, j in (local >= 0).nonzero().tolist():
            assert ranks[rank][local[t, j]] == ids[t, j]
            served.setdefault((t, j), []).append(rank)
    for t in range(num_tokens):
        for j in range(3):
            expert = int(ids[t, j])
            is_expert = 0 <= expert < num_global
            assert served.get((t, j), []) == ([held[expert][t % len(held[expert])]] if is_expert else [])


def test_two_copies_on_one_rank_share_its_tokens() -> None:
    both = ExpertMap.placed([[7, 3, 3], [0, 1, 2, 4, 5, 6]], 0, 8)
    assert both.local(torch.full((4, 1), 3)).flatten().tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("ranks", "rank", "message"),
    [
        ([[0, 1], [2]], 2, "no such rank .*given 2; needed 0 .. 1"),
        ([[0, 3], [1, 2]], 0, "no such expert .*3 on rank 0; needed 0 .. 2"),
        ([[0], [1]], 0, r"experts that no rank holds .*given \[2\]"),
    ],
)
def test_bad_placements(ranks: list[list[int]], rank: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ExpertMap.placed(ranks, rank, 3)
