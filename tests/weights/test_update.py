"""`PreparedExperts.update_`: new weights at the old addresses, or an error and not one byte written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from devices import on_hopper
from helpers import assert_equal_bits

import halfbyte as hb
from halfbyte.bench.inputs import random_experts
from halfbyte.bench.shapes import MoEShape
from halfbyte.errors import InputError
from halfbyte.experts import GPT_OSS_SWIGLU, SWIGLU
from halfbyte.weights.prepared import LAYOUTS

SHAPE = MoEShape("tiny", 64, 96, 5, 2, SWIGLU, True, hb.NVFP4)


def make(seed: int, format: hb.BlockFormat = hb.NVFP4, shape: MoEShape = SHAPE) -> hb.ExpertWeights:
    return random_experts(shape, format, torch.device("cpu"), seed)


def copied(w: hb.ExpertWeights) -> hb.ExpertWeights:
    return w.with_tensors({name: tensor.clone() for name, tensor in w.tensors.items()})


def addresses(prepared: hb.PreparedExperts) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in prepared.storage.tensors.items()}


def assert_same_tensors(actual: hb.PreparedExperts, expected: hb.PreparedExperts) -> None:
    ours, theirs = actual.storage.tensors, expected.storage.tensors
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert_equal_bits(tensor, theirs[name])


@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_bytes_at_the_old_addresses(layout: str, format: hb.BlockFormat) -> None:
    prepared = hb.prepare(make(1, format), layout)
    before = addresses(prepared)
    for _ in range(2):  # the second time changes nothing
        prepared.update_(make(2, format))
        assert addresses(prepared) == before
        assert_same_tensors(prepared, hb.prepare(make(2, format), layout))


def test_dense_weights() -> None:
    w13, w2 = torch.randn(2, 3, 64, 32), torch.randn(2, 3, 32, 32)
    prepared = hb.prepare(hb.ExpertWeights(w13[0].clone(), w2[0].clone()))
    prepared.update_(hb.ExpertWeights(w13[1], w2[1]))
    assert torch.equal(prepared.storage.w13, w13[1]) and torch.equal(prepared.storage.w2, w2[1])


def test_the_source_is_left_alone_and_shares_nothing() -> None:
    w = make(2)
    kept = copied(w)
    prepared = hb.prepare(make(1))
    prepared.update_(w)
    assert prepared.storage.w13.codes.data_ptr() != w.w13.codes.data_ptr()
    assert all(torch.equal(w.tensors[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in kept.tensors.items())


def without_bias(w: hb.ExpertWeights) -> hb.ExpertWeights:
    return replace(w, w13_bias=None, w2_bias=None)


def with_byte(w: hb.ExpertWeights, side: str, byte: int) -> hb.ExpertWeights:
    getattr(w, side).scales.view(torch.uint8)[-1, -1, -1] = byte
    return w


def with_global_scale(w: hb.ExpertWeights, value: float) -> hb.ExpertWeights:
    w.w2.global_scale[-1] = value
    return w


def with_input_scales(w: hb.ExpertWeights, value: float) -> hb.ExpertWeights:
    return replace(w, w13_input_scale=torch.full((5, 2), value), w2_input_scale=torch.full((5,), value))


def with_swizzled_scales(w: hb.ExpertWeights) -> hb.ExpertWeights:
    return replace(w, w2=w.w2.with_scale_layout("128x4"))


BAD = {
    "format": (lambda: make(2, hb.MXFP4), "differ in format"),
    "activation": (lambda: replace(make(2), activation=GPT_OSS_SWIGLU), "differ in activation"),
    "experts": (lambda: make(2)[:3], "differ in num_experts .*given 3; needed 5"),
    "range": (lambda: replace(make(2), first_expert=5, num_global_experts=10), "differ in first_expert"),
    "hidden": (lambda: make(2, shape=replace(SHAPE, hidden=128)), "differ in hidden"),
    "intermediate": (lambda: make(2, shape=replace(SHAPE, intermediate=64)), "differ in intermediate"),
    "no bias": (lambda: without_bias(make(2)), "differ in .*bias.*given none"),
    "NaN scale": (lambda: with_byte(make(2), "w2", 0x7F), "w2 has block scales that are negative or NaN"),
    "negative scale": (lambda: with_byte(make(2), "w13", 0x81), "w13 has block scales that are negative or NaN"),
    "NaN global scale": (lambda: with_global_scale(make(2), float("nan")), "w2.global_scale is not usable .given 1 of 5 values"),
    "negative global scale": (lambda: with_global_scale(make(2), -1.0), "w2.global_scale is not usable .given 1 of 5 values"),
    "scale layout": (lambda: with_swizzled_scales(make(2)), "block scales in tiles|differ in w2.scales"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in BAD if "scale" in name])
def test_prepare_refuses_the_same_scales(layout: str, name: str) -> None:
    build, message = BAD[name]
    with pytest.raises(InputError, match=message):
        hb.prepare(build(), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BAD)
def test_refused_and_nothing_written(layout: str, name: str) -> None:
    prepared = hb.prepare(make(1), layout)
    build, message = BAD[name]
    with pytest.raises(InputError, match=message):
        prepared.update_(build())
    assert_same_tensors(prepared, hb.prepare(make(1), layout))


@pytest.mark.parametrize("layout", ["canonical", "hopper", "hopper_fp8"])
def test_input_scales_are_replaced_or_missed(layout: str) -> None:
    def scaled(seed: int) -> hb.ExpertWeights:
        return replace(make(seed), w13_input_scale=torch.full((5, 2), 1.0 + seed), w2_input_scale=torch.full((5,), 2.0 + seed))

    prepared = hb.prepare(scaled(1), layout)
    prepared.update_(scaled(2))
    assert prepared.storage.w13_input_scale.unique().item() == 3.0
    assert prepared.unprepare().w2_input_scale.unique().item() == 4.0
    with pytest.raises(InputError, match=r"differ in w13_input_scale .*given none"):
        prepared.update_(make(2))


@pytest.mark.parametrize("value", [0.0, 1e-45])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_scales_that_nothing_is_divided_by(layout: str, value: float) -> None:
    message = "w13_input_scale is (zero, or too small to divide by|not usable) .given 10 of 10 values"
    with pytest.raises(InputError, match=message):
        hb.prepare(with_input_scales(make(1), value), layout)
    prepared = hb.prepare(with_input_scales(make(1), 1.0), layout)
    with pytest.raises(InputError, match=message):
        prepared.update_(with_input_scales(make(2), value))
    assert_same_tensors(prepared, hb.prepare(with_input_scales(make(1), 1.0), layout))


def test_experts_that_calibration_did_not_reach_may_have_an_input_scale_of_zero() -> None:
    w = with_input_scales(make(1), 0.0)
    w.w13_input_scale[3, 0] = w.w2_input_scale[1] = 0.01  # kernels take the largest of the layer
    hidden, routing = torch.randn(3, 64), hb.route(torch.randn(3, 5), 2)
    expected = hb.fused_moe(hidden, hb.prepare(with_input_scales(make(1), 0.01)), *routing, activations="nvfp4")
    assert_equal_bits(hb.fused_moe(hidden, hb.prepare(w), *routing, activations="nvfp4"), expected)


def test_slices_share_storage_and_know_their_place() -> None:
    w = replace(make(1), first_expert=8, num_global_experts=16, w13_input_scale=torch.ones(16, 2), w2_input_scale=torch.ones(16))
    part = w[2:4]
    assert (part.num_experts, part.first_expert, part.num_global_experts, part.w13_input_scale.shape[0]) == (2, 10, 16, 16)
    assert part.w2.codes.data_ptr() == w.w2.codes[2].data_ptr() and torch.equal(part.w13_bias, w.w13_bias[2:4])
    with pytest.raises(InputError, match="contiguous"):
        w[::2]


@on_hopper
@pytest.mark.parametrize("layout", ["canonical", "hopper"])
def test_a_captured_graph_goes_on_with_the_new_weights(layout: str) -> None:
    device = torch.device("cuda")
    shape = replace(SHAPE, hidden=256, intermediate=128)
    prepared, other = (hb.prepare(make(seed, shape=shape).to(device), layout) for seed in (1, 2))
    hidden = torch.randn(4, 256, device=device).bfloat16()
    routing = hb.route(torch.randn(4, 5, device=device), 2)
    expected = {name: hb.fused_moe(hidden, experts, *routing) for name, experts in (("old", prepared), ("new", other))}
    assert not torch.equal(expected["old"], expected["new"])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = hb.fused_moe(hidden, prepared, *routing)
    before = addresses(prepared)
    for seed, name in ((2, "new"), (1, "old")):
        torch.cuda.empty_cache()
        prepared.update_(make(seed, shape=shape))  # from the CPU, as weights that arrive over the network
        torch.cuda.empty_cache()
        assert addresses(prepared) == before
        output.fill_(float("nan"))
        graph.replay()
        assert_equal_bits(output, expected[name])
