"""Which kernel is chosen, and what is said when none is."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import InputError, UnsupportedError
from halfbyte.kernels import table
from halfbyte.kernels.table import Candidate, Problem, choose, obstacles

CPU = hb.Target.of("cpu")
HOPPER = hb.Target("NVIDIA H200", "sm_90", 132, 232448, 50 << 20, 4600.0)


@pytest.fixture(autouse=True)
def forget_choices():
    choose.cache_clear()
    yield
    choose.cache_clear()


@pytest.fixture
def two_kernels(monkeypatch):
    def fast(): ...

    def needs_hopper(problem: Problem) -> str | None:
        return None if problem.target.arch == "sm_90" else f"needs sm_90, this is {problem.target.arch}"

    monkeypatch.setattr(table, "CANDIDATES", (Candidate("route", "fast", fast, needs_hopper), *table.CANDIDATES))
    return fast


def test_the_first_that_applies_is_taken(two_kernels):
    assert choose(Problem("route", HOPPER)).function is two_kernels
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
    assert [(candidate.name, obstacle is None) for candidate, obstacle in obstacles(problem)][-2:] == [("triton", False), ("reference", False)]


def test_a_fallback_on_a_gpu_is_logged_once(caplog):
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


def test_obstacles_of_the_portable_kernel():
    def obstacle(target: hb.Target, format, layout: str = "canonical", activations: str = "bf16", dtype=torch.bfloat16) -> str | None:
        found = obstacles(Problem("fused_moe", target, format, layout, activations, dtype))
        return next(obstacle for candidate, obstacle in found if candidate.name == "triton")

    ampere = replace(HOPPER, name="NVIDIA A100", arch="sm_80")
    assert obstacle(HOPPER, hb.NVFP4) is obstacle(ampere, hb.MXFP4) is None
    assert obstacle(HOPPER, None) == "reads NVFP4 and MXFP4 weights, these are dense"
    assert obstacle(ampere, hb.NVFP4, activations="nvfp4") is obstacle(HOPPER, hb.MXFP4, activations="mxfp8", dtype=torch.float16) is None
    assert obstacle(HOPPER, hb.NVFP4, dtype=torch.float32) is None
    assert obstacle(HOPPER, hb.NVFP4, activations="fp8", dtype=torch.float32) == (
        "quantises activations of bfloat16 and float16 to 'fp8', these are float32"
    )
    assert obstacle(HOPPER, hb.NVFP4, layout="hopper") == "reads layout 'canonical', the weights are in 'hopper'"
    assert obstacle(replace(HOPPER, arch="sm_75"), hb.NVFP4) == "needs compute capability 8.0 or newer, this is sm_75"
    assert obstacle(CPU, hb.NVFP4) == "needs a CUDA GPU, this is a CPU"


def test_obstacles_of_the_hopper_kernel():
    def obstacle(target: hb.Target, layout: str = "hopper", activations: str = "bf16") -> str | None:
        found = obstacles(Problem("fused_moe", target, hb.NVFP4, layout, activations))
        return next(obstacle for candidate, obstacle in found if candidate.name == "hopper")

    assert obstacle(HOPPER) is obstacle(HOPPER, activations="fp8") is obstacle(HOPPER, activations="nvfp4") is None
    assert obstacle(HOPPER, layout="canonical") == "reads layouts 'hopper' and 'hopper_fp8', the weights are in 'canonical'"


def test_unknown_op():
    with pytest.raises(InputError, match="route or fused_moe"):
        obstacles(Problem("attention", CPU))


def test_fused_moe_asks_the_table(monkeypatch):
    w = hb.ExpertWeights(torch.randn(2, 64, 32), torch.randn(2, 32, 32))
    arguments = torch.randn(3, 32), hb.prepare(w), torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    assert torch.equal(hb.fused_moe(*arguments, backend="reference"), hb.fused_moe(*arguments))
    with pytest.raises(InputError, match="no kernel of fused_moe has this name"):
        hb.fused_moe(*arguments, backend="cutlass")
