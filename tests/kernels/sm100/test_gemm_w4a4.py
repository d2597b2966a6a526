"""The Blackwell W4A4 grouped GEMM: compiled for both formats; its MXFP4 arithmetic in Triton's interpreter (which decodes no e4m3 scales)."""

from __future__ import annotations

import re

import pytest
import torch
from compile_only import SHARED_LIMIT, compiling
from helpers import assert_close_rel
from interpreted import run_interpreted_script
from triton.runtime.interpreter import InterpreterBuilder

import halfbyte as hb
from halfbyte.formats import QuantTensor
from halfbyte.kernels.sm100.gemm_w4a4 import choose_config, grouped_gemm_w4a4


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_quantised(format, *shape: int, global_scale: torch.Tensor) -> QuantTensor:
    codes = meta(*shape[:-1], shape[-1] // 2, dtype=torch.uint8)
    scales = meta(*shape[:-1], shape[-1] // format.block, dtype=format.scale_dtype)
    return QuantTensor(codes, scales, global_scale if format is hb.NVFP4 else None, format)


@pytest.mark.parametrize(("columns", "k"), [(7168, 2048), (64, 2880)])
@pytest.mark.parametrize(("format", "kind"), [(hb.NVFP4, "mxf4nvf4"), (hb.MXFP4, "mxf4")], ids=str)
def test_compiles_to_block_scaled_mma(format, kind, columns, k):
    experts, rows = 32, 4096
    x = meta_quantised(format, rows, k, global_scale=meta(rows))
    weight = meta_quantised(format, experts, columns, k, global_scale=meta(experts))
    row_start, out = meta(experts + 1, dtype=torch.int32), meta(rows, columns, dtype=torch.bfloat16)
    with compiling(100) as launched:
        grouped_gemm_w4a4(x, weight, row_start, out, bias=meta(experts, columns))
    (compiled,) = launched
    assert set(re.findall(r"kind::(\w+)", compiled.ptx)) == {kind}
    assert compiled.spill_bytes == 0 and compiled.shared_bytes <= SHARED_LIMIT[100]


@pytest.mark.skipif(not hasattr(InterpreterBuilder, "create_dot_scaled"), reason="the interpreter of this Triton has no dot_scaled (3.9 has)")
def test_interpreted():
    run_interpreted_script(__file__)


def check_mxfp4() -> None:
    """Two blocks of rows in one expert, an empty expert, rows of nobody; tails in N (200) and K (288)."""
    counts, rows, columns, k = (130, 0, 9), 144, 200, 288
    random = torch.Generator().manual_seed(0)
    x = hb.quantize(torch.randn(rows, k, generator=random), hb.MXFP4)
    weight = hb.quantize(torch.randn(len(counts), columns, k, generator=random), hb.MXFP4)
    bias = torch.randn(len(counts), columns, generator=random)
    row_start = torch.tensor([0, *counts]).cumsum(0).int()
    out = torch.full((rows, columns), float("nan"))
    grouped_gemm_w4a4(x, weight, row_start, out, bias=bias)
    expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    expected = torch.einsum("rk,rnk->rn", x.dequantize()[: len(expert)], weight.dequantize()[expert]) + bias[expert]
    assert_close_rel(out[: len(expert)], expected, token=1e-5, overall=1e-5)
    assert out[len(expert) :].isnan().all()


def test_config():
    assert choose_config(7168).block_n == 128 and choose_config(64).block_n == 64


if __name__ == "__main__":
    check_mxfp4()
    print("ok")
