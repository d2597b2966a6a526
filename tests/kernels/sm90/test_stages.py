"""On Hopper: the layer in stages, hidden states that arrive quantised, and experts placed anywhere; against the reference, on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from devices import hopper
from helpers import assert_close_rel, assert_equal_bits
from hopper_layers import FP8_LIMITS, activation_of, configs, in_turns, make_experts, make_tokens

import halfbyte as hb
from halfbyte.experts import ExpertMap, ExpertWeights
from halfbyte.kernels.reference.fused_moe import run as reference
from halfbyte.moe import combine, expert_rows, sort
from halfbyte.weights.hopper.rounding_fp8 import round_to_fp8

pytestmark = hopper
ARRIVALS = ("nvfp4", "nvfp4 by row", "mxfp4", "fp8", "mxfp8")


def arrived(x: torch.Tensor, format: str) -> hb.QuantTensor | hb.Fp8Tensor:
    if format == "nvfp4 by row":
        return hb.quantize(x, hb.NVFP4, x.float().abs().amax(1) / (6 * 448))
    if format in ("fp8", "mxfp8"):
        return hb.quantize_fp8(x, "token" if format == "fp8" else "mx")
    return hb.quantize(x, hb.NVFP4 if format == "nvfp4" else hb.MXFP4)


@pytest.mark.parametrize("format", ARRIVALS)
@pytest.mark.parametrize("name", ["direct", "decode", "tiny", "large"])
@pytest.mark.parametrize(("hidden", "intermediate"), [(256, 128), (2880, 96), (320, 704)])
def test_hidden_states_that_arrive_quantised(format: str, name: str, hidden: int, intermediate: int) -> None:
    w = make_experts(6, hidden, intermediate, hb.NVFP4, activation_of(hidden))
    tokens, ids, weights = make_tokens(7 if name == "direct" else 150, hidden, 6, 3)
    ids[1, 0], ids[2] = -1, 99
    x = arrived(tokens, format)
    out = torch.full_like(tokens, torch.nan)
    hb.fused_moe(x, hb.prepare(w), ids, weights, out=out, config=configs()[name])
    expected = reference(x, w, ids, weights)
    assert_close_rel(out, expected)
    with pytest.raises(AssertionError):
        assert_close_rel(reference(tokens, w, ids, weights), expected)


@pytest.mark.parametrize(
    ("name", "format", "hidden", "intermediate"), in_turns(["fp8_tiny", "fp8_small", "fp8_huge"], [(64, 192), (320, 192), (2880, 192)]), ids=str
)
def test_e4m3_hidden_states_go_to_fp8_tensor_cores_as_they_are(name: str, format: hb.BlockFormat, hidden: int, intermediate: int) -> None:
    w = make_experts(5, hidden, intermediate, format)
    tokens, ids, weights = make_tokens(201, hidden, 5, 2)
    ids[3] = -1
    prepared, options = hb.prepare(w, activations="fp8"), {"activations": "fp8", "config": configs()[name]}
    before = hb.fused_moe(hb.quantize_fp8(tokens), prepared, ids, weights, **options)
    assert_equal_bits(before, hb.fused_moe(tokens, prepared, ids, weights, **options))
    seen = replace(w, w13=round_to_fp8(w.w13), w2=round_to_fp8(w.w2))
    assert_close_rel(before, reference(tokens, seen, ids, weights, activations="fp8"), **FP8_LIMITS)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("num_tokens", [4, 60, 900])
def test_other_hidden_states_with_fp8_activations_between_the_products(format: str, num_tokens: int) -> None:
    w = make_experts(8, 512, 256, hb.MXFP4)
    tokens, ids, weights = make_tokens(num_tokens, 512, 8, 2)
    x = arrived(tokens, format)
    out = hb.fused_moe(x, hb.prepare(w, activations="fp8"), ids, weights, activations="fp8")
    limits = {"token": 3e-2, "overall": 1e-2}  # a code of h may fall on the other side
    assert_close_rel(out, reference(x, w, ids, weights, activations="fp8"), **limits)
    prepared = hb.prepare(w, activations="fp8")
    slots = sort(ids, prepared)  # for fp8 tensor cores, which these hidden states cannot meet
    assert_close_rel(combine(expert_rows(x, slots, prepared), slots, weights), reference(x, w, ids, weights, activations="fp8"), **limits)


@pytest.mark.parametrize("activations", ["bf16", "fp8"])
@pytest.mark.parametrize("num_tokens", [1, 9, 100, 2000])
def test_the_stages_are_the_layer(num_tokens: int, activations: str) -> None:
    w = make_experts(16, 512, 256, hb.NVFP4)
    tokens, ids, weights = make_tokens(num_tokens, 512, 16, 4)
    ids[0, 1] = -1
    prepared = hb.prepare(w, activations=activations)
    slots = sort(ids, prepared, activations=activations)
    out = combine(expert_rows(tokens, slots, prepared), slots, weights)
    assert_equal_bits(out, hb.fused_moe(tokens, prepared, ids, weights, activations=activations, config=slots.config))
    assert_equal_bits(slots.work.row_start, sort(ids.cpu(), hb.prepare(w.to("cpu"), "canonical")).work.row_start.cuda())


def test_stages_in_a_graph_follow_their_routing() -> None:
    w = make_experts(16, 512, 256, hb.NVFP4)
    prepared, call = hb.prepare(w), make_tokens(120, 512, 16, 4)
    tokens, ids, weights = call

    def layer() -> torch.Tensor:
        slots = sort(ids, prepared)
        return combine(expert_rows(tokens, slots, prepared), slots, weights)

    layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    for seed in range(3):
        for old, fresh in zip(call, make_tokens(120, 512, 16, 4, seed=seed), strict=True):
            old.copy_(fresh)
        out.fill_(torch.nan)
        graph.replay()
        assert_close_rel(out, reference(tokens, w, ids, weights))
        first = out.clone()
        for _ in range(50):
            graph.replay()
            assert_equal_bits(out, first)


@pytest.mark.parametrize("layout", ["hopper", "canonical"])
@pytest.mark.parametrize("num_tokens", [3, 200])
def test_ranks_with_any_placement_and_copies_add_up(num_tokens: int, layout: str) -> None:
    w = make_experts(9, 256, 128, hb.NVFP4)
    tokens, ids, weights = make_tokens(num_tokens, 256, 9, 4)
    ranks, total = [[8, 0, 3, 3], [1, 2, 4, 5, 6, 7, 3]], 0.0
    for rank, held in enumerate(ranks):
        index = torch.tensor(held, device="cuda")
        parts = {name: t.view(torch.uint8)[index].view(t.dtype) if t.itemsize == 1 else t[index] for name, t in w.tensors.items()}
        held_here: ExpertWeights = replace(w.with_tensors(parts), num_global_experts=9)
        placed = ExpertMap.placed(ranks, rank, 9, "cuda")
        total += hb.fused_moe(tokens, hb.prepare(held_here, layout), ids, weights, expert_map=placed, out=torch.empty(num_tokens, 256, device="cuda"))
    assert_close_rel(total, reference(tokens, w, ids, weights))
