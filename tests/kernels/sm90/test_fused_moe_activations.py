"""Activations in NVFP4 and MXFP8 on Hopper, on a GPU: every kernel x weights x activations x tail, sizes, routings, graphs, new input scales."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from devices import hopper
from helpers import assert_close_rel, assert_equal_bits, relative_errors
from hopper_layers import ACTIVATIONS, activation_of, configs, in_turns, make_experts, make_tokens, natural, workspace

import halfbyte as hb
from halfbyte.experts import SWIGLU, ExpertWeights
from halfbyte.formats.activation_formats import round_trip
from halfbyte.kernels.reference.activation import activate
from halfbyte.kernels.reference.fused_moe import run as reference
from halfbyte.weights.hopper.layout import FRAGMENT_COLUMN_BF16, padded_size

pytestmark = hopper

# Of the whole layer. h is quantised between the products, and where fp32 sums in another order fall on the other side of a rounding boundary, a code
# of h moves by a whole step: 2^-3 in e4m3, up to 2^-1 in e2m1, where a step of a block's scale, or of the row's, moves all of the block. Each product
# on its own is held to the usual bounds: `test_each_product_on_every_tail`.
LAYER = {"mxfp8": {"token": 3e-2, "overall": 1e-2}, "nvfp4": {"token": 8e-2, "overall": 3e-2}}
CASES = [("nvfp4", False), ("nvfp4", True), ("mxfp8", False)]
CASE_IDS = ["nvfp4", "nvfp4-calibrated", "mxfp8"]
TAILS = [(256, 128), (2880, 96), (768, 1408), (320, 2688), (2880, 2880)]


def calibrated(w: ExpertWeights) -> ExpertWeights:
    """With input scales of experts that differ, the largest about amax / 2 of what comes: some values are cut."""
    random = torch.Generator("cuda").manual_seed(5)
    shape13 = (w.num_experts, 2) if w.activation.gated else (w.num_experts,)
    scale13, scale2 = (torch.rand(shape, generator=random, device="cuda") * 1e-3 for shape in (shape13, (w.num_experts,)))
    return replace(w, w13_input_scale=scale13, w2_input_scale=scale2)


def experts_of(num_experts: int, hidden: int, intermediate: int, format: hb.BlockFormat, static: bool, activation=SWIGLU) -> ExpertWeights:
    w = make_experts(num_experts, hidden, intermediate, format, activation)
    return calibrated(w) if static else w


def run(w: ExpertWeights, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, activations: str, name: str, offset: int = 0) -> torch.Tensor:
    from halfbyte.kernels.sm90.fused_moe import run as fused_moe

    config = None if name == "direct" else configs()[name]
    out = torch.full_like(x, torch.nan)
    return fused_moe(x, hb.prepare(w).storage, ids, weights, activations=activations, out=out, config=config, expert_offset=offset)


def check(w: ExpertWeights, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, activations: str, name: str, offset: int = 0) -> torch.Tensor:
    out = run(w, x, ids, weights, activations, name, offset)
    assert_close_rel(out, reference(x, w, ids, weights, activations=activations, expert_offset=offset), **LAYER[activations])
    return out


@pytest.mark.parametrize(("name", "format", "hidden", "intermediate"), in_turns(["tiny", "large", "huge"], TAILS), ids=str)
@pytest.mark.parametrize(("activations", "static"), CASES, ids=CASE_IDS)
def test_each_product_on_every_tail(name: str, format: hb.BlockFormat, activations: str, static: bool, hidden: int, intermediate: int) -> None:
    """h against q(x) @ w13, and y against q(h) @ w2 of the h that the kernels made, q by the codec: both on the same quantised operands."""
    from halfbyte.kernels.shared.encode_rows import encode_rows
    from halfbyte.kernels.sm90 import expert_rows as layer
    from halfbyte.kernels.sm90.gather import gather

    config = configs()[name]
    w = experts_of(5, hidden, intermediate, format, static, activation_of(hidden))
    tokens, ids, _ = make_tokens(301, hidden, 5, 3)
    ids[:150] = torch.where(ids[:150] == 4, 3, ids[:150])  # experts of different sizes
    experts = hb.prepare(w).storage
    items, h, y = workspace(experts, ids, config)
    codes, scale = encode_rows(tokens, activations, experts.w13_input_scale)
    x, x_scale = gather(codes, items, padded_size(hidden), scale)
    layer._prefill_gemm(layer._operand(x, config), x_scale, h, experts, items, config, is_w13=True)
    h_codes, h_scale = encode_rows(h, activations, experts.w2_input_scale, in_fragment_order=True)
    layer._prefill_gemm(layer._operand(h_codes, config), h_scale, y, experts, items, config, is_w13=False)
    scale13, scale2 = (None if scale is None else scale.max() for scale in (w.w13_input_scale, w.w2_input_scale))
    x_seen, h_seen = (
        round_trip(tokens, activations, scale13)[items.token_of_row.long()],
        round_trip(natural(h, FRAGMENT_COLUMN_BF16, intermediate).bfloat16(), activations, scale2),
    )
    expert_of_row = ids.flatten().sort().values
    w13, w2 = w.w13.dequantize(torch.float32), w.w2.dequantize(torch.float32)
    expected_h, expected_y = torch.empty(ids.numel(), intermediate).cuda(), torch.empty(ids.numel(), hidden).cuda()
    for expert in range(5):
        rows = expert_of_row == expert
        bias13, bias2 = (0 if bias is None else bias[expert].double() for bias in (w.w13_bias, w.w2_bias))
        expected_h[rows] = activate(x_seen[rows].double() @ w13[expert].double().T + bias13, w.activation).float()
        expected_y[rows] = (h_seen[rows].double() @ w2[expert].double().T + bias2).float()
    assert_close_rel(natural(h, FRAGMENT_COLUMN_BF16, intermediate), expected_h)
    assert_close_rel(y, expected_y)


@pytest.mark.parametrize(("name", "format", "hidden", "intermediate"), in_turns(["tiny", "direct", "huge", "decode", "medium"], TAILS), ids=str)
@pytest.mark.parametrize(("activations", "static"), CASES, ids=CASE_IDS)
def test_every_kernel_on_every_tail(name: str, format: hb.BlockFormat, activations: str, static: bool, hidden: int, intermediate: int) -> None:
    w = experts_of(5, hidden, intermediate, format, static, activation_of(hidden))
    check(w, *make_tokens(8 if name == "direct" else 201, hidden, 5, 3), activations, name)


@pytest.mark.parametrize("name", ["direct", "decode", "large"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("activations", "static"), CASES, ids=CASE_IDS)
def test_every_activation(name: str, activation: str, activations: str, static: bool) -> None:
    w = experts_of(6, 320, 160, hb.MXFP4, static, ACTIVATIONS[activation])
    for num_tokens in (1, 7) if name == "direct" else (90,):
        check(w, *make_tokens(num_tokens, 320, 6, 2), activations, name)


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 64, 700])
@pytest.mark.parametrize("num_experts", [1, 7, 60])
@pytest.mark.parametrize("layout", ["hopper", "canonical"])
@pytest.mark.parametrize(("activations", "static"), CASES, ids=CASE_IDS)
def test_chosen_kernels_at_every_size(num_tokens: int, num_experts: int, layout: str, activations: str, static: bool) -> None:
    w = experts_of(num_experts, 512, 256, hb.NVFP4, static)
    x, ids, weights = make_tokens(num_tokens, 512, num_experts, min(4, num_experts))
    prepared = hb.prepare(w, layout)
    for routing in (ids, torch.where(torch.rand(ids.shape, device="cuda") < 0.7, num_experts - 1, ids)):  # the second is skewed
        out = torch.full_like(x, torch.nan)
        backend = "hopper" if layout == "hopper" else "triton"
        hb.fused_moe(x, prepared, routing, weights, activations=activations, out=out, backend=backend)
        assert_close_rel(out, reference(x, w, routing, weights, activations=activations), **LAYER[activations])


@pytest.mark.parametrize(("activations", "static"), CASES, ids=CASE_IDS)
def test_the_comparison_would_notice_what_can_go_wrong(activations: str, static: bool) -> None:
    """Negative controls: each of these, compared as above, is out of bounds."""
    w = experts_of(5, 512, 256, hb.NVFP4, static)
    x, ids, weights = make_tokens(400, 512, 5, 3)
    expected = reference(x, w, ids, weights, activations=activations)
    w13, w2 = w.w13, w.w2
    swapped = replace(w13, codes=(w13.codes << 4) | (w13.codes >> 4))
    shifted = replace(w13, scales=w13.scales.view(torch.uint8).roll(1, -1).view(torch.float8_e4m3fn))
    skipped = replace(w2, codes=w2.codes.clone())
    skipped.codes[..., -8:] = 0
    reordered = torch.tensor(FRAGMENT_COLUMN_BF16).repeat(8) + torch.arange(512) // 64 * 64
    wrong = {
        "zeros": torch.zeros_like(expected),
        "half": expected / 2,
        "sign": -expected,
        "bf16 activations": reference(x, w, ids, weights),
        "columns in another order": reference(x[:, reordered], w, ids, weights, activations=activations),
        "swapped nibbles": reference(x, replace(w, w13=swapped), ids, weights, activations=activations),
        "scales of the next block": reference(x, replace(w, w13=shifted), ids, weights, activations=activations),
        "no last block of K": reference(x, replace(w, w2=skipped), ids, weights, activations=activations),
        "a dropped expert": reference(x, w, torch.where(ids == 2, -1, ids), weights, activations=activations),
        "the next token": reference(x.roll(1, 0), w, ids, weights, activations=activations),
        "last row zero": torch.cat([expected[:-1], torch.zeros_like(expected[:1])]),
    }
    if static:
        wrong["the first expert's input scales"] = reference(
            x,
            replace(w, w13_input_scale=w.w13_input_scale[:1] / 4, w2_input_scale=w.w2_input_scale[:1] / 4),
            ids,
            weights,
            activations=activations,
        )
    for name, other in wrong.items():
        token, overall = relative_errors(other, expected)
        assert token > LAYER[activations]["token"] or overall > LAYER[activations]["overall"], name
    check(w, x, ids, weights, activations, "large")


@pytest.mark.parametrize("name", ["direct", "decode", "small", "large"])
@pytest.mark.parametrize(("activations", "static"), CASES, ids=CASE_IDS)
def test_odd_routings(name: str, activations: str, static: bool) -> None:
    w = experts_of(9, 256, 128, hb.NVFP4, static)
    x, ids, weights = make_tokens(6 if name == "direct" else 150, 256, 9, 4)
    check(w, x, torch.full_like(ids, 8), weights, activations, name)  # everything to one expert, four times over
    check(w, x, torch.full_like(ids, -1), weights, activations, name)  # nothing is held here: zeros
    some = ids.clone()
    some[::2, 1], some[1] = -1, 77
    check(w, x, some.long(), weights.bfloat16(), activations, name)
    check(w, x, ids + 100, weights, activations, name, offset=100)


@pytest.mark.parametrize(("activations", "static"), CASES, ids=CASE_IDS)
def test_ranks_use_one_input_scale_and_their_sums_add_up(activations: str, static: bool) -> None:
    w = experts_of(8, 256, 128, hb.NVFP4, static)
    x, ids, weights = make_tokens(40, 256, 8, 4)
    parts = [check(w[first : first + 4], x, ids, weights, activations, "decode", first).float() for first in (0, 4)]
    assert_close_rel(sum(parts), reference(x, w, ids, weights, activations=activations), **LAYER[activations])


@pytest.mark.parametrize("num_tokens", [1, 32, 700])
@pytest.mark.parametrize("layout", ["hopper", "canonical"])
@pytest.mark.parametrize(("activations", "static"), CASES, ids=CASE_IDS)
def test_a_graph_follows_routing_and_new_input_scales(num_tokens: int, layout: str, activations: str, static: bool) -> None:
    w = experts_of(32, 512, 256, hb.NVFP4, static)
    prepared = hb.prepare(w.to("cuda"), layout)
    x, ids, weights = make_tokens(num_tokens, 512, 32, 4)
    hb.fused_moe(x, prepared, ids, weights, activations=activations)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = hb.fused_moe(x, prepared, ids, weights, activations=activations)
    for seed in range(3):
        for old, fresh in zip((x, ids, weights), make_tokens(num_tokens, 512, 32, 4, seed=seed), strict=True):
            old.copy_(fresh)
        if static:
            w = replace(w, w13_input_scale=w.w13_input_scale * 1.5, w2_input_scale=w.w2_input_scale * 0.75)
            prepared.update_(w)
        out.fill_(torch.nan)
        graph.replay()
        assert_close_rel(out, reference(x, w, ids, weights, activations=activations), **LAYER[activations])
        first = out.clone()
        for _ in range(100):
            out.fill_(torch.nan)
            graph.replay()
            assert_equal_bits(out, first)


def test_tokens_of_any_magnitude() -> None:
    w = make_experts(5, 256, 128, hb.MXFP4)
    x, ids, weights = make_tokens(160, 256, 5, 2)
    x = (x * torch.logspace(-12, 6, 160, device="cuda").unsqueeze(1)).bfloat16()
    x[7] = 0
    for activations in ("nvfp4", "mxfp8"):
        check(w, x, ids, weights, activations, "medium")
