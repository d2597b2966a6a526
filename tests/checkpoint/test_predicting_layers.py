"""Layers behind the model that predict further tokens (MTP): listed apart, loaded like any other, and a mistake where nothing announces them."""

from __future__ import annotations

from pathlib import Path

import checkpoint_files as cf
import pytest
import torch
from helpers import assert_equal_bits

from halfbyte.checkpoint import Checkpoint, find_defects, load_experts, load_router
from halfbyte.cli.main import main
from halfbyte.errors import CheckpointError

KEYS = ["num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_num_hidden_layers"]
HEAD = "model.layers.2.mlp"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def files(packed: bool = False, **config: object) -> tuple[cf.Files, cf.Files]:
    """DeepSeek-V3 in NVFP4 with one layer more, and what that layer means: bf16 as NVIDIA publishes it, or packed too."""
    model = cf.nvfp4("modelopt", config={**cf.DEEPSEEK_V3, **config})
    head = cf.nvfp4("modelopt", HEAD, config=cf.DEEPSEEK_V3) if packed else cf.dense(cf.DEEPSEEK_V3, block=HEAD)
    if not packed:
        model.hf_quant_config["quantization"]["exclude_modules"].append("model.layers.2*")
    model.tensors |= head.tensors | {f"model.layers.{layer}.mlp.gate.e_score_correction_bias": torch.randn(cf.E) for layer in (1, 2)}
    return model, head


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("packed", [False, True])
def test_they_are_listed_and_loaded(key: str, packed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, head = files(packed, **{key: 1})
    checkpoint = Checkpoint.open(model.write(tmp_path))
    moe = checkpoint.moe
    assert (moe.num_layers, moe.moe_layers, moe.predicting_layers, moe.expert_layers) == (2, (1,), (2,), (1, 2))
    for layer, wanted in ((1, model), (2, head)):
        weights = load_experts(checkpoint, layer).dequantize()
        assert_equal_bits(weights.w13, wanted.w13)
        assert_equal_bits(weights.w2, wanted.w2)
        assert_equal_bits(load_router(checkpoint, layer).weight, model.tensors[f"model.layers.{layer}.mlp.gate.weight"])
    assert not [defect for defect in find_defects(checkpoint) if defect.severity == "error"]
    assert main(["inspect", str(tmp_path)]) == 0
    assert "2 layers, MoE in 1 (and 2, which predict further tokens); 3 experts" in capsys.readouterr().out


def test_they_are_examined(tmp_path: Path) -> None:
    model, _ = files(num_nextn_predict_layers=1)
    del model.tensors[f"{HEAD}.experts.1.up_proj.weight"]
    (error,) = [defect for defect in find_defects(Checkpoint.open(model.write(tmp_path))) if defect.severity == "error"]
    assert error.layer == 2 and f"{HEAD}.experts.1.up_proj.weight" in error.message


def test_a_published_model_may_come_without(tmp_path: Path) -> None:
    model = cf.nvfp4("modelopt", config={**cf.DEEPSEEK_V3, "num_nextn_predict_layers": 1})
    moe = Checkpoint.open(model.write(tmp_path)).moe
    assert moe.expert_layers == (1,)
    with pytest.raises(CheckpointError, match="there is no layer 2"):
        moe.block_of(2)


@pytest.mark.parametrize("announced", [{}, {"num_nextn_predict_layers": 0}, {"num_nextn_predict_layers": None}])
def test_a_layer_that_nothing_announces_is_refused(announced: dict[str, object], tmp_path: Path) -> None:
    model, _ = files(**announced)
    with pytest.raises(CheckpointError, match=rf"gives this layer no experts .*{HEAD}\.experts\.0.*; needed experts in layers 1"):
        load_experts(model.write(tmp_path), 1)


def test_the_number_is_a_number(tmp_path: Path) -> None:
    model, _ = files(num_nextn_predict_layers="1")
    with pytest.raises(CheckpointError, match="num_nextn_predict_layers does not fit"):
        load_experts(model.write(tmp_path), 1)
