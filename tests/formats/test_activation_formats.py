"""Activation formats against their definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_equal_bits, relative_errors

import halfbyte as hb
from halfbyte.errors import InputError
from halfbyte.formats.activation_formats import round_trip
from halfbyte.formats.fp8_tensor import quantize_fp8


@pytest.fixture
def x():
    rows = torch.randn(9, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 9).unsqueeze(1)
    rows[3] = 0
    rows[4, 32:64] = 0
    return rows


def test_fp8_scale_is_the_row_maximum(x):
    q = quantize_fp8(x)
    codes, scales = q.codes, q.scales
    assert codes.dtype == torch.float8_e4m3fn and scales.shape == (9, 1)
    rows = x.abs().amax(1) > 0
    assert (codes[rows].float().abs().amax(1) == 448).all() and (codes[~rows].float() == 0).all()
    assert scales[rows].squeeze(1).tolist() == pytest.approx((x[rows].abs().amax(1).double() / 448).tolist(), rel=1e-6)
    # e4m3 keeps 3 mantissa bits: half a step is 1/16 of the value, or half the smallest subnormal of the row.
    error = (codes.double() * scales.double() - x.double()).abs()
    assert (error <= torch.maximum(x.double().abs() / 16, scales.double() * 2.0**-10) * (1 + 1e-6)).all()


def test_mxfp8_scale_is_the_smallest_power_of_two_that_does_not_clip(x):
    q = quantize_fp8(x, "mx")
    codes, scales = q.codes, q.scales
    assert scales.dtype == torch.uint8 and scales.shape == (9, 3)
    for block, byte in zip(x.view(-1, 32), scales.flatten().tolist(), strict=True):
        amax = block.abs().max().item()
        assert byte == (0 if amax == 0 else math.ceil(math.log2(amax / 448)) + 127)
    largest = codes.float().view(9, 3, 32).abs().amax(-1)
    assert ((largest == 0) | ((largest > 216) & (largest <= 448))).all()


@pytest.mark.parametrize(("kind", "typical"), [("fp8", 0.026), ("mxfp8", 0.026), ("nvfp4", 0.095)])
def test_round_trip_error_of_gaussian_rows(kind, typical):
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    worst, overall = relative_errors(round_trip(x, kind), x)
    assert overall == pytest.approx(typical, rel=0.15) and worst < 1.5 * typical
    assert_equal_bits(round_trip(x, "bf16"), x)


@pytest.mark.parametrize("kind", ["fp8", "mxfp8", "nvfp4"])
def test_rows_are_independent_and_exact_values_survive(kind, x):
    assert_equal_bits(round_trip(x, kind)[2:3], round_trip(x[2:3], kind))
    exact = torch.tensor([[0.0, -0.5, 1.0, 6.0 if kind == "nvfp4" else 0.25] * 8]) * 448
    assert_equal_bits(round_trip(exact.bfloat16(), kind), exact)
    assert round_trip(x[:0], kind).shape == (0, 96)


def test_nvfp4_with_a_calibrated_scale_is_plain_quantisation(x):
    x, scale = x[4:6], torch.tensor([0.01])
    assert_equal_bits(round_trip(x, "nvfp4", scale), hb.quantize(x, hb.NVFP4, 0.01).dequantize())
    assert not torch.equal(round_trip(x, "nvfp4", scale), round_trip(x, "nvfp4"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fp8_keeps_a_broken_row_visible(x, bad):
    x[0, 0] = bad
    result = round_trip(x, "fp8")
    assert result[0].isnan().any() and not result[1:].isnan().any()


def test_mxfp8_needs_whole_blocks():
    with pytest.raises(InputError, match="given 48; needed a multiple of 32"):
        quantize_fp8(torch.zeros(2, 48), "mx")
