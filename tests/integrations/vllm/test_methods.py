"""Which layers of vLLM's the plug-in runs, and that it reads them right: every way in which vLLM holds experts, on one rank and on several."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_stubs as stubs
from random_experts import make_experts

import halfbyte as hb
from halfbyte.experts import GEGLU, GEGLU_TANH, GPT_OSS_SWIGLU, RELU2, SWIGLU, Activation
from halfbyte.integrations.engines import Options
from halfbyte.integrations.vllm.methods import HOLDINGS, activation_of, expert_map_of, experts_of, refusal


def experts(method: str, activation: Activation = SWIGLU, num_experts: int = 4) -> hb.ExpertWeights:
    w = make_experts(num_experts, 128, 64, HOLDINGS[method].format, activation)
    return w if "Mxfp4MoEMethod" in method and "Compressed" not in method else hb.ExpertWeights(w.w13, w.w2, w.activation)


def dense_output(w: hb.ExpertWeights, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """fp32, expert by expert, from the dequantised weights alone."""
    out = torch.zeros(hidden.shape, dtype=torch.float32)
    d = w.dequantize()
    for token, (chosen, factors) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
        for expert, factor in zip(chosen, factors, strict=True):
            x = d.w13[expert] @ hidden[token].float()
            x = x if w.w13_bias is None else x + w.w13_bias[expert]
            if w.activation.gated:
                gate, up = x.chunk(2)
                limit = w.activation.limit
                if limit is not None:
                    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
                if w.activation.kind == "swiglu":
                    h = (up + w.activation.beta) * gate * torch.sigmoid(w.activation.alpha * gate)
                else:
                    h = up * torch.nn.functional.gelu(gate, approximate="tanh" if w.activation.kind == "geglu_tanh" else "none")
            else:
                h = x.relu() ** 2
            y = d.w2[expert] @ h
            out[token] += factor * (y if w.w2_bias is None else y + w.w2_bias[expert])
    return out


def tokens(num_experts: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(5)
    hidden = torch.randn(7, 128, generator=random).bfloat16()
    routing = hb.route(torch.randn(7, num_experts, generator=random), 2)
    return hidden, routing.ids, routing.weights


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("method", HOLDINGS)
def test_experts_are_read_as_they_were_loaded(method: str) -> None:
    w = experts(method)
    read = experts_of(stubs.RoutedExperts(w, method), HOLDINGS[method], Options())
    hidden, ids, weights = tokens()
    expected = dense_output(w, hidden, ids, weights)
    assert error(hb.fused_moe(hidden, hb.prepare(read), ids, weights, out=torch.empty(7, 128)), expected) < 5e-3
    assert error(hb.fused_moe(hidden, hb.prepare(read), ids.roll(1, 0), weights, out=torch.empty(7, 128)), expected) > 0.1


@pytest.mark.parametrize(
    ("name", "given", "activation"),
    [
        ("silu", {}, SWIGLU),
        ("silu", {"limit": 10.0}, Activation("swiglu", limit=10.0)),
        ("gelu", {}, GEGLU),
        ("gelu_tanh", {}, GEGLU_TANH),
        ("relu2_no_mul", {}, RELU2),
        ("swigluoai", {}, GPT_OSS_SWIGLU),
        ("swigluoai_uninterleave", {"alpha": 1.5, "beta": 1.0, "limit": 5.0}, Activation("swiglu", 1.5, 1.0, 5.0)),
    ],
)
def test_activations(name: str, given: dict[str, float], activation: Activation) -> None:
    method = "GptOssMxfp4MoEMethod"
    w = experts(method, activation)
    layer = stubs.RoutedExperts(w, method, name, **given)
    assert activation_of(layer)[0] == activation
    hidden, ids, weights = tokens()
    read = experts_of(layer, HOLDINGS[method], Options())
    assert error(hb.fused_moe(hidden, hb.prepare(read), ids, weights, out=torch.empty(7, 128)), dense_output(w, hidden, ids, weights)) < 5e-3


def test_calibrated_scales_are_read_where_they_are_used() -> None:
    method = "CompressedTensorsW4A4Nvfp4MoEMethod"
    w = replace(experts(method), w13_input_scale=torch.full((4, 2), 0.5), w2_input_scale=torch.full((4,), 0.25))
    layer = stubs.RoutedExperts(w, method)
    read = experts_of(layer, HOLDINGS[method], Options(activations="nvfp4"))
    assert torch.equal(read.w13_input_scale, w.w13_input_scale) and torch.equal(read.w2_input_scale, w.w2_input_scale)
    assert experts_of(layer, HOLDINGS[method], Options()).w13_input_scale is None


@pytest.mark.parametrize("num_experts", [8, 7])
@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_expert_parallel_ranks_add_up_to_one(placement: str, num_experts: int) -> None:
    method = "ModelOptNvFp4FusedMoE"
    w = experts(method, num_experts=num_experts)
    hidden, ids, weights = tokens(num_experts)
    total, whole = torch.zeros(7, 128), dense_output(w, hidden, ids, weights)
    for rank in range(2):
        manager = stubs.ExpertMapManager(num_experts, 2, rank, placement)
        held = w.with_tensors({name: tensor.view(torch.uint8)[manager.held].view(tensor.dtype) if tensor.element_size() == 1 else tensor[manager.held]
                               for name, tensor in w.tensors.items()})  # fmt: skip
        held = replace(held, num_global_experts=num_experts)
        layer = stubs.RoutedExperts(held, method, manager=manager)
        read = experts_of(layer, HOLDINGS[method], Options())
        assert (expert_map_of(layer) is None) == (placement == "linear")
        part = hb.fused_moe(hidden, hb.prepare(read), ids, weights, expert_map=expert_map_of(layer), out=torch.empty(7, 128))
        assert error(part, whole) > 0.1  # one rank is not the layer
        total += part
    assert error(total, whole) < 5e-3


@pytest.mark.parametrize("method", HOLDINGS)
def test_tensor_parallel_ranks_add_up_to_one(method: str) -> None:
    w = experts(method)
    hidden, ids, weights = tokens()
    total, whole = torch.zeros(7, 128), dense_output(w, hidden, ids, weights)
    for rank in range(2):
        layer = stubs.RoutedExperts(_slice(w, rank), method)
        part = hb.fused_moe(hidden, hb.prepare(experts_of(layer, HOLDINGS[method], Options())), ids, weights, out=torch.empty(7, 128))
        total += part
    assert error(total, whole) < 5e-3


def _slice(w: hb.ExpertWeights, rank: int) -> hb.ExpertWeights:
    """As vLLM's loader splits the intermediate size over two ranks; the bias of w2 is the first rank's."""

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([half.chunk(2, 1)[rank] for half in tensor.view(torch.uint8).chunk(2, 1)], 1).view(tensor.dtype)

    def columns(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(torch.uint8).chunk(2, 2)[rank].contiguous().view(tensor.dtype)

    def bias(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([half.chunk(2, 1)[rank] for half in tensor.chunk(2, 1)], 1)

    w13 = replace(w.w13, codes=rows(w.w13.codes), scales=rows(w.w13.scales))
    w2 = replace(w.w2, codes=columns(w.w2.codes), scales=columns(w.w2.scales))
    return hb.ExpertWeights(
        w13, w2, w.activation, None if w.w13_bias is None else bias(w.w13_bias), None if w.w2_bias is None else w.w2_bias * (rank == 0)
    )


def test_fused_shared_experts_are_experts_like_others() -> None:
    method = "Mxfp4MoEMethod"
    w = experts(method, num_experts=5)  # four and a shared one, which every token chooses last
    hidden, ids, weights = tokens(4)
    ids = torch.cat((ids, torch.full((7, 1), 4, dtype=ids.dtype)), 1)
    weights = torch.cat((weights, torch.ones(7, 1)), 1)
    read = experts_of(stubs.RoutedExperts(w, method), HOLDINGS[method], Options())
    assert error(hb.fused_moe(hidden, hb.prepare(read), ids, weights, out=torch.empty(7, 128)), dense_output(w, hidden, ids, weights)) < 5e-3


METHOD = "ModelOptNvFp4FusedMoE"


def refused(options: Options | None = None, lora: Any = None, method: str = METHOD, **changes: Any) -> str | None:
    layer = stubs.RoutedExperts(experts(METHOD), METHOD)
    for name in ("apply_router_weight_on_input", "activation"):
        if name in changes:
            setattr(layer, name, changes.pop(name))
    layer.moe_config = stubs.moe_config(experts(METHOD), **changes)
    return refusal(layer, type(method, (), {})(), options or Options(), lora)


def test_what_is_run() -> None:
    assert refused() is None
    assert refused(use_all2all_kernels=True) is None
    assert refused(lora=SimpleNamespace(target_modules=["q_proj", "o_proj"])) is None
    assert refused(method="Mxfp4MoEMethod", intermediate_size_per_partition=720) is None  # rounded up


@pytest.mark.parametrize(
    ("message", "given"),
    [
        ("switched off", {"options": Options(enabled=False)}),
        ("QuarkNvfp4MoEMethod", {"method": "QuarkNvfp4MoEMethod"}),
        ("'marlin' was asked for", {"moe_backend": "marlin"}),
        ("'deepep_low_latency'", {"use_all2all_kernels": True, "all2all_backend": "deepep_low_latency"}),
        ("input of the experts", {"apply_router_weight_on_input": True}),
        ("torch.float16", {"in_dtype": torch.float16}),
        ("'situ'", {"activation": stubs.MoEActivation.SITU}),
        ("LoRA", {"lora": SimpleNamespace(target_modules=None)}),
        ("LoRA", {"lora": SimpleNamespace(target_modules=["q_proj", "experts"])}),
        ("intermediate 72", {"intermediate_size_per_partition": 72}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_left_to_vllm_and_why(message: str, given: dict[str, Any]) -> None:
    assert message in (refused(**given) or "nothing was refused")
