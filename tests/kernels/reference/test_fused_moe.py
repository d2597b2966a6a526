"""The reference fused MoE against one token and one expert at a time in float64, and what would go unnoticed if the comparison were weaker."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import assert_close_rel, assert_equal_bits, relative_errors

import halfbyte as hb
from halfbyte.experts import DEEPSEEK_V4_SWIGLU, GEGLU, GEGLU_TANH, GPT_OSS_SWIGLU, RELU2, SWIGLU, Activation, ExpertWeights
from halfbyte.formats import e2m1

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, TOKENS = 7, 96, 64, 3, 11


def make_experts(format=hb.NVFP4, activation: Activation = SWIGLU, *, bias: bool = False, input_scales: bool = False, seed: int = 0) -> ExpertWeights:
    """Random experts whose gate and up have clearly different global scales, so that exchanging or dropping one shows."""
    random = torch.Generator().manual_seed(seed)
    halves = activation.halves
    gate_up = torch.randn(EXPERTS, halves, INTERMEDIATE, HIDDEN, generator=random) / 8
    gate_up[:, -1] *= 1.7
    w13 = gate_up.flatten(1, 2)
    w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=random) / 8
    more = {}
    if bias:
        more["w13_bias"] = torch.randn(w13.shape[:2], generator=random).bfloat16()
        more["w2_bias"] = torch.randn(w2.shape[:2], generator=random).bfloat16()
    if input_scales:
        shape = (EXPERTS, 2) if activation.gated else (EXPERTS,)
        more["w13_input_scale"] = torch.rand(shape, generator=random) * 5e-3 + 5e-3
        more["w2_input_scale"] = torch.rand(EXPERTS, generator=random) * 5e-3 + 5e-3
    if format is None:
        return ExpertWeights(w13, w2, activation, **more)
    global_scale = gate_up.abs().amax((2, 3)) / (6 * 448) if format is hb.NVFP4 else None
    if global_scale is not None and halves == 1:
        global_scale = global_scale[:, 0]
    return ExpertWeights(hb.quantize(w13, format, global_scale), hb.quantize(w2, format), activation, **more)


def make_tokens(num_tokens: int = TOKENS, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, HIDDEN, generator=random).to(dtype)
    ids = torch.rand(num_tokens, EXPERTS, generator=random).argsort(dim=1)[:, :TOP_K].int()
    return hidden, ids, torch.rand(num_tokens, TOP_K, generator=random) + 0.1


def naive(hidden, w: ExpertWeights, ids, weights, activations: str = "bf16") -> torch.Tensor:
    """One token, one slot at a time, in float64, with formulas written out again."""
    dense = w.dequantize(torch.float64)
    scale13 = None if w.w13_input_scale is None else w.w13_input_scale.max().item()
    scale2 = None if w.w2_input_scale is None else w.w2_input_scale.max().item()
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for token in range(len(hidden)):
        x = naive_round_trip(hidden[token], activations, scale13)
        for slot in range(ids.shape[1]):
            expert = int(ids[token, slot])
            if not 0 <= expert < w.num_experts:
                continue
            y = dense.w13[expert] @ x
            if w.w13_bias is not None:
                y = y + w.w13_bias[expert].double()
            h = naive_round_trip(naive_activation(y, w.activation).to(hidden.dtype), activations, scale2)
            y = dense.w2[expert] @ h
            if w.w2_bias is not None:
                y = y + w.w2_bias[expert].double()
            out[token] += weights[token, slot].double() * y
    return out


def naive_activation(y: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == RELU2:
        return torch.where(y > 0, y * y, 0.0)
    gate, up = y[: len(y) // 2], y[len(y) // 2 :]
    if activation == GEGLU:
        return gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * up
    if activation == GEGLU_TANH:
        return gate * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    if activation == GPT_OSS_SWIGLU:
        gate, up = torch.clamp(gate, max=7.0), torch.clamp(up, -7.0, 7.0)
        return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
    if activation == DEEPSEEK_V4_SWIGLU:
        gate, up = torch.clamp(gate, max=10.0), torch.clamp(up, -10.0, 10.0)
    return gate / (1 + torch.exp(-gate)) * up


def naive_round_trip(x: torch.Tensor, kind: str, static_scale: float | None) -> torch.Tensor:
    if kind == "bf16":
        return x.double()
    if kind == "fp8":
        scale = x.float().abs().max() / 448
        return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).double()
    out = []
    for block in x.float().split(32 if kind == "mxfp8" else 16):
        amax = block.abs().max().item()
        if kind == "mxfp8":
            scale = 2.0 ** math.ceil(math.log2(amax / 448)) if amax else 1.0
            out.append((block / scale).to(torch.float8_e4m3fn).double() * scale)
            continue
        global_scale = static_scale if static_scale is not None else x.float().abs().max().item() / (6 * 448)
        scale = torch.tensor(min(amax / 6 / global_scale, 448.0)).to(torch.float8_e4m3fn).double().item() * global_scale
        out.append(torch.tensor([0.0 if scale == 0 else nearest_e2m1(value / scale) * scale for value in block.tolist()], dtype=torch.float64))
    return torch.cat(out)


def nearest_e2m1(value: float) -> float:
    return math.copysign(min(e2m1.VALUES[:8], key=lambda grid: abs(abs(value) - grid)), value)


def run(w: ExpertWeights, hidden, ids, weights, **options) -> torch.Tensor:
    return hb.fused_moe(hidden, hb.prepare(w), ids, weights, **options)


@pytest.mark.parametrize("activation", [SWIGLU, GPT_OSS_SWIGLU, DEEPSEEK_V4_SWIGLU, GEGLU, GEGLU_TANH, RELU2], ids=lambda a: f"{a.kind}-{a.limit}")
@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4, None], ids=repr)
def test_equals_the_naive_loop(format, activation):
    w = make_experts(format, activation, bias=True)
    tokens = make_tokens(dtype=torch.float32)
    assert_close_rel(run(w, *tokens), naive(tokens[0] * 1, w, *tokens[1:]), token=1e-5, overall=1e-5)
    tokens = make_tokens(dtype=torch.bfloat16)
    actual = run(w, *tokens)
    assert actual.dtype == torch.bfloat16
    assert_close_rel(actual, naive(tokens[0], w, *tokens[1:]))


@pytest.mark.parametrize("activations", ["fp8", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("input_scales", [False, True])
def test_quantised_activations(activations, input_scales):
    w = make_experts(bias=True, input_scales=input_scales)
    hidden, ids, weights = make_tokens(dtype=torch.float32)
    expected = naive(hidden, w, ids, weights, activations)
    assert_close_rel(run(w, hidden, ids, weights, activations=activations), expected, token=1e-4, overall=1e-4)
    # The comparison sees the kind: unquantised activations are far away from the expectation, though still a sane answer.
    worst, overall = relative_errors(run(w, hidden, ids, weights), expected)
    assert 5e-3 < overall < 0.3 and worst > 1e-2


def one_expert_each(num_tokens: int, expert: int) -> torch.Tensor:
    return torch.full((num_tokens, 1), expert, dtype=torch.int32)


@pytest.mark.parametrize(
    "ids",
    [
        one_expert_each(5, 3),
        torch.tensor([[0, 1, 2], [2, 1, 0], [6, 0, 6]], dtype=torch.int32),  # empty experts, an expert twice
        torch.tensor([[4, 5]]),  # T = 1, int64
        torch.tensor([[-1, 5], [-1, -1], [EXPERTS, 2]], dtype=torch.int32),
        torch.empty(0, 3, dtype=torch.int32),
    ],
    ids=["all-to-one", "empty-and-repeated", "one-token", "absent-ids", "no-token"],
)
def test_degenerate_routing(ids):
    w = make_experts(bias=True)
    hidden = make_tokens(len(ids))[0]
    weights = torch.rand(ids.shape) + 0.1
    weights[ids < 0] = float("nan")  # the weight of an absent expert is never looked at
    out = torch.full_like(hidden, float("nan"))
    assert run(w, hidden, ids, weights, out=out) is out
    assert_close_rel(out, naive(hidden, w, ids, weights))


def test_a_nan_of_one_token_stays_with_it():
    w = make_experts()
    hidden, ids, weights = make_tokens()
    clean = run(w, hidden, ids, weights)
    hidden[4, 7] = float("nan")
    spoilt = run(w, hidden, ids, weights)
    assert spoilt[4].isnan().all()
    others = torch.arange(TOKENS) != 4
    assert_equal_bits(spoilt[others], clean[others])


@pytest.mark.parametrize("activations", ["bf16", "fp8", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("input_scales", [False, True])
def test_partial_sums_of_ranks_add_up(activations, input_scales):
    w = make_experts(bias=True, input_scales=input_scales)
    hidden, ids, weights = make_tokens(dtype=torch.float32)
    whole = run(w, hidden, ids, weights, activations=activations)
    total = torch.zeros_like(whole)
    for first, last in ((0, 1), (1, 1), (1, 5), (5, 7)):  # uneven, one rank without experts
        part = slice(first, last)
        rank = replace(w, w13=w.w13[part], w2=w.w2[part], w13_bias=w.w13_bias[part], w2_bias=w.w2_bias[part], first_expert=first)
        total += run(rank, hidden, ids, weights, activations=activations)
        explicit = run(replace(rank, first_expert=0), hidden, ids, weights, activations=activations, expert_offset=first)
        assert_equal_bits(explicit, run(rank, hidden, ids, weights, activations=activations))
    assert_close_rel(total, whole, token=1e-5, overall=1e-5)


def test_a_token_does_not_depend_on_the_others():
    w = make_experts(input_scales=False)
    hidden, ids, weights = make_tokens()
    for activations in ("bf16", "fp8", "mxfp8", "nvfp4"):
        together = run(w, hidden, ids, weights, activations=activations)
        alone = torch.cat([run(w, hidden[t : t + 1], ids[t : t + 1], weights[t : t + 1], activations=activations) for t in range(TOKENS)])
        assert_close_rel(together, alone, token=5e-3, overall=2e-3)  # fp32 sums of another matmul shape may round a bf16 differently


def test_rounded_once():
    """fp32 partial sums are what the bf16 result is rounded from."""
    w = make_experts()
    hidden, ids, weights = make_tokens()
    partial = run(w, hidden, ids, weights, out=torch.full((TOKENS, HIDDEN), float("nan")))
    assert_equal_bits(partial.bfloat16(), run(w, hidden, ids, weights))
    assert not torch.equal(partial.bfloat16().float(), partial)


def damaged(w: ExpertWeights, **fields: torch.Tensor) -> ExpertWeights:
    """`w` with w13's codes, scales or global scale replaced."""
    return replace(w, w13=replace(w.w13, **fields))


def test_the_comparison_notices_every_known_mistake():
    """Each of these passed some published absolute tolerance; none may pass ours."""
    w = make_experts(input_scales=False)
    hidden, ids, weights = make_tokens()
    expected = naive(hidden, w, ids, weights)
    good = run(w, hidden, ids, weights)
    assert_close_rel(good, expected)
    last_row_zero, one_nan = good.clone(), good.clone()
    last_row_zero[-1] = 0
    one_nan[0, 0] = float("nan")
    codes, scales, global_scale = w.w13.codes, w.w13.scales, w.w13.global_scale
    skipped = codes.clone()
    skipped[..., -8:] = 0
    exchanged = {"codes": codes.roll(INTERMEDIATE, 1), "scales": scales.view(torch.uint8).roll(INTERMEDIATE, 1), "global_scale": global_scale.flip(1)}
    dropped_ids = ids.clone()
    dropped_ids[5, 1] = -1
    mistakes = {
        "zeros": torch.zeros_like(good),
        "sign": -good,
        "half": good / 2,
        "last row zero": last_row_zero,
        "one NaN": one_nan,
        "swapped nibbles": run(damaged(w, codes=(codes << 4) | (codes >> 4)), hidden, ids, weights),
        "scales shifted by a block": run(damaged(w, scales=scales.view(torch.uint8).roll(1, dims=-1)), hidden, ids, weights),
        "skipped last K block": run(damaged(w, codes=skipped), hidden, ids, weights),
        "up has gate's global scale": run(damaged(w, global_scale=global_scale[:, :1].expand(-1, 2).contiguous()), hidden, ids, weights),
        "gate has up's global scale": run(damaged(w, global_scale=global_scale[:, 1:].expand(-1, 2).contiguous()), hidden, ids, weights),
        "gate and up exchanged": run(damaged(w, **exchanged), hidden, ids, weights),
        "dropped expert": run(w, hidden, dropped_ids, weights),
        "weights not applied": run(w, hidden, ids, torch.ones_like(weights)),
    }
    for name, wrong in mistakes.items():
        with pytest.raises(AssertionError):
            assert_close_rel(wrong, expected)
            pytest.fail(f"{name} went unnoticed")


def test_gradients_reach_hidden_and_weights():
    w = make_experts(bias=True)
    hidden, ids, weights = make_tokens(dtype=torch.float32)
    ids[0, 0] = -1
    hidden.requires_grad_()
    weights.requires_grad_()
    direction = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad((run(w, hidden, ids, weights) * direction).sum(), (hidden, weights))
    expected = torch.autograd.grad((naive(hidden, w, ids, weights) * direction).sum(), (hidden, weights))
    for actual, wanted in zip(gradients, expected, strict=True):
        assert_close_rel(actual, wanted, token=1e-4, overall=1e-4)
