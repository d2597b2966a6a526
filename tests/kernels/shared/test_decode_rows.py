"""Hidden states in 8 and 4 bits decoded to bf16: interpreted on a CPU, compiled without a GPU, on a GPU; against the codecs, bit for bit."""

from __future__ import annotations

import pytest
import torch
from compile_only import compiling
from interpreted import DEVICE, INTERPRETED, not_interpreted, numeric, run_interpreted

import halfbyte as hb
from halfbyte.kernels.shared.decode_rows import decode_rows

KINDS = ("nvfp4", "nvfp4 by row", "mxfp4", "fp8", "mxfp8")


def quantized(x: torch.Tensor, kind: str) -> hb.QuantTensor | hb.Fp8Tensor:
    if kind == "nvfp4 by row":
        return hb.quantize(x, hb.NVFP4, x.abs().amax(1).clamp(min=1e-30) / (6 * 448), backend="reference")
    if kind in ("fp8", "mxfp8"):
        return hb.quantize_fp8(x, "token" if kind == "fp8" else "mx", backend="reference")
    return hb.quantize(x, hb.NVFP4 if kind == "nvfp4" else hb.MXFP4, backend="reference")


@numeric
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 32), (5, 96), (3, 2880), (130, 64)] if INTERPRETED else [(1, 32), (5, 96), (3, 2880), (130, 64), (300, 7168)])
def test_equals_the_codec(kind: str, shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, shape[0]).unsqueeze(1)
    x[0, :5] = torch.tensor([0.0, -0.0, 1e-20, -448.0, 6.0])
    q = quantized(x.to(DEVICE), kind)
    out, scale = decode_rows(q)
    assert out.shape == shape and out.dtype == torch.bfloat16 and (scale is None) == (kind in ("mxfp4", "mxfp8"))
    values = out.float() if scale is None else out.float() * scale.unsqueeze(1)
    expected = q.dequantize(torch.float32)
    assert torch.equal(values, expected) if scale is None else torch.allclose(values, expected, rtol=3e-7, atol=0)
    assert not torch.equal(out.roll(1, 1), out)


@numeric
def test_every_code_and_scale() -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn).view(8, 32)
    out, scale = decode_rows(hb.Fp8Tensor(codes, torch.full((8, 1), 2.0, device=DEVICE), "token"))
    assert torch.equal(out.float().nan_to_num(7.0), codes.float().nan_to_num(7.0)) and (scale == 2).all()
    pairs = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(16, 16)
    scales = torch.arange(0, 127, 4, dtype=torch.uint8, device=DEVICE).view(16, 2).view(torch.float8_e4m3fn)
    q = hb.QuantTensor(pairs, scales, torch.tensor(1.0, device=DEVICE), hb.NVFP4)
    assert torch.equal(decode_rows(q)[0].float(), q.dequantize(torch.float32))
    q = hb.QuantTensor(pairs, torch.arange(0, 240, 15, dtype=torch.uint8, device=DEVICE).view(16, 1), None, hb.MXFP4)
    assert torch.equal(decode_rows(q)[0].float(), q.dequantize(torch.float32))


def test_no_rows() -> None:
    out, scale = decode_rows(hb.quantize_fp8(torch.empty(0, 64)))
    assert out.shape == (0, 64) and scale.shape == (0,)


@not_interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_spills(kind: str) -> None:
    with compiling(90) as compiled:
        decode_rows(quantized(torch.ones(4, 7168), kind))
    assert len(compiled) == 1 and compiled[0].spill_bytes == 0


@not_interpreted
def test_interpreted() -> None:
    """Every numeric test above, in Triton's interpreter."""
    assert run_interpreted(__file__) == 4 * len(KINDS) + 1
