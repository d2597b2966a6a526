"""The reference fused MoE against one token and one expert at a time in float64, and what would go unnoticed if the comparison were weaker."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close_rel, relative_errors

import halfbyte as hb
from halfbyte.checkpoint.experts import DEEPSEEK_V4_SWIGLU, GEGLU, GEGLU_TANH, GPT_OSS_SWIGLU, RELU2, SWIGLU, Activation, ExpertWeights
from halfbyte.formats import e2m1

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, TOKENS = 7, 96, 64, 3, 11


def make_experts(format=hb.NVFP4, activation: Activation = SWIGLU, *, bias: bool = False, input_scales: bool = False, seed: int = 0) -> ExpertWeights:
    """Random experts whose gate and up have clearly different global scales, so that exchanging or dropping one shows."""
    random = torch.Generator().manual_seed(seed)
    halves = 2 if activation.gated else 1
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
