"""The plug-in on a stand-in of SGLang: layers that are taken over, updated, given back; what is left to SGLang, and what the log says."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_close_rel, assert_equal_bits
from integrations.sglang import stand_in
from integrations.sglang.stand_in import BF16, Backend, FusedMoE, ModelOptNvFp4FusedMoEMethod, Mxfp4MoEMethod, TopK, runner_config, server

import halfbyte as hb
from halfbyte.errors import InputError, UnsupportedError

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS = 4, 64, 32, 9
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
GPT_OSS = {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0}


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[..., FusedMoE]:
    """A layer as SGLang makes one, with random weights loaded and not yet processed."""
    caplog.set_level(logging.INFO)

    def made(method: Any = None, arguments: SimpleNamespace | None = None, backend: Backend = Backend.MARLIN, name: str = "", **config: Any) -> Any:
        stand_in.install(monkeypatch, server() if arguments is None else arguments, backend)
        hook = importlib.import_module("halfbyte.integrations.sglang.hook")
        method = ModelOptNvFp4FusedMoEMethod() if method is None else method
        return another(hook, method, name or "model.layers.3.mlp.experts", **config)

    return made


def another(hook: Any, method: Any, name: str, **config: Any) -> FusedMoE:
    hidden, intermediate = (96, 96) if isinstance(method, Mxfp4MoEMethod) else (HIDDEN, INTERMEDIATE)
    layer = FusedMoE(runner_config(**config), hidden, intermediate, EXPERTS, name)
    layer.make(hook.choose(lambda *_: method, None, layer, name))
    layer.hook = hook
    fill(layer)
    return layer


def fill(layer: FusedMoE, seed: int = 0) -> None:
    random = torch.Generator().manual_seed(seed)
    mxfp4 = hasattr(layer, "w13_weight_bias")
    for name, parameter in layer.named_parameters():
        for expert in range(EXPERTS):
            part = parameter.data[expert]
            if name.endswith(("weight", "weight_scale")):
                low, high = (0, 256) if name.endswith("weight") else (118, 126) if mxfp4 else (0x28, 0x40)
                value = torch.randint(low, high, unpadded(layer, name, part.shape), dtype=torch.uint8, generator=random)
            elif name.endswith("bias"):
                value = torch.randn(unpadded(layer, name, part.shape), generator=random).to(BF16)
            else:
                value = torch.rand(part.shape, generator=random) + 0.5
            load(layer, name, expert, value)


def unpadded(layer: FusedMoE, name: str, shape: torch.Size) -> tuple[int, ...]:
    rows, columns = (2 * layer.intermediate_size_per_partition, layer.hidden_size)
    if name.startswith("w2"):
        rows, columns = layer.hidden_size, layer.intermediate_size_per_partition
    group = 2 if name.endswith("weight") else 32 if hasattr(layer, "w13_weight_bias") else 16
    return (rows,) if len(shape) == 1 else (rows, columns // group)


def load(layer: FusedMoE, name: str, expert: int, value: torch.Tensor) -> None:
    parameter = layer._parameters[name]
    parameter.weight_loader(parameter, value, expert)
    if not hasattr(layer, "loaded"):
        layer.loaded = {}
    layer.loaded[name, expert] = value


def inputs(seed: int = 1) -> tuple[torch.Tensor, TopK]:
    random = torch.Generator().manual_seed(seed)
    ids = torch.rand(TOKENS, EXPERTS, generator=random).argsort(1)[:, :2].int()
    return torch.randn(TOKENS, 96, generator=random).to(BF16), TopK(torch.rand(TOKENS, 2, generator=random) + 0.1, ids)


def dense(codes: torch.Tensor, scales: torch.Tensor, mxfp4: bool) -> torch.Tensor:
    values = torch.stack((E2M1[(codes & 15).long()], E2M1[(codes >> 4).long()]), -1).flatten(-2)
    factors = torch.exp2(scales.float() - 127) if mxfp4 else scales.view(torch.float8_e4m3fn).float()
    return values * factors.repeat_interleave(32 if mxfp4 else 16, -1)


def expected(layer: FusedMoE, x: torch.Tensor, topk: TopK) -> torch.Tensor:
    """The layer in fp32, from what was loaded."""
    weights, config, mxfp4 = layer.loaded, layer.moe_runner_config, hasattr(layer, "w13_weight_bias")
    out = torch.zeros(TOKENS, layer.hidden_size)
    in_turns = mxfp4 or getattr(layer, "inference_moe_w13_interleaved", False)
    for token in range(TOKENS):
        for expert, weight in zip(topk.topk_ids[token].tolist(), topk.topk_weights[token].tolist(), strict=True):
            if expert < 0:
                continue
            w13, w2 = (dense(weights[f"{side}_weight", expert], weights[f"{side}_weight_scale", expert], mxfp4) for side in ("w13", "w2"))
            y13 = w13 @ x[token].float()
            if mxfp4:
                y13 = y13 + weights["w13_weight_bias", expert].float()
            gate, up = (y13[::2], y13[1::2]) if in_turns else y13.chunk(2)
            if mxfp4:
                gate, up = gate.clamp(max=config.gemm1_clamp_limit), up.clamp(-config.gemm1_clamp_limit, config.gemm1_clamp_limit)
                h = gate * torch.sigmoid(config.gemm1_alpha * gate) * (up + 1)
                y = w2 @ h + weights["w2_weight_bias", expert].float()
            else:
                outer = weights["w13_weight_scale_2", expert]
                y = w2 @ (torch.nn.functional.silu(gate * outer[0]) * (up * outer[1])) * weights["w2_weight_scale_2", expert]
            out[token] += weight * y * (config.routed_scaling_factor or 1.0)
    return out


def assert_right(layer: FusedMoE, topk: TopK | None = None) -> None:
    x, routed = inputs()
    x, topk = x[:, : layer.hidden_size].contiguous(), routed if topk is None else topk
    assert_close_rel(layer(x, topk).float(), expected(layer, x, topk), token=2e-2, overall=1e-2)


def process(*layers: FusedMoE) -> None:
    for layer in layers:
        layer.quant_method.process_weights_after_loading(layer)


KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "modelopt": (ModelOptNvFp4FusedMoEMethod, {}),
    "routed scaling": (ModelOptNvFp4FusedMoEMethod, {"routed_scaling_factor": 2.5}),
    "gpt-oss": (Mxfp4MoEMethod, GPT_OSS),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_a_layer_computes_what_was_loaded(make: Any, kind: str) -> None:
    method, config = KINDS[kind]
    layer = make(method(), **config)
    process(layer)
    assert_right(layer)
    assert isinstance(layer.quant_method, method)
    assert type(layer.quant_method).__name__ == f"Halfbyte{method.__name__}"
    assert all(layer._parameters[name].numel() == 0 for name in ("w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale"))


@pytest.mark.parametrize("method", [ModelOptNvFp4FusedMoEMethod, Mxfp4MoEMethod])
def test_kernels_are_compiled_for_the_parameters_that_sglang_makes(make: Any, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ready: list[tuple[torch.Size, int, int]] = []

    def get_ready(_: Any, experts: Any, *, top_k: int, max_tokens: int) -> None:
        ready.append((experts().w13.codes.shape, top_k, max_tokens))

    monkeypatch.setattr("halfbyte.integrations.engines.EngineModel.get_ready", get_ready)
    layer = make(method(), **(GPT_OSS if method is Mxfp4MoEMethod else {}))
    sizes = (2 * layer.intermediate_size_per_partition, layer.hidden_size // 2)
    assert ready == [((EXPERTS, *sizes), layer.top_k, server().chunked_prefill_size)]


def test_rows_in_turns_are_put_in_order(make: Any) -> None:
    layer = make()
    layer.inference_moe_w13_interleaved = True
    process(layer)
    assert_right(layer)


def test_the_method_keeps_its_attributes_and_no_memory_for_blackwell(make: Any) -> None:
    layer = make()
    assert layer.quant_method.said == "kept"
    assert layer.w13_blockscale_swizzled is None


def test_experts_of_other_ranks_contribute_nothing(make: Any) -> None:
    layer = make()
    process(layer)
    _, topk = inputs()
    ids = topk.topk_ids.clone()
    ids[::2, 1] = -1
    assert_right(layer, TopK(topk.topk_weights, ids))


def test_packed_routing_is_unpacked(make: Any) -> None:
    layer = make()
    process(layer)
    x, topk = inputs()
    rounded = topk.topk_weights.to(BF16)
    packed = (topk.topk_ids << 16) | (rounded.view(torch.int16).int() & 0xFFFF)
    x = x[:, :HIDDEN].contiguous()
    assert_equal_bits(layer(x, stand_in.PackedTopK(packed)), layer(x, TopK(rounded.float(), topk.topk_ids)))


@each_kind
@pytest.mark.parametrize("layout", ["canonical", "hopper"])
def test_an_update_of_one_expert_goes_to_the_same_addresses(make: Any, monkeypatch: pytest.MonkeyPatch, kind: str, layout: str) -> None:
    method, config = KINDS[kind]
    layer = make(method(), **config)
    in_layout(monkeypatch, layout)
    process(layer)
    held = layer.halfbyte_experts
    assert held.layout == layout
    before = {name: tensor.data_ptr() for name, tensor in held.storage.tensors.items()}
    random = torch.Generator().manual_seed(5)
    for name in ("w13_weight", "w2_weight_scale"):
        old = layer.loaded[name, 2]
        load(layer, name, 2, old[torch.randperm(len(old), generator=random)])
    assert layer.quant_method.halfbyte.loading
    process(layer)
    assert layer.halfbyte_experts is held
    assert {name: tensor.data_ptr() for name, tensor in held.storage.tensors.items()} == before
    if layout == "canonical":  # the kernels of the other are for a GPU
        assert_right(layer)
    found = held.unprepare()
    codes, scales = (torch.stack([layer.loaded[name, expert] for expert in range(EXPERTS)]) for name in ("w13_weight", "w2_weight_scale"))
    in_order = codes.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2) if kind == "gpt-oss" else codes
    assert_equal_bits(found.w13.codes, in_order.contiguous())
    assert_equal_bits(found.w2.scales.view(torch.uint8), scales)


def in_layout(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Let layers be prepared in `layout`, in place, as on a GPU."""
    engines = importlib.import_module("halfbyte.integrations.engines")
    if layout == "canonical":
        return
    monkeypatch.setattr(engines, "prepare", lambda w, **options: hb.prepare(w, layout, **options | {"in_place": True}))
    monkeypatch.setattr(engines, "warm_up", lambda *_, **__: None)
    monkeypatch.setattr(engines, "workspace_nbytes", lambda *_, **__: 0)


def test_what_was_arranged_in_place_is_loaded_in_place(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make()
    in_layout(monkeypatch, "hopper")
    memory = layer.w2_weight.data  # held, or what comes later may get its address
    sizes = {name: parameter.shape for name, parameter in layer.named_parameters()}
    process(layer)
    assert "w2.codes" not in layer.halfbyte_experts.reused  # 32 columns are padded to 64
    load(layer, "w13_weight_scale_2", 0, torch.ones(2))
    assert {name: parameter.shape for name, parameter in layer.named_parameters() if name in sizes} == sizes
    assert layer.w2_weight.data_ptr() != memory.data_ptr()


def test_an_update_of_other_layers_costs_nothing(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make()
    process(layer)
    monkeypatch.setattr(type(layer.quant_method.halfbyte), "arrange", lambda *_: pytest.fail("arranged again"))
    process(layer)


def test_an_update_that_does_not_say_when_it_ends_is_arranged_after_it(make: Any) -> None:
    layer = make()
    process(layer)
    updater = stand_in.WeightUpdater(torch.nn.ModuleList([layer]))

    def update(_: Any, value: torch.Tensor) -> str:
        load(layer, "w2_weight_scale_2", 1, value)
        return "done"

    assert layer.hook.arrange_updated(update, updater, torch.tensor(9.0)) == "done"
    assert not layer.quant_method.halfbyte.loading
    assert_right(layer)


@each_kind
def test_experts_can_be_moved_parameter_by_parameter(make: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """As SGLang balances them: each Parameter that has a row for each expert, once."""
    method, config = KINDS[kind]
    layer = make(method(), **config)
    in_layout(monkeypatch, "hopper")
    process(layer)
    order, before = [2, 0, 3, 1], layer.halfbyte_experts.unprepare().tensors
    movable = [parameter.data for parameter in layer.parameters() if parameter.shape[0] == EXPERTS]
    assert len({tensor.untyped_storage().data_ptr() for tensor in movable}) == len(movable) >= 9
    for tensor in movable:
        raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
        raw.copy_(raw[order].clone())
    for name, tensor in layer.halfbyte_experts.unprepare().tensors.items():
        raw = before[name].view(torch.uint8) if tensor.element_size() == 1 else before[name]
        assert_equal_bits(tensor, raw[order].view(tensor.dtype))
    load(layer, "w2_weight", 0, layer.loaded["w2_weight", 3])  # an update goes on from where experts lie
    process(layer)
    assert_equal_bits(layer.halfbyte_experts.unprepare().w13.codes, before["w13.codes"][order])


def test_the_log_says_what_runs_where_after_the_last_layer(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    first = make(name="layers.0")
    second = another(first.hook, ModelOptNvFp4FusedMoEMethod(), "layers.1")
    process(first)
    assert "halfbyte" not in caplog.text
    process(second)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "runs 2 MoE layers (NVFP4, swiglu, 4 experts of 64 x 32, layout canonical, activations bf16)" in line
    assert "left to SGLang: nothing" in line


def test_what_is_not_covered_stays_with_sglang_and_is_said_once(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    first = make(Mxfp4MoEMethod(), backend=Backend.TRITON_KERNELS, name="layers.0", **GPT_OSS)
    second = another(first.hook, Mxfp4MoEMethod(), "layers.1", **GPT_OSS)
    for layer in (first, second):
        assert type(layer.quant_method) is Mxfp4MoEMethod
    (line,) = [record.getMessage() for record in caplog.records]
    assert "leaves layers.0 to SGLang" in line and "--moe-runner-backend marlin" in line


def test_layers_without_fp4_experts_are_not_looked_at(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    hook = make().hook
    linear = SimpleNamespace()
    for layer, method in ((linear, ModelOptNvFp4FusedMoEMethod()), (SimpleNamespace(moe_runner_config=None), None), (linear, "unquantised")):
        assert hook.choose(lambda *_, method=method: method, None, layer, "p") is method
    assert not caplog.records


def test_a_failure_while_weights_are_arranged_leaves_them_to_sglang(
    make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layer = make()
    loaded = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    in_layout(monkeypatch, "hopper")
    engines = importlib.import_module("halfbyte.integrations.engines")

    def warm_up(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(engines, "warm_up", warm_up)  # the experts are arranged by then
    process(layer)
    assert type(layer.quant_method) is ModelOptNvFp4FusedMoEMethod
    assert layer.on_marlin.keys() == loaded.keys()
    for name, value in loaded.items():
        assert_equal_bits(layer.on_marlin[name].view(torch.uint8), value.view(torch.uint8))
    assert "no compiler" in caplog.text
    assert "runs" not in caplog.text
    x, topk = inputs()
    assert (layer(x[:, :HIDDEN], topk) == 7).all()


def test_a_failure_of_the_hook_leaves_the_layer_to_sglang(make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    hook = make().hook
    caplog.clear()
    monkeypatch.setattr(hook, "refusal", lambda *_: (_ for _ in ()).throw(AttributeError("renamed")))
    layer = another(hook, ModelOptNvFp4FusedMoEMethod(), "layers.7")
    assert type(layer.quant_method) is ModelOptNvFp4FusedMoEMethod
    assert "AttributeError: renamed" in caplog.text


def test_options_come_from_the_command_line(make: Any) -> None:
    layer = make(arguments=server(json_model_override_args='{"halfbyte": {"activations": "fp8"}, "vocab_size": 7}'))
    process(layer)
    assert layer.halfbyte_experts.activations == "fp8"


@pytest.mark.parametrize(
    "given",
    ['{"halfbyte": {"activation": "fp8"}}', '{"halfbyte": {"activations": "fp6"}}', '{"halfbyte": {"peer_memory": true}}', '{"halfbyte": 1}'],
)
def test_options_that_there_are_not_are_refused(make: Any, given: str) -> None:
    with pytest.raises(InputError, match=r"--json-model-override-args|fp6"):
        make(arguments=server(json_model_override_args=given))


def test_deterministic_inference_is_batch_invariant(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(arguments=server(enable_deterministic_inference=True))
    process(layer)
    takeover = importlib.import_module("halfbyte.integrations.sglang.takeover")
    asked: list[bool] = []
    monkeypatch.setattr(takeover, "fused_moe", lambda x, *_, batch_invariant: asked.append(batch_invariant) or x)
    layer(*inputs())
    assert asked == [True]


def test_strict_makes_what_is_left_to_sglang_an_error(make: Any) -> None:
    with pytest.raises(UnsupportedError, match="router weights"):
        make(arguments=server(json_model_override_args='{"halfbyte": {"strict": true}}'), apply_router_weight_on_input=True)


def test_unusable_scales_are_said_and_served(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Random weights, with which people measure, have such scales; SGLang serves them."""
    layer = make()
    layer.w2_weight_scale.data.view(torch.uint8)[1, 2, 0] = 0x80 | 0x30
    process(layer)
    assert "results will mean nothing" in caplog.text
    assert "model.layers.3.mlp.experts" in caplog.text
    assert hasattr(layer, "halfbyte_experts")


def test_hooks_are_registered_where_methods_are_chosen(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = make().hook
    hook.install()
    targets = dict(stand_in.HookRegistry.registered)
    assert targets.keys() == {*hook.CHOICES, *hook.UPDATES}
    monkeypatch.setattr(stand_in.HookRegistry, "registered", [])
    monkeypatch.setattr(stand_in.WeightUpdater, "end_weight_update", None, raising=False)
    hook.install()
    assert dict(stand_in.HookRegistry.registered).keys() == set(hook.CHOICES)
