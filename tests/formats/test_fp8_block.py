"""fp8-block dequantisation, with ragged edges, against index arithmetic."""

import pytest
import torch
from helpers import assert_equal_bits

from halfbyte.errors import InputError
from halfbyte.formats.fp8_block import dequantize, scale_shape


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (1, 1), (130, 257), (300, 128), (127, 384)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_element_takes_the_scale_of_its_tile(rows: int, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, scale = torch.randn(rows, columns).to(torch.float8_e4m3fn), torch.rand(scale_shape(rows, columns)) + 0.1
    expected = weight.float() * scale[torch.arange(rows)[:, None] // 128, torch.arange(columns)[None] // 128]
    assert_equal_bits(dequantize(weight, scale, dtype), expected.to(dtype))


def test_refusals() -> None:
    weight = torch.zeros(130, 64).to(torch.float8_e4m3fn)
    with pytest.raises(InputError, match=r"given \(1, 1\); needed \(2, 1\)"):
        dequantize(weight, torch.ones(1, 1))
    with pytest.raises(InputError, match="e4m3 matrices"):
        dequantize(weight.bfloat16(), torch.ones(2, 1))
