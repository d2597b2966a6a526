"""Tokens of data-parallel ranks over halfbyte's own dispatch: when, and that two ranks give what one gives. vLLM is stubs, ranks are processes."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import vllm_stubs as stubs
from random_experts import make_experts
from ranks import run_ranks

import halfbyte as hb
from halfbyte.integrations.engines import Options
from halfbyte.integrations.vllm import register
from halfbyte.integrations.vllm.methods import refusal_of_peers

METHOD = "ModelOptNvFp4FusedMoE"
EXPERTS, HIDDEN, TOP_K = 8, 128, 2
SPREAD = {"use_ep": True, "dp_size": 2, "ep_size": 2}


def weights() -> hb.ExpertWeights:
    w = make_experts(EXPERTS, HIDDEN, 64, hb.NVFP4)
    return hb.ExpertWeights(w.w13, w.w2)


def calibrated(w: hb.ExpertWeights) -> hb.ExpertWeights:
    """With the input scales that the stub of a layer has."""
    return replace(w, w13_input_scale=torch.ones(EXPERTS, 2), w2_input_scale=torch.ones(EXPERTS))


def left_to_vllm(*, peer_memory: bool = True, **changes: Any) -> str | None:
    config = stubs.VllmConfig()
    for holder in (config.parallel_config, config.model_config):
        vars(holder).update({name: changes.pop(name) for name in list(changes) if hasattr(holder, name)})
    layer = SimpleNamespace(moe_config=stubs.moe_config(weights(), **SPREAD | changes))
    return refusal_of_peers(layer, Options(peer_memory=peer_memory), config)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("no data-parallel ranks", {"use_ep": False}),
        ("no data-parallel ranks", {"dp_size": 1}),
        ("switched off", {"peer_memory": False}),
        ("4 ranks share the experts, but 2", {"ep_size": 4}),
        ("move between ranks", {"enable_eplb": True}),
        ("move between ranks", {"enable_elastic_ep": True}),
        ("micro-batches", {"use_ubatching": True}),
        ("sleep mode", {"enable_sleep_mode": True}),
    ],
)
def test_when_vllm_moves_tokens(message: str, changes: dict[str, Any]) -> None:
    assert left_to_vllm() is None
    assert message in (left_to_vllm(**changes) or "nothing")


def layer_of(vllm: Any, rank: int, world: int, placement: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """A layer with this rank's share of the experts, chosen and taken over."""
    vllm.config = stubs.VllmConfig({"halfbyte": options})
    vllm.config.parallel_config.data_parallel_size = world
    vllm.group = SimpleNamespace(device_group=dist.group.WORLD, cpu_group=dist.group.WORLD, world_size=world, device=torch.device("cpu"))
    w, manager = weights(), stubs.ExpertMapManager(EXPERTS, world, rank, placement)
    held = w.with_tensors({name: tensor.view(torch.uint8)[manager.held].view(tensor.dtype) if tensor.element_size() == 1 else tensor[manager.held]
                           for name, tensor in w.tensors.items()})  # fmt: skip
    layer = vllm.layer_class(replace(held, num_global_experts=EXPERTS), METHOD, manager=manager)
    layer.moe_config = stubs.moe_config(held, **SPREAD)
    vllm.method = type(METHOD, (), {"is_monolithic": True, "process_weights_after_loading": lambda self, layer: setattr(layer, "by_vllm", True)})
    register()
    return layer, layer._get_quant_method(layer.layer_name, None, layer.moe_config)


def peers_in_place(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's stubs, and ranks that believe they reach each other: the group carries what peer memory would."""
    vllm = stubs.put_in_place(monkeypatch)
    register()
    monkeypatch.setattr(sys.modules["halfbyte.integrations.vllm.peers"], "why_not", lambda *_: None)
    return vllm


def check_layers(rank: int, world: int) -> None:
    for placement, activations in (("linear", "bf16"), ("round_robin", "fp8"), ("linear", "nvfp4")):
        with pytest.MonkeyPatch.context() as monkeypatch:
            vllm = peers_in_place(monkeypatch)
            layer, method = layer_of(vllm, rank, world, placement, {"activations": activations, "peer_memory": True})
            method.process_weights_after_loading(layer)
            assert method.supports_internal_mk and "over peer memory" in vllm.logged[0]
            whole = hb.prepare(calibrated(weights()) if activations == "nvfp4" else weights(), activations=activations)
            for sizes in ([5, 5], [3, 0], [1, 7]):
                vllm.sizes = sizes
                check_call(rank, sizes, layer, method, whole)


def check_call(rank: int, sizes: list[int], layer: Any, method: Any, whole: hb.PreparedExperts) -> None:
    """This rank's tokens get what `whole` gives them, but for the rounding of two partial sums."""
    random = torch.Generator().manual_seed(sum(sizes))
    hidden = torch.randn(sum(sizes), HIDDEN, generator=random).bfloat16()
    routing = hb.route(torch.randn(sum(sizes), EXPERTS, generator=random), TOP_K)
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    got = method.apply(layer, hidden[own], routing.weights[own], routing.ids[own]).float()
    wanted = hb.fused_moe(hidden, whole, *routing, out=torch.empty(hidden.shape))
    torch.testing.assert_close(got, wanted[own], rtol=2e-2, atol=1e-2 * wanted.abs().max().item())


def test_two_ranks_give_what_one_gives() -> None:
    run_ranks(check_layers, 2)


def check_failure(rank: int, world: int) -> None:
    options: tuple[dict[str, Any], ...] = ({"peer_memory": True}, {"activations": "fp8"})  # over peer memory; rounded, through vLLM's group
    for given in options:
        with pytest.MonkeyPatch.context() as monkeypatch:
            vllm = peers_in_place(monkeypatch)
            layer, method = layer_of(vllm, rank, world, "linear", given)
            if rank == 1:
                monkeypatch.setattr("halfbyte.integrations.engines.prepare", lambda *_, **__: 1 / 0)
            method.process_weights_after_loading(layer)
            assert layer.by_vllm and type(method).__name__ == METHOD and not hasattr(layer, "halfbyte_experts")
            assert any("rank 1: ZeroDivisionError" in line for line in vllm.logged)


def test_a_layer_that_one_rank_cannot_arrange_is_left_to_vllm_on_all() -> None:
    run_ranks(check_failure, 2)


def check_out_of_reach(rank: int, world: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        vllm = stubs.put_in_place(monkeypatch)
        layer, method = layer_of(vllm, rank, world, "linear", {"peer_memory": True})
        method.process_weights_after_loading(layer)
        assert hasattr(layer, "halfbyte_experts") and not method.supports_internal_mk
        assert "vLLM move tokens between ranks: not every rank has a GPU of its own" in vllm.logged[0]


def test_ranks_that_do_not_reach_each_other_let_vllm_move_tokens() -> None:
    run_ranks(check_out_of_reach, 2)
