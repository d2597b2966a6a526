"""The hook and the methods that are taken over, with stubs in vLLM's place: what runs, what falls back, and what a user is told."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from random_experts import make_experts
from vllm_stubs import ExpertMapManager, RoutedExperts, VllmConfig, vllm  # noqa: F401  (a fixture)

import halfbyte as hb
from halfbyte.errors import InputError, UnsupportedError
from halfbyte.experts import GPT_OSS_SWIGLU
from halfbyte.integrations.vllm import register

METHOD = "ModelOptNvFp4FusedMoE"


class OwnMethod:
    """As vLLM's methods are, as far as the plug-in meets them."""

    is_monolithic = True

    def __init__(self) -> None:
        self.moe_quant_config = self.moe_kernel = None
        self.processed: list[Any] = []

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, act_dtype: Any, moe_parallel_config: Any
    ) -> tuple[int, int]:
        return hidden_size + 256, intermediate_size_per_partition + 256

    def create_weights(self, layer: Any, **sizes: int) -> None:
        self.sizes = sizes

    def process_weights_after_loading(self, layer: Any) -> None:
        self.processed.append(layer)


def own(name: str = METHOD) -> Any:
    return type(name, (OwnMethod,), {})()


def weights(seed: int = 0) -> hb.ExpertWeights:
    w = make_experts(4, 128, 64, hb.NVFP4)
    w = hb.ExpertWeights(w.w13, w.w2)
    w.w13.codes.copy_(torch.randint(0, 256, w.w13.codes.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))
    return w


def chosen(vllm: Any, method: Any | None = None, layer: Any | None = None) -> tuple[Any, Any]:  # noqa: F811
    """A layer and the method that the plug-in makes of vLLM's choice."""
    vllm.method = lambda: own() if method is None else method
    register()
    layer = vllm.layer_class(weights(), METHOD) if layer is None else layer
    return layer, layer._get_quant_method(layer.layer_name, None, layer.moe_config)


def call(method: Any, layer: Any) -> torch.Tensor:
    random = torch.Generator().manual_seed(3)
    hidden = torch.randn(5, 128, generator=random).bfloat16()
    routing = hb.route(torch.randn(5, 4, generator=random), 2)
    return method.apply(layer, hidden, routing.weights, routing.ids, None, None)


def expected(w: hb.ExpertWeights) -> torch.Tensor:
    random = torch.Generator().manual_seed(3)
    hidden = torch.randn(5, 128, generator=random).bfloat16()
    return hb.fused_moe(hidden, hb.prepare(w.dequantize()), *hb.route(torch.randn(5, 4, generator=random), 2))


def test_a_layer_from_choice_to_call(vllm: Any) -> None:  # noqa: F811
    layer, method = chosen(vllm)
    assert isinstance(method, OwnMethod) and "ModelOpt" in type(method).__name__  # vLLM's loader looks for it
    assert not method.is_monolithic and method.supports_eplb and method.topk_indices_dtype == torch.int32
    assert method.maybe_roundup_sizes(128, 64, torch.bfloat16, None) == (128, 64)
    method.process_weights_after_loading(layer)
    assert not method.processed and all(name.startswith("halfbyte_") for name, _ in layer.named_parameters())
    assert torch.equal(call(method, layer), expected(weights()))
    assert len(vllm.logged) == 1 and "1 MoE layers (NVFP4, swiglu, 4 experts of 128 x 64" in vllm.logged[0]


def test_kernels_are_compiled_for_the_parameters_that_vllm_makes(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    layer, method = chosen(vllm)
    ready: list[tuple[Any, int, int]] = []
    monkeypatch.setattr(method.halfbyte.model, "get_ready", lambda experts, *, top_k, max_tokens: ready.append((experts(), top_k, max_tokens)))
    method.create_weights(layer=layer, hidden_size=128)
    assert method.sizes == {"hidden_size": 128}
    ((experts, *others),) = ready
    assert experts.w13.codes.data_ptr() == layer.w13_weight.data_ptr() and others == [2, 64]


def test_a_reload_keeps_the_addresses(vllm: Any) -> None:  # noqa: F811
    layer, method = chosen(vllm)
    method.process_weights_after_loading(layer)
    places = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
    for name in list(layer._parameters):
        delattr(layer, name)
    layer.load(weights(1), METHOD)
    method.process_weights_after_loading(layer)
    assert {name: parameter.data_ptr() for name, parameter in layer.named_parameters()} == places
    assert torch.equal(call(method, layer), expected(weights(1)))


def test_experts_of_other_ranks_may_come_after_a_reloaded_layer_is_complete(vllm: Any) -> None:  # noqa: F811
    layer, method = chosen(vllm, layer=vllm.layer_class(weights(), METHOD, manager=ExpertMapManager(8, ep_size=2)))
    layer.quant_method = method
    method.process_weights_after_loading(layer)
    for name in list(layer._parameters):
        delattr(layer, name)
    layer.load(weights(1), METHOD)
    checkpoint = [(f"{expert}.{part}_proj.weight", torch.zeros(())) for expert in range(8) for part in ("down", "gate", "up")]
    loaded = []
    for name in layer.load_weights(checkpoint):
        loaded.append(name)
        if len(loaded) == 12:  # vLLM counts
            method.process_weights_after_loading(layer)
    assert loaded == ["w2_weight", "w13_weight", "w13_weight"] * 4
    assert list(layer.load_weights(checkpoint[12:])) == []  # from another file
    with pytest.raises(AttributeError, match="w2_weight"):  # weights of its own, although nothing is reloaded
        list(layer.load_weights(checkpoint))


def test_options_reach_the_layer(vllm: Any) -> None:  # noqa: F811
    vllm.config = VllmConfig({"halfbyte": {"activations": "fp8"}})
    layer, method = chosen(vllm)
    method.process_weights_after_loading(layer)
    assert layer.halfbyte_experts.activations == "fp8"


def test_an_unknown_option_is_an_error(vllm: Any) -> None:  # noqa: F811
    vllm.config = VllmConfig({"halfbyte": {"activation": "fp8"}})
    with pytest.raises(InputError, match=r"--additional-config: unknown options \(given activation"):
        chosen(vllm)


def test_the_log_says_why_an_option_has_no_effect(vllm: Any) -> None:  # noqa: F811
    vllm.config = VllmConfig({"halfbyte": {"peer_memory": True}})
    chosen(vllm)
    assert vllm.logged == ["halfbyte lets vLLM move tokens between ranks: no data-parallel ranks share the experts"]


def test_what_is_refused_stays_as_it_was(vllm: Any) -> None:  # noqa: F811
    vllm.config = VllmConfig({"halfbyte": {"enabled": False}})
    theirs = own()
    assert chosen(vllm, theirs)[1] is theirs and type(theirs).__name__ == METHOD and theirs.is_monolithic
    assert vllm.logged == ["halfbyte leaves model.layers.0.mlp.experts to vLLM: switched off by option enabled"]
    vllm.config = VllmConfig({"halfbyte": {"strict": True}})
    with pytest.raises(UnsupportedError, match="does not know how QuarkNvfp4MoEMethod holds experts"):
        chosen(vllm, own("QuarkNvfp4MoEMethod"))


def test_layers_without_fp4_are_not_mentioned(vllm: Any) -> None:  # noqa: F811
    theirs = own("UnquantizedFusedMoEMethod")
    assert chosen(vllm, theirs)[1] is theirs and not vllm.logged


def test_a_bug_of_the_plug_in_leaves_the_layer_to_vllm(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    register()
    monkeypatch.setattr("halfbyte.integrations.vllm.hook.refusal", lambda *_: 1 / 0)
    theirs = own()
    assert chosen(vllm, theirs)[1] is theirs and type(theirs).__name__ == METHOD
    assert "ZeroDivisionError" in vllm.logged[0]


@pytest.mark.parametrize("fails", ["prepare", "warm_up"])  # before the experts are arranged, and when they are
@pytest.mark.parametrize("error", [UnsupportedError("not today"), RuntimeError("no compiler: not today")])
@pytest.mark.parametrize(("name", "activation"), [(METHOD, "silu"), ("GptOssMxfp4MoEMethod", "swigluoai")])  # rows gate first, and in turns
def test_a_failure_while_weights_are_arranged_gives_them_back(
    vllm: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    fails: str,
    error: Exception,
    name: str,
    activation: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    def packed_in_place(experts: hb.ExpertWeights, **_: Any) -> hb.PreparedExperts:  # as on a GPU
        return hb.prepare(experts, "hopper", in_place=True)

    w = weights() if name == METHOD else make_experts(4, 128, 64, hb.MXFP4, GPT_OSS_SWIGLU)
    layer, method = chosen(vllm, own(name), vllm.layer_class(w, name, activation))
    loaded = {parameter: tensor.detach().clone() for parameter, tensor in layer.named_parameters()}
    monkeypatch.setattr("halfbyte.integrations.engines.prepare", packed_in_place)
    monkeypatch.setattr(f"halfbyte.integrations.engines.{fails}", fail)
    method.process_weights_after_loading(layer)
    assert method.processed == [layer] and type(method).__name__ == name and not hasattr(layer, "halfbyte_experts")
    assert layer._parameters.keys() == loaded.keys()
    for parameter, tensor in loaded.items():
        assert torch.equal(getattr(layer, parameter).view(torch.uint8), tensor.view(torch.uint8)), parameter
    assert len(vllm.logged) == 1 and "halfbyte leaves" in vllm.logged[0] and "not today" in vllm.logged[0]


class Ranks:
    """As vLLM's group with `allgather_reducescatter`: this rank, and one whose tokens it knows."""

    def __init__(self, other: list[torch.Tensor], ids: torch.Tensor, weights: torch.Tensor) -> None:
        self.other, self.ids, self.weights, self.rows = other, ids, weights, 0

    def dispatch(self, hidden_states: Any, topk_weights: Any, topk_ids: Any, is_sequence_parallel: bool, extra_tensors: Any) -> Any:
        assert hidden_states.dtype == torch.uint8 and not is_sequence_parallel
        self.rows = len(hidden_states)
        ours = (hidden_states, topk_weights, topk_ids, *extra_tensors)
        theirs = (self.other[0], self.weights, self.ids, *self.other[1:])
        hidden, weights, ids, *others = (torch.cat(pair) for pair in zip(ours, theirs, strict=True))
        return hidden, weights, ids, others

    def combine(self, hidden_states: torch.Tensor, is_sequence_parallel: bool) -> torch.Tensor:
        return hidden_states[: self.rows]


@pytest.mark.parametrize("activations", ["fp8", "mxfp8"])
def test_tokens_that_the_experts_would_round_travel_rounded(vllm: Any, activations: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    vllm.config = VllmConfig({"halfbyte": {"activations": activations}})
    layer, method = chosen(vllm)
    monkeypatch.setattr(sys.modules["halfbyte.integrations.vllm.takeover"], "agreed", lambda reason: reason)  # with ranks that are not there
    layer.moe_config.dp_size = 2
    method.process_weights_after_loading(layer)
    assert method.supports_internal_mk  # so that vLLM does not gather them
    random = torch.Generator().manual_seed(3)
    hidden = torch.randn(5, 128, generator=random).bfloat16()
    routing = hb.route(torch.randn(5, 4, generator=random), 2)
    wire = method.halfbyte.wire
    vllm.group = Ranks([part.view(torch.uint8) for part in wire.encode(hidden[3:])], routing.ids[3:], routing.weights[3:])
    own = method.apply(layer, hidden[:3], routing.weights[:3], routing.ids[:3], None, None)
    assert torch.equal(own, hb.fused_moe(hidden, layer.halfbyte_experts, *routing)[:3])


@pytest.mark.parametrize(
    ("activations", "changed"),
    [("bf16", {"dp_size": 2}), ("nvfp4", {"dp_size": 2}), ("fp8", {}), ("fp8", {"dp_size": 2, "pcp_size": 2})],
)
def test_other_tokens_are_gathered_by_vllm(vllm: Any, activations: str, changed: dict[str, int]) -> None:  # noqa: F811
    vllm.config = VllmConfig({"halfbyte": {"activations": activations}})
    layer, method = chosen(vllm)
    vars(layer.moe_config).update(changed)
    method.process_weights_after_loading(layer)
    assert not method.supports_internal_mk and hasattr(layer, "halfbyte_experts")


def test_a_reload_that_fails_is_an_error(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """vLLM's own method knows nothing of a layer that serves with halfbyte."""
    layer, method = chosen(vllm)
    method.process_weights_after_loading(layer)
    for name in list(layer._parameters):
        delattr(layer, name)
    layer.load(weights(1), METHOD)
    layer.w2_weight.data = layer.w2_weight.data[:, :32]
    with pytest.raises(InputError):
        method.process_weights_after_loading(layer)
    assert not method.processed


@pytest.mark.parametrize("enabled", [True, False])
def test_vllm_without_a_kernel_of_its_own(vllm: Any, monkeypatch: pytest.MonkeyPatch, enabled: bool) -> None:  # noqa: F811
    def select(**_: Any) -> Any:
        raise NotImplementedError("No NvFp4 MoE backend supports the deployment configuration.")

    modelopt = SimpleNamespace(select_nvfp4_moe_backend=select)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.quantization.modelopt", modelopt)
    vllm.config = VllmConfig({"halfbyte": {"enabled": enabled}})

    def make() -> Any:
        assert modelopt.select_nvfp4_moe_backend(config=None) == (None, None)
        return own()

    register()
    vllm.method = make
    layer = vllm.layer_class(weights(), METHOD)
    if enabled:
        assert type(layer._get_quant_method(layer.layer_name, None, None)).__name__ == f"Halfbyte{METHOD}"
    else:
        with pytest.raises(NotImplementedError, match="No NvFp4 MoE backend"):
            layer._get_quant_method(layer.layer_name, None, None)
    assert modelopt.select_nvfp4_moe_backend is select


def test_an_expert_map_that_vllm_changes_is_read_again(vllm: Any) -> None:  # noqa: F811
    layer, method = chosen(vllm)
    layer.expert_map_manager.placement_strategy = "round_robin"
    layer._expert_map = torch.tensor([1, -1, 0, -1], dtype=torch.int32)
    first = method.halfbyte.expert_map(layer)
    assert first.local(torch.tensor([[0, 1, 2]])).tolist() == [[1, -1, 0]] and method.halfbyte.expert_map(layer) is first
    layer._expert_map = torch.tensor([-1, 0, -1, 1], dtype=torch.int32)
    assert method.halfbyte.expert_map(layer).local(torch.tensor([[0, 1, 2]])).tolist() == [[-1, 0, -1]]


def test_the_hook_is_put_in_once(vllm: Any) -> None:  # noqa: F811
    register()
    first = vllm.layer_class._get_quant_method
    register()
    assert vllm.layer_class._get_quant_method is first


def test_without_what_it_needs_of_vllm_it_does_nothing(vllm: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    monkeypatch.delitem(sys.modules, "vllm.model_executor.layers.fused_moe.routed_experts")
    monkeypatch.delattr(sys.modules["vllm.model_executor.layers.fused_moe"], "routed_experts")
    register()
    assert "halfbyte is not used: ModuleNotFoundError" in caplog.text


def test_the_stub_has_what_the_plug_in_asks_of_a_layer() -> None:
    assert {"w13_weight", "w2_weight_scale_2"} <= set(RoutedExperts(weights(), METHOD)._parameters)
