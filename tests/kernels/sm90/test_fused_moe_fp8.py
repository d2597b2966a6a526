"""W4A8 on Hopper against the reference on the same quantised operands, on a GPU: every kernel x format x activation x tail, routings, graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from devices import hopper
from helpers import assert_close_rel, assert_equal_bits, relative_errors
from hopper_layers import (
    ACTIVATIONS,
    FP8_LIMITS,
    activation_of,
    check_graph,
    configs,
    in_turns,
    make_experts,
    make_tokens,
    natural,
    rounds_weights,
    rows_at_the_edges,
    workspace,
)

import halfbyte as hb
from halfbyte.experts import GPT_OSS_SWIGLU, ExpertWeights
from halfbyte.formats.fp8_tensor import quantize_fp8
from halfbyte.kernels.reference.activation import activate
from halfbyte.kernels.reference.fused_moe import run as reference
from halfbyte.weights.hopper.layout import FRAGMENT_COLUMN_BF16, FRAGMENT_COLUMN_FP8, padded_size
from halfbyte.weights.hopper.rounding_fp8 import round_to_fp8

pytestmark = hopper

FP8_CONFIGS = ("FP8_TINY", "FP8_WIDE", "FP8_SMALL", "FP8_MEDIUM", "FP8_LARGE", "FP8_HUGE")
TAILS = [(256, 128), (2880, 96), (768, 1408), (320, 2688), (1536, 736), (2880, 2880)]


def fp8_values(w: ExpertWeights) -> ExpertWeights:
    """The experts whose values the fp8 kernels see, dense."""
    return replace(w, w13=round_to_fp8(w.w13), w2=round_to_fp8(w.w2))


def run(
    w: ExpertWeights, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, name: str, offset: int = 0, layout: str = "hopper_fp8"
) -> torch.Tensor:
    from halfbyte.kernels.sm90.fused_moe import run as fused_moe

    out, config = torch.full_like(x, torch.nan), configs()[name.lower()]
    return fused_moe(x, hb.prepare(w, layout).storage, ids, weights, activations="fp8", out=out, config=config, expert_offset=offset)


def check(w: ExpertWeights, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, name: str, offset: int = 0) -> torch.Tensor:
    is_fp8 = name.startswith("FP8")
    out = run(w, x, ids, weights, name, offset)
    expected = reference(x, fp8_values(w) if is_fp8 else w, ids, weights, activations="fp8", expert_offset=offset)
    assert_close_rel(out, expected, **(FP8_LIMITS if is_fp8 else {}))
    return out


def check_products(w: ExpertWeights, tokens: torch.Tensor, ids: torch.Tensor, name: str) -> None:
    """h against x @ w13, and y against the h that the kernels made: both on the same quantised operands."""
    from halfbyte.kernels.sm90 import expert_rows as layer
    from halfbyte.kernels.sm90.quantize_rows import quantize_rows, quantize_tokens

    config = configs()[name.lower()]
    experts = hb.prepare(w, activations="fp8").storage
    items, h, y = workspace(experts, ids, config)
    x, x_scale = quantize_tokens(tokens, items, padded_size(w.hidden))
    layer._prefill_gemm(layer._operand(x, config), x_scale, h, experts, items, config, is_w13=True)
    h_codes, h_scale = quantize_rows(h)
    layer._prefill_gemm(layer._operand(h_codes, config), h_scale, y, experts, items, config, is_w13=False)
    expert_of_row = ids.flatten().sort().values
    seen, expected_h, expected_y = fp8_values(w), torch.empty(ids.numel(), w.intermediate).cuda(), torch.empty(ids.numel(), w.hidden).cuda()
    for expert in range(w.num_experts):
        rows = expert_of_row == expert
        x_rows = natural(x[rows], FRAGMENT_COLUMN_FP8, w.hidden) * x_scale[rows, None]
        h_rows = natural(h_codes[rows], FRAGMENT_COLUMN_FP8, w.intermediate) * h_scale[rows, None]
        bias13, bias2 = (0 if bias is None else bias[expert].double() for bias in (w.w13_bias, w.w2_bias))
        expected_h[rows] = activate(x_rows.double() @ seen.w13[expert].double().T + bias13, w.activation).float()
        expected_y[rows] = (h_rows.double() @ seen.w2[expert].double().T + bias2).float()
    assert_close_rel(natural(h, FRAGMENT_COLUMN_BF16, w.intermediate), expected_h)
    assert_close_rel(y, expected_y)


@pytest.mark.parametrize(("name", "format", "hidden", "intermediate"), in_turns(FP8_CONFIGS, [*TAILS, (7168, 64), (64, 7168)]), ids=str)
def test_each_product_on_every_tail(name: str, format: hb.BlockFormat, hidden: int, intermediate: int) -> None:
    tokens, ids, _ = make_tokens(301, hidden, 5, 3)
    ids[:150] = torch.where(ids[:150] == 4, 3, ids[:150])  # experts of different sizes
    check_products(make_experts(5, hidden, intermediate, format, activation_of(hidden)), tokens, ids, name)


@pytest.mark.parametrize(("name", "format", "hidden", "intermediate"), in_turns([*FP8_CONFIGS, "MICRO", "TINY", "MEDIUM"], TAILS), ids=str)
def test_every_kernel_on_every_tail(name: str, format: hb.BlockFormat, hidden: int, intermediate: int) -> None:
    check(make_experts(5, hidden, intermediate, format, activation_of(hidden)), *make_tokens(201, hidden, 5, 3), name)


@pytest.mark.parametrize(("name", "format", "hidden", "intermediate"), in_turns(configs(), [(1536, 736)]), ids=str)
def test_both_layouts_give_the_same_bits(name: str, format: hb.BlockFormat, hidden: int, intermediate: int) -> None:
    """They hold the same values, in codes that every kernel reads."""
    w = make_experts(9, hidden, intermediate, format, activation_of(hidden))
    for num_tokens in (7,) if name == "direct" else (7, 301):
        call = make_tokens(num_tokens, hidden, 9, 2)
        assert_equal_bits(*(run(w, *call, name, layout=layout) for layout in ("hopper", "hopper_fp8")))


@pytest.mark.parametrize("name", ["FP8_LARGE", "FP8_HUGE"])
@pytest.mark.parametrize(("activation", "format"), list(zip(ACTIVATIONS, [hb.NVFP4, hb.MXFP4] * 3, strict=True)), ids=str)
def test_every_activation(name: str, format: hb.BlockFormat, activation: str) -> None:
    check(make_experts(6, 320, 160, format, ACTIVATIONS[activation]), *make_tokens(90, 320, 6, 2), name)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 8, 9, 64, 129, 500, 2000])
@pytest.mark.parametrize("num_experts", [1, 7, 60])
def test_chosen_kernels_at_every_size(num_tokens: int, num_experts: int) -> None:
    w = make_experts(num_experts, 512, 256, hb.NVFP4)
    x, ids, weights = make_tokens(num_tokens, 512, num_experts, min(4, num_experts))
    prepared = hb.prepare(w, activations="fp8")
    seen = fp8_values(w) if rounds_weights(prepared, ids, "fp8") else w
    assert prepared.layout == "hopper_fp8"
    out = hb.fused_moe(x, prepared, ids, weights, activations="fp8", backend="hopper")
    assert_close_rel(out, reference(x, seen, ids, weights, activations="fp8"), **(FP8_LIMITS if seen is not w else {}))


def test_the_comparison_would_notice_what_can_go_wrong() -> None:
    """Negative controls: each of these, compared as above, is out of bounds."""
    w = make_experts(5, 512, 256, hb.NVFP4)
    x, ids, weights = make_tokens(400, 512, 5, 3)
    out = run(w, x, ids, weights, "FP8_LARGE")
    seen = fp8_values(w)
    wrong = {
        "zeros": torch.zeros_like(out),
        "half": out / 2,
        "sign": -out,
        "bf16 activations": reference(x, seen, ids, weights),
        "exact weights": reference(x, w, ids, weights, activations="fp8"),
        "no last block of K": reference(torch.nn.functional.pad(x[:, :-16], (0, 16)), seen, ids, weights, activations="fp8"),
        "a dropped expert": reference(x, seen, torch.where(ids == 2, -1, ids), weights, activations="fp8"),
        "scales of the next token": reference(x.roll(1, 0), seen, ids, weights, activations="fp8"),
    }
    for name, other in wrong.items():
        token, overall = relative_errors(other, reference(x, seen, ids, weights, activations="fp8"))
        assert token > FP8_LIMITS["token"] or overall > FP8_LIMITS["overall"], name


@pytest.mark.parametrize("name", FP8_CONFIGS)
def test_every_size_of_tile(name: str) -> None:

    sizes = configs()[name.lower()].sizes
    ids = rows_at_the_edges(sizes)
    x, _, _ = make_tokens(len(ids), 256, 1, 1)
    check_products(make_experts(3 * len(sizes), 256, 128, hb.NVFP4), x, ids, name)  # one expert a token: no others even out what rounding h does


@pytest.mark.parametrize("name", FP8_CONFIGS)
def test_odd_routings(name: str) -> None:
    w = make_experts(9, 256, 128, hb.NVFP4)
    x, ids, weights = make_tokens(150, 256, 9, 4)
    check(w, x, torch.full_like(ids, 8), weights, name)  # everything to one expert, four times over
    check(w, x, torch.full_like(ids, -1), weights, name)  # nothing is held here: zeros
    some = ids.clone()
    some[::2, 1], some[1] = -1, 77
    check(w, x, some.long(), weights.bfloat16(), name)
    check(w, x, ids + 100, weights, name, offset=100)
    check(w, x[:1], ids[:1], weights[:1], name)
    skewed = torch.where(torch.rand(ids.shape, device="cuda") < 0.7, 3, ids)
    check(w, x, skewed, weights, name)


def test_tokens_of_any_magnitude() -> None:
    w = make_experts(5, 256, 128, hb.MXFP4)
    x, ids, weights = make_tokens(160, 256, 5, 2)
    x *= torch.logspace(-12, 6, 160, device="cuda").unsqueeze(1)
    x[7] = 0
    check(w, x.bfloat16(), ids, weights, "FP8_LARGE")


def test_biases_and_the_clamp_are_where_they_belong() -> None:
    w = make_experts(5, 256, 128, hb.MXFP4, GPT_OSS_SWIGLU)
    x, ids, weights = make_tokens(160, 256, 5, 2)
    check(w, x * 30, ids, weights, "FP8_LARGE")  # most gates and ups reach the limit
    check(w, x * 0, ids, weights, "FP8_LARGE")  # nothing but biases


def test_rows_whose_scales_span_more_than_e4m3_holds() -> None:
    """Even then the kernel does what `round_to_fp8` says, and stays within its bound of the exact weights."""
    w = make_experts(4, 512, 256, hb.MXFP4)
    w.w13.scales.view(torch.uint8)[:, ::3, 1] -= 17
    x, ids, weights = make_tokens(300, 512, 4, 2)
    out = check(w, x, ids, weights, "FP8_LARGE")
    assert_close_rel(out, reference(x, w, ids, weights, activations="fp8"), **FP8_LIMITS)


@pytest.mark.parametrize("hidden", [64, 2880, 7168])
def test_quantising_kernels_agree_with_the_format_bit_for_bit(hidden: int) -> None:
    from halfbyte.kernels.shared.sort import run as sort
    from halfbyte.kernels.sm90.quantize_rows import quantize_rows, quantize_tokens

    def in_order(codes: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
        wide = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 64))
        return wide.unflatten(1, (-1, 64))[:, :, list(order)].flatten(1)

    x, ids, _ = make_tokens(70, hidden, 9, 3)
    x *= torch.logspace(-20, 20, 70, device="cuda").unsqueeze(1)
    x = x.bfloat16()
    x[3], x[4, 1], x[5, 2], x[6, ::3] = 0, torch.inf, torch.nan, -0.0
    rows = sort(ids, 0, 7, 16)
    held = rows.token_of_row[: int((ids < 7).sum())].long()
    q = quantize_fp8(x)
    codes, scales = q.codes, q.scales
    finite = torch.isfinite(x).all(1)[held]
    expected = in_order(codes.view(torch.uint8), FRAGMENT_COLUMN_FP8)[held]
    h = in_order(x.view(torch.int16), FRAGMENT_COLUMN_BF16).view(torch.bfloat16)[held].contiguous()
    h = torch.nn.functional.pad(h, (0, 0, 0, ids.numel() - len(held)))
    for actual, actual_scales in (quantize_tokens(x, rows, expected.shape[1]), quantize_rows(h)):
        actual, actual_scales = actual[: len(held)], actual_scales[: len(held)]
        assert_equal_bits(actual.view(torch.uint8)[finite], expected[finite])
        assert_equal_bits(actual_scales[finite], scales[held, 0][finite])
        assert (actual.float() * actual_scales.unsqueeze(1))[~finite].isnan().any(1).all()


@pytest.mark.parametrize("num_tokens", [1, 32, 700, 1500, 4000])
def test_a_graph_follows_its_routing_and_repeats_bit_for_bit(num_tokens: int) -> None:
    w = make_experts(32, 512, 256, hb.NVFP4)
    if rounds_weights(hb.prepare(w, activations="fp8"), torch.empty(num_tokens, 4), "fp8"):
        check_graph(w, num_tokens, "fp8", fp8_values(w), **FP8_LIMITS)
    else:
        check_graph(w, num_tokens, "fp8")
