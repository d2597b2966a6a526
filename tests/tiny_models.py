"""Tiny random MoE models of each family, written as FP4 checkpoints and as the dense models that those stand for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import halfbyte as hb

COMMON = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
FAMILIES = {
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 8, "head_dim": 16, "intermediate_size": 64},
    "mixtral": {"intermediate_size": 32, "num_local_experts": 4},
    "deepseek_v3": {
        "moe_intermediate_size": 32,
        "intermediate_size": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
    },
    "glm4_moe": {
        "moe_intermediate_size": 32,
        "intermediate_size": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "head_dim": 16,
    },
    "qwen3_next": {
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "intermediate_size": 64,
        "num_experts": 8,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "gpt_oss": {
        "intermediate_size": 32,
        "num_local_experts": 4,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_v4": {
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "o_groups": 2,
        "mlp_layer_types": ["hash_moe", "moe"],
        "pad_token_id": 0,
    },
}
EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight$")
LINEAR = re.compile(r"\.(\w+_proj|kv_a_proj_with_mqa|[qk]v?_[ab]_proj)\.weight$")


def build(family: str, **overrides: object) -> torch.nn.Module:
    """A random fp32 model. Gate and up weights differ in size, so that their NVFP4 global scales do."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **COMMON | FAMILIES[family] | overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 or name.endswith("_bias"):
                parameter.normal_(0, 0.15)
            if name.endswith("gate_up_proj") and family != "gpt_oss":
                parameter[:, parameter.shape[1] // 2 :] *= 5
    return model


def write(
    model: torch.nn.Module, output: str, directory: Path, *, all_linear: bool = False, input_scales: bool = True, kept: str = "$^"
) -> tuple[Path, Path]:
    """Write `model` as an FP4 checkpoint and as a dense one holding the same (dequantised) values: their two directories.

    `output`: "modelopt", "nvfp4-pack-quantized", "mxfp4-pack-quantized", or "gpt-oss"; `kept`: a regular expression of names to leave dense.
    """
    fp4, dense = directory / "fp4", directory / "dense"
    model.save_pretrained(dense)
    tensors, values = {}, {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        if output == "gpt-oss" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            q = hb.quantize(tensor.mT.contiguous(), hb.MXFP4)
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = q.codes.unflatten(-1, (-1, 16)), q.scales
            values[name] = q.dequantize().mT.contiguous()
        elif output != "gpt-oss" and not re.search(kept, name) and (EXPERT.search(name) or (all_linear and LINEAR.search(name))):
            q = hb.quantize(tensor, hb.MXFP4 if output.startswith("mxfp4") else hb.NVFP4)
            tensors |= _named(q, name.removesuffix("weight"), output, input_scales)
            values[name] = q.dequantize()
        else:
            tensors[name] = values[name] = tensor
    fp4.mkdir()
    for path, content in ((fp4, tensors), (dense, values)):
        save_file(content, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = _quantization_config(output)
    (fp4 / "config.json").write_text(json.dumps(config))
    return fp4, dense


def _named(q: hb.QuantTensor, stem: str, output: str, input_scales: bool) -> dict[str, torch.Tensor]:
    if output == "modelopt":
        named = {"weight": q.codes, "weight_scale": q.scales, "weight_scale_2": q.global_scale}
        return {stem + key: value for key, value in (named | ({"input_scale": torch.tensor(0.01)} if input_scales else {})).items()}
    named = {"weight_packed": q.codes, "weight_scale": q.scales}
    if q.global_scale is not None:
        named["weight_global_scale"] = 1 / q.global_scale.reshape(1)
        if input_scales:
            named["input_global_scale"] = torch.tensor([100.0])
    return {stem + key: value for key, value in named.items()}


def _quantization_config(output: str) -> dict[str, object]:
    if output == "modelopt":
        return {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]}
    if output == "gpt-oss":
        return {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]}
    weights = {"num_bits": 4, "type": "float", "group_size": 32 if output.startswith("mxfp4") else 16}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": output}}
    return {"quant_method": "compressed-tensors", "format": output, "config_groups": groups, "ignore": ["lm_head"]}


def dense_of_64_tokens(initializer_range: float) -> Qwen3MoeForCausalLM:
    """A model for measurements alone: no quantisation, no files. With wider weights it is surer of the next token."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, initializer_range=initializer_range,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()
