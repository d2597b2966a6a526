"""Wrong arguments of `fused_moe`: one clear error each, before anything is computed."""

from __future__ import annotations

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import InputError
from halfbyte.moe import functional

HIDDEN = 48


@pytest.fixture
def good():
    w = hb.ExpertWeights(hb.quantize(torch.randn(4, 64, HIDDEN), hb.NVFP4), hb.quantize(torch.randn(4, HIDDEN, 32), hb.NVFP4))
    return {
        "hidden": torch.randn(5, HIDDEN, dtype=torch.bfloat16),
        "experts": hb.prepare(w),
        "topk_ids": torch.zeros(5, 2, dtype=torch.int32),
        "topk_weights": torch.ones(5, 2),
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": [1.0]}, "hidden is no tensor .*given list; needed torch.Tensor, QuantTensor or Fp8Tensor"),
        ({"topk_ids": hb.Routing(torch.zeros(5, 2), torch.ones(5, 2))}, "topk_ids is no tensor .*given Routing"),
        ({"topk_weights": None}, "topk_weights is no tensor .*given NoneType"),
        ({"hidden": torch.randn(5, 40)}, r"hidden does not fit .*\(5, 40\) on cpu; .*\[any, 48\]"),
        ({"hidden": torch.randn(5, 1, HIDDEN)}, r"hidden does not fit .*\(5, 1, 48\)"),
        ({"hidden": torch.zeros(5, HIDDEN, dtype=torch.int8)}, "given torch.int8"),
        ({"hidden": torch.randn(5, HIDDEN, device="meta")}, "on meta"),
        ({"hidden": torch.randn(4, HIDDEN)}, r"topk_ids does not fit .*\[4, any\]"),
        ({"topk_ids": torch.zeros(5, 2)}, "topk_ids does not fit .*given torch.float32"),
        ({"topk_weights": torch.ones(5, 3)}, r"topk_weights does not fit .*\(5, 3\).*\[5, 2\]"),
        ({"topk_weights": torch.ones(5, 2, dtype=torch.int32)}, "topk_weights does not fit"),
        ({"out": torch.empty(5, HIDDEN, dtype=torch.float16)}, "out does not fit .*needed torch.bfloat16 or torch.float32"),
        ({"out": torch.empty(6, HIDDEN, dtype=torch.bfloat16)}, "out does not fit"),
        ({"activations": "int8"}, "unknown activation format .*'bf16' or 'fp8' or 'nvfp4' or 'mxfp8'"),
        ({"activations": "mxfp8"}, "hidden 48, intermediate 32; needed multiples of 32"),
        ({"backend": "magic"}, "'reference'"),
    ],
)
def test_wrong_argument(good, wrong, message):
    hb.fused_moe(**good)
    with pytest.raises(InputError, match=message):
        hb.fused_moe(**{**good, **wrong})


def test_unprepared_experts(good):
    with pytest.raises(InputError, match=r"given ExpertWeights; needed PreparedExperts\). Call halfbyte.prepare"):
        hb.fused_moe(**{**good, "experts": good["experts"].storage})


def test_accepts_what_hosts_pass(good):
    """int64 ids and bf16 weights, as transformers has them, give the same result."""
    weights = torch.rand(5, 2).bfloat16()
    expected = hb.fused_moe(**{**good, "topk_weights": weights.float()})
    assert torch.equal(hb.fused_moe(**{**good, "topk_ids": good["topk_ids"].long(), "topk_weights": weights}), expected)


@pytest.mark.parametrize("wrong", [4, -2])
def test_ids_are_checked_when_asked(good, wrong):
    good["topk_ids"][3, 1] = wrong
    hb.fused_moe(**good)  # an expert of another rank, for all that it knows
    with pytest.raises(InputError, match=rf"ids name no expert \(given \[{wrong}\]; needed 0 .. 3, or -1 for none\)"):
        hb.fused_moe(**good, check_ids=True)
    good["topk_ids"][3, 1] = -1
    hb.fused_moe(**good, check_ids=True)


def test_ids_of_other_ranks_are_of_the_layer(good):
    """Also where the weights were made without the others: the map or the offset says how many there are."""
    placed = hb.ExpertMap.placed([[4, 5], [0, 1, 2, 3]], rank=1, num_global=6)
    for here, last in (({"expert_map": placed}, 5), ({"expert_offset": 4}, 7)):
        good["topk_ids"][3, 1] = last
        hb.fused_moe(**good, **here, check_ids=True)
        good["topk_ids"][3, 1] = last + 1
        with pytest.raises(InputError, match=f"ids name no expert .*needed 0 .. {last}, or -1"):
            hb.fused_moe(**good, **here, check_ids=True)


@pytest.mark.parametrize("name", ["hidden", "topk_weights"])
def test_a_gradient_that_a_kernel_does_not_have_is_an_error_when_it_is_asked_for(good, name, monkeypatch):
    expected = hb.fused_moe(**good)
    good[name].requires_grad_()
    hb.fused_moe(**good).sum().backward()
    assert good[name].grad.norm() > 0  # plain torch has one
    run = functional.run
    monkeypatch.setattr(functional, "run", torch.no_grad()(run))  # as kernels are
    result = hb.fused_moe(**good)
    assert torch.equal(result, expected) and result.requires_grad
    with pytest.raises(InputError, match="fused_moe: this kernel has no gradient"):
        result.sum().backward()
    with torch.no_grad():
        assert not hb.fused_moe(**good).requires_grad


def test_an_out_that_cannot_be_written_to_is_refused() -> None:
    w = hb.ExpertWeights(torch.randn(2, 64, 32), torch.randn(2, 32, 32))
    p, x, ids, weights = hb.prepare(w), torch.randn(3, 32), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    for out in (torch.zeros(1, 32).expand(3, 32), torch.zeros(3, 32, requires_grad=True)):
        with pytest.raises(InputError, match="fused_moe: out cannot be written to"):
            hb.fused_moe(x, p, ids, weights, out=out)
    with torch.no_grad():
        hb.fused_moe(x, p, ids, weights, out=torch.zeros(3, 32, requires_grad=True))
