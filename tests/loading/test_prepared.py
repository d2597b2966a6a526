"""`prepare`: layouts there are, and errors for those there are not."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_experts import make_experts

import halfbyte as hb
from halfbyte.errors import InputError, UnsupportedError
from halfbyte.loading.prepared import outline

DEMO_MODEL = Path(hb.__file__).parent / "demo_model"


@pytest.fixture
def w():
    return hb.ExpertWeights(hb.quantize(torch.randn(4, 64, 32), hb.NVFP4), hb.quantize(torch.randn(4, 32, 32), hb.NVFP4))


@pytest.mark.parametrize("layout", ["auto", "canonical"])
def test_canonical_is_the_same_storage(w, layout):
    prepared = hb.prepare(w, layout)
    assert prepared.layout == "canonical" and prepared.target == hb.Target.of("cpu") and prepared.policy == "packed"
    assert prepared.reason == (
        "asked for" if layout == "canonical" else "read by kernel 'reference', the first that runs NVFP4 experts with bf16 activations on cpu"
    )
    assert prepared.storage.w13.codes.data_ptr() == w.w13.codes.data_ptr()
    assert prepared.nbytes == w.nbytes
    described = (prepared.format, prepared.activation, prepared.num_experts, prepared.hidden, prepared.intermediate, prepared.device)
    assert described == (hb.NVFP4, w.activation, 4, 32, 32, torch.device("cpu"))


def test_triton_is_a_name_of_the_canonical_layout(w):
    prepared = hb.prepare(w, "triton")
    assert prepared.layout == "canonical" and prepared.storage is w
    assert prepared.reason == "asked for"
    assert hb.fused_moe(torch.randn(2, 32).bfloat16(), prepared, torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)).shape == (2, 32)


@pytest.mark.parametrize("layout", ["trtllm_gen", "cutlass"])
def test_layouts_of_engines_are_packed_anywhere_and_read_by_no_kernel_here(w, layout):
    prepared = hb.prepare(w, layout)
    assert (prepared.layout, prepared.reason) == (layout, "asked for")
    assert (prepared.format, prepared.num_experts, prepared.hidden, prepared.intermediate) == (hb.NVFP4, 4, 32, 32)
    assert prepared.to("cpu").nbytes == prepared.nbytes > w.nbytes
    back = prepared.unprepare()
    assert all(torch.equal(back.tensors[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in w.tensors.items())
    with pytest.raises(UnsupportedError, match=f"reads layout 'canonical', the weights are in '{layout}'"):
        hb.fused_moe(torch.randn(2, 32).bfloat16(), prepared, torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1))


def test_hopper_can_be_packed_anywhere_and_read_by_no_other_kernel(w):
    prepared = hb.prepare(w, "hopper")
    assert prepared.layout == "hopper" and (prepared.num_experts, prepared.hidden, prepared.intermediate) == (4, 32, 32)
    assert prepared.to("cpu").nbytes == prepared.nbytes
    assert torch.equal(prepared.unprepare().w13.codes, w.w13.codes)
    with pytest.raises(UnsupportedError, match="hopper: needs a CUDA GPU, this is a CPU"):
        hb.fused_moe(torch.randn(2, 32).bfloat16(), prepared, torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1))


def test_unknown_names(w):
    with pytest.raises(InputError, match=r"unknown activation format .*'fp4'"):
        hb.prepare(w, activations="fp4")
    with pytest.raises(InputError, match=r"unknown layout .*'blackwell'"):
        hb.prepare(w, "blackwell")
    with pytest.raises(InputError, match=r"unknown residency policy .*'dense'"):
        hb.prepare(w, policy="dense")


def test_calls_compute_on_what_the_experts_were_prepared_for(w):
    hidden, routing = torch.randn(5, 32).bfloat16(), hb.route(torch.randn(5, 4), 2)
    fp8, bf16 = hb.prepare(w, activations="fp8"), hb.prepare(w)
    told = hb.fused_moe(hidden, bf16, *routing, activations="fp8")
    assert torch.equal(hb.fused_moe(hidden, fp8, *routing), told)
    assert torch.equal(hb.fused_moe(hidden, fp8, *routing, activations="bf16"), hb.fused_moe(hidden, bf16, *routing))
    assert not torch.equal(told, hb.fused_moe(hidden, bf16, *routing))
    slots = hb.moe.sort(routing.ids, fp8)
    assert slots.activations == "fp8"
    assert hb.load_prepared(DEMO_MODEL, 0, experts=range(2), activations="fp8").activations == "fp8"
    assert hb.MoE.from_checkpoint(DEMO_MODEL, 0, activations="fp8").experts.activations == "fp8"


@pytest.mark.parametrize(("hidden", "reused"), [(256, {"w13.codes", "w13.scales", "w2.codes"}), (96, set())])
def test_what_was_arranged_in_place_is_said(hidden, reused):
    w = make_experts(2, hidden, 64, hb.NVFP4)
    places = {name: tensor.data_ptr() for name, tensor in w.tensors.items()}
    prepared = hb.prepare(w, "hopper", in_place=True)
    assert set(prepared.reused) == reused
    lies_in = {name for name, place in places.items() for tensor in prepared.storage.tensors.values() if tensor.data_ptr() == place}
    assert lies_in == reused
    assert hb.prepare(make_experts(2, hidden, 64, hb.NVFP4), "hopper").reused == ()


def test_canonical_experts_lie_in_all_of_their_tensors(w):
    assert set(hb.prepare(w).reused) == set(w.tensors) and hb.prepare(w).to("cpu").reused == ()


@pytest.mark.parametrize("layout", ["canonical", "hopper"])
@pytest.mark.parametrize("name", ["w13.scales", "w2.scales", "w13.global_scale", "w2_input_scale"])
def test_checks_that_are_read_together_name_the_layers(layout, name):
    def layer(bad: bool) -> hb.ExpertWeights:
        w = replace(make_experts(2, 256, 64, hb.NVFP4), w2_input_scale=torch.ones(2))
        if bad:
            tensor = w.tensors[name]
            tensor.view(torch.uint8 if tensor.element_size() == 1 else tensor.dtype).flatten()[-1] = 0xFF if tensor.element_size() == 1 else -1.0
        return w

    checks = hb.ScaleChecks()
    hb.prepare(layer(False), layout, scale_check=checks.of("layer 0"))
    checks.wait()
    kept = layer(True)
    before = kept.w13.codes.clone()
    hb.prepare(kept, layout, in_place=True, scale_check=checks.of("layer 1"))  # does not raise
    hb.prepare(layer(False), layout, scale_check=checks.of("layer 2"))
    with pytest.raises(InputError, match=r"^layer 1: scales are negative or not finite"):
        checks.wait()
    assert torch.equal(kept.w13.codes, before)  # nothing was packed
    checks.wait()  # forgotten
    with pytest.raises(InputError, match=re.escape(name.split(".")[0])):
        hb.prepare(kept, layout)
    prepared = hb.prepare(layer(False), layout)
    prepared.update_(layer(True), scale_check=checks.of("layer 3"))
    with pytest.raises(InputError, match="layer 3"):
        checks.wait()


@pytest.mark.parametrize("in_place", [False, True])
def test_an_outline_is_what_prepare_returns_with_other_bytes(w, in_place, monkeypatch):
    monkeypatch.setattr("halfbyte.loading.prepared.wanted_layout", lambda problem, in_place: ("hopper", "a test wants it"))
    before = {name: tensor.clone() for name, tensor in w.tensors.items()}
    outlined = outline(w, activations="fp8", in_place=in_place)
    assert all(torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)) for name, tensor in w.tensors.items())
    prepared = hb.prepare(w, activations="fp8", in_place=in_place)
    for fact in ("layout", "target", "reason", "activations", "reused", "description"):
        assert getattr(outlined, fact) == getattr(prepared, fact), fact
    kinds = [{name: (tensor.dtype, tensor.shape) for name, tensor in p.storage.tensors.items()} for p in (outlined, prepared)]
    assert kinds[0] == kinds[1]


def test_the_outline_of_a_canonical_layout_is_the_weights(w):
    assert outline(w).storage is w
