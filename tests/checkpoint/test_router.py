"""Routers read back: every tensor that the family has, none left out, none in place of another."""

from __future__ import annotations

from pathlib import Path

import checkpoint_files as cf
import pytest
import torch
from helpers import assert_equal_bits

from halfbyte.checkpoint import load_router
from halfbyte.errors import CheckpointError, UnsupportedError

E, H = cf.E, cf.H
BLOCK = "model.layers.1.mlp"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_routers_of_three_families(tmp_path: Path) -> None:
    files = cf.dense(cf.DEEPSEEK_V3)
    files.tensors[f"{BLOCK}.gate.e_score_correction_bias"] = torch.arange(E).bfloat16()
    router = load_router(files.write(tmp_path / "v3"), 1)
    assert_equal_bits(router.weight, files.tensors[f"{BLOCK}.gate.weight"])
    assert router.correction_bias.dtype == torch.float32 and router.correction_bias.tolist() == [0, 1, 2]
    assert (router.rule.method, router.rule.scale, router.logit_bias) == ("deepseek_v3", 2.5, None)
    files, _, _ = cf.gpt_oss()
    router = load_router(files.write(tmp_path / "oss"), 1)
    assert_equal_bits(router.logit_bias, files.tensors[f"{BLOCK}.router.bias"])
    assert router.rule.method == "renormalize" and router.correction_bias is None
    files = cf.dense({**cf.QWEN, "norm_topk_prob": False})
    assert load_router(files.write(tmp_path / "qwen"), 1).rule.method == "default"


@pytest.mark.parametrize(("hash_layers", "read", "other"), [(3, "gate.tid2eid", "gate.bias"), (1, "gate.bias", "gate.tid2eid")])
def test_deepseek_v4_looks_the_experts_of_its_first_layers_up(tmp_path: Path, hash_layers: int, read: str, other: str) -> None:
    files = cf.without(cf.deepseek_v4(), f"layers.1.ffn.{other}")
    files.config["num_hash_layers"] = hash_layers
    router = load_router(files.write(tmp_path / "whole"), 1)
    assert router.rule.method == "deepseek_v4" and router.logit_bias is None
    ids, bias = router.token_experts, router.correction_bias
    assert (ids is None, bias is None) == (read != "gate.tid2eid", read != "gate.bias")
    assert_equal_bits(bias if ids is None else ids, files.tensors[f"layers.1.ffn.{read}"])
    with pytest.raises(CheckpointError, match=rf"part of it is missing .*layers\.1\.ffn\.{read}"):
        load_router(cf.without(files, read).write(tmp_path / "half"), 1)


def v3(**tensors: torch.Tensor) -> cf.Files:
    files = cf.dense(cf.DEEPSEEK_V3)
    files.tensors |= {f"{BLOCK}.gate.e_score_correction_bias": torch.ones(E)} | {f"{BLOCK}.{name}": tensor for name, tensor in tensors.items()}
    return files


BROKEN = {
    "no router": ({"gate.weight": None}, CheckpointError, ["missing", f"{BLOCK}.gate.weight"]),
    "no correction bias": ({"gate.e_score_correction_bias": None}, CheckpointError, ["missing", f"{BLOCK}.gate.e_score_correction_bias"]),
    "two routers": ({"router.weight": torch.ones(E, H)}, CheckpointError, ["two tensors", f"{BLOCK}.gate.weight or {BLOCK}.router.weight"]),
    "two biases": ({"expert_bias": torch.ones(E)}, CheckpointError, ["two tensors", f"{BLOCK}.expert_bias"]),
    "integers": ({"gate.weight": torch.ones(E, H, dtype=torch.int32)}, CheckpointError, ["does not fit", f"{BLOCK}.gate.weight", "int32"]),
    "a dimension more": ({"gate.weight": torch.ones(E, H, 1)}, CheckpointError, ["does not fit", "(3, 64, 1)", "(3, 64)"]),
    "a scale": ({"gate.weight_scale": torch.ones(1)}, UnsupportedError, ["does not read", f"{BLOCK}.gate.weight_scale"]),
}


@pytest.mark.parametrize(("change", "error", "said"), BROKEN.values(), ids=BROKEN)
def test_broken_routers(tmp_path: Path, change: dict, error: type[Exception], said: list[str]) -> None:
    files = v3(**{name: tensor for name, tensor in change.items() if tensor is not None})
    for name in (name for name, tensor in change.items() if tensor is None):
        del files.tensors[f"{BLOCK}.{name}"]
    with pytest.raises(error) as caught:
        load_router(files.write(tmp_path), 1)
    assert all(text in str(caught.value) for text in (*said, str(tmp_path)))


@pytest.mark.parametrize(
    "said", [{"topk_method": "greedy"}, {"use_expert_bias": False}, {"use_routing_bias": False}, {"moe_router_enable_expert_bias": False}]
)
def test_a_configuration_may_say_that_there_is_no_correction(tmp_path: Path, said: dict) -> None:
    files = cf.without(cf.dense({**cf.DEEPSEEK_V3, **said}), "e_score_correction_bias")
    assert load_router(files.write(tmp_path), 1).correction_bias is None


def test_a_correction_that_the_router_does_not_use(tmp_path: Path) -> None:
    files = cf.dense()
    files.tensors[f"{BLOCK}.expert_bias"] = torch.ones(E)
    with pytest.raises(UnsupportedError, match=rf"does not read: {BLOCK}\.expert_bias"):
        load_router(files.write(tmp_path), 1)


def test_experts_of_a_token_that_do_not_exist(tmp_path: Path) -> None:
    files = cf.without(cf.deepseek_v4(), "gate.bias")
    files.tensors["layers.1.ffn.gate.tid2eid"][3, 1] = E
    with pytest.raises(CheckpointError, match=r"gate\.tid2eid does not fit .given experts 0 to 3; needed 0 to 2"):
        load_router(files.write(tmp_path), 1)
