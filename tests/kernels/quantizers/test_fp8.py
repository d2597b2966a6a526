"""The Triton quantiser to e4m3 against its definition, bit for bit: interpreted (see the last test), compiled without a GPU, on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from compile_only import compiling
from helpers import assert_equal_bits
from interpreted import DEVICE, gpu_only, not_interpreted, numeric, run_interpreted

import halfbyte as hb
from halfbyte.errors import InputError
from halfbyte.formats.fp8_tensor import quantize_fp8 as reference
from halfbyte.kernels.quantizers.fp8 import run as quantize_fp8

pytestmark = pytest.mark.usefixtures("uninitialised_memory_shows")

CASES = [("token", "linear"), ("block", "linear"), *(("mx", layout) for layout in ("linear", "128x4", "8x4"))]
DTYPES = (torch.bfloat16, torch.float16)
every_case = pytest.mark.parametrize(("scaling", "layout"), CASES)


def rows_of(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (x * torch.logspace(-4, 3, shape[-2]).unsqueeze(1)).to(dtype)


def check(x: torch.Tensor, scaling: str, layout: str) -> None:
    expected = reference(x, scaling, scale_layout=layout)
    actual = quantize_fp8(x.to(DEVICE), scaling, scale_layout=layout)
    assert_equal_bits(actual.codes.cpu(), expected.codes)
    assert_equal_bits(actual.scales.cpu(), expected.scales)
    assert (actual.scaling, actual.scale_layout) == (scaling, layout)


@numeric
@every_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(scaling, layout, dtype):
    narrow = ((130, 32), (3, 64)) if scaling == "mx" else ()
    for shape in ((1, 128), (9, 384), (2, 3, 256), (130, 128), *narrow):
        check(rows_of(*shape, dtype=dtype), scaling, layout)
    empty = quantize_fp8(torch.empty(0, 128, dtype=dtype, device=DEVICE), scaling, scale_layout=layout)
    assert (
        empty.codes.shape == (0, 128) and empty.scales.shape == reference(torch.empty(0, 128, dtype=dtype), scaling, scale_layout=layout).scales.shape
    )
    check(torch.empty(7, 0, dtype=dtype), scaling, layout)
    check(rows_of(4, 384, dtype=dtype)[:, 128:256], scaling, layout)


@numeric
@every_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_difficult_values(scaling, layout, dtype):
    info = torch.finfo(dtype)
    x = torch.randn(10, 256, generator=torch.Generator().manual_seed(1))
    x[1], x[2], x[3, 5], x[4, 6], x[5, 7] = 0.0, -0.0, torch.inf, -torch.inf, torch.nan
    x[6], x[7, 0], x[8] = x[6] * 1e-37, info.max, info.smallest_normal / 8
    x[9] = torch.linspace(-448, 448, 256)
    check(x.to(dtype), scaling, layout)


def test_blocks_of_128_are_rows_of_their_own():
    x = rows_of(3, 384, dtype=torch.bfloat16)
    q, alone = hb.quantize_fp8(x, "block"), hb.quantize_fp8(x.view(9, 128), "token")
    assert_equal_bits(q.codes.view(9, 128), alone.codes)
    assert_equal_bits(q.scales.view(9, 1), alone.scales)


def test_nan_spoils_its_block_only():
    x = rows_of(2, 256, dtype=torch.bfloat16)
    x[0, 3] = torch.nan
    for scaling, spoiled in (("token", 256), ("block", 128), ("mx", 1)):
        broken = hb.quantize_fp8(x, scaling).codes.float().isnan()
        assert broken[0].sum() == spoiled and not broken[1].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 130)}, "does not divide into blocks"),
        ({"x": torch.zeros(128)}, "cannot quantise this"),
        ({"x": torch.zeros(3, 128).double()}, "cannot quantise this"),
        ({"scaling": "row"}, "unknown scaling"),
        ({"scale_layout": "128x4"}, "only mx scales have layouts"),
        ({"scale_layout": "4x4"}, "unknown scale layout"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(InputError, match=message):
        hb.quantize_fp8(**{"x": torch.zeros(3, 128), "scaling": "block", **change})


@not_interpreted
@every_case
def test_compiles(scaling, layout):
    for capability, dtype in ((80, torch.float16), (90, torch.bfloat16)):
        with compiling(capability) as launched:
            quantize_fp8(torch.empty(64, 7168, dtype=dtype), scaling, scale_layout=layout)
        assert launched[0].spill_bytes == 0 and launched[0].registers <= 128
        assert ("cvt.rn.satfinite.e4m3x2" in launched[0].ptx) == (capability >= 89)


@gpu_only
@every_case
def test_matrix_on_a_gpu(scaling, layout):
    for num_rows, width, dtype in itertools.product((1, 127, 129), (128, 2944, 4096, 7168, 16384), DTYPES):
        check(rows_of(num_rows, width, dtype=dtype), scaling, layout)
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    check(values, scaling, layout)


@not_interpreted
def test_interpreted():
    """Everything marked `numeric`, on the CPU."""
    assert run_interpreted(__file__) == 20
