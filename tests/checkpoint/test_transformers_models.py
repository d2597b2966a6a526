"""Checkpoints that transformers writes, one of each family, read back equal to the modules that wrote them, router included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import assert_close_rel

import halfbyte
from halfbyte.checkpoint import Checkpoint, load_experts, load_router

transformers = pytest.importorskip("transformers")

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "num_experts_per_tok": 2,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
}
DEEPSEEK = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
MODELS = {
    "qwen3_moe": {"num_experts": 6, "norm_topk_prob": False},
    "mixtral": {"num_local_experts": 6},
    "deepseek_v3": {**DEEPSEEK, **LATENT},
    "glm4_moe": DEEPSEEK,
    "qwen3_next": {"num_experts": 6, "shared_expert_intermediate_size": 32, **LINEAR},
    "gpt_oss": {"num_local_experts": 6},
    "deepseek_v4": {"n_routed_experts": 6, "num_key_value_heads": 1, "mlp_layer_types": ["hash_moe", "moe"]},
}


@pytest.mark.parametrize("model_type", MODELS)
def test_experts_and_router(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = {**COMMON, **MODELS[model_type]}
    if model_type in ("mixtral", "gpt_oss"):
        del values["moe_intermediate_size"]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **values), dtype=torch.float32)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and "mlp" in name:
            torch.nn.init.normal_(tensor, std=0.2)
    model.save_pretrained(tmp_path)

    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.moe.moe_layers == ((1,) if "first_k_dense_replace" in values else (0, 1))
    block = model.model.layers[1].mlp
    gate_up, down = block.experts.gate_up_proj.detach(), block.experts.down_proj.detach()
    weights, router = load_experts(checkpoint, 1), load_router(checkpoint, 1)
    if model_type == "gpt_oss":  # [E, H, 2I], gate and up in turn
        gate_up, down = torch.cat([gate_up[..., ::2], gate_up[..., 1::2]], dim=-1).transpose(1, 2), down.transpose(1, 2)
        bias = block.experts.gate_up_proj_bias
        assert torch.equal(weights.w13_bias, torch.cat([bias[:, ::2], bias[:, 1::2]], dim=-1))
        assert torch.equal(weights.w2_bias, block.experts.down_proj_bias)
    assert torch.equal(weights.w13, gate_up) and torch.equal(weights.w2, down)

    hidden = torch.randn(30, 64)
    _, expected_weights, expected_ids = (block.router if model_type == "gpt_oss" else block.gate)(hidden)
    logits = torch.nn.functional.linear(hidden, router.weight, router.logit_bias)
    rule = router.rule
    routing = halfbyte.route(
        logits,
        rule.top_k,
        rule.method,
        bias=router.correction_bias,
        num_groups=rule.num_groups,
        top_k_groups=rule.top_k_groups,
        scale=rule.scale,
    )
    dense, expected = (torch.zeros(30, checkpoint.moe.num_experts) for _ in range(2))
    dense.scatter_(1, routing.ids.long(), routing.weights)
    expected.scatter_(1, expected_ids, expected_weights)
    assert_close_rel(dense, expected, token=1e-5, overall=1e-5)
