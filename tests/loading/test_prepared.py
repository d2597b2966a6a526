"""`prepare`: layouts there are, and errors for those there are not."""

from __future__ import annotations

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import InputError, UnsupportedError


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
