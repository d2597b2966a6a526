"""The names of projections, and the sizes that stacked shapes mean."""

from __future__ import annotations

import itertools

import pytest

from halfbyte.checkpoint.projections import FUSED, LEAVES, PROJECTION_OF, fused_with, stacked_sizes


def test_every_leaf_is_one_projection() -> None:
    assert PROJECTION_OF == {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
    assert len(PROJECTION_OF) == sum(map(len, LEAVES))


def test_fused_modules() -> None:
    """A leaf is part of one fused matrix only, so that it has one group; gate and up of every naming are fused, down never is."""
    parts = [leaf for leaves in FUSED.values() for leaf in leaves]
    assert len(parts) == len(set(parts))
    for leaves in LEAVES:
        assert fused_with(leaves["gate"]) == fused_with(leaves["up"]) == (leaves["gate"], leaves["up"])
        assert fused_with(leaves["down"]) == (leaves["down"],)


@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 32), (64, 64), (64, 128), (96, 40)])
@pytest.mark.parametrize("transposed", [False, True])
def test_two_stacked_shapes_are_never_ambiguous(hidden: int, intermediate: int, transposed: bool) -> None:
    gate_up, down = (6, 2 * intermediate, hidden), (6, hidden, intermediate)
    if transposed:
        gate_up, down = (6, hidden, 2 * intermediate), (6, intermediate, hidden)
    assert stacked_sizes(gate_up, down) == (6, hidden, intermediate, transposed)


def test_stacked_shapes_that_do_not_belong_together() -> None:
    right = {(4, 16, 32), (4, 32, 8)}
    for gate_up, down in itertools.product([(4, 16, 32), (4, 32, 16), (5, 16, 32), (16, 32), (4, 15, 32)], [(4, 32, 8), (4, 8, 33), (4, 32)]):
        if {gate_up, down} != right:
            assert stacked_sizes(gate_up, down) is None, (gate_up, down)
