"""transformers models under torch.compile: one graph, the same logits, and experts that are prepared, moved and packed as without."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from devices import on_hopper
from helpers import relative_errors
from tiny_models import build, write
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM

import halfbyte as hb
import halfbyte.integrations.transformers as hbt
from halfbyte.integrations import packing
from halfbyte.kernels.problem import Problem
from halfbyte.kernels.table import choose
from halfbyte.moe import functional
from halfbyte.weights.hopper import layout
from halfbyte.weights.hopper.pack import unpack

IDS = torch.randint(128, (2, 12), generator=torch.Generator().manual_seed(0))

transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module", params=[("qwen3_moe", "modelopt"), ("gpt_oss", "gpt-oss")], ids="-".join)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, output = request.param
    return write(build(family), output, tmp_path_factory.mktemp(family), all_linear=family != "gpt_oss")[0]


def load(directory: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def packed_experts(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "halfbyte")]


def inputs(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand(num_tokens, 4, generator=random).argsort(1)[:, :2]
    return torch.randn(num_tokens, 64, generator=random), ids, torch.rand(num_tokens, 2, generator=random)


@pytest.mark.slow
@torch.no_grad()
def test_model_is_one_graph(directory: Path) -> None:
    model, stock = load(directory), load(directory)
    expected = stock(IDS, use_cache=False).logits
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert torch.equal(compiled(IDS, use_cache=False).logits, expected)
    assert [str(node.target) for node in counter.graphs[-1].graph.nodes].count("halfbyte.fused_moe") == 2
    compilations = counter.frame_count
    for module, other in zip(packed_experts(model), packed_experts(stock), strict=True):  # in place, as load_state_dict and weight updates do
        module.down_proj.copy_(module.down_proj.flip(0))
        other.down_proj.copy_(other.down_proj.flip(0))
    changed = compiled(IDS, use_cache=False).logits
    assert torch.equal(changed, stock(IDS, use_cache=False).logits) and relative_errors(changed, expected)[1] > 0.01
    assert counter.frame_count == compilations


@torch.no_grad()
def test_experts_prepared_before_share_a_graph_for_any_number_of_tokens(directory: Path) -> None:
    experts = packed_experts(load(directory))
    counter = CompileCounterWithBackend("aot_eager")
    compilations = set()
    for module in experts:
        expected = [module(*inputs(num_tokens)) for num_tokens in (5, 9)]
        compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
        for num_tokens, result in zip((5, 9), expected, strict=True):
            assert torch.equal(compiled(*inputs(num_tokens)), result)
            compilations.add(counter.frame_count)
    assert len(experts) == 2 and len(compilations) == 1


@torch.no_grad()
def test_copies_are_prepared_for_themselves(directory: Path) -> None:
    module = packed_experts(load(directory))[0]
    torch.save(module, file := io.BytesIO())
    file.seek(0)
    copies = [module, copy.deepcopy(module), torch.load(file, weights_only=False)]
    compiled = torch.compile(lambda experts, *arguments: experts(*arguments), fullgraph=True, backend="aot_eager")
    for shift, experts in enumerate(copies):
        experts.down_proj.copy_(experts.down_proj.roll(shift, 0))
        result = compiled(experts, *inputs(5))
        assert [other.halfbyte.prepared is not None for other in copies] == [index <= shift for index in range(3)]
        assert torch.equal(result, experts(*inputs(5)))
        assert experts is module or relative_errors(result, module(*inputs(5)))[1] > 0.01


@torch.no_grad()
def test_graph_uses_tensors_that_took_the_place_of_others(directory: Path) -> None:
    module = packed_experts(load(directory))[0]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    before = compiled(*inputs(5))
    module.down_proj.data = module.down_proj.data.flip(0)
    after = compiled(*inputs(5))
    assert torch.equal(after, module(*inputs(5))) and not torch.equal(after, before)
    hbt_activations = copy.deepcopy(module)
    hbt_activations.halfbyte.activations = module.halfbyte.activations = "fp8"
    assert torch.equal(compiled(*inputs(5)), hbt_activations(*inputs(5))) and not torch.equal(compiled(*inputs(5)), after)


@torch.no_grad()
def test_experts_are_packed_in_place_while_tracing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Hopper GPU, its kernel stood in for by the reference on unpacked weights."""
    reference = choose(Problem("fused_moe", hb.Target.of("cpu"), layout="canonical", activations="bf16"))

    def run(hidden: torch.Tensor, experts: layout.HopperExperts, *arguments: torch.Tensor, **options: object) -> torch.Tensor:
        return reference.run(hidden, unpack(experts), *arguments, **options)

    stand_in = replace(reference, run=run)
    monkeypatch.setattr(functional, "choose", lambda problem, backend: stand_in if problem.layout == "hopper" else choose(problem, backend))
    monkeypatch.setattr(packing, "_wanted_layout", lambda device, format, activations: "hopper")
    model, canonical = load(directory), load(directory)
    hbt.set_layout(canonical, "canonical")
    module = packed_experts(model)[0]
    expected = packed_experts(canonical)[0](*inputs(5))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert relative_errors(compiled(*inputs(5)), expected)[1] < 1e-5
        assert module.halfbyte.prepared.layout == "hopper"
    model.load_state_dict(model.state_dict())  # brings the canonical tensors back
    assert not module.halfbyte.replaced
    for layout_of_all, replaced in ((None, True), ("canonical", False), ("auto", True)):
        if layout_of_all:
            hbt.set_layout(model, layout_of_all)
        assert relative_errors(compiled(*inputs(5)), expected)[1] < 1e-5
        assert bool(module.halfbyte.replaced) == replaced


@on_hopper
@torch.no_grad()
def test_models_on_hopper(directory: Path) -> None:
    """The whole model, recorded as CUDA graphs. Without Inductor, which rounds less often, so that some tokens are routed otherwise."""
    model, stock = load(directory, torch.bfloat16).cuda(), load(directory, torch.bfloat16).cuda()
    compiled = torch.compile(model, fullgraph=True, backend="cudagraphs", dynamic=False)
    for seed in range(5):
        ids = torch.randint(128, (2, 12), generator=torch.Generator().manual_seed(seed)).cuda()
        assert torch.equal(compiled(ids, use_cache=False).logits, stock(ids, use_cache=False).logits)
    assert all(module.halfbyte.prepared.layout == "hopper" for module in packed_experts(model))


@on_hopper
@torch.no_grad()
def test_experts_on_hopper_under_inductor(directory: Path) -> None:
    module, stock = (packed_experts(load(directory, torch.bfloat16).cuda())[0] for _ in range(2))
    compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead", dynamic=False)
    for num_tokens in (5, 5, 9, 9, 9):
        hidden, ids, weights = (tensor.cuda() for tensor in inputs(num_tokens))
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(compiled(hidden.bfloat16(), ids, weights).clone(), stock(hidden.bfloat16(), ids, weights))
    assert module.halfbyte.prepared.layout == "hopper"
