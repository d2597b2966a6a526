"""The Triton quantisers against the codec, bit for bit: interpreted (in one subprocess, see the last test), compiled without a GPU, on a GPU."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import triton
from compile_only import compiling
from helpers import assert_equal_bits
from interpreted import DEVICE, INTERPRETED, gpu_only, not_interpreted, numeric, run_interpreted
from slow import slow_case

import halfbyte as hb
from halfbyte.errors import InputError
from halfbyte.experts import GPT_OSS_SWIGLU, RELU2, SWIGLU
from halfbyte.formats import quantize as codec
from halfbyte.formats.scale_layout import max_padded_rows, tile_rows
from halfbyte.kernels.problem import Problem
from halfbyte.kernels.quantize import QuantizedExperts
from halfbyte.kernels.quantizers.fp4 import programs_per_sm, tiles_for
from halfbyte.kernels.quantizers.fp4 import run as quantize
from halfbyte.kernels.quantizers.fp4_experts import run as kernel_quantize_experts
from halfbyte.kernels.reference import quantize as reference
from halfbyte.kernels.table import support

NAN, INF = float("nan"), float("inf")
LAYOUTS = ("linear", "128x4", "8x4")
DTYPES = (torch.bfloat16, torch.float16)


def rows_of(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Gaussian rows, from tiny to large."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x * torch.logspace(-3, 2, shape[-2]).unsqueeze(1)).to(dtype)


def difficult(dtype: torch.dtype, width: int = 64) -> torch.Tensor:
    """Rows whose blocks hold zeros, subnormals, infinities, NaN, the largest values, ties."""
    x = torch.zeros(12, width)
    info = torch.finfo(dtype)
    x[1] = -0.0
    x[2, ::3] = info.smallest_normal / 4
    x[3, ::5] = -info.tiny
    x[4], x[4, 3], x[4, 20] = torch.randn(width), INF, -INF
    x[5], x[5, 1], x[5, 17] = torch.randn(width), NAN, -NAN
    x[6] = NAN
    x[7], x[7, 0] = torch.randn(width), info.max
    x[8] = info.max
    x[9] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(width // 8)
    x[10] = torch.randn(width) * 1e-30
    x[11] = torch.linspace(-6, 6, width)
    return x.to(dtype)


def check(x: torch.Tensor, format: hb.BlockFormat, global_scale: torch.Tensor | float | None = None, **options: object) -> None:
    expected = codec(x, format, global_scale, **options)
    on_device = global_scale.to(DEVICE) if isinstance(global_scale, torch.Tensor) else global_scale
    actual = quantize(x.to(DEVICE), format, on_device, **options)
    assert_equal_bits(actual.codes.cpu(), expected.codes)
    assert_equal_bits(actual.scales.cpu(), expected.scales)
    assert actual.format is expected.format and actual.scale_layout == expected.scale_layout
    if expected.global_scale is not None:
        assert_equal_bits(actual.global_scale.cpu().reshape(-1), expected.global_scale.reshape(-1))


@numeric
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("format", "dtype"), [(hb.NVFP4, torch.bfloat16), (hb.MXFP4, torch.float16)])
def test_shapes(format, dtype, layout):
    more_than_a_tile = tile_rows(layout) + 1 if INTERPRETED else 129
    for shape in ((1, 64), (7, 32), (more_than_a_tile, 96), (2, 3, 160), (0, 64), (3, 0)):
        check(rows_of(*shape, dtype=dtype) if shape[-2] else torch.empty(shape, dtype=dtype), format, scale_layout=layout)
    if format is hb.NVFP4:
        check(rows_of(5, 48, dtype=dtype), format, 0.01, scale_layout=layout)


@numeric
@pytest.mark.parametrize("dtype", DTYPES)
def test_difficult_values(dtype):
    x = difficult(dtype)
    for rule in ("ceil", "floor", "even"):
        check(x, hb.MXFP4, scale_rule=rule)
    for four_over_six in (False, True):
        check(x, hb.NVFP4, four_over_six=four_over_six)
        for scale in (1.0, 1e-44, 1e-20, 1e20, 5e37, 1 / 3):
            check(x, hb.NVFP4, scale, four_over_six=four_over_six)


@numeric
def test_nan_spoils_its_own_block_only():
    x = rows_of(4, 128)
    spoiled = x.clone()
    spoiled[1, 40] = NAN
    clean, actual = (quantize(t.to(DEVICE), hb.NVFP4, 0.01) for t in (x, spoiled))
    different = (clean.codes != actual.codes).cpu().nonzero().tolist()
    assert all(row == 1 and 16 <= byte < 24 for row, byte in different) and different
    assert (clean.scales.view(torch.uint8) != actual.scales.view(torch.uint8)).sum() <= 1
    assert hb.formats.count_nonfinite(spoiled) == 1


@numeric
def test_global_scales_of_matrices_rows_and_groups():
    x = rows_of(2, 6, 64)
    for shape in ((2,), (2, 2), (2, 6)):
        scales = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 0.01 + 1e-3
        check(x, hb.NVFP4, scales, scale_layout="128x4")
        check(x, hb.NVFP4, scales, four_over_six=True)


@numeric
def test_any_stride():
    wide = rows_of(6, 192)
    odd = rows_of(6, 193)  # one row of it is contiguous to torch, and so are rows that start anywhere
    views = (wide[:, 16:80], wide[:, 8:72], wide[::2, :64], wide[:, :128:2], wide.T[:, :0], wide[:1].expand(6, 192))
    for view in (*views, odd[:1, :64], odd[:1, 1:65], odd.flatten()[3:195].view(3, 64)):
        if view.shape[1] % 32 == 0:
            check(view, hb.MXFP4)
            check(view, hb.NVFP4)


def offsets_of(counts: list[int], before: int = 0) -> torch.Tensor:
    return torch.tensor([before, *(before + total for total in itertools.accumulate(counts))], dtype=torch.int32)


SPLITS = [[0, 3, 0, 130, 2], [0, 0, 0], [0] * 16 + [7]] if INTERPRETED else [[5], [1] * 9, [128, 129, 127], [2] * 17, [0, 0, 0], [0, 3, 0, 130, 2]]

# Interpreted, a program takes a quarter of a second, and "row" has one for each row.
LOOKUPS = [(counts, lookup) for counts in SPLITS for lookup in ("scan", "search") + (() if INTERPRETED else ("row",))] + [([0, 1, 9], "row")]


def check_experts(
    counts: list[int],
    width: int,
    format: hb.BlockFormat,
    layout: str,
    lookup: str,
    *,
    before: int = 0,
    after: int = 0,
    dtype: torch.dtype = DTYPES[0],
) -> None:
    """Against the codec, expert by expert, in buffers that were full of 99: what no expert covers must still be."""
    offsets = offsets_of(counts, before)
    x = rows_of(before + sum(counts) + after, width, dtype=dtype)
    num_rows, block, tile = x.shape[0], format.block, tile_rows(layout)
    scales = torch.rand(len(counts), generator=torch.Generator().manual_seed(1)) * 0.01 + 1e-3 if format is hb.NVFP4 else None
    columns = width // block if layout == "linear" else -(-width // block // 4) * 4
    expected = [torch.full((num_rows, width // 2), 99, dtype=torch.uint8)]
    expected.append(torch.full((max_padded_rows(num_rows, len(counts), tile), columns), 99, dtype=torch.uint8))
    actual = [part.to(DEVICE) for part in [*map(torch.clone, expected), torch.full_like(offsets, 99)]]
    starts = [0]
    for expert, (first, end) in enumerate(itertools.pairwise(offsets.tolist())):
        part = codec(x[first:end], format, None if scales is None else scales[expert], scale_layout=layout)
        expected[0][first:end] = part.codes
        start = first if layout == "linear" else starts[-1]
        expected[1][start : start + part.scales.shape[0]] = part.scales.view(torch.uint8)
        starts.append(starts[-1] + -(-(end - first) // tile) * tile)
    on_device = [None if part is None else part.to(DEVICE) for part in (x, offsets, scales)]
    kernel_quantize_experts(*on_device, format, layout, *actual, lookup=lookup)
    assert_equal_bits(actual[0].cpu(), expected[0])
    assert_equal_bits(actual[1].cpu(), expected[1])
    assert actual[2].tolist() == ([99] * len(starts) if layout == "linear" else starts)


@numeric
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("counts", "lookup"), LOOKUPS, ids=str)
def test_experts(counts, lookup, layout):
    if INTERPRETED:  # a few rows more than a tile show what many do
        counts = [min(count, tile_rows(layout) + 2) for count in counts]
    check_experts(counts, 96, hb.NVFP4, layout, lookup, before=2, after=3)
    check_experts(counts, 64, hb.MXFP4, layout, lookup, after=1, dtype=torch.float16)


@numeric
def test_offsets_outside_of_the_rows_write_nothing_there():
    x, offsets = rows_of(4, 32).to(DEVICE), torch.tensor([-3, 2, 9], dtype=torch.int32, device=DEVICE)
    q = [torch.full(shape, 99, dtype=torch.uint8, device=DEVICE) for shape in ((4, 16), (256, 4))]
    kernel_quantize_experts(x, offsets, torch.ones(2, device=DEVICE), hb.NVFP4, "128x4", *q, torch.empty_like(offsets))
    assert_equal_bits(q[0].cpu(), codec(x.cpu(), hb.NVFP4, 1.0).codes)


def differing(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The fraction of bytes that differ."""
    assert actual.shape == expected.shape
    return (actual.cpu().view(torch.uint8) != expected.cpu().view(torch.uint8)).float().mean().item()


@numeric
@pytest.mark.parametrize(("dtype", "activation"), [(torch.bfloat16, SWIGLU), (torch.float16, GPT_OSS_SWIGLU)], ids=["silu", "gpt-oss"])
def test_activation(dtype, activation):
    """exp is the device's: one product in a thousand may round the other way. Whatever else is wrong changes most bytes."""
    gate_up = (3 * torch.randn(37 if INTERPRETED else 133, 384, generator=torch.Generator().manual_seed(0))).to(dtype)
    for format, scale, layout in ((hb.NVFP4, 0.01, "128x4"), (hb.MXFP4, None, "linear")):
        expected = reference.run(gate_up, format, scale, activation=activation, scale_layout=layout)
        actual = quantize(gate_up.to(DEVICE), format, scale, activation=activation, scale_layout=layout)
        assert differing(actual.codes, expected.codes) < 1e-3 and differing(actual.scales, expected.scales) < 1e-3
        swapped = reference.run(gate_up.roll(192, 1), format, scale, activation=activation, scale_layout=layout)
        assert differing(swapped.codes, expected.codes) > 0.5


@numeric
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    """As in test_activation, the sum of squares has another order."""
    x, weight = rows_of(9 if INTERPRETED else 37, 160, dtype=dtype), (1 + torch.randn(160, generator=torch.Generator().manual_seed(2)) / 4).to(dtype)
    for format, scale in ((hb.NVFP4, 0.002), (hb.MXFP4, None)):
        expected = reference.run(x, format, scale, norm=(weight, 1e-6), scale_layout="128x4")
        actual = quantize(x.to(DEVICE), format, scale, norm=(weight.to(DEVICE), 1e-6), scale_layout="128x4")
        assert differing(actual.codes, expected.codes) < 2e-3 and differing(actual.scales, expected.scales) < 2e-3
        assert differing(reference.run(x, format, scale, norm=(weight.flip(0), 1e-6)).codes, expected.codes) > 0.3
        assert differing(reference.run(x, format, scale, norm=(weight, 1e-2)).codes, expected.codes) > 0.01


def test_rms_norm_quantize():
    x, weight = rows_of(5, 64), torch.linspace(0.5, 2, 64).bfloat16()
    normed = torch.nn.functional.rms_norm(x.float(), (64,), weight.float(), 1e-5).bfloat16()
    q = hb.rms_norm_quantize(x, weight, hb.NVFP4, 0.002, eps=1e-5)
    assert differing(q.codes, codec(normed, hb.NVFP4, 0.002).codes) < 2e-3
    for bad, message in (
        ({"weight": weight[:32]}, "weight does not fit"),
        ({"weight": weight.half()}, "weight does not fit"),
        ({"global_scale": None}, "needs a global scale"),
        ({"x": x[:, :40]}, "does not divide"),
    ):
        with pytest.raises(InputError, match=message):
            hb.rms_norm_quantize(**{"x": x, "weight": weight, "format": hb.NVFP4, "global_scale": 0.002, **bad})


@numeric
def test_activation_of_experts():
    gate_up, offsets, scales = rows_of(40, 192) * 3, offsets_of([13, 0, 20], before=3), torch.tensor([0.01, 1.0, 0.02])
    actual, expected = [
        QuantizedExperts(torch.full((40, 48), 9, dtype=torch.uint8), torch.full((384, 8), 9, dtype=torch.uint8), torch.zeros(4, dtype=torch.int32))
        for _ in range(2)
    ]
    on_device = [part.to(DEVICE) for part in (gate_up, offsets, scales, *actual)]
    kernel_quantize_experts(*on_device[:3], hb.NVFP4, "128x4", *on_device[3:], activation=SWIGLU)
    hb.quantize_experts(
        gate_up,
        offsets,
        scales,
        activation=SWIGLU,
        out=QuantizedExperts(expected.codes, expected.scales.view(torch.float8_e4m3fn), expected.scale_offsets),
    )
    assert differing(on_device[3], expected.codes) < 1e-3 and differing(on_device[4], expected.scales) < 1e-3
    assert on_device[5].tolist() == expected.scale_offsets.tolist() == [0, 128, 128, 256]


def test_silu_mul_quantize_rounds_the_product_first():
    gate_up = rows_of(9, 128) * 3
    gate, up = gate_up.float().chunk(2, dim=1)
    product = (torch.nn.functional.silu(gate) * up).bfloat16()
    assert differing(hb.silu_mul_quantize(gate_up, hb.NVFP4, 0.01).codes, codec(product, hb.NVFP4, 0.01).codes) < 1e-3
    for bad, message in (
        ({"activation": RELU2}, "not fused"),
        ({"global_scale": None}, "needs a global scale"),
        ({"gate_up": gate_up[:, :127]}, "do not make pairs"),
        ({"gate_up": gate_up[:, :72]}, "does not divide"),
        ({"scale_layout": "4x4"}, "unknown scale layout"),
    ):
        with pytest.raises(InputError, match=message):
            hb.silu_mul_quantize(**{"gate_up": gate_up, "format": hb.NVFP4, "global_scale": 0.01, **bad})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_public_functions_on_a_cpu(layout):
    x, offsets, scales = rows_of(9, 64), offsets_of([4, 0, 5]), torch.tensor([0.01, 0.02, 0.03])
    q = hb.quantize_experts(x, offsets, scales, scale_layout=layout)
    again = hb.quantize_experts(x, offsets, scales, scale_layout=layout, out=q)
    assert again.codes is q.codes
    part = codec(x[4:], hb.NVFP4, 0.03, scale_layout=layout)
    start = 4 if layout == "linear" else q.scale_offsets[2]
    assert_equal_bits(q.codes[4:], part.codes)
    assert_equal_bits(q.scales[start : start + part.scales.shape[0]], part.scales)
    assert_equal_bits(hb.quantize(x, hb.MXFP4, scale_layout=layout).scales, codec(x, hb.MXFP4, scale_layout=layout).scales)
    empty = hb.quantize_experts(x[:0], torch.zeros(4, dtype=torch.int32), scales, scale_layout=layout)
    assert empty.codes.shape == (0, 32) and empty.scale_offsets.tolist() == [0] * 4


GOOD = {"x": torch.zeros(3, 32), "expert_offsets": offsets_of([1, 2]), "global_scales": torch.ones(2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 24)}, "does not divide into NVFP4 blocks"),
        ({"x": torch.zeros(3, 32, dtype=torch.float64)}, "cannot quantise these rows"),
        ({"x": torch.zeros(1, 3, 32)}, "cannot quantise these rows"),
        ({"expert_offsets": torch.tensor([0, 1, 3])}, "expert_offsets do not fit"),
        ({"expert_offsets": torch.zeros(1, dtype=torch.int32)}, "expert_offsets do not fit"),
        ({"global_scales": torch.ones(3)}, "global_scales do not fit"),
        ({"global_scales": torch.ones(2, dtype=torch.float64)}, "global_scales do not fit"),
        ({"global_scales": None}, "global_scales do not fit"),
        ({"format": hb.MXFP4}, "has no global scales"),
        ({"scale_layout": "32x4"}, "unknown scale layout"),
        ({"out": QuantizedExperts(*[torch.zeros(1)] * 3)}, "out does not fit"),
        ({"backend": "cutlass"}, "unknown kernel of quantize_experts"),
        ({"global_scales": torch.ones(2, device="meta")}, "different devices"),
        ({"global_scales": torch.tensor([1.0, float("nan")])}, "a global scale is not usable"),
        ({"global_scales": torch.tensor([0.0, 1.0])}, "a global scale is not usable"),
        ({"expert_offsets": torch.tensor([0, 2, 1], dtype=torch.int32)}, r"expert_offsets do not rise from 0 to the rows .given \[0, 2, 1\]"),
        ({"expert_offsets": torch.tensor([-1, 2, 3], dtype=torch.int32)}, "expert_offsets do not rise"),
        ({"expert_offsets": torch.tensor([0, 2, 4], dtype=torch.int32)}, r"expert_offsets do not rise .*within 0 \.\. 3"),
    ],
)
def test_bad_input_of_experts(change, message):
    arguments = {**GOOD, **change}
    with pytest.raises(InputError, match=message):
        hb.quantize_experts(**arguments)


@pytest.mark.parametrize(
    ("x", "format", "options", "message"),
    [
        (torch.zeros(3, 24), hb.NVFP4, {}, "does not divide"),
        (torch.zeros(32), hb.NVFP4, {}, "needs rows and columns"),
        (torch.zeros(3, 32).int(), hb.NVFP4, {}, "cannot quantise this dtype"),
        (torch.zeros(3, 32), hb.MXFP4, {"global_scale": 1.0}, "belong to NVFP4"),
        (torch.zeros(3, 32), hb.NVFP4, {"global_scale": torch.ones(5)}, "global scale does not fit"),
        (torch.zeros(3, 32), hb.NVFP4, {"scale_layout": "4x4"}, "unknown scale layout"),
    ],
)
def test_bad_input(x, format, options, message):
    with pytest.raises(InputError, match=message):
        hb.quantize(x, format, **options)


UNUSABLE = [0, 0.0, -1.0, float("nan"), float("inf"), "1", torch.tensor(0.0), torch.tensor([1.0, 1.0, -1.0]), torch.tensor(float("nan"))]


@pytest.mark.parametrize("scale", UNUSABLE, ids=repr)
def test_a_global_scale_that_spoils_everything(scale):
    x, message = torch.ones(3, 2, 32), "a global scale is not usable .*needed a finite number > 0"
    with pytest.raises(InputError, match=message):
        hb.quantize(x, hb.NVFP4, scale)
    with pytest.raises(InputError, match=message):
        hb.silu_mul_quantize(torch.ones(3, 2, 64), hb.NVFP4, scale)
    with pytest.raises(InputError, match=message):
        hb.rms_norm_quantize(x, torch.ones(32), hb.NVFP4, scale)


def test_rows_that_no_expert_covers_are_no_error():
    x, offsets = torch.randn(6, 32), torch.tensor([1, 1, 4], dtype=torch.int32)
    q = hb.quantize_experts(x, offsets, torch.ones(2), scale_layout="linear")
    assert_equal_bits(q.codes[1:4], codec(x[1:4], hb.NVFP4, torch.tensor(1.0)).codes)


def test_the_table_prefers_it_on_a_gpu():
    def found(arch: str, dtype: torch.dtype) -> str | None:
        answer = support(Problem("quantize_experts", hb.Target("", arch, 1, 0, 0.0), hb.NVFP4, dtype=dtype))["triton"]
        return None if answer.verdict == "yes" else answer.reason

    assert found("sm_90", torch.bfloat16) is found("sm_80", torch.float16) is None
    assert found("sm_75", torch.bfloat16) == "needs compute capability 8.0 or newer, this is sm_75"
    assert found("sm_90", torch.float32) == "takes bfloat16 and float16, not torch.float32"
    assert found("cpu", torch.bfloat16) == "needs a CUDA GPU, this is a CPU"


def test_config():
    assert tiles_for(64, 448, 16, "128x4", 132).rows == 4
    assert tiles_for(65536, 448, 16, "128x4", 132).rows == 32
    for columns, block, layout in itertools.product((2, 3, 4, 64, 180, 512), (16, 32), LAYOUTS):
        config = tiles_for(4096, columns, block, layout, 132)
        assert config.rows % config.block_rows == 0 and (layout == "linear" or tile_rows(layout) % config.rows == 0)
    assert programs_per_sm(32, 0, 4) == 12 and programs_per_sm(255, 0, 16) == 1 and programs_per_sm(32, 90000, 4) == 1


@not_interpreted
@pytest.mark.parametrize(
    ("format", "capability", "dtype", "lookups"),
    [
        (hb.NVFP4, 80, torch.float16, ()),
        slow_case(hb.NVFP4, 90, torch.bfloat16, ("scan", "search", "row")),
        (hb.NVFP4, 100, torch.bfloat16, ()),
        slow_case(hb.MXFP4, 80, torch.bfloat16, ("scan", "row")),
        (hb.MXFP4, 90, torch.float16, ()),
    ],
)
def test_compiles_lean(format, dtype, capability, lookups):
    x, offsets, scale = torch.empty(256, 7168, dtype=dtype), offsets_of([100, 156]), torch.ones(2) if format is hb.NVFP4 else None
    with compiling(capability) as launched:
        quantize(x, format, None if scale is None else 1.0, scale_layout="128x4")
        out = hb.quantize_experts(x, offsets, scale, format, backend="reference")
        for lookup in lookups:
            kernel_quantize_experts(x, offsets, scale, format, "128x4", *out, lookup=lookup)
    names = {
        "scan": ["quantize_experts_kernel"],
        "search": ["expert_ends_kernel", "quantize_experts_kernel"],
        "row": ["quantize_single_rows_kernel"],
    }
    assert [compiled.name for compiled in launched] == ["quantize_kernel", *itertools.chain.from_iterable(names[lookup] for lookup in lookups)]
    for compiled in launched:
        assert compiled.spill_bytes == 0 and compiled.registers <= (96 if format is hb.NVFP4 else 64) and compiled.shared_bytes <= 1024
        assert "div.full" not in compiled.ptx
    assert launched[0].shared_bytes == 0 and "bar.sync" not in launched[0].ptx  # nothing is passed between threads
    assert ".ftz.f32 %" not in launched[0].ptx.replace("rcp.approx.ftz", "")
    loads = re.findall(r"\bLDG\.E\.?[A-Z.]*128", launched[0].sass)
    assert len(loads) == 8  # 32 elements a thread before the loop and, a step ahead, in it
    # Of 32 elements; for NVFP4 170 more for each block that is not ordinary.
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", launched[0].sass, flags=re.M))
    assert instructions < (1296 if format is hb.NVFP4 else 736), f"{instructions} instructions for 32 elements a thread"


@pytest.mark.slow
@not_interpreted
@pytest.mark.parametrize(("format", "dtype"), [(hb.NVFP4, torch.bfloat16), (hb.MXFP4, torch.float16)])
def test_compiles_with_an_activation_or_a_norm(format, dtype):
    x, scale, offsets = torch.empty(64, 4096, dtype=dtype), 1.0 if format is hb.NVFP4 else None, offsets_of([30, 34])
    scales = None if scale is None else torch.ones(2)
    with compiling(90) as launched:
        quantize(x, format, scale, activation=GPT_OSS_SWIGLU)
        quantize(x, format, scale, norm=(torch.empty(4096, dtype=dtype), 1e-6))
        out = hb.quantize_experts(x, offsets, scales, format, activation=SWIGLU, backend="reference")
        kernel_quantize_experts(x, offsets, scales, format, "128x4", *out, activation=SWIGLU)
        if format is hb.NVFP4:
            quantize(x, format, scale, four_over_six=True)
    names = ["quantize_kernel", "inverse_rms_kernel", "quantize_kernel", "quantize_single_rows_kernel"] + ["quantize_kernel"] * (format is hb.NVFP4)
    assert [compiled.name for compiled in launched] == names
    max_registers = 144 if triton.__version__.startswith("3.6") else 128
    assert all(compiled.registers <= max_registers and compiled.spill_bytes <= 64 for compiled in launched)


@gpu_only
@pytest.mark.parametrize("width", [64, 96, 1536, 2880, 4096, 7168, 16384])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4])
def test_matrix_on_a_gpu(format, layout, width):
    for num_rows, dtype in itertools.product((0, 1, 127, 128, 129, 1000), DTYPES):
        if num_rows < 1000 or dtype == torch.bfloat16:
            check(rows_of(num_rows, width, dtype=dtype) if num_rows else torch.empty(0, width, dtype=dtype), format, scale_layout=layout)


@gpu_only
def test_every_bf16_value_on_a_gpu():
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for dtype in DTYPES:
        x = values.view(dtype).view(64, 1024)
        for scale in (1.0, 1 / 3, 1e-3, 0.7, 1e-30, 1e30, 2.0**-140):
            for four_over_six in (False, True):
                check(x, hb.NVFP4, scale, four_over_six=four_over_six)
        for rule in ("ceil", "floor", "even"):
            check(x, hb.MXFP4, scale_rule=rule)


@gpu_only
def test_reciprocals_on_a_gpu():
    """All block scales of 4,096 global scales with random mantissas, in blocks whose elements are near every tie."""
    scales = torch.rand(4096, generator=torch.Generator().manual_seed(3)) + 0.5
    x = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]).repeat(2).repeat(4096, 64) * scales[:, None]
    x = x * torch.logspace(-3, 2, 64, base=2).repeat_interleave(16)
    check(x.bfloat16(), hb.NVFP4, scales)
    check(x.half(), hb.NVFP4, scales)


@gpu_only
@pytest.mark.parametrize("lookup", ["row", "scan", "search"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("counts", [[300], [0, 1, 127, 128, 129, 0], [3] * 257, [0] * 100 + [2000] + [0] * 155, [17] * 33], ids=lambda c: f"{len(c)}")
def test_experts_on_a_gpu(counts, layout, lookup):
    check_experts(counts, 7168, hb.NVFP4, layout, lookup, before=5, after=7)
    check_experts(counts, 2880, hb.MXFP4, layout, lookup)
    check_experts(counts, 64, hb.NVFP4, layout, lookup, dtype=torch.float16)


@gpu_only
def test_repeats_bit_for_bit():
    x, offsets = rows_of(5000, 4096).cuda(), offsets_of([20] * 250).cuda()
    scales = torch.rand(250, device="cuda") + 0.1
    first = hb.quantize_experts(x, offsets, scales)
    for _ in range(50):
        again = hb.quantize_experts(x, offsets, scales)
        rows = int(again.scale_offsets[-1])
        assert torch.equal(first.codes, again.codes)
        assert torch.equal(first.scales[:rows].view(torch.uint8), again.scales[:rows].view(torch.uint8))


@gpu_only
@pytest.mark.parametrize("num_experts", [8, 300])
def test_replays_in_a_cuda_graph_with_other_offsets(num_experts):
    x, scales = rows_of(1024, 2048).cuda(), torch.rand(num_experts).cuda() + 0.1
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device="cuda")
    hb.quantize_experts(x, offsets, scales)  # compile outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = hb.quantize_experts(x, offsets, scales)
    for seed in range(3):
        bounds = torch.randint(0, 1025, (num_experts + 1,), generator=torch.Generator().manual_seed(seed)).sort().values.int()
        offsets.copy_(bounds)
        graph.replay()
        expected = hb.quantize_experts(x.cpu(), bounds, scales.cpu())
        assert captured.scale_offsets.tolist() == expected.scale_offsets.tolist()
        assert_equal_bits(captured.codes.cpu()[bounds[0] : bounds[-1]], expected.codes[bounds[0] : bounds[-1]])
        rows = expected.scale_offsets[-1]
        assert_equal_bits(captured.scales.cpu()[:rows], expected.scales[:rows])


@not_interpreted
def test_interpreted():
    """Everything marked `numeric`, on the CPU."""
    assert run_interpreted(__file__) > 35
