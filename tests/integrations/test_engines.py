"""What plug-ins of engines share: options, and a layer's way from an engine's Parameters to prepared experts and back to the same addresses."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from devices import on_hopper
from random_experts import make_experts
from torch import nn

import halfbyte as hb
from halfbyte.errors import InputError, UnsupportedError
from halfbyte.integrations import head_start
from halfbyte.integrations.engines import EngineModel, Options, refusal_of_device
from halfbyte.loading.prepared import outline

NAMES = ("w13.codes", "w13.scales", "w13.global_scale", "w2.codes", "w2.scales", "w2.global_scale")


def test_options() -> None:
    assert Options.of({}, "here") == Options()
    assert Options.of({"activations": "fp8", "strict": True}, "here") == Options(activations="fp8", strict=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"activation": "fp8", "layers": 3}, r"here: unknown options \(given activation, layers; needed enabled, .*, any_gpu, peer_memory\)"),
        ({"activations": "int8"}, r"here: unknown activation format .*'int8'"),
        ({"enabled": "no"}, r"here: option enabled is true or false .*'no'"),
        ("fp8", "here: halfbyte's options are an object"),
    ],
)
def test_wrong_options_are_named(given: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Options.of(given, "here")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal_of_device("cpu", Options()) is None
    targets = {arch: hb.Target("a GPU", arch, 132, 1, 1.0) for arch in ("sm_90", "sm_100", "sm_80")}
    for arch, target in targets.items():
        monkeypatch.setattr("halfbyte.integrations.engines.Target", type("T", (), {"of": staticmethod(lambda device, target=target: target)}))
        refusal = refusal_of_device("cuda", Options())
        assert (refusal is None) == (arch == "sm_90") and refusal_of_device("cuda", Options(any_gpu=True)) is None
        assert arch == "sm_90" or arch in refusal


class Layer(nn.Module):
    """As an engine makes it: Parameters under names of its own."""

    def __init__(self, w: hb.ExpertWeights) -> None:
        super().__init__()
        self.load(w)

    def load(self, w: hb.ExpertWeights) -> None:
        for name in NAMES:
            self.register_parameter(name.replace(".", "_"), nn.Parameter(w.tensors[name].clone(), requires_grad=False))

    def experts(self) -> hb.ExpertWeights:
        return hb.ExpertWeights.from_engine_tensors({name: getattr(self, name.replace(".", "_")) for name in NAMES}, hb.NVFP4)


PARAMETERS = [name.replace(".", "_") for name in NAMES]


def experts(seed: int, device: str = "cpu") -> hb.ExpertWeights:
    w = make_experts(4, 256, 128, hb.NVFP4)
    w = hb.ExpertWeights(w.w13, w.w2)
    random = torch.Generator().manual_seed(seed)
    w.w13.codes.copy_(torch.randint(0, 256, w.w13.codes.shape, dtype=torch.uint8, generator=random))
    return w.to(device)


def take_over(model: EngineModel, layer: Layer, name: str = "layer 0") -> None:
    model.take_over(layer, name, layer.experts(), PARAMETERS, top_k=2, max_tokens=64)


def call(layer: Layer, device: str = "cpu") -> torch.Tensor:
    random = torch.Generator().manual_seed(3)
    hidden, logits = torch.randn(5, 256, generator=random).bfloat16().to(device), torch.randn(5, 4, generator=random).to(device)
    return hb.fused_moe(hidden, layer.halfbyte_experts, *hb.route(logits, 2))


def test_a_layer_keeps_its_memory_and_its_values() -> None:
    w, logged = experts(1), []
    layer = Layer(w)
    codes = layer.w13_codes.data_ptr()
    model = EngineModel("an engine", Options(), logged.append)
    take_over(model, layer)
    assert {name for name, _ in layer.named_parameters()} == {f"halfbyte_{name.replace('.', '_')}" for name in layer.halfbyte_experts.storage.tensors}
    assert layer.halfbyte_w13_codes.data_ptr() == codes and all(parameter.shape[0] == 4 for parameter in layer.parameters())
    random = torch.Generator().manual_seed(3)
    hidden, routing = torch.randn(5, 256, generator=random).bfloat16(), hb.route(torch.randn(5, 4, generator=random), 2)
    assert torch.equal(call(layer), hb.fused_moe(hidden, hb.prepare(w.dequantize()), *routing))


def test_other_weights_go_to_the_same_addresses() -> None:
    first, second = experts(1), experts(2)
    layer, model = Layer(first), EngineModel("an engine", Options(), print)
    take_over(model, layer)
    before, places = call(layer), {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
    for name in list(layer._parameters):  # as an engine does: its own Parameters come back, and are loaded
        delattr(layer, name)
    layer.load(second)
    take_over(model, layer)
    assert {name: parameter.data_ptr() for name, parameter in layer.named_parameters()} == places
    other = Layer(second)
    take_over(EngineModel("an engine", Options(), print), other)
    assert torch.equal(call(layer), call(other)) and not torch.equal(call(layer), before)
    assert model.stats["layers"] == 1


def test_experts_that_an_engine_moves_are_the_ones_that_run() -> None:
    layer = Layer(experts(1))
    take_over(EngineModel("an engine", Options(), print), layer)
    before = call(layer)
    for parameter in layer.parameters():  # experts 0 and 2 change places, as a rebalance does it: row by row of every Parameter
        rows = parameter.data.view(torch.uint8).view(4, -1)
        rows[[0, 2]] = rows[[2, 0]].clone()
    assert not torch.equal(call(layer), before)
    random = torch.Generator().manual_seed(3)
    hidden, routing = torch.randn(5, 256, generator=random).bfloat16(), hb.route(torch.randn(5, 4, generator=random), 2)
    moved = torch.tensor([2, 1, 0, 3], dtype=torch.int32)[routing.ids.long()]
    assert torch.equal(hb.fused_moe(hidden, layer.halfbyte_experts, moved, routing.weights), before)


def get_ready(model: EngineModel, layer: Layer) -> None:
    model.get_ready(layer.experts, top_k=2, max_tokens=64)


def test_a_head_start_is_taken_once_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def prepare(w: hb.ExpertWeights, **_: Any) -> None:
        time.sleep(0.1)
        done.append(f"{w.num_experts} arranged")

    def warm_up(experts: hb.PreparedExperts, *_: Any, **__: Any) -> None:
        time.sleep(0.1)
        done.append(f"kernels for {experts.num_experts}")

    monkeypatch.setattr("halfbyte.integrations.head_start.prepare", prepare)
    monkeypatch.setattr("halfbyte.integrations.head_start.warm_up", warm_up)
    monkeypatch.setattr("halfbyte.integrations.engines.prepare", lambda w, **options: done.append("all arranged") or hb.prepare(w, **options))
    monkeypatch.setattr("halfbyte.integrations.engines.warm_up", lambda *_, **__: done.append("all kernels"))
    model, layer = EngineModel("an engine", Options(), print), Layer(experts(1))
    for _ in range(3):  # layers that the engine makes
        get_ready(model, layer)
    take_over(model, layer)
    assert sorted(done[:3]) == ["1 arranged", "all arranged", "kernels for 4"] and done[0] == "1 arranged" and done[3:] == ["all kernels"]


@pytest.mark.parametrize("fails", ["prepare", "outline", "warm_up"])
def test_a_head_start_that_fails_changes_nothing(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(f"halfbyte.integrations.head_start.{fails}", fail)
    model, layer = EngineModel("an engine", Options(), print), Layer(experts(1))
    model.get_ready(lambda: fail(), top_k=2, max_tokens=64)
    get_ready(model, layer)
    take_over(model, layer)
    other = Layer(experts(1))
    take_over(EngineModel("an engine", Options(), print), other)
    assert torch.equal(call(layer), call(other))


@pytest.mark.parametrize(
    ("sizes", "format", "activations"),
    [
        ((128, 2048, 768), hb.NVFP4, "bf16"),  # Qwen3-30B
        ((128, 2048, 768), hb.NVFP4, "fp8"),
        ((16, 7168, 2048), hb.NVFP4, "bf16"),  # DeepSeek-R1, a rank of 16
        ((25, 2880, 2880), hb.MXFP4, "bf16"),  # gpt-oss, an odd share of its experts
        ((4, 192, 64), hb.NVFP4, "bf16"),  # one unit for all programs
    ],
)
def test_the_kernels_of_a_head_start_are_those_of_the_layer(
    sizes: tuple[int, int, int], format: hb.BlockFormat, activations: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's keys of what arranges weights, on a Hopper GPU that is not there; nothing is compiled."""
    from halfbyte.tuning.compiling import kernels_passed_over, without_device

    keys: set[str] = set()
    of_one_expert: set[str] = set()

    def prepare_one(w: hb.ExpertWeights, **options: Any) -> hb.PreparedExperts:
        return hb.prepare(w, **options | {"in_place": True})

    def prepare(w: hb.ExpertWeights, **options: Any) -> hb.PreparedExperts:
        of_one_expert.update(keys)
        keys.clear()
        return prepare_one(w, **options)

    layout = "hopper_fp8" if activations == "fp8" else "hopper"
    monkeypatch.setattr("halfbyte.loading.prepared.wanted_layout", lambda problem, in_place: (layout, "a test wants it"))
    monkeypatch.setattr("halfbyte.weights.hopper.pack._has_kernels", lambda _: True)
    monkeypatch.setattr("halfbyte.weights.hopper.pack.Target", SimpleNamespace(of=lambda _: hb.Target("a GPU", "sm_90", 132, 1, 1.0)))
    monkeypatch.setattr(
        "halfbyte.integrations.head_start.outline", lambda w, activations, in_place: outline(w, activations=activations, in_place=True)
    )
    monkeypatch.setattr("halfbyte.integrations.head_start.prepare", prepare_one)
    monkeypatch.setattr("halfbyte.integrations.engines.prepare", prepare)
    for name in ("head_start.warm_up", "engines.warm_up"):
        monkeypatch.setattr(f"halfbyte.integrations.{name}", lambda *_, **__: None)
    monkeypatch.setattr("halfbyte.integrations.engines.workspace_nbytes", lambda *_, **__: 0)
    num_experts, hidden, intermediate = sizes
    shapes = {"w13": (num_experts, 2 * intermediate, hidden), "w2": (num_experts, hidden, intermediate)}
    tensors = {f"{side}.codes": torch.empty(*shape[:2], shape[2] // 2, dtype=torch.uint8) for side, shape in shapes.items()}
    tensors |= {f"{side}.scales": torch.empty(*shape[:2], shape[2] // format.block, dtype=torch.uint8) for side, shape in shapes.items()}
    if format.has_global_scale:
        tensors |= {f"{side}.global_scale": torch.ones(num_experts) for side in shapes}
    w = hb.ExpertWeights.from_engine_tensors(tensors, format)
    model = EngineModel("an engine", Options(activations=activations), print)
    with without_device(90, 232448), kernels_passed_over(lambda key: keys.add(key) or True):
        model.get_ready(lambda: w, top_k=2, max_tokens=64)
        model.take_over(nn.Module(), "layer 0", w, (), top_k=2, max_tokens=64)
    assert keys == of_one_expert and len(keys) >= 4


def test_a_head_start_works_on_the_device_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every thread has a current device of its own."""
    current: list[torch.device] = []
    within: list[tuple[str, list[torch.device]]] = []

    @contextlib.contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(head_start, "current", enter)
    for step in ("prepare", "warm_up"):
        monkeypatch.setattr(head_start, step, lambda *_, step=step, **__: within.append((step, list(current))))
    w = experts(1)
    head_start.HeadStart(w, w.device, "bf16", 2, 64, batch_invariant=False).wait()
    assert within == [("prepare", [w.device]), ("warm_up", [w.device])]


def test_one_line_per_model() -> None:
    logged: list[str] = []
    model = EngineModel("an engine", Options(activations="fp8"), logged.append)
    model.refuse("layer 0", "it is dense")
    model.refuse("layer 1", "it is dense")
    assert logged == ["halfbyte leaves layer 0 to an engine: it is dense"]
    for name in ("layer 2", "layer 3"):
        take_over(model, Layer(experts(1)), name)
    model.finish()
    model.finish()
    assert len(logged) == 2
    assert "2 MoE layers (NVFP4, swiglu, 4 experts of 256 x 128, layout canonical, activations fp8)" in logged[1]
    assert logged[1].endswith("left to an engine: 2 layers (it is dense)")


def test_strict_makes_what_is_left_an_error() -> None:
    with pytest.raises(UnsupportedError, match="layer 0: it is dense"):
        EngineModel("an engine", Options(strict=True), print).refuse("layer 0", "it is dense")


def test_bad_scales_are_found_before_the_first_call_and_named() -> None:
    w = experts(1)
    w.w2.scales.view(torch.uint8)[3, 5, 1] = 0xFF
    logged: list[str] = []
    for options in (Options(), Options(strict=True)):
        model = EngineModel("an engine", options, logged.append)
        take_over(model, Layer(experts(1)), "layer 0")
        take_over(model, Layer(w), "layer 1")
        if options.strict:
            with pytest.raises(InputError, match=r"^layer 1: scales are negative or not finite"):
                model.finish()
        else:
            model.finish()
            assert logged[0].startswith("halfbyte: results will mean nothing: layer 1: scales are negative or not finite")
            assert "2 MoE layers" in logged[1]


@on_hopper
@pytest.mark.parametrize("activations", ["bf16", "fp8"])
def test_a_captured_graph_goes_on_with_other_weights(activations: Any) -> None:
    first, second = experts(1, "cuda"), experts(2, "cuda")
    layer, model = Layer(first), EngineModel("an engine", Options(activations=activations), print)
    get_ready(model, layer)
    take_over(model, layer)
    model.finish()
    expected_first = call(layer, "cuda")
    graph = torch.cuda.CUDAGraph()
    hidden = torch.randn(5, 256, generator=torch.Generator().manual_seed(3)).bfloat16().cuda()
    routing = hb.route(torch.randn(5, 4, device="cuda"), 2)
    with torch.cuda.graph(graph):
        out = hb.fused_moe(hidden, layer.halfbyte_experts, *routing)
    graph.replay()
    before = out.clone()
    for name in list(layer._parameters):
        delattr(layer, name)
    layer.load(second)
    take_over(model, layer)
    graph.replay()
    other = Layer(second)
    take_over(EngineModel("an engine", Options(activations=activations), print), other)
    assert torch.equal(out, hb.fused_moe(hidden, other.halfbyte_experts, *routing)) and not torch.equal(out, before)
    assert not torch.equal(call(layer, "cuda"), expected_first)
