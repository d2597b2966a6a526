"""`warm_up` compiles what later calls need: seen in what Triton looks up, for every number of tokens, with a GPU and without."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compile_only import compiling
from devices import on_hopper
from random_experts import make_experts

import halfbyte as hb
from halfbyte.errors import InputError, UnsupportedError
from halfbyte.formats.activation_formats import ACTIVATION_FORMATS
from halfbyte.moe import warm

triton = pytest.importorskip("triton")

HOPPER = hb.Target("NVIDIA H100", "sm_90", 132, 50 << 20, 3350.0)
EXPERTS, TOP_K = 8, 2


@pytest.fixture(autouse=True)
def cold() -> None:
    """As a new process would be."""
    warm.WARM.clear()


def layer(layout: str, *, hidden: int = 128, intermediate: int = 64, device: str = "cpu") -> hb.PreparedExperts:
    """A small layer; on a CPU with the kernels of a Hopper GPU, which `compiling` compiles for."""
    prepared = hb.prepare(make_experts(EXPERTS, hidden, intermediate, hb.NVFP4).to(device), layout)
    return prepared if device == "cuda" else replace(prepared, target=HOPPER)


def call(experts: hb.PreparedExperts, num_tokens: int, **options: Any) -> None:
    hidden = torch.zeros((num_tokens, experts.hidden), dtype=torch.bfloat16, device=experts.device)
    ids = (torch.arange(num_tokens * TOP_K, device=experts.device) % EXPERTS).view(num_tokens, TOP_K).int()
    hb.fused_moe(hidden, experts, ids, torch.ones((num_tokens, TOP_K), device=experts.device), **options)


@contextmanager
def missed(*, compile: bool) -> Iterator[set[tuple[str, str]]]:
    """The kernels that Triton does not have in memory when they are launched; then it compiles them, or (`compile` False) passes over them."""
    keys: set[tuple[str, str]] = set()

    def note(*, key: str, fn: Any, **others: Any) -> bool:
        keys.add((fn.name, key))
        return not compile

    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = note
    try:
        yield keys
    finally:
        triton.knobs.runtime.jit_cache_hook = before


def sizes(layout: str) -> Iterable[int]:
    few = {*range(1, 24), *range(24, 1600, 97), 64, 65, 240, 511, 512, 513, 1600}
    return sorted(few | {*range(24, 200, 7), *range(200, 1600, 61)} if layout != "canonical" else few)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("activations", ACTIVATION_FORMATS)
@pytest.mark.parametrize("layout", ["hopper", "hopper_fp8", "canonical"])
def test_no_number_of_tokens_needs_another_kernel(layout: str, activations: str, batch_invariant: bool) -> None:
    experts, options = layer(layout), {"activations": activations, "batch_invariant": batch_invariant}
    with compiling(90), missed(compile=False) as compiled:
        hb.warm_up(experts, TOP_K, max_tokens=1600, threads=2, **options)
    with compiling(90), missed(compile=False) as needed:
        for num_tokens in sizes(layout):
            call(experts, num_tokens, **options)
    assert needed == compiled and len(needed) >= 2  # equal: nothing is compiled for nothing


def test_a_largest_number_of_tokens_spares_the_kernels_for_more() -> None:
    experts = layer("hopper")
    with compiling(90), missed(compile=False) as few:
        hb.warm_up(experts, TOP_K, max_tokens=16)
    warm.WARM.clear()
    with compiling(90), missed(compile=False) as many:
        hb.warm_up(experts, TOP_K)
    assert few < many
    with compiling(90), missed(compile=False) as needed:
        call(experts, 1600)
    assert needed <= many and not needed <= few


@pytest.mark.slow
def test_compiled_kernels_are_in_memory_and_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    experts, hits, done = layer("hopper"), [], []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, cache_hit, **others: hits.append(cache_hit))
    with compiling(90):
        hb.warm_up(experts, TOP_K, max_tokens=18, threads=2, progress=lambda *counts: done.append(counts))
        assert hits.count(False) >= 2 * 2 + 3 and done == [(1, 2), (2, 2)]
        with missed(compile=True) as keys:
            for num_tokens in (1, 8, 9, 16, 17, 18):
                call(experts, num_tokens)
        assert not keys
        with missed(compile=False) as keys:
            call(experts, 40)
        assert keys  # the negative control: more tokens than were asked for
    hits.clear()
    warm.WARM.clear()
    with compiling(90):  # another device, as another process would be
        hb.warm_up(experts, TOP_K, max_tokens=18)
    assert hits and all(hits)


def test_what_is_warm_is_passed_over() -> None:
    experts, calls = layer("hopper"), []

    def count(what: Any, **options: Any) -> int:
        calls.clear()
        hb.warm_up(what, TOP_K, max_tokens=40, progress=lambda *counts: calls.append(counts), **options)
        return len(calls)

    other = layer("hopper", intermediate=128)
    with compiling(90), missed(compile=False):
        assert count(experts) == 3
        assert count(layer("hopper")) == 0  # of the same kind
        assert count([experts, other, other]) == 3  # one of two kinds
        assert count(experts, activations="nvfp4") == 3
        assert count(experts, ids_dtype=torch.int64) == 3


def test_a_model_is_all_its_layers() -> None:
    class Layer(torch.nn.Module):
        def __init__(self, experts: hb.PreparedExperts, top_k: int | None) -> None:
            super().__init__()
            self.held, self.top_k = experts, top_k

    model = torch.nn.Sequential(Layer(layer("hopper"), 2), torch.nn.Linear(2, 2), Layer(layer("hopper_fp8"), 4))
    with compiling(90), missed(compile=False) as compiled:
        hb.warm_up(model, max_tokens=40)
    warm.WARM.clear()
    with compiling(90), missed(compile=False) as one_by_one:
        hb.warm_up(model[0].held, 2, max_tokens=40)
        hb.warm_up(model[2].held, 4, max_tokens=40)
    assert compiled == one_by_one
    with pytest.raises(InputError, match="experts per token are not known"):
        hb.warm_up(torch.nn.Sequential(Layer(layer("hopper"), None)))


def test_experts_are_warmed_for_what_they_were_prepared_for() -> None:
    experts = layer("hopper_fp8")
    with compiling(90), missed(compile=False) as remembered:
        hb.warm_up(replace(experts, activations="fp8"), TOP_K, max_tokens=1600)
    warm.WARM.clear()
    with compiling(90), missed(compile=False) as told:
        hb.warm_up(experts, TOP_K, activations="fp8", max_tokens=1600)
    assert remembered == told


def test_other_dtypes_are_other_kernels() -> None:
    experts = layer("hopper")
    with compiling(90), missed(compile=False) as compiled:
        hb.warm_up(experts, TOP_K, max_tokens=100, ids_dtype=torch.int64, weights_dtype=torch.bfloat16)
    with compiling(90), missed(compile=False) as needed:
        for num_tokens in (1, 20, 100):
            ids, weights = torch.zeros((num_tokens, TOP_K), dtype=torch.int64), torch.ones((num_tokens, TOP_K), dtype=torch.bfloat16)
            hb.fused_moe(torch.zeros((num_tokens, experts.hidden), dtype=torch.bfloat16), experts, ids, weights)
    assert needed and needed <= compiled


def test_more_rows_than_fit_32_bits_are_combined_by_the_same_kernel() -> None:
    from halfbyte.kernels.shared.combine import run as combine

    def keys(num_tokens: int) -> set[tuple[str, str]]:
        ids, weights = torch.zeros((num_tokens, 8), dtype=torch.int32), torch.ones((num_tokens, 8))
        y = torch.empty((num_tokens * 8, 7168), dtype=torch.bfloat16, device="meta")
        with compiling(90), missed(compile=False) as keys:
            combine(y, ids, weights, torch.empty((num_tokens, 7168), dtype=torch.bfloat16, device="meta"))
        return keys

    assert keys(512) == keys(40000)


def test_an_error_in_a_thread_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = warm.choose

    def refuse(*tensors: torch.Tensor, **options: object) -> None:
        raise UnsupportedError(f"not in thread {threading.current_thread().name}")

    monkeypatch.setattr(warm, "choose", lambda problem: replace(choose(problem), run=refuse))
    with pytest.raises(UnsupportedError, match="not in thread ThreadPool"), compiling(90):
        hb.warm_up(layer("hopper"), TOP_K)


def test_what_no_kernel_takes_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="multiplies bf16"), compiling(90):
        hb.warm_up(layer("hopper"), TOP_K, dtype=torch.float16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k does not fit .given 0"),
        ({"max_tokens": 0}, "max_tokens does not fit .given 0"),
        ({"threads": 0}, "threads does not fit .given 0"),
        ({"activations": "fp4"}, "unknown activation format"),
        ({"ids_dtype": torch.float32}, "ids does not fit"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        hb.warm_up(layer("hopper"), **{"top_k": TOP_K, **options})
    with pytest.raises(InputError, match="not prepared"):
        hb.warm_up(make_experts(EXPERTS, 64, 64, hb.NVFP4), TOP_K)


@on_hopper
@pytest.mark.parametrize(("layout", "activations"), [("hopper", "bf16"), ("hopper", "fp8"), ("canonical", "bf16")])
def test_no_call_compiles_on_a_gpu(layout: str, activations: str) -> None:
    experts = layer(layout, hidden=320, intermediate=192, device="cuda")
    hb.warm_up(experts, TOP_K, activations=activations, max_tokens=1600)
    with missed(compile=True) as keys:
        for num_tokens in (1, 2, 7, 8, 9, 20, 48, 49, 100, 250, 600, 1000, 1600):
            call(experts, num_tokens, activations=activations)
        torch.cuda.synchronize()
    assert not keys
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # of a size that was never called
        call(experts, 300, activations=activations)
    graph.replay()
    torch.cuda.synchronize()
