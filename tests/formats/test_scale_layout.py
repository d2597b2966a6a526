"""Scale layouts against their flat-index formulas, evaluated one scale at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import InputError
from halfbyte.formats import swizzle_scales, unswizzle_scales
from halfbyte.formats.scale_layout import padded_shape


def flat_index(layout: str, r: int, c: int, padded_cols: int) -> int:
    if layout == "128x4":
        return (r // 128) * (padded_cols // 4) * 512 + (c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    return (r // 8) * (padded_cols // 4) * 32 + (c // 4) * 32 + (r % 8) * 4 + c % 4


@pytest.mark.parametrize("layout", ["128x4", "8x4"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (8, 4), (7, 5), (33, 3), (128, 8), (130, 6), (300, 12)])
def test_swizzle_equals_the_formula_and_pads_with_zero(layout: str, rows: int, cols: int) -> None:
    scales = torch.randint(1, 256, (2, rows, cols), dtype=torch.uint8)
    swizzled = swizzle_scales(scales, layout)
    padded_rows, padded_cols = padded_shape(layout, rows, cols)
    assert swizzled.shape == (2, padded_rows, padded_cols) and swizzled.is_contiguous()
    for matrix in range(2):
        expected = torch.zeros(padded_rows * padded_cols, dtype=torch.uint8)
        for r in range(rows):
            for c in range(cols):
                expected[flat_index(layout, r, c, padded_cols)] = scales[matrix, r, c]
        assert torch.equal(swizzled[matrix].flatten(), expected)


@given(st.sampled_from(["linear", "128x4", "8x4"]), st.integers(0, 300), st.integers(0, 20), st.integers(0, 3))
def test_unswizzle_undoes_swizzle(layout: str, rows: int, cols: int, batch: int) -> None:
    scales = torch.randint(0, 127, (batch, rows, cols), dtype=torch.uint8).view(torch.float8_e4m3fn)
    back = unswizzle_scales(swizzle_scales(scales, layout), layout, rows, cols)
    assert back.dtype == scales.dtype and torch.equal(back.view(torch.uint8), scales.view(torch.uint8))


def test_layouts_differ_where_the_shape_does_not() -> None:
    scales = torch.arange(128 * 8, dtype=torch.int32).to(torch.uint8).view(128, 8)
    layouts = [swizzle_scales(scales, layout) for layout in ("linear", "128x4", "8x4")]
    assert len({tuple(s.shape) for s in layouts}) == 1
    assert len({bytes(s.flatten().tolist()) for s in layouts}) == 3


def test_bad_input() -> None:
    with pytest.raises(InputError, match="unknown scale layout"):
        swizzle_scales(torch.zeros(4, 4, dtype=torch.uint8), "64x4")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rows of bytes"):
        swizzle_scales(torch.zeros(4, 4), "128x4")
    with pytest.raises(InputError, match=r"needed \[..., 128, 4\]"):
        unswizzle_scales(torch.zeros(4, 4, dtype=torch.uint8), "128x4", 4, 4)
