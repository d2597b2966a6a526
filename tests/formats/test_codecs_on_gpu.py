"""The codecs give the same bytes on a GPU as on a CPU."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_equal_bits

from halfbyte.formats import MXFP4, NVFP4, BlockFormat, quantize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("format", "options"),
    [(NVFP4, {}), (NVFP4, {"four_over_six": True}), (NVFP4, {"scale_layout": "128x4"}), (MXFP4, {}), (MXFP4, {"scale_rule": "even"})],
    ids=["nvfp4", "four-over-six", "128x4", "mxfp4", "even"],
)
def test_same_bytes_as_on_the_cpu(format: BlockFormat, options: dict[str, object], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(3, 260, 2048) * torch.logspace(-6, 3, 260).unsqueeze(1)).to(dtype)
    x[0, 1], x[1, 2, 3], x[2, 4, 5] = 0, torch.nan, torch.inf
    here, there = quantize(x, format, **options), quantize(x.cuda(), format, **options)  # type: ignore[arg-type]
    assert_equal_bits(there.codes.cpu(), here.codes)
    assert_equal_bits(there.scales.cpu(), here.scales)
    if here.global_scale is not None:
        assert_equal_bits(there.global_scale.cpu(), here.global_scale)
    for output in (torch.float32, torch.bfloat16):
        assert_equal_bits(there.dequantize(output).cpu(), here.dequantize(output))
