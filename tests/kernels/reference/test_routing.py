"""Routing against plain Python, one token at a time: sorted(), math.exp, no torch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import halfbyte as hb
from halfbyte.errors import InputError
from halfbyte.kernels.reference.routing import METHODS

BIASED = ("deepseek_v3", "minimax2", "deepseek_v4")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / sum(powers) for power in powers]


def best(keys: list[float], count: int, allowed: list[int] | None = None) -> list[int]:
    return sorted(range(len(keys)) if allowed is None else allowed, key=lambda e: (-keys[e], e))[:count]


def naive_route(logits: list[float], k: int, method: str, bias: list[float] | None, groups: int, kept: int, scale: float):
    """ids and weights of one token, from the words of the documentation."""
    bias = bias or [0.0] * len(logits)
    if method == "default":
        scores = softmax(logits)
        ids = best(scores, k)
        return ids, [scale * scores[e] for e in ids]
    if method in ("renormalize", "renormalize_naive"):
        ids = best(logits, k)
        return ids, [scale * weight for weight in softmax([logits[e] for e in ids])]
    if method in ("llama4", "topk_sigmoid"):
        ids = best(logits, k)
        return ids, [scale * sigmoid(logits[e]) for e in ids]
    if method == "topk":
        ids = best(logits, k)
        return ids, [scale * logits[e] for e in ids]
    scores = [math.sqrt(softplus(x)) if method == "deepseek_v4" else sigmoid(x) for x in logits]
    if method == "sigmoid":
        ids = best(scores, k)
        return ids, [scale * scores[e] for e in ids]
    keys = [score + b for score, b in zip(scores, bias, strict=True)]
    size = len(logits) // groups
    group_keys = [sum(sorted(keys[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    allowed = [e for g in best(group_keys, kept) for e in range(g * size, (g + 1) * size)]
    ids = best(keys, k, allowed)
    total = sum(scores[e] for e in ids)
    return ids, [scale * scores[e] / (total + 1e-20) for e in ids]


def ranks_groups_by_rounding(logits: list[float], bias: list[float], groups: int) -> bool:
    """Whether groups have equal sums of different experts, as sigmoid(x) + sigmoid(-x) is 1 for every x: fp32 and float64 may rank them otherwise."""
    size, keys = len(logits) // groups, [sigmoid(x) + b for x, b in zip(logits, bias, strict=True)]
    pairs = [sorted(keys[first : first + size])[-2:] for first in range(0, len(keys), size)]
    return any(a != b and abs(sum(a) - sum(b)) < 1e-5 for a, b in itertools.combinations(pairs, 2))


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_equals_plain_python(method, data):
    # Logits on a coarse grid: many exact ties, and experts never so close that fp32 and Python's float64 disagree about the order.
    groups = data.draw(st.sampled_from([1, 2, 4])) if method == "deepseek_v3" else 1
    num_experts = groups * data.draw(st.integers(1, 6))
    kept = data.draw(st.integers(1, groups))
    k = 1 if method == "llama4" else data.draw(st.integers(1, kept * num_experts // groups))
    grid = st.integers(-12, 12).map(lambda n: n / 4)
    rows = data.draw(st.lists(st.lists(grid, min_size=num_experts, max_size=num_experts), min_size=0, max_size=4))
    bias = None
    if method in BIASED and data.draw(st.booleans()):
        bias = data.draw(st.lists(st.integers(-8, 8).map(lambda n: n / 2), min_size=num_experts, max_size=num_experts))
    assume(method != "deepseek_v3" or not any(ranks_groups_by_rounding(row, bias or [0.0] * num_experts, groups) for row in rows))
    scale = data.draw(st.sampled_from([1.0, 2.5]))
    routing = hb.route(
        torch.tensor(rows, dtype=torch.float32).reshape(len(rows), num_experts),
        k,
        method,
        bias=None if bias is None else torch.tensor(bias),
        num_groups=groups,
        top_k_groups=kept,
        scale=scale,
    )
    assert routing.ids.dtype == torch.int32 and routing.weights.dtype == torch.float32
    assert routing.ids.shape == routing.weights.shape == (len(rows), k)
    for row, ids, weights in zip(rows, routing.ids.tolist(), routing.weights.tolist(), strict=True):
        expected_ids, expected_weights = naive_route(row, k, method, bias, groups, kept, scale)
        assert ids == expected_ids
        assert weights == pytest.approx(expected_weights, rel=1e-5)


def deepseek_logits(num_tokens: int = 400) -> torch.Tensor:
    return torch.randn(num_tokens, 256, generator=torch.Generator().manual_seed(0))


def test_masked_groups_lose_even_against_negative_keys():
    """With every key negative a masked key of 0 would win; -inf does not."""
    logits, bias = deepseek_logits(), torch.full((256,), -3.0)
    groups = {"num_groups": 8, "top_k_groups": 4}
    shifted = hb.route(logits, 8, "deepseek_v3", bias=bias, **groups)
    plain = hb.route(logits, 8, "deepseek_v3", bias=torch.zeros(256), **groups)
    groups_used = [len({expert // 32 for expert in ids}) for ids in shifted.ids.tolist()]
    assert max(groups_used) <= 4
    assert (shifted.ids == plain.ids).float().mean() > 0.99  # a constant bias changes nothing but fp32 rounding


def test_bias_is_read_in_fp32():
    """Negative control: a bias of 5 + noise, rounded to bf16, selects other experts for many tokens."""
    logits = deepseek_logits()
    bias = 5 + 0.02 * torch.randn(256, generator=torch.Generator().manual_seed(1))
    groups = {"num_groups": 8, "top_k_groups": 4}
    exact = hb.route(logits, 8, "deepseek_v3", bias=bias, **groups).ids.sort().values
    rounded = hb.route(logits, 8, "deepseek_v3", bias=bias.bfloat16(), **groups).ids.sort().values
    assert (exact != rounded).any(dim=1).float().mean() > 0.2
    expected = naive_route(logits[0].tolist(), 8, "deepseek_v3", bias.tolist(), 8, 4, 1.0)[0]
    assert sorted(expected) == exact[0].tolist()


def test_bias_selects_but_does_not_weigh():
    routing = hb.route(torch.tensor([[0.0, 1.0, 2.0]]), 1, "minimax2", bias=torch.tensor([9.0, 0.0, 0.0], dtype=torch.bfloat16), scale=2.0)
    assert routing.ids.tolist() == [[0]] and routing.weights.item() == pytest.approx(2.0)


def test_ties_go_to_the_lowest_id_also_when_a_sigmoid_saturates():
    assert hb.route(torch.zeros(2, 300), 5).ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    saturated = torch.tensor([[90.0, 1.0, 95.0]])
    assert hb.route(saturated, 1, "sigmoid").ids.item() == 0  # both scores are 1.0
    assert hb.route(saturated, 1, "topk_sigmoid").ids.item() == 2  # selects by the logit


def test_rounded_logits_change_the_selection():
    """Why logits stay in fp32: bf16 ones are accepted, and select differently for a few per cent of the tokens."""
    logits = deepseek_logits(2000)
    different = (hb.route(logits, 8).ids.sort().values != hb.route(logits.bfloat16(), 8).ids.sort().values).any(dim=1)
    assert 0.005 < different.float().mean() < 0.3


@pytest.mark.parametrize("method", METHODS)
def test_a_nan_logit_stays_visible(method):
    logits = torch.randn(3, 8)
    logits[1, 5] = float("nan")
    routing = hb.route(logits, 1 if method == "llama4" else 2, method)
    assert routing.weights[1].isnan().any() and not routing.weights[[0, 2]].isnan().any()
    assert ((routing.ids >= 0) & (routing.ids < 8)).all()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(2, 4), 2, "softmax"), {}, "unknown routing method .*renormalize"),
        ((torch.zeros(2, 4, dtype=torch.int32), 2), {}, "int32"),
        ((torch.zeros(4), 2), {}, r"\[T, E\]"),
        ((torch.zeros(2, 4), 5), {}, "given 5; needed 1 to 4"),
        ((torch.zeros(2, 4), 0), {}, "given 0"),
        ((torch.zeros(2, 4), 2, "llama4"), {}, "top_k 2; needed 1"),
        ((torch.zeros(2, 4), 2), {"bias": torch.zeros(4)}, "no selection bias"),
        ((torch.zeros(2, 4), 2, "minimax2"), {"bias": torch.zeros(3)}, "does not fit the logits"),
        ((torch.zeros(2, 4), 2), {"num_groups": 2}, "no expert groups"),
        ((torch.zeros(2, 4), 2, "deepseek_v3"), {"num_groups": 3}, "a divisor of 4"),
        ((torch.zeros(2, 4), 3, "deepseek_v3"), {"num_groups": 2, "top_k_groups": 1}, "cannot supply"),
        ((torch.zeros(2, 4), 1, "deepseek_v3"), {"num_groups": 2, "top_k_groups": 3}, "cannot supply"),
    ],
)
def test_wrong_arguments(arguments, options, message):
    with pytest.raises(InputError, match=message):
        hb.route(*arguments, **options)
