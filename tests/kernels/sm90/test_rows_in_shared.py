"""Rows of x in the shared memory of the direct kernel: their rounding; on a GPU the bits of the same kernel without them, and the layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from devices import on_hopper
from helpers import assert_close_rel, assert_equal_bits
from hopper_layers import ACTIVATIONS, make_experts, make_tokens
from ptx import run

import halfbyte as hb
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.kernels.reference.fused_moe import run as reference

# A code of h moves by a whole step where fp32 sums in another order fall on the other side of a rounding boundary.
LIMITS = {"bf16": {}, "fp8": {"token": 3e-2, "overall": 1e-2}}


def both(
    w: hb.ExpertWeights, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, activations: ActivationFormat, layout: str, offset: int = 0
) -> torch.Tensor:
    """Run the direct kernel with rows in shared memory, twice, and without; all must be equal."""
    from halfbyte.kernels.sm90 import expert_rows
    from halfbyte.kernels.sm90.configs import DIRECT
    from halfbyte.kernels.sm90.fused_moe import run as fused_moe

    results = []
    for tiles in (expert_rows.MAX_TILES_IN_SHARED, expert_rows.MAX_TILES_IN_SHARED, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(expert_rows, "MAX_TILES_IN_SHARED", tiles)
            out = torch.full_like(x, torch.nan)
            prepared = hb.prepare(w, layout).storage  # what calls of a layer share is kept with it
            fused_moe(x, prepared, ids, weights, activations=activations, out=out, config=DIRECT, expert_offset=offset)
            results.append(out)
    for other in results[1:]:
        assert_equal_bits(results[0], other)
    return results[0]


def test_the_assembly_rounds_through_e4m3() -> None:
    pytest.importorskip("triton")
    from halfbyte.kernels.sm90.rows_in_shared import _ROUND

    bf16 = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = torch.cat([bf16.float(), torch.randn(1 << 12) * 100]).clamp(-448, 448)  # clamp leaves NaN
    low, high = x.numpy(), x.roll(1).numpy()
    found = torch.from_numpy(run(_ROUND.value, ["r"], [low, high])[0]).view(torch.bfloat16).view(-1, 2)
    rounded = x.to(torch.float8_e4m3fn).bfloat16()
    assert torch.equal(found[:, 0].nan_to_num(1e9), rounded.nan_to_num(1e9))
    assert torch.equal(found[:, 1].nan_to_num(1e9), rounded.roll(1).nan_to_num(1e9))


def test_the_assembly_keeps_the_larger_magnitudes_and_nan() -> None:
    pytest.importorskip("triton")
    from halfbyte.kernels.sm90.rows_in_shared import _LARGER_MAGNITUDE

    x, so_far = torch.randn(4096).bfloat16(), torch.randn(4096).bfloat16().abs()
    x[7], x[8] = torch.nan, -torch.inf
    found = run(_LARGER_MAGNITUDE.value, ["r"], [x.view(torch.int32).numpy(), so_far.view(torch.int32).numpy()])[0]
    expected = np.maximum(x.abs().view(torch.int16).numpy(), so_far.view(torch.int16).numpy())
    assert np.array_equal(found.view(np.int16), expected) and np.isnan(torch.from_numpy(found).view(torch.bfloat16).float().numpy()[7])


@on_hopper
@pytest.mark.parametrize(("activations", "layout"), [("fp8", "hopper_fp8"), ("fp8", "hopper"), ("bf16", "hopper"), ("bf16", "hopper_fp8")])
@pytest.mark.parametrize(
    ("format", "hidden", "intermediate"), [(hb.NVFP4, 320, 2688), (hb.MXFP4, 2880, 2880), (hb.NVFP4, 1088, 1152), (hb.MXFP4, 256, 96)], ids=str
)
def test_bits_are_those_of_rows_that_an_earlier_launch_rounds(
    format: hb.BlockFormat, hidden: int, intermediate: int, activations: ActivationFormat, layout: str
) -> None:
    w = make_experts(6, hidden, intermediate, format, ACTIVATIONS["gpt-oss" if format is hb.MXFP4 else "swiglu"])
    for num_tokens in (1, 3, 4):
        x, ids, weights = make_tokens(num_tokens, hidden, 6, 3)
        out = both(w, x, ids, weights, activations, layout)
        assert_close_rel(out, reference(x, w, ids, weights, activations=activations), **LIMITS[activations])


@on_hopper
@pytest.mark.parametrize("activations", ["fp8", "bf16"])
def test_odd_routings(activations: ActivationFormat) -> None:
    w = make_experts(9, 256, 128, hb.NVFP4)
    x, ids, weights = make_tokens(7, 256, 9, 4)
    some = ids.clone()
    some[::2, 1], some[1], some[2] = -1, 77, some[2, 0]
    for routing, offset in ((torch.full_like(ids, 8), 0), (torch.full_like(ids, -1), 0), (some.long(), 0), (ids + 100, 100)):
        out = both(w, x, routing, weights, activations, "hopper_fp8", offset)
        assert_close_rel(out, reference(x, w, routing, weights, activations=activations, expert_offset=offset), **LIMITS[activations])


@on_hopper
def test_rows_of_any_magnitude_and_rows_that_are_not_finite() -> None:
    w = make_experts(5, 320, 128, hb.MXFP4)
    x, ids, weights = make_tokens(8, 320, 5, 2)
    x = (x * torch.logspace(-38, 30, 8, device="cuda").unsqueeze(1)).bfloat16()
    x[3] = 0
    both(w, x, ids, weights, "fp8", "hopper_fp8")
    x[0, 5], x[7, 9] = torch.inf, torch.nan
    both(w, x, ids, weights, "fp8", "hopper_fp8")
    ties = torch.randint(-255, 256, x.shape, device="cuda") * 2.0 ** torch.randint(-9, 3, x.shape, device="cuda")  # quotients that lie between codes
    both(w, ties.bfloat16(), ids, weights, "fp8", "hopper_fp8")
