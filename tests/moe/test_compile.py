"""`fused_moe`, `route` and `MoE` under torch.compile: one graph, one compilation for many token counts, the same bits as without."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from devices import on_hopper
from helpers import relative_errors
from random_experts import make_experts
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import halfbyte as hb
import halfbyte.moe.ops  # registers them
from halfbyte.checkpoint import RouterWeights
from halfbyte.errors import UnsupportedError
from halfbyte.weights.prepared import keep_address

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 8, 64, 32, 3
DEMO = Path(hb.__file__).parent / "demo_model"


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture(params=[hb.NVFP4, hb.MXFP4], ids=repr)
def prepared(request: pytest.FixtureRequest) -> hb.PreparedExperts:
    return hb.prepare(make_experts(EXPERTS, HIDDEN, INTERMEDIATE, request.param))


def tokens(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.rand(num_tokens, EXPERTS).argsort(1)[:, :TOP_K].int()
    return torch.randn(num_tokens, HIDDEN).bfloat16(), ids, torch.rand(num_tokens, TOP_K)


def compiled(function: Callable, **options: object) -> tuple[Callable, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


@pytest.mark.slow
def test_module_compiles_once_for_many_token_counts() -> None:
    layer = hb.MoE.from_checkpoint(DEMO, 0)
    f, counter = compiled(layer, dynamic=True)
    compilations = set()
    for num_tokens in (5, 9, 2, 300):
        hidden = torch.randn(num_tokens, 256).bfloat16()
        assert torch.equal(f(hidden), layer(hidden))
        compilations.add(counter.frame_count)
    assert len(compilations) == 1
    for num_tokens in (1, 0):  # torch.compile makes a graph of their own for these
        hidden = torch.randn(num_tokens, 256).bfloat16()
        assert torch.equal(f(hidden), layer(hidden))
    f, counter = compiled(layer)
    for num_tokens in (4, 7):
        hidden = torch.randn(num_tokens, 256).bfloat16()
        torch._dynamo.mark_dynamic(hidden, 0)
        assert torch.equal(f(hidden), layer(hidden))
    assert counter.frame_count == 1


def test_layers_of_one_kind_share_a_graph(prepared: hb.PreparedExperts) -> None:
    rule = hb.load_router(DEMO, 0).rule
    layers = [
        hb.MoE(RouterWeights(torch.randn(EXPERTS, HIDDEN), rule), prepared),
        hb.MoE(RouterWeights(torch.randn(EXPERTS, HIDDEN), rule), prepared),
    ]
    counter = CompileCounterWithBackend("aot_eager")
    hidden = torch.randn(5, HIDDEN)
    results = []
    for layer in layers:
        expected = layer(hidden)
        layer.compile(fullgraph=True, backend=counter)
        results.append(layer(hidden))
        assert torch.equal(results[-1], expected)
    assert counter.frame_count == 1 and not torch.equal(*results)


@pytest.mark.parametrize(
    "options",
    [
        {"activations": "fp8"},
        {"activations": "mxfp8"},
        {"activations": "nvfp4"},
        {"expert_offset": 3},
        {"backend": "reference"},
        {"batch_invariant": True},
    ],
    ids=str,
)
def test_options(prepared: hb.PreparedExperts, options: dict) -> None:
    f, _ = compiled(lambda hidden, ids, weights: hb.fused_moe(hidden, prepared, ids, weights, **options))
    arguments = tokens(6)
    assert torch.equal(f(*arguments), hb.fused_moe(arguments[0], prepared, *arguments[1:], **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_out_is_written_in_place(prepared: hb.PreparedExperts, dtype: torch.dtype) -> None:
    def twice(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return hb.fused_moe(hidden, prepared, ids, weights, out=out) * 2

    f, _ = compiled(twice)
    hidden, ids, weights = tokens(6)
    out = torch.full((6, HIDDEN), torch.nan, dtype=dtype)
    doubled = f(hidden, ids, weights, out)
    expected = hb.fused_moe(hidden, prepared, ids, weights, out=torch.empty_like(out))
    assert torch.equal(out, expected) and torch.equal(doubled, expected * 2)


def test_graph_follows_the_experts(prepared: hb.PreparedExperts) -> None:
    """New values by update_ need no new graph; experts of another kind get one."""
    f, counter = compiled(hb.fused_moe)
    hidden, ids, weights = tokens(6)
    before = f(hidden, prepared, ids, weights)
    w = make_experts(EXPERTS, HIDDEN, INTERMEDIATE, prepared.format)
    changed = replace(w, w2=replace(w.w2, codes=w.w2.codes.flip(0)))
    prepared.update_(changed)
    after = f(hidden, prepared, ids, weights)
    assert counter.frame_count == 1 and not torch.equal(before, after)
    assert torch.equal(after, hb.fused_moe(hidden, hb.prepare(changed), ids, weights))
    late = hb.prepare(replace(w, first_expert=2, num_global_experts=EXPERTS + 2))
    assert torch.equal(f(hidden, late, ids, weights), hb.fused_moe(hidden, late, ids, weights))
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("method", "options"), [("renormalize", {}), ("default", {"scale": 2.5}), ("deepseek_v3", {"num_groups": 4, "top_k_groups": 2})], ids=str
)
def test_route(method: str, options: dict) -> None:
    bias = torch.randn(EXPERTS) if method == "deepseek_v3" else None

    def weigh(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        routing = hb.route(logits, TOP_K, method, bias=bias, **options)
        return routing.ids + 1, routing.weights

    f, counter = compiled(weigh, dynamic=True)
    compilations = set()
    for num_tokens in (5, 12):
        logits = torch.randn(num_tokens, EXPERTS)
        for actual, expected in zip(f(logits), weigh(logits), strict=True):
            assert actual.dtype == expected.dtype and torch.equal(actual, expected)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1


def test_wrong_arguments_are_found_while_tracing(prepared: hb.PreparedExperts) -> None:
    hidden, ids, weights = tokens(6)
    f, _ = compiled(hb.fused_moe)
    with pytest.raises(RuntimeError, match=r"InputError.*fused_moe: hidden does not fit"):
        f(hidden[:, :32], prepared, ids, weights)
    f, _ = compiled(hb.route)
    with pytest.raises(RuntimeError, match="route: top_k does not fit the logits"):
        f(torch.randn(4, EXPERTS), EXPERTS + 1)


def test_layout_without_a_kernel_here_is_named_at_the_call() -> None:
    hidden, ids, weights = tokens(6)
    hopper = hb.prepare(make_experts(EXPERTS, HIDDEN, INTERMEDIATE, hb.NVFP4), "hopper")
    f, _ = compiled(hb.fused_moe)
    with pytest.raises(UnsupportedError, match=r"hopper: needs a CUDA GPU, this is a CPU"):
        f(hidden, hopper, ids, weights)
    engine = hb.prepare(make_experts(EXPERTS, 128, 128, hb.NVFP4), "cutlass")
    with pytest.raises(UnsupportedError, match="the weights are in 'cutlass'"):
        f(torch.randn(6, 128), engine, ids, weights)


def test_a_gradient_is_refused(prepared: hb.PreparedExperts) -> None:
    hidden, ids, weights = tokens(6)
    f, _ = compiled(hb.fused_moe)
    with pytest.raises(Exception, match=r"fused_moe has no gradient under torch.compile. Run under torch.no_grad"):
        f(hidden.requires_grad_(), prepared, ids, weights).sum().backward()


@pytest.mark.parametrize("num_tokens", [0, 1, 6])
def test_ops_keep_the_rules_of_torch(prepared: hb.PreparedExperts, num_tokens: int) -> None:
    hidden, ids, weights = tokens(num_tokens)
    tensors = list(prepared.storage.tensors.values())
    arguments = (hidden, tensors, prepared.description, prepared.layout, ids, weights, "bf16", 0, None, None, None, False)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if prepared.format is hb.NVFP4:
        checks.remove("test_schema")  # it compares inputs by torch.allclose, which knows no fp8 on a CPU (torch 2.13)
    torch.library.opcheck(torch.ops.halfbyte.fused_moe.default, arguments, test_utils=checks)
    if not (across := hidden.T.contiguous().T).is_contiguous():
        torch.library.opcheck(torch.ops.halfbyte.fused_moe.default, (across, *arguments[1:]), test_utils=checks)
    torch.library.opcheck(torch.ops.halfbyte.fused_moe_out.default, (*arguments, torch.empty(num_tokens, HIDDEN)), test_utils=checks)


@pytest.mark.parametrize("num_tokens", [0, 1, 6])
def test_ops_without_experts_keep_the_rules_of_torch(num_tokens: int) -> None:
    torch.library.opcheck(torch.ops.halfbyte.route.default, (torch.randn(num_tokens, EXPERTS), TOP_K, "topk", None, 1, 1, 1.0))
    torch.library.opcheck(torch.ops.halfbyte.invariant_linear.default, (torch.randn(num_tokens, HIDDEN), torch.randn(EXPERTS, HIDDEN)))


def test_weights_are_inputs_at_fixed_addresses() -> None:
    """CUDA graphs copy every other input at every replay."""
    reference = torch.empty(1)
    torch._dynamo.mark_static_address(reference)
    mine = torch.empty(1)
    keep_address(mine)
    assert vars(mine) == vars(reference)

    fixed = []

    def record(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        indices = torch._guards.TracingContext.get().fw_metadata.static_input_indices
        fixed.extend(inputs[index].shape for index in indices)
        return graph.forward

    layer = hb.MoE.from_checkpoint(DEMO, 0)
    torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=record))(torch.randn(4, 256))
    assert sorted(fixed) == sorted(tensor.shape for tensor in (layer.router.weight, *layer.experts.storage.tensors.values()))


IN_ANOTHER_PROCESS = """
import sys, halfbyte, halfbyte.moe

halfbyte.route
assert "halfbyte.kernels.table" in sys.modules
assert "torch._dynamo" not in sys.modules and "triton" not in sys.modules  # seconds that most users need not wait

import torch

hidden, expected = torch.load(sys.argv[1] + "/expected.pt")
actual = torch.export.load(sys.argv[1] + "/layer.pt2").module()(hidden)
assert (actual - expected).norm() <= 1e-4 * expected.norm(), (actual - expected).norm() / expected.norm()
"""


@pytest.mark.slow
def test_importing_brings_neither_compiler_nor_triton_and_runs_an_exported_layer(tmp_path: Path) -> None:
    layer, hidden = hb.MoE.from_checkpoint(DEMO, 0), torch.randn(5, 256)
    with torch.no_grad():
        program = torch.export.export(layer, (hidden[:3],), dynamic_shapes=({0: torch.export.Dim("num_tokens", min=2)},))
    torch.export.save(program, tmp_path / "layer.pt2")
    torch.save((hidden, layer(hidden)), tmp_path / "expected.pt")
    assert subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS, tmp_path], check=False).returncode == 0


@on_hopper
@pytest.mark.parametrize("activations", ["bf16", "fp8"])
@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
def test_cuda_graphs_on_hopper(format: hb.BlockFormat, activations: str) -> None:
    """A recording for each number of tokens serves any routing, and the weights that update_ brings, without a copy of them."""
    rule = hb.load_router(DEMO, 0).rule
    w = make_experts(32, 1024, 512, format).to("cuda")
    layer = hb.MoE(RouterWeights(torch.randn(32, 1024, device="cuda"), rule), hb.prepare(w), activations=activations)
    assert layer.experts.layout == "hopper"
    f = torch.compile(layer, fullgraph=True, mode="reduce-overhead", dynamic=False)

    def assert_same(hidden: torch.Tensor) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        actual, expected = f(hidden).clone(), layer(hidden)
        assert expected.isfinite().all() and relative_errors(actual, expected)[1] < 1e-3

    with torch.no_grad():
        hidden = torch.randn(512, 1024, device="cuda").bfloat16()
        for num_tokens in (1, 16, 512):
            before = torch.cuda.memory_allocated()
            for _ in range(6):
                hidden = torch.randn(num_tokens, 1024, device="cuda").bfloat16()
                assert_same(hidden)
            if num_tokens > 1:  # the first recording brings the workspace of cuBLAS too
                assert torch.cuda.memory_allocated() - before < layer.experts.nbytes / 2
        before = layer(hidden)
        layer.experts.update_(replace(w, w2=replace(w.w2, codes=w.w2.codes.flip(0))))
        assert relative_errors(layer(hidden), before)[1] > 0.1
        assert_same(hidden)
