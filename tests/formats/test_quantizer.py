"""`quantize` and `QuantTensor` against a slow definition in plain Python, round trips, four-over-six, memory, and bad input."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from helpers import assert_equal_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import InputError
from halfbyte.formats import MXFP4, NVFP4, QuantTensor, count_nonfinite, e2m1, e4m3, matrix_amax, nvfp4_decode_scale, quantize
from halfbyte.formats.block_format import decode_scale_from_encode, encode_scale_from_decode


def f32(x: float) -> float:
    """Round to fp32, so that Python arithmetic below follows the definition step by step."""
    return torch.tensor(x, dtype=torch.float64).float().item()


def slow_nvfp4(row: list[float], global_scale: float) -> tuple[list[int], list[float]]:
    codes, scales = [], []
    for start in range(0, len(row), 16):
        block = row[start : start + 16]
        amax = max((abs(v) for v in block if not math.isnan(v)), default=0.0)
        scale = e4m3.encode(torch.tensor(f32(amax / f32(6 * global_scale)))).float().item()
        step = f32(scale * global_scale)
        codes += [0 if step == 0 else e2m1.encode(torch.tensor([f32(v / step)])).item() for v in block]
        scales.append(scale)
    return codes, scales


def slow_mxfp4(row: list[float]) -> tuple[list[int], list[int]]:
    codes, scales = [], []
    for start in range(0, len(row), 32):
        block = row[start : start + 32]
        amax = max(abs(v) for v in block)
        exponent = -127 if amax == 0 else math.ceil(math.log2(amax / 6))
        codes += [e2m1.encode(torch.tensor([v * 2.0**-exponent])).item() for v in block]
        scales.append(exponent + 127)
    return codes, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nvfp4_equals_the_slow_definition(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 5, 64) * torch.tensor([1.0, 1e-3]).view(2, 1, 1)).to(dtype)
    x[0, 1] = 0  # a zero row
    x[1, 2, :16] *= 1e-6  # a block whose scale underflows to 0
    q = quantize(x, NVFP4)
    assert torch.equal(q.global_scale, nvfp4_decode_scale(x.float().abs().amax((1, 2))))
    for matrix in range(2):
        for row in range(5):
            codes, scales = slow_nvfp4(x[matrix, row].float().tolist(), q.global_scale[matrix].item())
            assert e2m1.unpack(q.codes[matrix, row]).tolist() == codes
            assert q.scales[matrix, row].float().tolist() == scales


def test_mxfp4_equals_the_slow_definition() -> None:
    torch.manual_seed(1)
    x = torch.randn(6, 96) * torch.logspace(-20, 20, 6).unsqueeze(1)
    x[3] = 0
    q = quantize(x, MXFP4)
    for row in range(6):
        codes, scales = slow_mxfp4(x[row].tolist())
        assert e2m1.unpack(q.codes[row]).tolist() == codes
        assert q.scales[row].tolist() == scales


def test_dequantize_rounds_once() -> None:
    """(code * scale) is exact in fp32; the product with the global scale is the only rounding."""
    q = quantize(torch.randn(3, 48), NVFP4)
    values = torch.tensor(e2m1.VALUES, dtype=torch.float64)[e2m1.unpack(q.codes).long()].view(3, 3, 16)
    exact = values * q.scales.double().unsqueeze(-1) * q.global_scale.double()
    assert_equal_bits(q.dequantize(), exact.float().view(3, 48))
    assert_equal_bits(q.dequantize(torch.bfloat16), exact.float().bfloat16().view(3, 48))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-20, 20), rows=st.integers(1, 5), blocks=st.integers(1, 4))
def test_round_trip_is_stable_and_close(seed: int, exponent: int, rows: int, blocks: int) -> None:
    x = torch.randn(rows, 32 * blocks, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    for format, bound in ((NVFP4, 1 / 6 + 1 / 16), (MXFP4, 1 / 4)):
        q = quantize(x, format)
        y = q.dequantize()
        block_max = x.abs().unflatten(-1, (-1, format.block)).amax(-1, keepdim=True)
        assert ((y - x).abs().unflatten(-1, (-1, format.block)) <= bound * block_max + x.abs().max() * 2.0**-13).all()
        again = quantize(y, format, q.global_scale)
        assert_equal_bits(again.dequantize(), y)


def test_batch_is_each_matrix_alone_and_layout_is_only_a_layout() -> None:
    x = torch.randn(3, 130, 96)
    for format in (NVFP4, MXFP4):
        q = quantize(x, format)
        for e in range(3):
            assert_equal_bits(q[e].codes, quantize(x[e], format).codes)
            assert_equal_bits(q[e].scales, quantize(x[e], format).scales)
        for layout in ("128x4", "8x4"):
            other = quantize(x, format, scale_layout=layout)
            assert other.scale_layout == layout and other.scales.shape != q.scales.shape
            assert_equal_bits(other.dequantize(), q.dequantize())
            assert_equal_bits(other.with_scale_layout("linear").scales, q.scales)


def test_global_scale_of_row_groups() -> None:
    x = torch.cat([torch.randn(2, 4, 32), torch.randn(2, 4, 32) * 50], dim=1)
    halves = nvfp4_decode_scale(matrix_amax(x.view(2, 2, 4, 32)))
    q = quantize(x, NVFP4, halves)
    assert q.global_scale.shape == (2, 2)
    assert_equal_bits(q.dequantize()[:, :4], quantize(x[:, :4], NVFP4).dequantize())
    assert_equal_bits(q.dequantize()[:, 4:], quantize(x[:, 4:], NVFP4).dequantize())
    whole = quantize(x, NVFP4).dequantize()
    assert not torch.equal(whole[:, :4], q.dequantize()[:, :4]), "negative control: one scale for both halves gives other values"


def test_scale_conventions_are_inverse() -> None:
    decode = nvfp4_decode_scale(torch.tensor([2688.0, 6.0, 0.0, 1e-44]))
    assert decode[0] == 1.0 and decode[2] == 1.0, "amax 2688 = 6 * 448 gives 1; a zero matrix gives 1, never 0 or infinity"
    assert decode[3] >= torch.finfo(torch.float32).tiny
    assert torch.equal(decode_scale_from_encode(encode_scale_from_decode(decode[:1])), decode[:1])
    assert nvfp4_decode_scale(torch.tensor(1536.0), four_over_six=True) == 1.0


@pytest.mark.parametrize(("name", "low", "high"), [("gaussian", 0.80, 0.87), ("laplace", 0.85, 0.92)])
def test_four_over_six_lowers_the_error(name: str, low: float, high: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 512, generator=generator)
    if name == "laplace":
        x = x.sign() * -torch.rand(512, 512, generator=generator).clamp_min(1e-7).log()
    plain, adaptive = quantize(x, NVFP4), quantize(x, NVFP4, four_over_six=True)
    assert (adaptive.global_scale / plain.global_scale).item() == pytest.approx(448 / 256)
    assert adaptive.scales.float().max() <= 384
    ratio = (adaptive.dequantize() - x).square().mean() / (plain.dequantize() - x).square().mean()
    assert low < ratio < high
    blocks = lambda q: (q.dequantize() - x).square().unflatten(-1, (-1, 16)).sum(-1)  # noqa: E731
    same_global = quantize(x, NVFP4, adaptive.global_scale)
    assert (blocks(adaptive) <= blocks(same_global) * (1 + 1e-5)).all(), "no block gets worse by the choice"


def test_nonfinite_values_stay_in_their_block() -> None:
    x = torch.randn(4, 64)
    clean = quantize(x, NVFP4, 0.01)
    x[1, 20], x[2, 5] = torch.nan, torch.inf
    assert count_nonfinite(x) == 2
    q = quantize(x, NVFP4, 0.01)
    touched = torch.zeros(4, 4, dtype=torch.bool)
    touched[1, 1] = touched[2, 0] = True
    same = (q.codes.view(4, 4, 8) == clean.codes.view(4, 4, 8)).all(-1) & (q.scales.view(torch.uint8) == clean.scales.view(torch.uint8))
    assert same[~touched].all()
    assert e2m1.unpack(q.codes)[1, 20] == 7 and q.scales[2, 0].float() == 448
    assert torch.isfinite(quantize(x, NVFP4).global_scale), "the global scale looks at finite values only"


@pytest.mark.parametrize("shape", [(0, 32), (3, 0, 32), (0, 4, 32), (4, 0)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    for format in (NVFP4, MXFP4):
        assert quantize(torch.empty(shape), format).dequantize().shape == shape


def test_torch_dtype_views() -> None:
    x = torch.randn(4, 64)
    for format in (NVFP4, MXFP4):
        q = quantize(x, format)
        viewed = QuantTensor(q.codes_float4(), q.scales_float8(), q.global_scale, format)
        assert q.codes_float4().dtype == torch.float4_e2m1fn_x2
        assert_equal_bits(viewed.dequantize(), q.dequantize())
    assert q.nbytes == 4 * 32 + 4 * 2


BAD_CALLS = [
    (lambda x: quantize(x.int(), NVFP4), "float32, bfloat16 or float16"),
    (lambda x: quantize(x[0], NVFP4), "rows and columns"),
    (lambda x: quantize(x[:, :24], NVFP4), "multiple of 16"),
    (lambda x: quantize(x[:, :48], MXFP4), "multiple of 32"),
    (lambda x: quantize(x, MXFP4, 1.0), "belong to NVFP4"),
    (lambda x: quantize(x, MXFP4, four_over_six=True), "belong to NVFP4"),
    (lambda x: quantize(x, NVFP4, scale_rule="floor"), "belongs to MXFP4"),
    (lambda x: quantize(x, MXFP4, scale_rule="up"), "unknown e8m0 scale rule"),
    (lambda x: quantize(x, NVFP4, scale_layout="256x1"), "unknown scale layout"),
    (lambda x: quantize(x, NVFP4, torch.ones(3)), "global scale does not fit"),
    (lambda x: QuantTensor(x, x, None, NVFP4), "codes|byte|dtype"),
    (lambda x: QuantTensor(torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 3, dtype=torch.uint8), None, MXFP4), "block scales do not fit"),
    (lambda x: QuantTensor(torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.uint8), torch.ones(()), MXFP4), "no global scale"),
    (
        lambda x: QuantTensor(torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.float8_e4m3fn), None, NVFP4),
        "needs a global scale",
    ),
    (lambda x: quantize(x, NVFP4)[0], "cannot index a single matrix"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS, ids=[m for _, m in BAD_CALLS])
def test_bad_input_is_one_clear_error(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        call(torch.randn(4, 64))


MEMORY_PROBE = """
import resource, sys, torch
from halfbyte.formats import NVFP4, quantize
torch.set_num_threads(1)
quantize(torch.randn(64, 1024), NVFP4).dequantize()          # load everything once
x = torch.randn(1, 1 << 13, 1 << 12).bfloat16()               # 32 Mi elements, 64 MiB
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
q = quantize(x, NVFP4)
middle = peak()
y = q.dequantize(torch.bfloat16)
print(middle - before, peak() - middle)
"""


@pytest.mark.slow
def test_memory_stays_within_the_stated_bound() -> None:
    """The result (18 + 64 MiB) plus 160 MiB; unchunked, fp32 copies of x alone would take 128 MiB each, several at a time."""
    output = subprocess.run([sys.executable, "-c", MEMORY_PROBE], capture_output=True, text=True, check=True).stdout.split()
    quantising, dequantising = map(float, output)
    assert quantising < 18 + 160
    assert dequantising < 64 + 160
