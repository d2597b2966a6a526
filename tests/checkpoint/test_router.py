"""Routers read back: every tensor that the family has, none left out, none in place of another."""

from __future__ import annotations

from pathlib import Path

import checkpoint_files as cf
import pytest
import torch
from helpers import assert_equal_bits

from halfbyte.checkpoint import load_router
from halfbyte.errors import CheckpointError

E, H = cf.E, cf.H
BLOCK = "model.layers.1.mlp"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_router(tmp_path: Path) -> None:
    files = cf.dense(cf.DEEPSEEK_V3)
    files.tensors["model.layers.1.mlp.gate.e_score_correction_bias"] = torch.arange(E).bfloat16()
    router = load_router(files.write(tmp_path / "v3"), 1)
    assert_equal_bits(router.weight, files.tensors["model.layers.1.mlp.gate.weight"])
    assert router.correction_bias.dtype == torch.float32 and router.correction_bias.tolist() == [0, 1, 2]
    assert (router.rule.method, router.rule.scale, router.logit_bias) == ("deepseek_v3", 2.5, None)
    files, _, _ = cf.gpt_oss()
    router = load_router(files.write(tmp_path / "oss"), 1)
    assert_equal_bits(router.logit_bias, files.tensors["model.layers.1.mlp.router.bias"])
    assert router.rule.method == "renormalize" and router.correction_bias is None
    files = cf.deepseek_v4()
    router = load_router(files.write(tmp_path / "v4"), 1)
    assert_equal_bits(router.correction_bias, files.tensors["layers.1.ffn.gate.bias"])
    assert_equal_bits(router.token_experts, files.tensors["layers.1.ffn.gate.tid2eid"])
    assert router.rule.method == "deepseek_v4" and router.logit_bias is None
    files = cf.dense({**cf.QWEN, "norm_topk_prob": False})
    assert load_router(files.write(tmp_path / "qwen"), 1).rule.method == "default"
    del files.tensors["model.layers.1.mlp.gate.weight"]
    with pytest.raises(CheckpointError, match="no router"):
        load_router(files.write(tmp_path / "none"), 1)
