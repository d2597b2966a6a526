"""`encode_rows` against `formats.activation_formats`, bit for bit: interpreted on a CPU (see `test_interpreted`), compiled, on a GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import assert_equal_bits
from interpreted import DEVICE, INTERPRETED, not_interpreted, numeric, run_interpreted
from slow import slow_case

pytest.importorskip("triton")

from compile_only import compiling

from halfbyte.formats import NVFP4
from halfbyte.formats.activation_formats import round_trip
from halfbyte.formats.block_format import nvfp4_decode_scale
from halfbyte.formats.fp8_tensor import quantize_fp8
from halfbyte.formats.quantizer import quantize
from halfbyte.kernels.shared.encode_rows import encode_rows
from halfbyte.weights.hopper.layout import FRAGMENT_COLUMN_BF16

CASES = ["fp8", "mxfp8", "nvfp4", "nvfp4-calibrated"]
INPUT_SCALE = torch.tensor([[2e-4, 1e-5], [7e-4, 3e-4], [1e-6, 2e-4]], device=DEVICE)  # the largest of them counts


def make_rows(columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows of every magnitude, of all ties between codes, of zeros and negative zeros, of blocks of very different size, of one large value."""
    random = torch.Generator().manual_seed(columns)
    x = torch.randn(13, columns, generator=random)
    largest = 4 if dtype == torch.float16 else 37
    x[:5] *= torch.logspace(-largest, largest, 5).unsqueeze(1)
    x[5], x[6] = 0.0, -0.0
    x[7] = torch.arange(columns) % 29 * 0.25 - 3.5
    x[8] *= torch.logspace(-6, 2, columns // 16).repeat_interleave(16)
    x[9, :16] = 0
    x[10], x[10, columns // 3] = 1e-4, 500.0
    x[11] *= 2.0**-14 if dtype == torch.float16 else 2.0**-128  # subnormal
    return x.to(dtype).to(DEVICE)


def expected_of(x: torch.Tensor, activations: str, input_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the codecs say, computed on the CPU."""
    x = x.cpu()
    if activations == "fp8":
        q = quantize_fp8(x)
        codes, scales = q.codes, q.scales
        return codes.float(), scales.squeeze(1)
    if activations == "mxfp8":
        q = quantize_fp8(x, "mx")
        codes, bytes_ = q.codes, q.scales
        return codes.float() * torch.exp2(bytes_.double() - 127).float().repeat_interleave(32, 1), None
    scale = nvfp4_decode_scale(x.float().abs().amax(1)) if input_scale is None else input_scale.max().cpu().repeat(len(x))
    q = quantize(x, NVFP4, scale)
    return replace(q, global_scale=torch.ones_like(scale)).dequantize(torch.float32), scale


def in_fragments(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(1, (-1, 64))[:, :, list(FRAGMENT_COLUMN_BF16)].flatten(1).contiguous()


@numeric
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [96, 320, 1408, 2688, 2880, 7168])
@pytest.mark.parametrize(("activations", "input_scale"), [("fp8", None), ("mxfp8", None), ("nvfp4", None), ("nvfp4", INPUT_SCALE)], ids=CASES)
def test_equals_the_codec_bit_for_bit(activations, input_scale, columns, dtype):
    if INTERPRETED and columns != (320 if dtype is torch.bfloat16 else 96):  # with fragment order, and with a tail
        pytest.skip("takes long where it is interpreted")
    x = make_rows(columns, dtype)
    values, scales = expected_of(x, activations, input_scale)
    assert_equal_bits(values.bfloat16().float(), values)  # bf16 holds them exactly
    actual, actual_scales = encode_rows(x, activations, input_scale)
    assert_equal_bits(actual.cpu(), values.bfloat16())
    if scales is None:
        assert actual_scales is None
    else:
        assert_equal_bits(actual_scales.cpu(), scales)
    if columns % 64 == 0:  # in fragment order, and in place
        h = in_fragments(x)
        actual, _ = encode_rows(h, activations, input_scale, in_fragment_order=True, out=h.view(torch.bfloat16))
        assert_equal_bits(actual.cpu(), in_fragments(values.bfloat16()))
        assert actual.data_ptr() == h.data_ptr()


@numeric
@pytest.mark.parametrize(("activations", "input_scale"), [("fp8", None), ("mxfp8", None), ("nvfp4", None), ("nvfp4", INPUT_SCALE)], ids=CASES)
@pytest.mark.parametrize("spoilt", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_where_the_format_has_it(activations, input_scale, spoilt):
    """NaN spoils a row whose scale it decides, or else itself; infinity a row, itself (MXFP8), or nothing (calibrated: the largest value)."""
    x = make_rows(96)[7:10]
    x[1, 17] = spoilt
    actual, scales = encode_rows(x, activations, input_scale)
    actual = (actual.float() if scales is None else actual.float() * scales.unsqueeze(1)).cpu()
    expected = round_trip(x.cpu(), activations, None if input_scale is None else input_scale.max().cpu())
    assert torch.equal(actual.nan_to_num(nan=12345.0), expected.nan_to_num(nan=12345.0))


@numeric
def test_the_comparison_notices_blocks_of_the_wrong_columns():
    """The order of columns matters: slots read as if they were columns have other block scales."""
    x = torch.randn(3, 320, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e-4]).repeat_interleave(32).repeat(5)
    x = x.bfloat16().to(DEVICE)
    for activations in ("mxfp8", "nvfp4"):
        values, _ = expected_of(x, activations, None)
        actual, _ = encode_rows(in_fragments(x), activations)
        with pytest.raises(AssertionError):
            assert_equal_bits(actual.cpu(), in_fragments(values.bfloat16()))


@numeric
def test_bf16_and_no_rows_need_no_kernel():
    x = make_rows(96)
    assert encode_rows(x, "bf16") == (x, None)
    actual, scales = encode_rows(x[:0], "nvfp4")
    assert actual.shape == (0, 96) and scales is not None and scales.shape == (0,)


@not_interpreted
def test_interpreted():
    """Every numeric test above, in Triton's interpreter."""
    assert run_interpreted(__file__) == 22


@not_interpreted
@pytest.mark.parametrize(
    ("activations", "static", "capability"),
    [slow_case("fp8", False, 80), ("fp8", False, 90), ("mxfp8", False, 90), slow_case("nvfp4", False, 80), ("nvfp4", True, 90)],
)
def test_compiles_without_spills(activations, static, capability):
    x, scale = torch.empty((4, 7168), dtype=torch.bfloat16), torch.empty((256, 2)) if static else None
    with compiling(capability) as launched:
        encode_rows(x, activations, scale, out=x, launch_early=capability == 90)
        encode_rows(x.half(), activations, scale, in_fragment_order=True)
    assert len(launched) == 2
    for compiled in launched:
        assert compiled.spill_bytes == 0 and compiled.registers <= 128
        assert ("cvt.rn.satfinite.e4m3x2.f32" in compiled.ptx) == (capability == 90)
