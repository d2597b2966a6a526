"""Negative controls: what the comparison helpers must reject. An absolute tolerance would pass several of these."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_close_rel, assert_equal_bits

DEFECTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros": torch.zeros_like,
    "sign": torch.neg,
    "half": lambda y: y * 0.5,
    "two per cent": lambda y: y * 1.02,
    "last row zero": lambda y: torch.cat([y[:-1], torch.zeros_like(y[-1:])]),
    "one NaN": lambda y: y.clone().index_put_((torch.tensor(3), torch.tensor(5)), torch.tensor(torch.nan)),
    "one infinity": lambda y: y.clone().index_put_((torch.tensor(3), torch.tensor(5)), torch.tensor(torch.inf)),
    "rows rolled": lambda y: y.roll(1, 0),
    "columns swapped in pairs": lambda y: y.unflatten(-1, (-1, 2)).flip(-1).flatten(-2),
}


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_rejected_at_any_scale(defect: str, scale: float) -> None:
    expected = torch.randn(16, 64) * scale
    assert_close_rel(expected.bfloat16(), expected)  # bf16 rounding alone passes
    with pytest.raises(AssertionError):
        assert_close_rel(DEFECTS[defect](expected), expected)


def test_one_bad_token_among_many_is_rejected() -> None:
    expected = torch.randn(4096, 8)
    actual = expected.clone()
    actual[17] *= 1.05
    with pytest.raises(AssertionError, match="worst token 5"):
        assert_close_rel(actual, expected)


def test_zero_rows_must_be_zero_and_shapes_must_match() -> None:
    expected = torch.zeros(2, 4)
    assert_close_rel(torch.zeros(2, 4), expected)
    with pytest.raises(AssertionError):
        assert_close_rel(torch.full((2, 4), 1e-30), expected)
    with pytest.raises(AssertionError):
        assert_close_rel(torch.zeros(2, 3), expected)


def test_equal_bits_tells_zero_from_minus_zero() -> None:
    nan = torch.tensor([torch.nan, 0.0])
    assert_equal_bits(nan, nan.clone())
    with pytest.raises(AssertionError):
        assert_equal_bits(nan, torch.tensor([torch.nan, -0.0]))
    with pytest.raises(AssertionError):
        assert_equal_bits(nan, nan.double())
