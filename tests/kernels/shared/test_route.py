"""The Triton `route` against the reference: interpreted on a CPU (see the last test), compiled without a GPU, and on a GPU."""

from __future__ import annotations

import re

import pytest
import torch
import triton
from compile_only import compile_for, compiling
from interpreted import DEVICE, HAS_GPU, gpu_only, not_interpreted, numeric, run_interpreted
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

import halfbyte as hb
from halfbyte.kernels.problem import Problem, Size
from halfbyte.kernels.reference.routing import METHODS
from halfbyte.kernels.reference.routing import run as reference_route
from halfbyte.kernels.shared.route import choose_config, route_kernel
from halfbyte.kernels.shared.route import run as route
from halfbyte.kernels.table import support

BIASED = [method for method, rule in METHODS.items() if rule.has_bias]
NAN, INF = float("nan"), float("inf")


def logits_of(num_tokens: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))


def bias_of(num_experts: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(num_experts, generator=torch.Generator().manual_seed(seed))


def assert_same_routing(actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Same ids and weights. One token in a thousand may choose otherwise: exp differs by 2 ulp, and that can decide between near-equal keys."""
    (ids, weights), (expected_ids, expected_weights) = [tuple(part.cpu() for part in routing) for routing in (actual, expected)]
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    assert ids.shape == expected_ids.shape and weights.shape == expected_weights.shape
    same = (ids == expected_ids).all(dim=1)
    assert (~same).sum().item() <= len(same) // 1000, f"other experts for {(~same).sum().item()} of {len(same)} tokens"
    torch.testing.assert_close(weights[same], expected_weights[same], rtol=1e-5, atol=0, equal_nan=True)


def check(logits: torch.Tensor, top_k: int, method: str, bias: torch.Tensor | None = None, **options: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare the kernel with the reference, computed on the CPU; return the kernel's result."""
    actual = route(logits.to(DEVICE), top_k, method, bias=None if bias is None else bias.to(DEVICE), **options)
    assert_same_routing(actual, reference_route(logits, top_k, method, bias=bias, **options))
    return actual


@numeric
@pytest.mark.parametrize("num_experts", [1, 5, 8, 60, 128, 256])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, num_experts):
    bias = bias_of(num_experts) if method in BIASED else None
    top_k = 1 if method == "llama4" else min(num_experts, {128: 2, 5: 2}.get(num_experts, 8))
    check(logits_of(7, num_experts), top_k, method, bias, scale=2.5)
    check(logits_of(1, num_experts).bfloat16(), 1, method)


@numeric
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 33])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (60, 1), (5, 5)])
def test_any_number_of_tokens(num_tokens, num_experts, top_k):
    check(logits_of(num_tokens, num_experts), top_k, "renormalize")


@numeric
@pytest.mark.parametrize(
    ("num_experts", "num_groups", "top_k_groups", "top_k"),
    [(256, 8, 4, 8), (60, 3, 2, 8), (60, 5, 1, 2), (8, 4, 2, 2), (5, 5, 3, 2), (6, 1, 1, 6), (4, 2, 2, 4)],
)
def test_groups(num_experts, num_groups, top_k_groups, top_k):
    groups = {"num_groups": num_groups, "top_k_groups": top_k_groups}
    logits, bias = logits_of(4, num_experts), bias_of(num_experts)
    check(logits, top_k, "deepseek_v3", bias, **groups)
    check(logits, top_k, "deepseek_v3", **groups)
    ids, _ = check(logits, top_k, "deepseek_v3", bias - 5, **groups)  # every key negative: a masked key of 0 would win
    size = num_experts // num_groups
    assert max(len({expert // size for expert in row}) for row in ids.tolist()) <= top_k_groups
    coarse = (logits.round() / 4 + 0.1).clone()
    coarse[0] = 0.1  # all equal: the first experts of the first group
    ids, _ = check(coarse, top_k, "deepseek_v3", **groups)
    assert ids[0].tolist() == list(range(top_k))


@numeric
def test_padding_never_wins_over_experts_at_minus_infinity():
    """Groups of 5 are padded to 8: after the four finite keys come -inf ones, the lowest id first, masked group or not, and each once."""
    bias = torch.full((15,), -INF)
    bias[[5, 6, 10, 11]] = 0
    ids, _ = check(logits_of(2, 15), 10, "deepseek_v3", bias, num_groups=3, top_k_groups=2)
    assert ids[:, 4:].tolist() == [[0, 1, 2, 3, 4, 7]] * 2


@numeric
@pytest.mark.parametrize("method", METHODS)
def test_ties_go_to_the_lowest_id(method):
    top_k = 1 if method == "llama4" else 7
    coarse = logits_of(4, 40).round() / 2
    coarse[0] = 0
    coarse[1] = torch.tensor([-0.0, 0.0] * 20)
    ids, _ = check(coarse, top_k, method)
    assert ids[:2].tolist() == [list(range(top_k))] * 2
    if method in BIASED:
        check(coarse, top_k, method, torch.full((40,), -4.0))


@numeric
def test_a_saturated_sigmoid_ties():
    saturated = torch.tensor([[90.0, 1.0, 95.0]])
    assert check(saturated, 1, "sigmoid")[0].item() == 0
    assert check(saturated, 1, "topk_sigmoid")[0].item() == 2


@numeric
@pytest.mark.parametrize("method", METHODS)
def test_nan_and_infinities(method):
    top_k = 1 if method == "llama4" else 3
    logits = logits_of(7, 8)
    logits[0, 5] = NAN
    logits[1, [2, 6]] = -torch.tensor(NAN)
    logits[2] = NAN
    logits[3] = -INF
    logits[4, 1:] = -INF
    logits[5, 3] = INF
    _, weights = check(logits, top_k, method)
    assert weights[:3].isnan().any(dim=1).all() and not weights[6].isnan().any()
    if METHODS[method].has_bias:
        bias = bias_of(8)
        bias[2], bias[4] = -INF, NAN
        check(logits, top_k, method, bias)
    if METHODS[method].has_groups:
        for bad in (NAN, INF, -INF):
            bias = bias_of(8)
            bias[5] = bad
            check(logits, top_k, method, bias, num_groups=4, top_k_groups=2)


@numeric
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_bias_and_logits_of_any_dtype(dtype):
    logits, bias = logits_of(3, 60), bias_of(60)
    check(logits, 8, "minimax2", bias.to(dtype))
    if dtype.itemsize == 2:
        check(logits.to(dtype), 8, "deepseek_v4", bias)


@numeric
def test_strided_logits_and_bias():
    wide = logits_of(5, 70)
    for view in (wide[:, 3:63], wide[::2, :60], logits_of(60, 5).t(), logits_of(1, 60).expand(5, 60)):
        for actual in (route(view.to(DEVICE), 4, "renormalize"), route(_on_device(view), 4, "renormalize")):
            assert_same_routing(actual, reference_route(view, 4, "renormalize"))
    bias = bias_of(120)[::2]
    assert_same_routing(
        route(_on_device(wide[:, :60]), 4, "minimax2", bias=_on_device(bias)), reference_route(wide[:, :60], 4, "minimax2", bias=bias)
    )


def _on_device(view: torch.Tensor) -> torch.Tensor:
    """The same view of a copy on the device, strides kept."""
    storage = torch.tensor(view.untyped_storage(), dtype=torch.uint8).view(view.dtype).to(DEVICE)
    return storage.as_strided(view.shape, view.stride(), view.storage_offset())


@pytest.mark.parametrize("spoil", ["ids", "weights", "last token"])
def test_the_comparison_can_fail(spoil):
    ids, weights = reference_route(logits_of(9, 8), 2, "renormalize")
    wrong_ids, wrong_weights = ids.clone(), weights.clone()
    if spoil == "ids":
        wrong_ids = ids.flip(1)
    elif spoil == "weights":
        wrong_weights *= 0.5
    else:
        wrong_weights[-1] = 0
    with pytest.raises(AssertionError):
        assert_same_routing((wrong_ids, wrong_weights), (ids, weights))


def test_config():
    def config(num_experts: int, top_k: int, num_groups: int = 1):
        return choose_config(Problem("route", hb.Target.of("cpu"), num_experts=num_experts, num_groups=num_groups), Size(1, top_k))

    assert config(8, 2).block_tokens == 16
    assert config(60, 4, num_groups=3).padded_size == 32
    assert [config(num_experts, 8).num_warps for num_experts in (8, 256, 1024, 1025, 100_000)] == [1, 1, 1, 2, 16]


def test_the_table_prefers_it_on_a_gpu():
    for arch, obstacle in [
        ("cpu", "needs a CUDA GPU, this is a CPU"),
        ("sm_75", "needs compute capability 8.0 or newer, this is sm_75"),
        ("sm_80", None),
        ("sm_90", None),
        ("sm_120", None),
    ]:
        name, answer = next(iter(support(Problem("route", hb.Target("", arch, 1, 0, 0.0))).items()))
        assert name == "triton" and (answer.runs if obstacle is None else answer.reason == obstacle)


@not_interpreted
@pytest.mark.parametrize(
    ("num_experts", "top_k", "method", "groups", "capability"),
    [
        (256, 8, "deepseek_v3", (8, 4), 90),
        (128, 8, "renormalize", (1, 1), 90),
        (256, 6, "deepseek_v4", (1, 1), 90),
        (512, 10, "default", (1, 1), 90),
        (256, 8, "deepseek_v3", (8, 4), 100),
    ],
)
def test_compiles_without_spills(num_experts, top_k, method, groups, capability):
    bias = torch.empty(num_experts) if method in BIASED else None
    with compiling(capability) as launched:
        route(torch.empty(3, num_experts), top_k, method, bias=bias, num_groups=groups[0], top_k_groups=groups[1])
    (compiled,) = launched
    assert compiled.spill_bytes == 0 and compiled.registers <= 80
    assert compiled.num_warps == 1 and "redux.sync" in compiled.ptx


@not_interpreted
def test_one_kernel_for_any_number_of_tokens():
    with compiling(90) as launched:
        for num_tokens in (1, 2, 16, 17, 4096):
            route(torch.empty(num_tokens, 128), 8, "renormalize")
    assert len(launched) == 1


@gluon.jit
def gluon_copy(source, target, size: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    offsets = gl.arange(0, size, layout)
    gl.store(target + offsets, gl.load(source + offsets))


@not_interpreted
def test_compile_for_takes_gluon_kernels_and_leaves_no_driver_behind():
    before = triton.runtime.driver._active
    compiled = compile_for(gluon_copy, torch.bfloat16, torch.bfloat16, size=256, num_warps=4, capability=90)
    assert compiled.name == "gluon_copy" and ".target sm_90a" in compiled.ptx and compiled.spill_bytes == 0
    assert re.search(r"\bSTG\b", compiled.sass) and 8 <= compiled.registers < 64
    assert triton.runtime.driver._active is before
    with pytest.raises(ZeroDivisionError), compiling(90):
        _ = 1 / 0
    assert triton.runtime.driver._active is before
    assert route_kernel.device_caches.get(0) is None or HAS_GPU


@gpu_only
@pytest.mark.parametrize("num_tokens", [1, 33, 4096])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "method", "groups"),
    [
        (256, 8, "deepseek_v3", (8, 4)),
        (384, 6, "deepseek_v4", (1, 1)),
        (512, 10, "default", (1, 1)),
        (2000, 8, "topk", (1, 1)),
        (8, 2, "renormalize", (1, 1)),
    ],
)
def test_large_on_a_gpu(num_tokens, num_experts, top_k, method, groups):
    bias = bias_of(num_experts) if method in BIASED else None
    for dtype in (torch.float32, torch.bfloat16):
        check(logits_of(num_tokens, num_experts).to(dtype), top_k, method, bias, num_groups=groups[0], top_k_groups=groups[1])


@gpu_only
def test_the_public_function_uses_it_on_a_gpu():
    logits = logits_of(9, 128)
    routing = hb.route(logits.cuda(), 8)
    assert all(torch.equal(a, b) for a, b in zip(routing, route(logits.cuda(), 8, "renormalize"), strict=True))


@gpu_only
def test_replays_in_a_cuda_graph_with_other_logits():
    logits, bias = logits_of(33, 256).cuda(), bias_of(256).cuda()
    options = {"bias": bias, "num_groups": 8, "top_k_groups": 4, "scale": 2.5}
    route(logits, 8, "deepseek_v3", **options)  # compile outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = route(logits, 8, "deepseek_v3", **options)
    for seed in range(1, 4):
        logits.copy_(logits_of(33, 256, seed))
        for output in captured:
            output.fill_(-1)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_routing(captured, reference_route(logits.cpu(), 8, "deepseek_v3", **{**options, "bias": bias.cpu()}))


@not_interpreted
def test_interpreted():
    """Everything marked `numeric`, on the CPU."""
    assert run_interpreted(__file__) > 100
