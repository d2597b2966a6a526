"""The provider hands FlashInfer's functions what gives the layer: they are replaced by plain torch that computes what they are documented to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import flashinfer_stand_in as stand_in
import pytest
import torch
from helpers import assert_close_rel, relative_errors
from random_experts import make_experts

import halfbyte as hb
from halfbyte.errors import UnsupportedError
from halfbyte.experts import GEGLU, GEGLU_TANH, GPT_OSS_SWIGLU, RELU2, SWIGLU, Activation, ExpertWeights
from halfbyte.kernels.flashinfer import arguments, fused_moe, package
from halfbyte.kernels.problem import Problem, Support
from halfbyte.kernels.reference.quantize import run as quantize_fp4
from halfbyte.kernels.reference.quantize_fp8 import run as quantize_fp8
from halfbyte.kernels.table import support, wanted_layout

HIDDEN, INTERMEDIATE, EXPERTS, TOKENS, TOP_K = 96, 96, 6, 6, 3  # of sizes that both layouts pad
B200, RTX = hb.Target("B200", "sm_100", 148, 126 << 20, 8000.0), hb.Target("RTX 5090", "sm_120", 170, 96 << 20, 1790.0)


@pytest.fixture(autouse=True)
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(package, "flashinfer", lambda: stand_in)
    monkeypatch.setattr(package, "refusal", lambda: None)
    monkeypatch.setattr(arguments, "quantize_fp4", quantize_fp4)
    monkeypatch.setattr(arguments, "quantize_fp8", quantize_fp8)
    stand_in.calls.clear()
    yield
    stand_in.calls.clear()


def experts(format: hb.BlockFormat, activation: Activation, *, calibrated: bool, biased: bool = True) -> ExpertWeights:
    """Experts whose numbers straddle a limit, and matter as much as their biases. Global scales differ, but under a limit not between gate and up.

    CUTLASS takes biases in bf16, that of up times the ratio of the two scales: these are bf16, and the ratio is a power of two.
    """
    w = make_experts(EXPERTS, HIDDEN, INTERMEDIATE, format, activation)
    w = replace(w, w13_bias=w.w13_bias.bfloat16(), w2_bias=w.w2_bias.bfloat16()) if biased else replace(w, w13_bias=None, w2_bias=None)
    if format is hb.MXFP4:
        return replace(w, w13=replace(w.w13, scales=w.w13.scales - 6), w2=replace(w.w2, scales=w.w2.scales - 8))
    random = torch.Generator().manual_seed(3)
    scale = w.w13.global_scale / 1000
    if activation.gated:
        ratio = torch.ones(EXPERTS) if activation.limit is not None else torch.tensor([0.5, 2, 1, 4, 0.25, 2])
        scale = torch.stack([scale[:, 0], scale[:, 0] * ratio], dim=1)
    w = replace(w, w13=replace(w.w13, global_scale=scale), w2=replace(w.w2, global_scale=w.w2.global_scale / 2000))
    if not calibrated:
        return w
    columns = (2,) if activation.gated else ()
    a13 = (torch.rand(EXPERTS, *columns, generator=random, dtype=torch.float32) + 0.5) / 1000
    return replace(w, w13_input_scale=a13, w2_input_scale=(torch.rand(EXPERTS, generator=random, dtype=torch.float32) + 0.5) * 10)


def routing(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=random, dtype=torch.float32).bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS - 1, generator=random)[:TOP_K] for _ in range(TOKENS)]).to(torch.int32)  # nobody wants the last
    weights = torch.rand(TOKENS, TOP_K, generator=random, dtype=torch.float32).bfloat16().float()
    ids[2, 1] = -1
    return hidden, ids, weights


def expected(w: ExpertWeights, hidden: Any, ids: torch.Tensor, weights: torch.Tensor, activations: str) -> torch.Tensor:
    """The reference, which rounds the activated product to the dtype of hidden: fp32, as FlashInfer does not round it at all."""
    hidden = hidden.float() if isinstance(hidden, torch.Tensor) else hidden
    return hb.fused_moe(hidden, hb.prepare(w, "canonical"), ids, weights, activations=activations)


def run(w: ExpertWeights, layout: str, *call: Any, activations: str, **options: Any) -> torch.Tensor:
    prepared = hb.prepare(w, layout)
    options = {"expert_offset": prepared.storage.first_expert} | options
    return fused_moe.run(call[0], prepared.storage, *call[1:], activations=activations, **options)


CASES = [
    *(("trtllm_gen", hb.NVFP4, "nvfp4", activation, True) for activation in (SWIGLU, GPT_OSS_SWIGLU, GEGLU_TANH, RELU2)),
    *(("trtllm_gen", hb.NVFP4, "nvfp4", activation, False) for activation in (SWIGLU, GEGLU_TANH, RELU2)),
    *(("trtllm_gen", hb.MXFP4, activations, activation, False) for activations in ("bf16", "mxfp8") for activation in (SWIGLU, GPT_OSS_SWIGLU)),
    *(("cutlass", hb.NVFP4, "nvfp4", activation, True) for activation in (SWIGLU, GPT_OSS_SWIGLU, Activation("swiglu", 1.702, 0.5), GEGLU, RELU2)),
    *(("cutlass", hb.MXFP4, "mxfp8", activation, False) for activation in (SWIGLU, GPT_OSS_SWIGLU, RELU2)),
]
each_case = pytest.mark.parametrize(("layout", "format", "activations", "activation", "calibrated"), CASES, ids=str)


@each_case
def test_the_functions_compute_the_layer(layout: str, format: hb.BlockFormat, activations: str, activation: Activation, calibrated: bool) -> None:
    w = experts(format, activation, calibrated=calibrated, biased=calibrated or format is hb.MXFP4)
    call = routing()
    out = torch.full((TOKENS, HIDDEN), torch.nan, dtype=torch.bfloat16)
    assert run(w, layout, *call, activations=activations, out=out) is out
    assert_close_rel(out, expected(w, *call, activations))
    assert len(stand_in.calls) == 1


SLICES = [(0, 3), (3, 6), (1, 3), (2, 6)]  # ranks of equally many experts, and of others


@pytest.mark.parametrize("layout", ["trtllm_gen", "cutlass"])
@pytest.mark.parametrize(("first", "last"), SLICES)
def test_experts_of_other_ranks_contribute_nothing(layout: str, first: int, last: int) -> None:
    w = experts(hb.NVFP4, SWIGLU, calibrated=True)[first:last]
    call = routing(1)
    out = torch.full((TOKENS, HIDDEN), torch.nan, dtype=torch.float32)  # partial sums
    run(w, layout, *call, activations="nvfp4", out=out)
    assert_close_rel(out, expected(w, *call, "nvfp4"))
    offset = torch.full_like(call[1], 9) + call[1]  # the same, where the caller counts from elsewhere
    moved = run(w, layout, call[0], offset, call[2], activations="nvfp4", expert_offset=9 + first)
    assert torch.equal(moved.float(), out)


def test_mxfp8_hidden_states_are_taken_as_they_are() -> None:
    w = experts(hb.MXFP4, SWIGLU, calibrated=False)
    hidden, ids, weights = routing()
    quantized = hb.quantize_fp8(hidden, "mx")
    for layout in ("trtllm_gen", "cutlass"):
        out = run(w, layout, quantized, ids, weights, activations="mxfp8")
        assert torch.equal(out, run(w, layout, hidden, ids, weights, activations="mxfp8"))


def test_one_bias_of_two() -> None:
    w = replace(experts(hb.MXFP4, SWIGLU, calibrated=False), w2_bias=None)
    call = routing()
    for layout in ("trtllm_gen", "cutlass"):
        assert_close_rel(run(w, layout, *call, activations="mxfp8"), expected(w, *call, "mxfp8"))


def test_many_tokens_are_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    w, call = experts(hb.NVFP4, SWIGLU, calibrated=True), routing()
    whole = run(w, "trtllm_gen", *call, activations="nvfp4")
    monkeypatch.setattr(fused_moe, "MAX_BLOCKS", EXPERTS + 1)
    stand_in.calls.clear()
    assert torch.equal(run(w, "trtllm_gen", *call, activations="nvfp4"), whole)
    assert [len(called["hidden_states"]) for called in stand_in.calls] == [2, 2, 2]


def test_no_tokens() -> None:
    hidden, ids, weights = routing()
    out = run(experts(hb.NVFP4, SWIGLU, calibrated=True), "cutlass", hidden[:0], ids[:0], weights[:0], activations="nvfp4")
    assert out.shape == (0, HIDDEN) and not stand_in.calls


def exchanged(scalar: torch.Tensor) -> torch.Tensor:
    return scalar.roll(1, 0)


def halves_exchanged(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.roll(matrix.shape[1] // 2, 1)


def in_list(index: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    return lambda parts: [change(part) if i == index else part for i, part in enumerate(parts)]


DEFECTS: list[tuple[str, str, Callable[[Any], Any]]] = [
    *(("trtllm_gen", name, exchanged) for name in ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")),
    *(("trtllm_gen", name, lambda scalar: scalar * 1.2) for name in ("output1_scale_gate_scalar", "output2_scale_scalar", "gemm1_clamp_limit")),
    *(("trtllm_gen", name, lambda scalar: None) for name in ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit", "gemm1_bias", "gemm2_bias")),
    *(("trtllm_gen", name, lambda matrix: matrix.roll(1, 1)) for name in ("gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm1_bias")),
    *(("trtllm_gen", name, lambda matrix: matrix.flip(0)) for name in ("gemm1_weights", "gemm2_weights", "gemm2_weights_scale", "gemm2_bias")),
    ("trtllm_gen", "local_expert_offset", lambda offset: offset + 1),
    ("trtllm_gen", "topk_ids", lambda pair: (pair[0], pair[1].roll(1, 1))),
    ("trtllm_gen", "hidden_states_scale", lambda scales: scales.roll(1, 1)),
    *(("cutlass", name, halves_exchanged) for name in ("fc1_expert_weights", "fc1_expert_biases")),
    *(("cutlass", name, lambda matrix: matrix.flip(0)) for name in ("fc1_expert_weights", "fc2_expert_weights", "fc2_expert_biases")),
    *(("cutlass", name, lambda scalar: None) for name in ("swiglu_alpha", "swiglu_beta", "swiglu_limit")),
    *(("cutlass", "quant_scales", in_list(index, exchanged)) for index in (1, 2, 4, 5)),
    *(("cutlass", "quant_scales", in_list(index, lambda scalar: scalar * 1.2)) for index in (2, 5)),
    ("cutlass", "quant_scales", in_list(3, lambda scalar: scalar * 40)),  # no error of the value, but of what is rounded: saturation
    ("cutlass", "token_selected_experts", lambda ids: ids + 1),
    ("cutlass", "token_final_scales", lambda weights: weights.roll(1, 1)),
    ("cutlass", "ep_rank", lambda rank: rank + 1),
    ("cutlass", "input_sf", lambda scales: scales.roll(1, 1)),
]


@pytest.mark.parametrize(("layout", "name", "spoil"), DEFECTS, ids=[f"{layout} {name} {i}" for i, (layout, name, _) in enumerate(DEFECTS)])
def test_a_wrong_argument_is_seen(layout: str, name: str, spoil: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: each argument matters, so that the comparison above would fail had it been wrong."""
    w, call = experts(hb.NVFP4, GPT_OSS_SWIGLU, calibrated=True)[1:5], routing()
    right = fused_moe.KERNELS[layout]
    monkeypatch.setitem(
        fused_moe.KERNELS, layout, right._replace(arguments=lambda *given: (named := right.arguments(*given)) | {name: spoil(named[name])})
    )
    worst, overall = relative_errors(run(w, layout, *call, activations="nvfp4"), expected(w, *call, "nvfp4"))
    assert worst > 1e-2 and overall > 5e-3


@pytest.mark.parametrize(
    ("w", "given"),
    [
        (experts(hb.NVFP4, SWIGLU, calibrated=False), "w13_bias, w2_bias"),
        (experts(hb.NVFP4, GPT_OSS_SWIGLU, calibrated=False, biased=False), "gemm1_beta, gemm1_clamp_limit"),
        (replace(experts(hb.NVFP4, SWIGLU, calibrated=True, biased=False), w2_input_scale=None), "w13_input_scale"),
    ],
    ids=["biases", "limit", "one input scale"],
)
def test_numbers_in_another_unit_are_refused(w: ExpertWeights, given: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"scale per token.*given {given};.*Quantise with calibration, or prepare\(w, 'canonical'\)"):
        run(w, "trtllm_gen", *routing(), activations="nvfp4")


def answer(target: hb.Target, layout: str, format: hb.BlockFormat | None, activations: str, **others: Any) -> Support:
    others = {"dtype": torch.bfloat16, "calibrated": True} | others
    return support(Problem("fused_moe", target, format, layout, activations, **others))["flashinfer"]


def test_what_it_answers() -> None:
    assert answer(B200, "trtllm_gen", hb.NVFP4, "nvfp4").verdict == answer(RTX, "cutlass", hb.MXFP4, "mxfp8").verdict == "yes"
    assert answer(B200, "cutlass", hb.NVFP4, "nvfp4").runs and answer(B200, "trtllm_gen", hb.MXFP4, "bf16").runs
    assert answer(B200, "trtllm_gen", hb.NVFP4, "nvfp4", calibrated=False).runs
    assert answer(B200, "trtllm_gen", hb.MXFP4, "mxfp8", dtype=None, quantized="mxfp8").runs
    reasons = [
        (answer(B200, "canonical", hb.NVFP4, "nvfp4"), "reads layouts 'trtllm_gen' and 'cutlass', the weights are in 'canonical'"),
        (answer(RTX, "trtllm_gen", hb.NVFP4, "nvfp4"), "layout 'trtllm_gen' is for sm_100 and sm_103, this is sm_120"),
        (answer(B200, "cutlass", None, "bf16"), "reads NVFP4 and MXFP4 weights, these are dense"),
        (answer(B200, "trtllm_gen", hb.NVFP4, "bf16"), "trtllm_gen multiplies NVFP4 by activations in nvfp4, not bf16"),
        (answer(B200, "trtllm_gen", hb.NVFP4, "nvfp4", dtype=None, quantized="nvfp4"), "quantises hidden states itself, these arrive in nvfp4"),
        (answer(B200, "cutlass", hb.NVFP4, "nvfp4", dtype=torch.float16), "takes bf16, hidden is torch.float16: pass hidden.bfloat16()"),
        (answer(B200, "trtllm_gen", hb.NVFP4, "nvfp4", kind="geglu"), "trtllm_gen has no geglu for NVFP4 experts"),
        (answer(RTX, "cutlass", hb.NVFP4, "nvfp4", calibrated=False), "cutlass quantises activations with input scales, which these experts lack"),
        (
            answer(B200, "trtllm_gen", hb.NVFP4, "nvfp4", batch_invariant=True),
            "FlashInfer chooses kernels by the number of tokens, and batch_invariant is asked for",
        ),
    ]
    for support_, reason in reasons:
        assert support_ == Support.no(reason)


def wanted(target: hb.Target, format: hb.BlockFormat, activations: str, *, in_place: bool = False, calibrated: bool = True) -> str:
    return wanted_layout(Problem("fused_moe", target, format, activations=activations, calibrated=calibrated), in_place=in_place)[0]


def test_the_layout_on_blackwell() -> None:
    assert wanted(B200, hb.NVFP4, "nvfp4") == wanted(B200, hb.MXFP4, "bf16") == "trtllm_gen"
    assert wanted(RTX, hb.NVFP4, "nvfp4") == wanted(RTX, hb.MXFP4, "mxfp8") == "cutlass"
    assert wanted(B200, hb.NVFP4, "bf16") == wanted(RTX, hb.NVFP4, "nvfp4", calibrated=False) == "canonical"
    assert wanted(B200, hb.NVFP4, "nvfp4", in_place=True) == "canonical"  # hosts that pack where the weights lie


@pytest.mark.parametrize(
    ("version", "refusal"),
    [
        ("0.7.2.post1", None),
        ("0.6.12", None),
        ("0.6.9", "needs flashinfer-python 0.6.12 or newer, this is 0.6.9"),
        (None, "needs the package flashinfer-python, which is not installed"),
    ],
)
def test_the_package_must_be_there(version: str | None, refusal: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise package.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.undo()
    monkeypatch.setattr(package.importlib.metadata, "version", installed)
    assert package.refusal.__wrapped__() == refusal
