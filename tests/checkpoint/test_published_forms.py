"""Forms in which models are published: what their configurations say, and what their tensors are called. Values are decoded element by element."""

from __future__ import annotations

import re
from pathlib import Path

import checkpoint_files as cf
import pytest
import torch
from helpers import assert_equal_bits

from halfbyte.checkpoint import Checkpoint, find_defects, load_experts
from halfbyte.experts import DEEPSEEK_V4_SWIGLU
from halfbyte.formats import NVFP4

BLOCK = "layers.1.ffn"
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
EXCLUDED = ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"]
LAYERS = {f"layers.{layer}.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16} for layer in range(2)}
LINEAR = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}}
MODELOPT = {**FP8, "quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4", "group_size": 16, "ignore": EXCLUDED}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def check(files: cf.Files, path: Path) -> None:
    checkpoint = Checkpoint.open(files.write(path))
    weights = load_experts(checkpoint, 1)
    assert weights.format is NVFP4
    assert_equal_bits(weights.dequantize().w13, files.w13)
    assert_equal_bits(weights.dequantize().w2, files.w2)
    assert not [defect for defect in find_defects(checkpoint) if defect.severity == "error"]


def deepseek_v4(kind: str, names: dict[str, str], quantization: dict, inner: dict | None = None) -> cf.Files:
    """The configuration goes on to say expert_dtype fp4, as that of the original does."""
    config = {**cf.DEEPSEEK_V4, "mlp_layer_types": ["dense", "moe"], "num_nextn_predict_layers": 1}
    files = cf.nvfp4(kind, BLOCK, names, config)
    files.tensors[f"{BLOCK}.gate.bias"] = torch.randn(cf.E)
    files.config["quantization_config"] = {**quantization, **(inner or {})}
    files.hf_quant_config = None
    return files


@pytest.mark.parametrize(
    "quantization",
    [
        {**MODELOPT, "quantized_layers": LAYERS},
        {**MODELOPT, "quantized_layers": LAYERS, "expert_dtype": "fp4", "config_groups": {"group_0": LINEAR}},
        MODELOPT,
        {**FP8, "moe_quant_algo": "NVFP4"},
    ],
    ids=["layers", "groups", "mixed", "experts alone"],
)
def test_deepseek_v4_by_modelopt(tmp_path: Path, quantization: dict) -> None:
    """nvidia/DeepSeek-V4-*-NVFP4: fp8 blocks by method, experts by algorithm."""
    files = deepseek_v4("modelopt", cf.W_NAMES, quantization)
    check(files, tmp_path)
    described = Checkpoint.open(tmp_path).quantization
    assert described.kind == "modelopt" and described.excluded("layers.1.attn.wq_a") and described.excluded("layers.1.ffn.shared_experts.w1")
    assert load_experts(tmp_path, 1).activation == DEEPSEEK_V4_SWIGLU


def test_deepseek_v4_by_hf_quant_config(tmp_path: Path) -> None:
    files = deepseek_v4("modelopt", cf.W_NAMES, FP8)
    layers = {"quant_algo": "MIXED_PRECISION", "group_size": 16, "quantized_layers": LAYERS, "exclude_modules": EXCLUDED}
    files.hf_quant_config = {"producer": {"name": "modelopt", "version": "dsv4-nvfp4-experts"}, "quantization": layers}
    check(files, tmp_path)


def test_deepseek_v4_by_compressed_tensors(tmp_path: Path) -> None:
    """RedHatAI/DeepSeek-V4-Flash-NVFP4-FP8: two groups, each with a format of its own."""
    attention = {"format": "float-quantized", "targets": ["re:.*attn.*(fused_wqa_wkv|wq_b|wo_a|wo_b)$"]}
    attention["weights"] = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128], "group_size": None}
    experts = {"format": "nvfp4-pack-quantized", "targets": ["re:.*ffn.*(gate|up|down)_proj$"], "weights": {"num_bits": 4, "group_size": 16}}
    groups = {"quant_method": "compressed-tensors", "format": "mixed-precision", "ignore": [], "config_groups": {"a": attention, "b": experts}}
    check(deepseek_v4("compressed-tensors", cf.NAMES, groups), tmp_path)


def test_compressed_tensors_without_groups(tmp_path: Path) -> None:
    files = cf.nvfp4("compressed-tensors")
    files.config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ["lm_head"]}
    check(files, tmp_path)


@pytest.mark.parametrize("prefix", ["model.language_model.layers.1.mlp", "model.layers.1.mlp"])
def test_qwen3_vl_moe_with_the_projection_before_the_expert(tmp_path: Path, prefix: str) -> None:
    """ModelOpt 0.43 took its stacked experts apart as experts.gate_proj.N, matrices [out, in] as those of every nn.Linear."""
    files = cf.nvfp4("modelopt", prefix, config={**cf.QWEN, "model_type": "qwen3_vl_moe_text"})
    files.tensors = {re.sub(r"experts\.(\d)\.(\w+_proj)", r"experts.\2.\1", name): tensor for name, tensor in files.tensors.items()}
    assert f"{prefix}.experts.gate_proj.2.weight_scale_2" in files.tensors
    check(files, tmp_path)
