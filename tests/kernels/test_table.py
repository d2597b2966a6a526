"""Which kernel is chosen, and what is said when none is; and that every provider offers what the table reads."""

from __future__ import annotations

import importlib.util
import inspect
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import InputError, UnsupportedError
from halfbyte.kernels import table
from halfbyte.kernels.problem import Problem, Size, Support
from halfbyte.kernels.sm90 import configs
from halfbyte.kernels.table import PROVIDERS, choose, support, wanted_layout
from halfbyte.moe.checks import config_of_sorted, resolve_config

CPU = hb.Target.of("cpu")
HOPPER = hb.Target("NVIDIA H200", "sm_90", 132, 50 << 20, 4600.0)
AMPERE = replace(HOPPER, name="NVIDIA A100", arch="sm_80")
BLACKWELL = replace(HOPPER, name="NVIDIA B200", arch="sm_100")
LAYER = {"num_experts": 256, "hidden": 7168, "intermediate": 2048}

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def forget_choices():
    choose.cache_clear()
    yield
    choose.cache_clear()


@pytest.fixture
def two_kernels(monkeypatch):
    def supports(problem: Problem) -> Support:
        return Support.yes("it is") if problem.target.arch == "sm_90" else Support.no(f"needs sm_90, this is {problem.target.arch}")

    fast = SimpleNamespace(supports=supports, run=lambda: None)
    load = table._load
    monkeypatch.setitem(PROVIDERS, "route", {"fast": "reference.fast", **PROVIDERS["route"]})
    monkeypatch.setattr(table, "_load", lambda module: fast if module == "reference.fast" else load(module))
    return fast


def test_the_first_that_applies_is_taken(two_kernels):
    assert choose(Problem("route", HOPPER)).run is two_kernels.run
    assert choose(Problem("route", CPU)).name == "reference"
    assert choose(Problem("route", HOPPER), backend="reference").reason == "asked for by backend="


def test_backend_forbids_the_others(two_kernels):
    with pytest.raises(UnsupportedError, match="fast: needs sm_90, this is cpu") as caught:
        choose(Problem("route", CPU), backend="fast")
    assert "reference" not in str(caught.value)
    with pytest.raises(InputError, match="'fast' or 'triton' or 'reference'"):
        choose(Problem("route", CPU), backend="quick")


def test_every_candidate_gives_its_reason():
    problem = Problem("fused_moe", CPU, hb.NVFP4, "hopper", "bf16")
    with pytest.raises(UnsupportedError, match=r"cpu, NVFP4, layout hopper, activations bf16: .*reference: reads layout 'canonical'"):
        choose(problem)
    assert {name: answer.verdict for name, answer in support(problem).items()} == dict.fromkeys(("hopper", "flashinfer", "triton", "reference"), "no")


def test_a_slow_kernel_on_a_gpu_is_logged_once(caplog):
    problem = Problem("fused_moe", HOPPER, hb.MXFP4, "canonical", "bf16")
    with caplog.at_level(logging.WARNING, "halfbyte"):
        assert [choose(problem).name for _ in range(3)] == ["triton"] * 3
        assert choose(Problem("fused_moe", HOPPER, None, "canonical", "bf16")).name == "reference"
        choose(Problem("fused_moe", CPU, hb.MXFP4, "canonical", "bf16"))
    assert [record.getMessage() for record in caplog.records] == [
        "fused_moe: no faster kernel of fused_moe exists for sm_90, MXFP4, layout canonical, activations bf16; "
        "the portable Triton kernel runs instead; on sm_90, prepare(w, layout='hopper') is what the fast kernel needs",
        "fused_moe: no faster kernel of fused_moe exists for sm_90, dense weights, layout canonical, activations bf16; plain torch runs instead",
    ]


def answer(name: str, target: hb.Target, format, layout: str = "canonical", activations: str = "bf16", **others) -> Support:
    return support(Problem("fused_moe", target, format, layout, activations, **{"dtype": torch.bfloat16, **others}))[name]


def test_what_the_portable_kernel_answers():
    assert answer("triton", HOPPER, hb.NVFP4).verdict == answer("triton", AMPERE, hb.MXFP4).verdict == "slow"
    assert answer("triton", HOPPER, None).reason == "reads NVFP4 and MXFP4 weights, these are dense"
    assert answer("triton", AMPERE, hb.NVFP4, activations="nvfp4").runs
    assert answer("triton", HOPPER, hb.MXFP4, activations="mxfp8", dtype=torch.float16).runs
    assert answer("triton", HOPPER, hb.NVFP4, dtype=torch.float32).runs
    assert answer("triton", HOPPER, hb.NVFP4, activations="fp8", dtype=torch.float32).reason == (
        "quantises activations of bfloat16 and float16 to 'fp8', these are float32"
    )
    assert answer("triton", HOPPER, hb.NVFP4, layout="hopper").reason == "reads layout 'canonical', the weights are in 'hopper'"
    assert answer("triton", replace(HOPPER, arch="sm_75"), hb.NVFP4).reason == "needs compute capability 8.0 or newer, this is sm_75"
    assert answer("triton", CPU, hb.NVFP4).reason == "needs a CUDA GPU, this is a CPU"


def test_what_the_hopper_kernel_answers():
    for activations in ("bf16", "fp8", "nvfp4"):
        assert answer("hopper", HOPPER, hb.NVFP4, "hopper", activations).verdict == "yes"
    assert answer("hopper", HOPPER, hb.NVFP4).reason == "reads layouts 'hopper' and 'hopper_fp8', the weights are in 'canonical'"
    assert answer("hopper", BLACKWELL, hb.NVFP4, "hopper").reason == "needs compute capability 9.0, this is sm_100"
    assert (
        answer("hopper", HOPPER, hb.NVFP4, "hopper", dtype=torch.float16).reason == "multiplies bf16, hidden is torch.float16: pass hidden.bfloat16()"
    )
    assert answer("hopper", HOPPER, hb.NVFP4, "hopper", dtype=None, quantized="nvfp4").runs


def test_without_triton_its_kernels_are_not_loaded(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    monkeypatch.setattr(
        table,
        "_load",
        lambda module: pytest.fail(module) if not module.startswith("reference.") else importlib.import_module(f"halfbyte.kernels.{module}"),
    )
    assert answer("hopper", HOPPER, hb.NVFP4, "hopper").reason == "needs the package triton, which is not installed"
    assert wanted_layout(Problem("fused_moe", HOPPER, hb.NVFP4, activations="bf16"))[0] == "canonical"


def test_the_wanted_layout_is_what_the_activations_are_fastest_with():
    def wanted(activations: str, format: hb.BlockFormat | None = hb.NVFP4, target: hb.Target = HOPPER) -> str:
        return wanted_layout(Problem("fused_moe", target, format, activations=activations))[0]

    assert (wanted("bf16"), wanted("nvfp4"), wanted("fp8")) == ("hopper", "hopper", "hopper_fp8")
    assert wanted("fp8", None) == wanted("fp8", target=AMPERE) == wanted("bf16", target=BLACKWELL) == "canonical"
    reason = wanted_layout(Problem("fused_moe", HOPPER, hb.MXFP4, activations="bf16"))[1]
    assert reason == "read by kernel 'hopper', the first that runs MXFP4 experts with bf16 activations on sm_90"


def test_unknown_op():
    with pytest.raises(InputError, match="'route' or 'fused_moe'"):
        support(Problem("attention", CPU))


def test_fused_moe_asks_the_table(monkeypatch):
    w = hb.ExpertWeights(torch.randn(2, 64, 32), torch.randn(2, 32, 32))
    arguments = torch.randn(3, 32), hb.prepare(w), torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    assert torch.equal(hb.fused_moe(*arguments, backend="reference"), hb.fused_moe(*arguments))
    with pytest.raises(InputError, match="unknown kernel of fused_moe"):
        hb.fused_moe(*arguments, backend="cutlass")


def test_a_given_configuration_reaches_the_kernel(monkeypatch):
    w = hb.ExpertWeights(torch.randn(2, 64, 32), torch.randn(2, 32, 32))
    seen = []
    reference = choose(Problem("fused_moe", CPU, layout="canonical", activations="bf16"))
    monkeypatch.setattr(
        "halfbyte.moe.functional.choose",
        lambda problem, backend: replace(
            reference, run=lambda *a, config, **k: seen.append(config) or reference.run(*a, **k), configs=lambda problem: ("another",)
        ),
    )
    arguments = (torch.randn(3, 32), hb.prepare(w), torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1))
    hb.fused_moe(*arguments, config="a tile")
    assert seen == ["a tile"]
    with pytest.raises(InputError, match=r"config does not fit \(given 3; needed None, or one like 'another'"):
        hb.fused_moe(*arguments, config=3)


@pytest.mark.parametrize(
    ("config", "size", "facts", "needed"),
    [
        (configs.MICRO, Size(64, 8), {"batch_invariant": True}, "with batch_invariant, None or one of PrefillConfig"),
        (configs.DECODE, Size(64, 8), {"batch_invariant": True}, "with batch_invariant, None or one of PrefillConfig"),
        (configs.FP8_SMALL, Size(64, 8), {}, "one for fused_moe of 64 tokens with bf16 activations"),
        (configs.FP8_SMALL, Size(64, 8), {"activations": "fp8", "quantized": "nvfp4"}, "one for fused_moe of 64 tokens with fp8 activations"),
        (configs.DIRECT, Size(64, 8), {}, "one for fused_moe of 64 tokens with bf16 activations"),
    ],
)
def test_a_configuration_that_cannot_run_the_call_is_refused(config: Any, size: Size, facts: dict[str, Any], needed: str) -> None:
    problem = Problem("fused_moe", HOPPER, hb.NVFP4, "hopper", "bf16", torch.bfloat16, **LAYER)._replace(**facts)
    with pytest.raises(InputError, match=needed):
        resolve_config(config, choose(problem), problem, size, "fused_moe")
    fits = choose(problem).choose_config(problem, size)
    assert resolve_config(fits, choose(problem), problem, size, "fused_moe") is fits


@pytest.mark.parametrize("quantized", [None, "fp8", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("num_tokens", [4, 60, 300, 900, 4000, 40000])
def test_rows_are_multiplied_in_tiles_that_hold_as_many_whatever_format_they_come_in(quantized: str | None, num_tokens: int) -> None:
    problem, size = Problem("expert_rows", HOPPER, hb.MXFP4, "hopper", "fp8", torch.bfloat16, **LAYER), Size(num_tokens, 8)
    sorted_for = choose(problem).choose_config(problem, size)
    problem = problem._replace(quantized=quantized)
    config = config_of_sorted(sorted_for, choose(problem), problem, size)
    assert config in choose(problem).configs(problem) and config.max_rows >= sorted_for.max_rows
    assert (config == sorted_for) == (quantized in (None, "fp8") or not configs.rounds_weights(sorted_for))


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in PROVIDERS.items() for name in names])
def test_every_provider_answers_with_a_reason_and_takes_what_its_twin_takes(op: str, name: str):
    problems = [
        Problem(op, target, format, layout, "bf16", dtype, **LAYER)
        for target in (CPU, AMPERE, HOPPER, BLACKWELL)
        for format in (hb.NVFP4, hb.MXFP4)
        for layout in ("canonical", "hopper", "hopper_fp8", "linear")
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]
    assert all(support(problem)[name].reason for problem in problems)
    ours = inspect.signature(table._load(PROVIDERS[op][name]).run).parameters
    twin = inspect.signature(table._load(PROVIDERS[op]["reference"]).run).parameters
    positional = [parameter for parameter in twin.values() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert [parameter.name for parameter in positional] == [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert "config" not in twin or "config" in ours


@pytest.mark.parametrize("op", ["fused_moe", "expert_rows"])
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("activations", ["bf16", "fp8", "nvfp4"])
@pytest.mark.parametrize("layout", ["canonical", "hopper", "hopper_fp8"])
def test_every_choice_is_one_of_the_configurations(op: str, layout: str, activations: str, batch_invariant: bool):
    problem = Problem(op, HOPPER, hb.MXFP4, layout, activations, torch.bfloat16, batch_invariant=batch_invariant, **LAYER)
    kernel = choose(problem)
    chosen = {kernel.choose_config(problem, Size(num_tokens, 8)) for num_tokens in (1, 2, 8, 9, 40, 300, 700, 1500, 4000, 9000, 40000)}
    assert chosen <= set(kernel.configs(problem)) and len(chosen) > (0 if batch_invariant else 1)
    assert all(config.max_rows >= 8 for config in chosen)
