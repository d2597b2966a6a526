"""Engines load models under torch.set_default_dtype(bfloat16): nothing in the package may depend on it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from random_experts import make_experts

import halfbyte as hb

SOURCE = Path(hb.__file__).parent
CONSTRUCTORS = {"tensor", "empty", "zeros", "ones", "full", "arange", "linspace", "eye", "rand", "randn", "randint", "randperm", "scalar_tensor"}


def constructors_without_dtype(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in CONSTRUCTORS:
            continue
        from_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        if from_torch and not any(keyword.arg in ("dtype", None) for keyword in node.keywords):
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_every_constructor_names_its_dtype(file: Path) -> None:
    assert list(constructors_without_dtype(file.read_text())) == []


def test_the_search_finds_a_constructor_without() -> None:
    assert list(constructors_without_dtype("x = torch.ones(2)\ny = torch.ones(2, dtype=d)")) == ["line 1: torch.ones(2)"]


def outputs(format: hb.BlockFormat) -> dict[str, torch.Tensor]:
    """What the main functions make of inputs whose dtypes are all named."""
    w = make_experts(4, 64, 32, format)
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, 64, generator=random, dtype=torch.float32).bfloat16()
    routing = hb.route(torch.randn(5, 4, generator=random, dtype=torch.float32), 2)
    p = hb.prepare(w)
    results = {activations: hb.fused_moe(hidden, p, *routing, activations=activations) for activations in ("bf16", "fp8", "nvfp4")}
    results |= hb.prepare(w, "hopper").unprepare().dequantize().tensors
    results |= {f"trtllm {name}": tensor.float() for name, tensor in hb.prepare(without_bias(w), "trtllm_gen").storage.tensors.items()}
    q = hb.quantize(hidden, format)
    return results | {"codes": q.codes, "scales": q.scales.float(), "values": q.dequantize(), "ids": routing.ids}


def without_bias(w: hb.ExpertWeights) -> hb.ExpertWeights:
    return hb.ExpertWeights(w.w13, w.w2, w.activation)


@pytest.fixture
def bf16_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
def test_results_are_the_same(format: hb.BlockFormat, bf16_by_default: None) -> None:
    from halfbyte.formats import e2m1

    expected = outputs(format)
    e2m1._table.cache_clear()  # made when a table is first needed
    torch.set_default_dtype(torch.bfloat16)
    found = outputs(format)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
