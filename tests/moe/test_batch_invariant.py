"""With `batch_invariant`, a token alone and the same token among others give the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import assert_close_rel
from random_experts import make_experts

import halfbyte as hb
from halfbyte.checkpoint import RouterWeights
from halfbyte.experts import SWIGLU

EXPERTS, TOP_K = 8, 3
DEMO = Path(hb.__file__).parent / "demo_model"


def experts(format: hb.BlockFormat | None, hidden: int, intermediate: int) -> hb.ExpertWeights:
    if format is not None:
        return make_experts(EXPERTS, hidden, intermediate, format)
    random = torch.Generator().manual_seed(0)
    w13, w2 = torch.randn(EXPERTS, 2 * intermediate, hidden, generator=random), torch.randn(EXPERTS, hidden, intermediate, generator=random)
    return hb.ExpertWeights(w13 / hidden**0.5, w2, SWIGLU)


def tokens(num_tokens: int, hidden: int, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    ids = torch.rand(num_tokens, EXPERTS, generator=random).argsort(1)[:, :TOP_K].int()
    x, weights = torch.randn(num_tokens, hidden, generator=random).to(dtype), torch.rand(num_tokens, TOP_K, generator=random)
    return x.to(device), ids.to(device), weights.to(device)


def assert_invariant(prepared: hb.PreparedExperts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, parts: list[slice], **options) -> None:
    whole = hb.fused_moe(x, prepared, ids, weights, batch_invariant=True, **options)
    for part in parts:
        alone = hb.fused_moe(x[part], prepared, ids[part], weights[part], batch_invariant=True, **options)
        assert torch.equal(alone, whole[part]), part


@pytest.mark.parametrize("activations", ["bf16", "fp8", "nvfp4"])
@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 32), (96, 160)])
@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4, None], ids=repr)
def test_reference(format, hidden: int, intermediate: int, activations) -> None:
    prepared, arguments = hb.prepare(experts(format, hidden, intermediate)), tokens(13, hidden, torch.float32)
    parts = [*(slice(token, token + 1) for token in range(13)), slice(2, 9)]
    assert_invariant(prepared, *arguments, parts, activations=activations)
    once = hb.fused_moe(arguments[0], prepared, *arguments[1:], activations=activations)
    invariant = hb.fused_moe(arguments[0], prepared, *arguments[1:], activations=activations, batch_invariant=True)
    assert_close_rel(invariant, once, **({"token": 1e-5, "overall": 1e-5} if activations == "bf16" else {"token": 2e-2, "overall": 5e-3}))


def test_reference_needs_the_option() -> None:
    """The premise of taking tokens one by one."""
    prepared, (x, ids, weights) = hb.prepare(experts(None, 512, 96)), tokens(64, 512, torch.float32)
    whole = hb.fused_moe(x, prepared, ids, weights)
    assert not all(torch.equal(hb.fused_moe(x[t : t + 1], prepared, ids[t : t + 1], weights[t : t + 1])[0], whole[t]) for t in range(64))


def test_no_tokens_and_out_in_fp32() -> None:
    prepared, (x, ids, weights) = hb.prepare(experts(hb.NVFP4, 64, 32)), tokens(5, 64, torch.bfloat16)
    assert hb.fused_moe(x[:0], prepared, ids[:0], weights[:0], batch_invariant=True).shape == (0, 64)
    out = torch.full((5, 64), torch.nan)
    assert hb.fused_moe(x, prepared, ids, weights, batch_invariant=True, out=out) is out
    assert_close_rel(out, hb.fused_moe(x, prepared, ids, weights, out=torch.empty_like(out)), token=1e-2, overall=5e-3)


def test_module_routes_invariantly_too() -> None:
    """The router's product must not round by the number of tokens either: its weights multiply everything."""
    layer = hb.MoE.from_checkpoint(DEMO, 0, batch_invariant=True)
    hidden = torch.randn(40, 256, generator=torch.Generator().manual_seed(2))
    whole, routing = layer(hidden), layer.route(hidden)
    for token in range(40):
        alone = layer.route(hidden[token : token + 1])
        assert torch.equal(alone.weights[0], routing.weights[token]) and torch.equal(alone.ids[0], routing.ids[token])
        assert torch.equal(layer(hidden[token : token + 1])[0], whole[token])
    assert repr(layer).endswith("batch invariant)")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("activations", ["bf16", "fp8"])
@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
def test_portable_kernels_on_a_gpu(format, activations) -> None:
    """Those of Hopper have a test of their own."""
    prepared, arguments = hb.prepare(experts(format, 256, 192).to("cuda"), "canonical"), tokens(700, 256, torch.bfloat16, "cuda")
    parts = [slice(0, 1), slice(699, 700), slice(3, 11), slice(100, 164), slice(0, 300)]
    if activations == "fp8":
        arguments, parts = tuple(argument[:40] for argument in arguments), [slice(0, 1), slice(3, 11)]  # the reference, a token at a time
    assert_invariant(prepared, *arguments, parts, activations=activations)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("num_experts", [8, 128, 256])
def test_module_on_a_gpu(num_experts: int) -> None:
    router = RouterWeights(torch.randn(num_experts, 2048, device="cuda").bfloat16(), hb.load_router(DEMO, 0).rule)
    layer = hb.MoE(router, hb.prepare(make_experts(num_experts, 2048, 64, hb.NVFP4).to("cuda")), batch_invariant=True)
    hidden = torch.randn(500, 2048, device="cuda").bfloat16()
    whole, routing = layer(hidden), layer.route(hidden)
    for part in (slice(0, 1), slice(77, 78), slice(499, 500), slice(5, 70), slice(1, 129)):
        assert torch.equal(layer.route(hidden[part]).weights, routing.weights[part])
        assert torch.equal(layer(hidden[part]), whole[part])
