"""The provider on a Blackwell GPU with FlashInfer, against the reference on the CPU. Not run yet: there was no such GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_close_rel
from random_experts import make_experts

import halfbyte as hb
from halfbyte.device import Target
from halfbyte.experts import GPT_OSS_SWIGLU, SWIGLU, Activation
from halfbyte.kernels.flashinfer.fused_moe import KERNELS
from halfbyte.kernels.flashinfer.package import refusal

ARCH = Target.of("cuda").arch if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ARCH not in KERNELS["cutlass"].archs, reason="no GPU of compute capability 10.0 or newer"),
    pytest.mark.skipif(ARCH in KERNELS["cutlass"].archs and refusal() is not None, reason=f"{refusal()}"),
]


@pytest.mark.parametrize("num_tokens", [1, 37, 1024])
@pytest.mark.parametrize("activation", [SWIGLU, GPT_OSS_SWIGLU], ids=["swiglu", "gpt-oss"])
@pytest.mark.parametrize(
    ("layout", "format", "activations"),
    [(layout, format, kind) for layout, kernel in KERNELS.items() for format in (hb.NVFP4, hb.MXFP4) for kind in kernel.activations[format.name]],
    ids=str,
)
def test_the_layer(layout: str, format: hb.BlockFormat, activations: str, activation: Activation, num_tokens: int) -> None:
    if ARCH not in KERNELS[layout].archs:
        pytest.skip(f"{layout} has no kernels for {ARCH}")
    w = make_experts(16, 512, 256, format, activation)
    if format is hb.NVFP4:
        scale = w.w13.global_scale[:, :1].expand(16, 2) / 20000
        w = replace(w, w13=replace(w.w13, global_scale=scale.contiguous()))
        w = replace(w, w13_input_scale=torch.full((16, 2), 0.002), w2_input_scale=torch.full((16,), 0.01))
    else:
        w = replace(w, w13=replace(w.w13, scales=w.w13.scales - 8))
    random = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 512, generator=random, dtype=torch.float32).bfloat16()
    routing = hb.route(torch.randn(num_tokens, 16, generator=random, dtype=torch.float32), 4)
    prepared = hb.prepare(w, layout, activations=activations, device="cuda")
    out = hb.fused_moe(hidden.cuda(), prepared, routing.ids.cuda(), routing.weights.cuda(), backend="flashinfer")
    expected = hb.fused_moe(hidden, hb.prepare(w, "canonical"), *routing, activations=activations)
    limit = 5e-2 if activations == "nvfp4" else 1e-2  # of codes that fall to the other side, where a product was not rounded to bf16 before
    assert_close_rel(out.cpu(), expected, token=2 * limit, overall=limit)
