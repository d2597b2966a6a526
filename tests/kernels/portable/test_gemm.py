"""The portable Triton MoE against the reference: interpreted on a CPU (see `test_interpreted`), compiled without a GPU, on a GPU."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from compile_only import SHARED_LIMIT, compiling
from helpers import assert_close_rel, assert_equal_bits
from interpreted import DEVICE, INTERPRETED, gpu_only, not_interpreted, numeric, run_interpreted
from slow import slow_case

import halfbyte as hb
from halfbyte.errors import UnsupportedError
from halfbyte.experts import DEEPSEEK_V4_SWIGLU, GEGLU, GEGLU_TANH, GPT_OSS_SWIGLU, RELU2, SWIGLU, Activation, ExpertWeights
from halfbyte.formats import QuantTensor
from halfbyte.formats.activation_formats import round_trip
from halfbyte.kernels.portable.fused_moe import run as fused_moe
from halfbyte.kernels.portable.gemm import compute_dtype, grouped_gemm_w4a16, row_block_bound, tiles
from halfbyte.kernels.reference.fused_moe import run as reference_fused_moe
from halfbyte.kernels.shared.encode_rows import encode_rows

pytestmark = pytest.mark.usefixtures("uninitialised_memory_shows")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Interpreted bf16 stores truncate (Triton 3.9), so the interpreter checks fp16 and fp32 tightly and bf16 by the general rule.
TOLERANCE = {BF16: (1e-2, 5e-3), FP16: (2e-3, 1e-3), FP32: (1e-4, 1e-4)}
EXPERTS, TOP_K = 5, 3
# Hidden and intermediate size: small, for the interpreter; multiples neither of a tile's 64 columns nor (but for MXFP4 in fp32) of its 32 or 64 k.
SIZES = {hb.NVFP4: (48, 80), hb.MXFP4: (32, 96)}


def make_experts(format=hb.NVFP4, activation: Activation = SWIGLU, *, bias=True, sizes=None, experts=EXPERTS, row_scales=False) -> ExpertWeights:
    """Random experts on DEVICE, large enough to reach the limits of clamped activations; gate and up differ in their global scales."""
    hidden, intermediate = sizes or SIZES[format]
    random = torch.Generator(DEVICE).manual_seed(0)
    halves = activation.halves
    gate_up = torch.randn(experts, halves, intermediate, hidden, generator=random, device=DEVICE) / 3
    gate_up[:, -1] *= 1.7
    w13, global_scale = gate_up.flatten(1, 2), None
    if format is hb.NVFP4:
        global_scale = gate_up.abs().amax(3).flatten(1) if row_scales else gate_up.abs().amax((2, 3))
        global_scale = (global_scale if row_scales or halves == 2 else global_scale[:, 0]) / (6 * 448)
    w2 = torch.randn(experts, hidden, intermediate, generator=random, device=DEVICE) / 8
    biases = {}
    if bias:
        biases["w13_bias"] = torch.randn(w13.shape[:2], generator=random, device=DEVICE).bfloat16()
        biases["w2_bias"] = torch.randn(w2.shape[:2], generator=random, device=DEVICE)
    return ExpertWeights(hb.quantize(w13, format, global_scale), hb.quantize(w2, format), activation, **biases)


def make_tokens(w: ExpertWeights, num_tokens: int = 11, dtype: torch.dtype = FP32, top_k: int = TOP_K) -> tuple[torch.Tensor, ...]:
    random = torch.Generator(DEVICE).manual_seed(1)
    hidden = torch.randn(num_tokens, w.hidden, generator=random, device=DEVICE).to(dtype)
    ids = torch.rand(num_tokens, w.num_experts, generator=random, device=DEVICE).argsort(dim=1)[:, :top_k].int()
    return hidden, ids, torch.rand(ids.shape, generator=random, device=DEVICE) + 0.1


def check(w: ExpertWeights, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, **options) -> torch.Tensor:
    """Compare with the reference before the last rounding."""
    out = torch.full(hidden.shape, float("nan"), device=DEVICE)
    assert fused_moe(hidden, w, ids, weights, out=out, **options) is out
    token, overall = TOLERANCE[hidden.dtype]
    assert_close_rel(out, reference_fused_moe(hidden, w, ids, weights, out=torch.empty_like(out), **options), token=token, overall=overall)
    if INTERPRETED:  # where every call takes seconds, `test_half_precision` alone looks at the rounding
        return out.to(hidden.dtype)
    rounded = fused_moe(hidden, w, ids, weights, **options)
    assert_equal_bits(rounded, out.to(hidden.dtype))
    return rounded


@numeric
@pytest.mark.parametrize(
    ("format", "activation"),
    [*((hb.NVFP4, a) for a in (SWIGLU, GPT_OSS_SWIGLU, DEEPSEEK_V4_SWIGLU, GEGLU, GEGLU_TANH, RELU2)), (hb.MXFP4, GPT_OSS_SWIGLU), (hb.MXFP4, RELU2)],
    ids=lambda value: f"{value.kind}-{value.limit}" if isinstance(value, Activation) else repr(value),
)
def test_equals_the_reference(format, activation):
    w = make_experts(format, activation)
    check(w, *make_tokens(w))


@numeric
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
def test_half_precision(format, dtype):
    w = make_experts(format, bias=False)
    hidden, ids, weights = make_tokens(w, dtype=dtype)
    out = check(w, hidden, ids, weights)
    assert_equal_bits(fused_moe(hidden, w, ids, weights), out.to(dtype))  # rounded once


@numeric
@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
def test_every_code_and_scale_is_decoded(format):
    """Exact bytes: one expert, x selects columns one by one, scales far apart."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 16, 16)
    blocks = 32 // format.block
    if format is hb.NVFP4:
        scales = torch.arange(0, 127, 4, dtype=torch.uint8, device=DEVICE).view(1, 16, blocks).view(torch.float8_e4m3fn)
        weight = QuantTensor(codes, scales, torch.tensor([0.5], device=DEVICE), format)
    else:
        weight = QuantTensor(codes, torch.arange(120, 136, dtype=torch.uint8, device=DEVICE).view(1, 16, blocks), None, format)
    for dtype in (FP32, FP16) if INTERPRETED else (FP32, FP16, BF16):
        out = torch.full((32, 16), float("nan"), device=DEVICE)
        grouped_gemm_w4a16(torch.eye(32, dtype=dtype, device=DEVICE), weight, torch.tensor([0, 32], dtype=torch.int32, device=DEVICE), out)
        assert torch.equal(out, weight.dequantize()[0].T)


def one_expert_each(num_tokens: int, expert: int) -> torch.Tensor:
    return torch.full((num_tokens, 1), expert, dtype=torch.int32)


@numeric
@pytest.mark.parametrize("dtype", [FP16, BF16] if not INTERPRETED else [FP16], ids=str)
@pytest.mark.parametrize(
    "ids",
    [
        one_expert_each(5, 3),
        one_expert_each(150, 4),  # more than a block of rows, few experts with any
        torch.tensor([[0, 1, 2], [2, 1, 0], [4, 0, 4]], dtype=torch.int32),  # empty experts, an expert twice
        torch.tensor([[3, 4]]),  # T = 1, int64
        torch.tensor([[-1, 4], [-1, -1], [EXPERTS, 2]], dtype=torch.int32),
        torch.full((4, 2), -1, dtype=torch.int32),
        torch.empty(0, 3, dtype=torch.int32),
    ],
    ids=["all-to-one", "many-to-one", "empty-and-repeated", "one-token", "absent-ids", "all-absent", "no-token"],
)
def test_degenerate_routing(ids, dtype):
    w = make_experts()
    hidden = make_tokens(w, len(ids), dtype)[0]
    weights = torch.rand(ids.shape) + 0.1
    weights[ids < 0] = float("nan")  # the weight of an absent expert is never looked at
    check(w, hidden, ids.to(DEVICE), weights.to(DEVICE))


@numeric
@pytest.mark.parametrize(("experts", "num_tokens"), [(1, 1), (1, 140), (2, 70), (5, 150)])
def test_blocks_of_every_height(experts, num_tokens):
    """The average number of rows chooses the height; the load is skewed, so that other experts have less than one block or several."""
    w = make_experts(experts=experts)
    hidden, ids, weights = make_tokens(w, num_tokens, FP16, top_k=1)
    ids[: num_tokens // 2] = 0
    check(w, hidden, ids, weights)
    if not INTERPRETED:
        check(w, hidden.bfloat16(), ids, weights)


@numeric
@pytest.mark.parametrize("dtype", [FP16] if INTERPRETED else [BF16, FP16, FP32], ids=str)
def test_batch_invariant(dtype, monkeypatch):
    """A token alone, in parts of other heights and in the whole batch: the same bits, right ones."""
    if INTERPRETED:  # on some CPUs BLAS adds up a row in another order where it stands elsewhere in the matrix
        monkeypatch.setattr(np, "matmul", lambda a, b, dtype: (a[:, :, None] * b[None]).sum(axis=1, dtype=dtype))
    w = make_experts(experts=2)
    hidden, ids, weights = make_tokens(w, 140, dtype, top_k=1)
    whole = check(w, hidden, ids, weights, batch_invariant=True)
    for part in (slice(0, 1), slice(139, 140), slice(7, 40), slice(40, 139)):
        assert_equal_bits(fused_moe(hidden[part], w, ids[part], weights[part], batch_invariant=True), whole[part])


@numeric
def test_one_global_scale_a_row():
    w = make_experts(row_scales=True)
    assert w.w13.global_scale.shape == (EXPERTS, 2 * w.intermediate)
    check(w, *make_tokens(w))


# h of the kernel and of the reference differ in last bits, and one on the other side of a rounding boundary is a whole code away: a step of 2^-3 in
# e4m3, of up to 2^-1 in e2m1, or a block, when its scale moves. Each product is held to tight bounds: `test_each_product_on_quantised_rows`. The
# interpreter truncates h to bf16 (see above), which moves half of it: only fp16 there.
LAYER = {"fp8": {"token": 3e-2, "overall": 1e-2}, "mxfp8": {"token": 3e-2, "overall": 1e-2}, "nvfp4": {"token": 8e-2, "overall": 3e-2}}


def calibrated(w: ExpertWeights) -> ExpertWeights:
    """With input scales, one of them so small that some values are cut."""
    random = torch.Generator(DEVICE).manual_seed(3)
    halves = (2,) if w.activation.gated else ()
    scales = (torch.rand(w.num_experts, *shape, generator=random, device=DEVICE) * 1e-3 for shape in (halves, ()))
    return replace(w, **dict(zip(("w13_input_scale", "w2_input_scale"), scales, strict=True)))


@numeric
@pytest.mark.parametrize("dtype", [FP16] if INTERPRETED else [BF16, FP16], ids=str)
@pytest.mark.parametrize(("format", "activations"), [(hb.NVFP4, "nvfp4"), (hb.MXFP4, "mxfp8"), (hb.MXFP4, "fp8")], ids=str)
def test_quantised_activations(format, activations, dtype):
    for w in (make_experts(format), calibrated(make_experts(format, GPT_OSS_SWIGLU))):
        hidden, ids, weights = make_tokens(w, 3, dtype, top_k=2)
        ids[0] = -1
        out = torch.full(hidden.shape, float("nan"), device=DEVICE)
        fused_moe(hidden, w, ids, weights, activations=activations, out=out)
        expected = reference_fused_moe(hidden, w, ids, weights, activations=activations, out=torch.empty_like(out))
        assert_close_rel(out, expected, **LAYER[activations])
        with pytest.raises(AssertionError):  # and would notice activations that nobody quantised
            assert_close_rel(reference_fused_moe(hidden, w, ids, weights, out=torch.empty_like(out)), expected, **LAYER[activations])


@numeric
@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
@pytest.mark.parametrize("activations", ["fp8", "mxfp8", "nvfp4"])
def test_each_product_on_quantised_rows(format, activations):
    """Products of the same quantised operands, within the bounds of bf16 (fp32 out: nothing is rounded after)."""
    w = calibrated(make_experts(format, sizes=(96, 96)))
    x = make_tokens(w, 9, BF16)[0] * torch.logspace(-3, 3, 9, device=DEVICE).unsqueeze(1)
    x = x.bfloat16()
    codes, scale = encode_rows(x, activations, w.w2_input_scale)
    out = torch.full((9, w.hidden), float("nan"), device=DEVICE)
    row_start = torch.tensor([0, 2, 2, 5, 8, 9], dtype=torch.int32, device=DEVICE)
    grouped_gemm_w4a16(codes, w.w2, row_start, out, bias=w.w2_bias, x_scale=scale)
    seen = round_trip(x, activations, w.w2_input_scale.max()).double()
    for expert, (first, last) in enumerate(itertools.pairwise(row_start.tolist())):
        expected = seen[first:last] @ w.w2.dequantize()[expert].double().T + w.w2_bias[expert]
        assert_close_rel(out[first:last], expected.float(), token=1e-4, overall=1e-4)


@numeric
def test_partial_sums_of_ranks_add_up():
    w = make_experts()
    hidden, ids, weights = make_tokens(w)
    total = torch.zeros_like(hidden)
    for first, last in ((0, 1), (1, 1), (1, 3), (3, 5)):  # uneven, one rank without experts
        part = slice(first, last)
        rank = replace(w, w13=w.w13[part], w2=w.w2[part], w13_bias=w.w13_bias[part], w2_bias=w.w2_bias[part], first_expert=first)
        total += check(rank, hidden, ids, weights, expert_offset=first)
    assert_close_rel(total, reference_fused_moe(hidden, w, ids, weights), token=1e-4, overall=1e-4)


@numeric
def test_a_nan_of_one_token_stays_with_it():
    w = make_experts(activation=GPT_OSS_SWIGLU)  # its clamps must let NaN through
    hidden, ids, weights = make_tokens(w)
    clean = fused_moe(hidden, w, ids, weights)
    hidden[4, 7] = float("nan")
    spoilt = fused_moe(hidden, w, ids, weights)
    assert spoilt[4].isnan().all()
    others = torch.arange(len(hidden)) != 4
    assert_equal_bits(spoilt[others], clean[others])


@numeric
def test_rows_of_nobody_are_left_alone():
    w = make_experts()
    row_start = torch.tensor([0, 2, 2, 3, 3, 5], dtype=torch.int32, device=DEVICE)
    out = torch.full((9, w.hidden), float("nan"), device=DEVICE)
    grouped_gemm_w4a16(torch.ones(9, w.intermediate, device=DEVICE), w.w2, row_start, out)
    assert not out[:5].isnan().any() and out[5:].isnan().all()


@numeric
def test_the_comparison_notices():
    w = make_experts()
    hidden, ids, weights = make_tokens(w, 4)
    codes, scales = w.w13.codes, w.w13.scales.view(torch.uint8)
    skipped = codes.clone()
    skipped[..., -8:] = 0
    expected = reference_fused_moe(hidden, w, ids, weights)
    for damage in ({"codes": (codes << 4) | (codes >> 4)}, {"scales": scales.roll(1, dims=-1)}, {"codes": skipped}):
        wrong = fused_moe(hidden, replace(w, w13=replace(w.w13, **damage)), ids, weights)
        with pytest.raises(AssertionError):
            assert_close_rel(wrong, expected)


@numeric
def test_gradients_reach_weights_only():
    w = make_experts()
    hidden, ids, weights = make_tokens(w, 4)
    weights.requires_grad_()
    (gradient,) = torch.autograd.grad(fused_moe(hidden, w, ids, weights).sum(), weights)
    (expected,) = torch.autograd.grad(reference_fused_moe(hidden, w, ids, weights).sum(), weights)
    assert_close_rel(gradient, expected, token=1e-4, overall=1e-4)
    hidden.requires_grad_()
    with pytest.raises(UnsupportedError, match="reference"):
        fused_moe(hidden, w, ids, weights).sum().backward()


@gpu_only
@pytest.mark.parametrize("num_tokens", [1, 33, 700])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(("format", "hidden", "intermediate"), [(hb.MXFP4, 2880, 2880), (hb.NVFP4, 2048, 768), (hb.NVFP4, 2048, 1408)], ids=str)
def test_sizes_of_models(format, hidden, intermediate, dtype, num_tokens):
    w = make_experts(format, GPT_OSS_SWIGLU, sizes=(hidden, intermediate), experts=5)
    hidden, ids, weights = make_tokens(w, num_tokens, dtype)
    out = check(w, hidden, ids, weights)
    for _ in range(3):  # rounded once, and the same in every run
        assert_equal_bits(fused_moe(hidden, w, ids, weights), out.to(dtype))


@gpu_only
def test_cuda_graph_and_no_synchronisation():
    torch.set_deterministic_debug_mode("default")  # as users run it: torch's deterministic scatter is another one
    w = make_experts()
    hidden, ids, weights = make_tokens(w, 40, BF16)
    fused_moe(hidden, w, ids, weights)  # compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_moe(hidden, w, ids, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused_moe(hidden, w, ids, weights)
    for routing in (ids.flip(0), torch.full_like(ids, 2), torch.full_like(ids, -1)):
        ids.copy_(routing)
        graph.replay()
        assert_equal_bits(out, fused_moe(hidden, w, ids, weights))
        assert_close_rel(out, reference_fused_moe(hidden, w, ids, weights))


@not_interpreted
def test_interpreted():
    """Every numeric test above, in Triton's interpreter."""
    assert 40 <= run_interpreted(__file__) < 60


def test_row_block_bound_holds():
    for counts in ([0, 0, 0], [1, 0, 0], [1, 1, 1], [16, 16, 16], [17, 1, 33], [0, 100, 0], [15, 15, 15]):
        blocks = sum(-(-count // 16) for count in counts)
        assert blocks <= row_block_bound(sum(counts), 3, 16) <= sum(counts) // 16 + 3
    assert row_block_bound(48, 3, 16) == 6 and row_block_bound(35, 3, 16) == 5  # reached by 33 + 1 + 1 rows


def test_few_configs():
    for compute in (BF16, FP16, FP32):
        assert len({tiles(rows, 8, compute) for rows in range(1, 20_000, 7)}) <= 3


def meta_weight(format, experts: int, rows: int, k: int, groups: tuple[int, ...] = ()) -> QuantTensor:
    codes = torch.empty(experts, rows, k // 2, dtype=torch.uint8, device="meta")
    scales = torch.empty(experts, rows, k // format.block, dtype=format.scale_dtype, device="meta")
    return QuantTensor(codes, scales, torch.empty(experts, *groups, device="meta") if format is hb.NVFP4 else None, format)


def launch_both(format, dtype: torch.dtype, num_rows: int, sizes: tuple[int, int], experts: int, activation: Activation) -> None:
    """Launch the two products of a layer on meta tensors (within `compiling`)."""
    hidden, intermediate = sizes
    halves = activation.halves

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    w13 = meta_weight(format, experts, halves * intermediate, hidden, (2,) if halves == 2 else ())
    row_start, h = empty(experts + 1, dtype=torch.int32), empty(num_rows, intermediate)
    tokens, bias = empty(num_rows, dtype=torch.int32), empty(experts, halves * intermediate)
    grouped_gemm_w4a16(empty(num_rows // 4, hidden), w13, row_start, h, bias=bias, activation=activation, token_of_row=tokens)
    grouped_gemm_w4a16(h, meta_weight(format, experts, hidden, intermediate), row_start, empty(num_rows, hidden, dtype=FP32))


@not_interpreted
@pytest.mark.parametrize(
    ("capability", "format", "dtype", "sizes", "activation", "rows_of_an_expert"),
    [
        slow_case(90, hb.NVFP4, BF16, (7168, 2048), SWIGLU, (1, 256)),
        (90, hb.NVFP4, FP16, (80, 176), RELU2, (64,)),
        slow_case(90, hb.MXFP4, BF16, (2880, 2880), GPT_OSS_SWIGLU, (256,)),
        slow_case(80, hb.MXFP4, BF16, (2880, 2880), GPT_OSS_SWIGLU, (256,)),
        slow_case(100, hb.NVFP4, BF16, (7168, 2048), SWIGLU, (256,)),
    ],
    ids=["deepseek-90", "tails-90", "gpt-oss-90", "gpt-oss-80", "deepseek-100"],
)
def test_compiles_without_spills(capability, format, dtype, sizes, activation, rows_of_an_expert):
    """Tiles of every height for Hopper; elsewhere those with the most registers, and what the others may do differently."""
    with compiling(capability) as launched:
        for rows in rows_of_an_expert:
            launch_both(format, dtype, 32 * rows, sizes, 32, activation)
    assert len(launched) == 2 * len(rows_of_an_expert)
    for compiled in launched:
        assert compiled.spill_bytes == 0 and compiled.shared_bytes <= SHARED_LIMIT[86]
        # A wgmma still running while the next step overwrites its operands is the defect that the module's docstring describes.
        waits = re.findall(r"warp_group_dot_wait.*?pendings = (\d+)", compiled.asm["ttgir"])
        assert set(waits) <= {"0"} and len(waits) == len(re.findall(r"= ttng\.warp_group_dot ", compiled.asm["ttgir"]))
    kinds = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma\S*kind::f16"}
    multiplied = [bool(re.search(kinds[capability], compiled.ptx)) for compiled in launched]
    assert sum(multiplied) >= 2 * sum(rows >= 64 for rows in rows_of_an_expert)


@pytest.mark.slow
@not_interpreted
@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
def test_slow_paths_compile_without_spills(format):
    """fp32 activations, fp16 activations on MXFP4 weights."""
    with compiling(90) as launched:
        for dtype in (FP16, FP32):
            if compute_dtype(dtype, format) == FP32:
                launch_both(format, dtype, 64 * 8, (512, 256), 8, SWIGLU)
    assert launched and all(compiled.spill_bytes == 0 and "tf32" in compiled.ptx for compiled in launched)


@pytest.mark.slow
@not_interpreted
def test_one_kernel_for_any_number_of_tokens():
    w = make_experts(experts=8).to("cpu")
    with compiling(90) as launched:
        for num_tokens in (1, 2, 15, 16, 17, 32):
            hidden, ids, weights = [part.cpu() for part in make_tokens(w, num_tokens, BF16)]
            fused_moe(hidden, w, ids, weights)
    assert sorted(kernel.name for kernel in launched) == ["_combine", "_sort", *2 * ["grouped_gemm_w4a16_kernel"]]
