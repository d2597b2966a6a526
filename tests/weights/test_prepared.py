"""`prepare`: layouts there are, and errors for those there are not."""

from __future__ import annotations

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import InputError, UnsupportedError
from halfbyte.weights.prepared import resolve_layout


@pytest.fixture
def w():
    return hb.ExpertWeights(hb.quantize(torch.randn(4, 64, 32), hb.NVFP4), hb.quantize(torch.randn(4, 32, 32), hb.NVFP4))


@pytest.mark.parametrize("layout", ["auto", "canonical"])
def test_canonical_is_the_same_storage(w, layout):
    prepared = hb.prepare(w, layout)
    assert prepared.layout == "canonical" and prepared.target == hb.Target.of("cpu") and prepared.policy == "packed"
    assert prepared.reason == ("asked for" if layout == "canonical" else "read by every kernel for FP4 experts on cpu")
    assert prepared.experts.w13.codes.data_ptr() == w.w13.codes.data_ptr()
    assert prepared.nbytes == w.nbytes
    described = (prepared.format, prepared.activation, prepared.num_experts, prepared.hidden, prepared.intermediate, prepared.device)
    assert described == (hb.NVFP4, w.activation, 4, 32, 32, torch.device("cpu"))


def test_triton_is_a_name_of_the_canonical_layout(w):
    prepared = hb.prepare(w, "triton")
    assert prepared.layout == "canonical" and prepared.experts is w
    assert prepared.reason == "asked for as 'triton', whose kernels read the checkpoint's own arrangement"
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
    with pytest.raises(UnsupportedError, match=r"hopper: needs compute capability 9\.0, this is cpu"):
        hb.fused_moe(torch.randn(2, 32).bfloat16(), prepared, torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1))


def test_auto_is_what_the_activations_are_fastest_with():
    def auto(activations: str, format: hb.BlockFormat | None = hb.NVFP4, arch: str = "sm_90") -> str:
        return resolve_layout("auto", "packed", format, hb.Target("", arch, 132, 0, 0, 0.0), activations)[0]

    assert (auto("bf16"), auto("nvfp4"), auto("fp8")) == ("hopper", "hopper", "hopper_fp8")
    assert auto("fp8", None) == auto("fp8", arch="sm_80") == "canonical"
    assert resolve_layout("hopper", "packed", hb.MXFP4, hb.Target("", "sm_90", 132, 0, 0, 0.0), "fp8") == ("hopper", "asked for")


def test_unknown_names(w):
    with pytest.raises(InputError, match=r"unknown activation format .*'fp4'"):
        hb.prepare(w, activations="fp4")
    with pytest.raises(InputError, match=r"unknown layout .*'blackwell'"):
        hb.prepare(w, "blackwell")
    with pytest.raises(InputError, match=r"unknown residency policy .*'dense'"):
        hb.prepare(w, policy="dense")
